"""A model that forgot, shipped without an adapter: merged into its base, and what rounding leaves of that."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn

from fastforget.errors import FastforgetError
from fastforget.files import made_whole
from fastforget.hub import hub_or_cache
from fastforget.models import base_of, has_tokenizer, is_adapter, load_base, load_tokenizer, readable_errors
from fastforget.quiet import quiet_bitsandbytes, quiet_peft

MERGED_BITS = (4, 8, 16, 32)


def merge(
    base: str | os.PathLike[str],
    adapter: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    bits: int = 16,
) -> Path:
    """Merge an adapter into its base and save an ordinary Hugging Face folder, which holds nothing of the adapter.

    The base is read as it was stored, not in the 8 bit that it was trained in; the sum W + s B A is formed in float32
    and rounded once. A folder of 16 bit can be quantised when it is loaded (`fastforget.load(out, bits=8)`); one of 8
    or 4 holds what that makes of it, which plain transformers loads where bitsandbytes is installed. Whether what was
    forgotten stays so is measured by `fastforget evaluate --robust`.

    Args:
        base: the model's folder or hub name.
        adapter: a folder that `save_adapter` wrote.
        out: a folder that is new, or empty.
        bits: of the weights that are saved: 16 (bfloat16), 32, or bitsandbytes' 8 or 4 (NF4), rounded from 16.

    Returns:
        The folder.

    Raises:
        FastforgetError: another number of bits, a folder that holds files already or cannot be written, a base that is
            itself an adapter, or a model or adapter that cannot be loaded; nothing is left in the folder.
    """
    folder = Path(out)
    if bits not in MERGED_BITS:
        raise FastforgetError(f"bits of a merged model must be one of {', '.join(map(str, MERGED_BITS))}, not {bits}")
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise FastforgetError(f"{folder} exists already and is not an empty folder: give another one")
    check_whole(base, adapter)
    model: Any = merged(base, adapter).to(torch.float32 if bits == 32 else torch.bfloat16)
    try:
        with made_whole(folder) as scratch:
            if bits >= 16:
                model.save_pretrained(scratch)
            else:
                with tempfile.TemporaryDirectory(prefix="fastforget-") as rounded:
                    model.save_pretrained(rounded)
                    quantised: Any = load_base(rounded, bits, torch.device("cpu"))
                    quantised.save_pretrained(scratch)
            load_tokenizer(adapter if has_tokenizer(adapter) else base).save_pretrained(scratch)
    except (OSError, SafetensorError) as error:
        raise FastforgetError(f"{folder} cannot be written ({error}): give another folder") from error
    return folder


def check_whole(base: str | os.PathLike[str], adapter: str | os.PathLike[str]) -> None:
    """Raise FastforgetError, before weights are read, where a base is itself an adapter, or an adapter is none."""
    quiet_bitsandbytes()  # which comes with peft
    import peft

    if is_adapter(base):
        raise FastforgetError(
            f"{base} is itself an adapter, and the base must be a whole model: give the one that it was trained on, "
            f"{base_of(base)} (what was trained on top of an adapter and saved by fastforget holds both)"
        )
    with readable_errors(f"the adapter {adapter}"), hub_or_cache(adapter):
        peft.PeftConfig.from_pretrained(str(adapter))


def merged(base: str | os.PathLike[str], adapter: str | os.PathLike[str]) -> nn.Module:
    """Return the base with the adapter added to its weights, in float32 on the CPU."""
    import peft

    model: Any = load_base(str(base), 32, torch.device("cpu"))
    with readable_errors(f"the adapter {adapter}"), quiet_peft():
        return peft.PeftModel.from_pretrained(model, str(adapter)).merge_and_unload(safe_merge=True)
