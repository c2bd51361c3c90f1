"""Less memory for a step: checkpointed layers, and micro-batches as large as fit."""

from __future__ import annotations

import gc
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import nn

from fastforget.batch import COMPANIONS, Batch, sides_of, stream_of
from fastforget.collectives import ran_out_of_memory
from fastforget.errors import FastforgetError
from fastforget.head import base_causal_lm

Result = TypeVar("Result")


def checkpoint_layers(model: Any) -> None:
    """Let a model's decoder layers keep only their inputs for the backward pass, which computes the rest again.

    Only while the model is in training mode. Every adapted weight gets its gradient.

    Raises:
        FastforgetError: the architecture cannot.
    """
    causal_lm = base_causal_lm(model)
    # its older name, of which newer releases of transformers warn
    enable = getattr(causal_lm, "activation_checkpointing_enable", None) or causal_lm.gradient_checkpointing_enable
    try:
        enable({"use_reentrant": False})
    except ValueError as error:
        raise FastforgetError(f"checkpointing: {error}") from error
    let_inputs_require_grad(model)


def let_inputs_require_grad(model: nn.Module) -> None:
    """Let the embeddings' output require a gradient where layers are checkpointed; else nothing.

    Reentrant checkpointing leaves the weights of a layer without a gradient, in silence, unless its input requires one,
    and below an adapter all is frozen.
    """
    causal_lm = base_causal_lm(model)
    checkpointed = any(getattr(module, "gradient_checkpointing", False) for module in model.modules())
    if checkpointed and getattr(causal_lm, "_require_grads_hook", None) is None:
        causal_lm.enable_input_require_grads()


@dataclass
class FittingRows:
    """How many sequences fit in memory at once: all of the first batch, or `rows`, until memory runs out."""

    rows: int | None = None

    def find(self, run: Callable[[int | None], Result], count: Callable[[], int]) -> Result:
        """What `run` returns of so many rows, half of them after each failure for want of memory; warns of that once.

        Args:
            run: leaves everything as it was where it raises; in every process where one runs out of memory.
            count: tells of how many rows a batch consists: of several processes, the largest of theirs.

        Raises:
            RuntimeError, MemoryError, FastforgetError: what `run` raised of one row, or for another reason.
        """
        failed = None
        while True:
            try:
                result = run(self.rows)
                break
            except (RuntimeError, MemoryError, FastforgetError) as error:
                if not ran_out_of_memory(error):
                    raise
                whole = count()
                tried = min(self.rows or whole, whole)
                if tried <= 1:
                    raise
            # only here, where the error and with it the graph of what failed are gone
            failed = failed or tried
            self.rows = tried // 2
            gc.collect()  # an error that went through several processes is held by frames that it holds itself
            if torch.cuda.is_initialized():
                torch.cuda.empty_cache()
        if failed is not None:
            warnings.warn(
                f"micro_batch='auto': memory ran out with {failed} sequences at once; from here on {self.rows} are "
                "(the gradients are those of the whole batch)",
                stacklevel=4,
            )
        return result


def row_count(forget: Batch | None, retain: Batch | None) -> int:
    """Count the rows of the largest stream of a batch that has been checked; a process may have none of its sides."""
    sides = [side for side in sides_of(forget, retain) if side is not None]
    streams = [stream_of(side, name) for side in sides for name in ("answer", *COMPANIONS)]
    return max((len(stream["input_ids"]) for stream in streams if stream is not None), default=0)


def check_micro_batch(micro_batch: Any) -> None:
    """Raise for a number of rows that is none."""
    if micro_batch is not None and not (isinstance(micro_batch, int) and micro_batch >= 1):
        raise FastforgetError(f"micro_batch must be at least 1, 'auto' or None, not {micro_batch!r}")
