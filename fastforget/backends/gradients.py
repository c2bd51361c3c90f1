"""The backward passes: from upstream gradients of statistics to gradients over hidden states, and a head that trains.

Most are the gradient that the forward pass kept, times a factor, plus single rows of the head; the rest takes the
gradient sweep.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from fastforget.backends import fields as closing
from fastforget.backends import tiling
from fastforget.backends.blocks import KeptRows, SweepInput, prepared
from fastforget.backends.products import add_head_rows, compute_dtype, head_logit, label_slope
from fastforget.backends.protocol import Targets
from fastforget.backends.sweep import Trained, gradient_sweep
from fastforget.backends.torch_passes import unit_vectors

NEEDS_SWEEP = frozenset({"entropy", "expected_embedding"})


@dataclass(frozen=True)
class LabelContext:
    """What a label sweep leaves for its backward pass."""

    given: SweepInput
    accumulators: Tensor
    logp: Tensor
    log_not: Tensor
    unit_grad: Tensor | None
    argmax: Tensor | None
    embedding: Tensor | None  # the expected one


def label_backward(
    context: LabelContext, upstream: Mapping[str, Tensor], train_weight: bool, train_bias: bool
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Gradients over hidden (N, D) and over a head that trains, from upstream gradients (n,) or (n, D) by field."""
    hidden, head = context.given.hidden, context.given.head
    whole = torch.empty_like if context.given.positions is None else torch.zeros_like
    # passes write rows of logits where they belong, and those must lie side by side
    out = whole(hidden, memory_format=torch.contiguous_format if head.is_identity else torch.preserve_format)
    capped_mean = "logit_mean" in upstream and head.softcap is not None
    if not (train_weight or train_bias or capped_mean or head.is_identity or NEEDS_SWEEP & upstream.keys()):
        direct_backward(context, upstream, out)
        return out, None, None
    dtype = compute_dtype(hidden)
    trained = Trained(
        torch.zeros_like(head.weight, dtype=dtype) if train_weight else None,
        torch.zeros_like(head.bias, dtype=dtype) if train_bias and head.bias is not None else None,
    )
    others = {name: gradient for name, gradient in upstream.items() if name != "expected_embedding"}
    embedding = None
    if "expected_embedding" in upstream and context.embedding is not None:
        embedding = context.embedding, upstream["expected_embedding"]
    argmax = context.argmax if "max_logit" in upstream else None
    gradient_sweep(context.given, context.accumulators, argmax, others, out, embedding, trained)
    weight = None if trained.weight is None else trained.weight.to(head.weight.dtype)
    bias = None if trained.bias is None or head.bias is None else trained.bias.to(head.bias.dtype)
    return out, weight, bias


def direct_backward(context: LabelContext, upstream: Mapping[str, Tensor], out: Tensor) -> None:
    """Write the gradient that is the kept one times a factor, plus single rows of the head, or the mean of all."""
    hidden, head, labels, unit_grad = context.given.hidden, context.given.head, context.given.labels, context.unit_grad
    assert unit_grad is not None
    kept = context.given.kept
    factor = closing.unit_factor(upstream, context.logp, context.log_not)
    mean_row = None
    if "logit_mean" in upstream:
        mean_row = unit_grad.new_zeros(unit_grad.shape[1])
        for rows in tiling.state_blocks(
            len(head.weight), head.weight
        ):  # summed in another dtype it would be cast whole
            mean_row += head.weight.detach()[rows].sum(dim=0, dtype=mean_row.dtype)
        mean_row *= head.scale / len(head.weight)
    for rows in tiling.state_blocks(len(unit_grad), unit_grad):
        part = unit_grad[rows] * factor[rows, None]
        for index, name in ((labels, "lse"), (labels, "label_logit"), (context.argmax, "max_logit")):
            if name in upstream and index is not None:
                coefficient = upstream[name][rows]
                if head.softcap is not None:
                    logit = head_logit(head, kept.take(hidden, rows), index[rows])
                    coefficient = coefficient * label_slope(logit, head).to(coefficient.dtype)
                add_head_rows(part, index[rows], coefficient, head)
        if mean_row is not None:
            part.addcmul_(mean_row, upstream["logit_mean"][rows, None])
        kept.put(part, rows, out)


def scatter_scaled(grad: Tensor, factor: Tensor, positions: Tensor | None, hidden: Tensor) -> Tensor:
    """`grad * factor` (n, D) in the rows of (N, D), like hidden, that they are kept from; 0 elsewhere."""
    out = torch.empty_like(hidden) if positions is None else torch.zeros_like(hidden)
    kept = KeptRows.of(hidden, positions)
    for rows in tiling.state_blocks(len(grad), grad):
        kept.put(grad[rows] * factor[rows, None].to(grad.dtype), rows, out)
    return out


def states_backward(
    out: Tensor,
    hidden: Tensor,
    positions: Tensor | None,
    targets: Targets,
    nearest: Tensor,
    upstream: Mapping[str, Tensor],
) -> None:
    """Add the gradients of `distance` and `pull` (n,) to `out` (N, D).

    Nothing (n, D) is kept for them: each is a difference divided by a norm. Where a distance is 0, so is its gradient.
    """
    states = hidden if targets.states is None else targets.states
    kept, ready = KeptRows.of(states, positions), prepared(targets, compute_dtype(states))
    for rows in tiling.state_blocks(kept.count, states):
        part = kept.take(states, rows).to(compute_dtype(states))
        if "distance" in upstream and ready.anchor is not None:
            points = ready.anchor[None] if ready.anchor.dim() == 1 else kept.take(ready.anchor, rows)
            kept.add(direction(part, points, ready.cosine) * upstream["distance"][rows, None], rows, out)
        if "pull" in upstream and ready.centres is not None:
            points = ready.centres[nearest[rows]]
            kept.add(direction(part, points, ready.cosine) * upstream["pull"][rows, None], rows, out)


def direction(states: Tensor, points: Tensor, cosine: bool) -> Tensor:
    """The gradient (r, D) of the distance of states from points (r, D) or (1, D)."""
    if not cosine:
        difference = states - points
        length = torch.linalg.vector_norm(difference, dim=1, keepdim=True)
        return difference * torch.where(length > 0, 1.0 / length, length)
    unit, length = unit_vectors(states)
    other, other_length = unit_vectors(points)
    difference = unit - other
    distance = 0.5 * difference.square().sum(dim=1, keepdim=True)
    undirected = ((length == 0) | (other_length == 0))[:, None]
    return torch.where(undirected, 0.0, (difference - distance * unit) / length[:, None])
