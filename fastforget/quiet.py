"""What libraries print and warn of that no user of ours can act on: silenced in the commands, or where we call them."""

from __future__ import annotations

import contextlib
import logging
import os
import warnings
from collections.abc import Iterator

FROM_PEFT = "`is_gradient_checkpointing` is deprecated"  # a name of transformers that PEFT asks for


def quiet_commands() -> None:
    """Let only our own progress bars and lines show, for the rest of the process."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    warnings.filterwarnings("ignore", category=FutureWarning)
    for name in ("bitsandbytes", "huggingface_hub"):
        logging.getLogger(name).setLevel(logging.ERROR)
    import transformers

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()


def quiet_bitsandbytes() -> None:
    """Switch off two warnings that are not for the user; the second one comes when bitsandbytes is imported."""
    # in each layer of each forward: that float32 is cast to float16 to be quantised
    logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)
    # on CPUs with AVX-512-BF16: that the PyPI package `kernels`, or `get_kernel` from it where the working directory
    # has a folder of that name, cannot be imported; only its 4-bit inference is slower without
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)


@contextlib.contextmanager
def quiet_peft() -> Iterator[None]:
    """Keep back what PEFT makes transformers warn of when an adapter is put into a model."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=FROM_PEFT, category=FutureWarning)
        yield


@contextlib.contextmanager
def library_bars(off: bool) -> Iterator[None]:
    """Hide the progress bars that transformers shows inside, where `off`."""
    from transformers.utils import logging

    if not off or not logging.is_progress_bar_enabled():
        yield
        return
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.enable_progress_bar()
