"""Statistics of logits that a model has already produced, which are overwritten: no second (N, V) tensor.

The logits become the unit row (see `driver.py`), and in the backward pass their own gradient. Every row is computed,
the ignored ones too, as kept rows cannot be gathered without a copy.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fastforget.backends import OUTPUTS, driver, gemm
from fastforget.backends.chunks import passes_of
from fastforget.errors import FastforgetError
from fastforget.head import LMHead

DIFFERENTIABLE = ("logp", "lse", "label_logit", "log_not_label")


def label_stats(
    logits: Tensor, labels: Tensor, kept: Tensor, outputs: Collection[str], *, backend: str
) -> dict[str, Tensor]:
    """{field: (N,)} of logits (N, V), which are overwritten; labels (N,) are valid ones where not `kept` (N,) too."""
    names = tuple(name for name in OUTPUTS if name in outputs or name in driver.ALWAYS)
    with torch.cuda.device_of(logits):  # Triton launches on whichever device is current
        return dict(zip(names, StatsInPlace.apply(logits, labels, kept, names, backend), strict=True))


class StatsInPlace(torch.autograd.Function):
    """The row pass over the logits themselves.

    The overwritten tensor is deliberately not declared dirty: a model's logits are nobody else's input, and autograd
    complains by itself where the operation that made them needs them again.
    """

    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, labels: Tensor, kept: Tensor, names: tuple[str, ...], backend: str
    ) -> tuple[Tensor, ...]:
        rows_of_logits = logits.detach()
        passes = passes_of(backend, logits.dtype)
        head = LMHead(None)
        parts: dict[str, list[Tensor]] = {}
        scales = []
        for rows in gemm.row_chunks(len(logits), gemm.chunk_rows(logits.shape[1], logits)):
            chunk = rows_of_logits[rows]
            # torch's passes compute in float32; the kernels read and write the logits in their own dtype
            product = chunk if passes.ANY_DTYPE else chunk.to(gemm.compute_dtype(logits))
            found = passes.label_pass(product, labels[rows], head, names, product)
            assert found.row is not None
            if product is not chunk:
                chunk.copy_(found.row)
            for name, value in found.fields.items():
                parts.setdefault(name, []).append(value)
            if found.row_scale is not None:
                scales.append(found.row_scale)
        fields = {name: torch.cat(part) for name, part in parts.items()}
        if not fields:
            fields = driver.empty_fields(names, gemm.compute_dtype(logits), logits.device)
        ctx.rows = rows_of_logits
        ctx.names = names
        scale = torch.cat(scales) if scales else None
        ctx.save_for_backward(labels, kept, fields["logp"], fields["log_not_label"], scale)
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(*(fields[name] for name in names if name not in DIFFERENTIABLE))
        return tuple(fields[name] for name in names)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor, None, None, None, None]:
        if ctx.rows is None:
            raise FastforgetError("the logits were overwritten, so there is one backward pass only: not in_place=True")
        labels, kept, logp, log_not, scale = ctx.saved_tensors
        upstream = {name: grad for name, grad in zip(ctx.names, grads, strict=True) if grad is not None}
        zero = torch.zeros_like(logp)
        coefficient = torch.where(kept, driver.unit_coefficient(upstream, logp, log_not), 0.0)
        at_label = upstream.get("lse", zero) + upstream.get("label_logit", zero) - coefficient
        rows, ctx.rows = ctx.rows, None
        factor = coefficient if scale is None else coefficient / scale
        rows.mul_(factor[:, None]).masked_fill_(~kept[:, None], 0.0)  # 0 times an infinite logit would be NaN
        at_label = torch.where(kept, at_label, 0.0)
        rows.scatter_(1, labels[:, None], at_label[:, None].to(rows.dtype))
        return rows, None, None, None, None
