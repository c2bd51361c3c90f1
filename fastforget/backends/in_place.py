"""Statistics of logits that a model has already produced, which become their own gradient: no second (N, V) tensor."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fastforget.backends import fields as closing
from fastforget.backends import passes_of
from fastforget.backends.blocks import SweepInput
from fastforget.backends.sweep import gradient_sweep, label_sweep
from fastforget.errors import FastforgetError
from fastforget.head import LMHead


def label_stats(
    logits: Tensor, labels: Tensor, kept: Tensor, outputs: Collection[str], *, backend: str
) -> dict[str, Tensor]:
    """{field: (N,)} of logits (N, V); labels (N,) are valid ones where not `kept` (N,) too, whose gradient is 0."""
    wanted = {*outputs, "argmax"} if "max_logit" in outputs else {*outputs}
    names = tuple(name for name in closing.NAMES if name in wanted)
    fields = dict(zip(names, StatsInPlace.apply(logits, labels, kept, names, backend), strict=True))
    return {name: fields[name] for name in outputs}


class StatsInPlace(torch.autograd.Function):
    """A label sweep that writes nothing, and a gradient sweep over the logits themselves.

    The overwritten tensor is deliberately not declared dirty: a model's logits are nobody else's input, and autograd
    complains by itself where the operation that made them needs them again.
    """

    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, labels: Tensor, kept: Tensor, names: tuple[str, ...], backend: str
    ) -> tuple[Tensor, ...]:
        given = SweepInput(passes_of(backend, logits.dtype), logits.detach(), labels, None, LMHead(None))
        with torch.cuda.device_of(logits):
            found = label_sweep(given, names, False)
        ctx.logits, ctx.names, ctx.backend = given.hidden, names, backend
        ctx.version = None if logits.is_inference() else logits._version
        ctx.save_for_backward(labels, kept, found.accumulators, found.fields.get("argmax"))
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(*(found.fields[name] for name in names if name not in closing.DIFFERENTIABLE))
        return tuple(found.fields[name] for name in names)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor, None, None, None, None]:
        if ctx.logits is None:
            raise FastforgetError("the logits were overwritten, so there is one backward pass only: not in_place=True")
        if ctx.logits._version != ctx.version:
            raise FastforgetError(
                "the logits were changed after their statistics were computed (by in_place=True on them or a part of "
                "them, perhaps), so their gradient cannot be written over them: not in_place=True"
            )
        labels, kept, accumulators, argmax = ctx.saved_tensors
        logits, ctx.logits = ctx.logits, None
        given = SweepInput(passes_of(ctx.backend, logits.dtype), logits, labels, None, LMHead(None))
        upstream = {name: grad for name, grad in zip(ctx.names, grads, strict=True) if grad is not None}
        with torch.cuda.device_of(logits):
            gradient_sweep(given, accumulators, argmax if "max_logit" in upstream else None, upstream, logits)
        return logits.masked_fill_(~kept[:, None], 0.0), None, None, None, None
