"""Distances of hidden states behind autograd, and the check of labels, as ops of their own (see `opaque.py`)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from fastforget.backends import passes_of
from fastforget.backends.blocks import measure_states
from fastforget.backends.gradients import states_backward
from fastforget.backends.opaque import differentiable, opaque, or_empty
from fastforget.backends.products import compute_dtype
from fastforget.backends.protocol import Targets
from fastforget.errors import FastforgetError


def state_stats_body(
    hidden: Tensor, anchor: Tensor | None, centres: Tensor | None, metric: str, backend: str
) -> list[Tensor]:
    """distance (n,), pull (n,), and the nearest centre (n,)."""
    with torch.cuda.device_of(hidden):
        found = measure_states(passes_of(backend, hidden.dtype), hidden, Targets(anchor, centres, metric))
    distance = None if anchor is None else found.values[0].clone()
    pull = None if centres is None else found.values[1].clone()
    nearest = found.nearest if centres is not None else found.nearest.new_empty(0)
    return or_empty(distance, found.values), or_empty(pull, found.values), nearest  # type: ignore[return-value]


def state_stats_fake(
    hidden: Tensor, anchor: Tensor | None, centres: Tensor | None, metric: str, backend: str
) -> list[Tensor]:
    """Shapes and dtypes of what `state_stats_body` returns."""
    found = hidden.new_empty(len(hidden), dtype=compute_dtype(hidden))
    distance = or_empty(None if anchor is None else found, found)
    pull = or_empty(None if centres is None else torch.empty_like(found), found)
    return [distance, pull, hidden.new_empty(0 if centres is None else len(hidden), dtype=torch.long)]


def save_state_stats(ctx: Any, inputs: Sequence[Any], output: Sequence[Tensor]) -> None:
    """Save what the backward takes."""
    hidden, anchor, centres, ctx.metric, _ = inputs
    ctx.save_for_backward(hidden, anchor, centres, output[2])
    ctx.set_materialize_grads(False)


def state_stats_grad(ctx: Any, grads: Sequence[Tensor | None], compute: Callable[..., Any]) -> tuple[Any, ...]:
    """The gradient over hidden."""
    hidden, anchor, centres, nearest = ctx.saved_tensors
    distance = grads[0] if anchor is not None else None
    pull = grads[1] if centres is not None else None
    found = None
    if (distance is not None or pull is not None) and ctx.needs_input_grad[0]:
        found = compute(hidden, anchor, centres, nearest, distance, pull, ctx.metric)
    return found, None, None, None, None


def state_stats_backward_body(
    hidden: Tensor,
    anchor: Tensor | None,
    centres: Tensor | None,
    nearest: Tensor,
    distance: Tensor | None,
    pull: Tensor | None,
    metric: str,
) -> Tensor:
    """The gradient over hidden (n, D)."""
    grad = torch.zeros_like(hidden)
    given = {name: value for name, value in (("distance", distance), ("pull", pull)) if value is not None}
    states_backward(grad, hidden, None, Targets(anchor, centres, metric), nearest, given)
    return grad


def state_stats_backward_fake(hidden: Tensor, *others: Any) -> Tensor:
    """Shape and dtype of what `state_stats_backward_body` returns."""
    return torch.empty_like(hidden)


state_stats_backward = opaque("state_stats_backward", state_stats_backward_body, state_stats_backward_fake)
state_stats = differentiable(
    "state_stats", state_stats_body, state_stats_fake, save_state_stats, state_stats_grad, state_stats_backward
)


def checked_labels_body(labels: Tensor, vocabulary: int, ignore_index: int | None) -> Tensor:
    """Labels (N,) with the ignored ones as 0, once each is known to lie inside the vocabulary or be ignored.

    `ignore_index`: None where none may be ignored.

    On a device nothing is looked at from the host: there a label outside ends the next launches with the message.
    """
    ignored = torch.zeros_like(labels, dtype=torch.bool) if ignore_index is None else labels == ignore_index
    right = ignored | ((labels >= 0) & (labels < vocabulary))
    if labels.is_cpu:
        if not bool(right.all()):
            raise outside(int(labels[~right][0]), vocabulary)
    else:
        torch._assert_async(right.all(), f"a label is outside the vocabulary of {vocabulary} (ignored labels are -100)")
    return labels.masked_fill(ignored, 0)


def checked_labels_fake(labels: Tensor, vocabulary: int, ignore_index: int | None) -> Tensor:
    """Shape and dtype of what `checked_labels_body` returns."""
    return torch.empty_like(labels)


checked_labels = opaque("checked_labels", checked_labels_body, checked_labels_fake)


def outside(label: int, vocabulary: int) -> FastforgetError:
    """What to raise for a label outside the vocabulary."""
    return FastforgetError(f"label {label} is outside the vocabulary of {vocabulary} (ignored labels are -100)")
