"""Distances of hidden states behind autograd, as an op of their own; and what all ops share (see `ops.py`)."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fastforget.backends import passes_of
from fastforget.backends.blocks import measure_states
from fastforget.backends.gradients import states_backward
from fastforget.backends.products import compute_dtype
from fastforget.backends.protocol import Targets
from fastforget.errors import FastforgetError


def call(op: Callable[..., Any], function: type[torch.autograd.Function]) -> Callable[..., Any]:
    """What to call: the op where torch.compile traces, else the Function."""
    return op if torch.compiler.is_compiling() else function.apply


def remember_signature(body: Callable[..., Any]) -> None:
    """Keep a body's signature, which a Function with a `setup_context` looks up at each call (30 microseconds)."""
    body.__signature__ = inspect.signature(body)  # type: ignore[attr-defined]


def or_empty(tensor: Tensor | None, like: Tensor) -> Tensor:
    """The tensor, or an empty one on the same device."""
    return like.new_empty(0) if tensor is None else tensor


def or_zeros(grad: Tensor | None, like: Tensor | None, needed: bool) -> Tensor:
    """The gradient; zeros where it is needed and there is none; empty where it is not needed."""
    if not needed or like is None:
        return torch.empty(0)
    return torch.zeros_like(like) if grad is None else grad


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


state_stats_op = torch.library.custom_op("fastforget::state_stats", state_stats_body, mutates_args=())
remember_signature(state_stats_body)


@state_stats_op.register_fake
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


def state_stats_backward(ctx: Any, grads: Sequence[Tensor | None]) -> tuple[Any, ...]:
    """The gradient over hidden."""
    hidden, anchor, centres, nearest = ctx.saved_tensors
    distance = grads[0] if anchor is not None else None
    pull = grads[1] if centres is not None else None
    found = None
    if (distance is not None or pull is not None) and ctx.needs_input_grad[0]:
        run = state_stats_backward_op if torch.compiler.is_compiling() else state_stats_backward_body
        found = run(hidden, anchor, centres, nearest, distance, pull, ctx.metric)
    return found, None, None, None, None


state_stats_op.register_autograd(state_stats_backward, setup_context=save_state_stats)


class StateStatsFunction(torch.autograd.Function):
    """`state_stats_op` in eager mode."""

    setup_context = staticmethod(save_state_stats)

    forward = staticmethod(state_stats_body)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
        return state_stats_backward(ctx, grads)


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


state_stats_backward_op = torch.library.custom_op(
    "fastforget::state_stats_backward", state_stats_backward_body, mutates_args=()
)


@state_stats_backward_op.register_fake
def state_stats_backward_fake(hidden: Tensor, *others: Any) -> Tensor:
    """Shape and dtype of what `state_stats_backward_body` returns."""
    return torch.empty_like(hidden)


@torch.library.custom_op("fastforget::checked_labels", mutates_args=())
def checked_labels(labels: Tensor, vocabulary: int, ignore_index: int) -> Tensor:
    """Labels (N,) with the ignored ones as 0, once each is known to lie inside the vocabulary or be ignored.

    On a device nothing is looked at from the host: there a label outside ends the next launches with the message.
    """
    ignored = labels == ignore_index
    right = ignored | ((labels >= 0) & (labels < vocabulary))
    if labels.is_cpu:
        if not bool(right.all()):
            raise outside(int(labels[~right][0]), vocabulary)
    else:
        torch._assert_async(right.all(), f"a label is outside the vocabulary of {vocabulary} (ignored labels are -100)")
    return labels.masked_fill(ignored, 0)


@checked_labels.register_fake
def checked_labels_fake(labels: Tensor, vocabulary: int, ignore_index: int) -> Tensor:
    """Shape and dtype of what `checked_labels` returns."""
    return torch.empty_like(labels)


def outside(label: int, vocabulary: int) -> FastforgetError:
    """What to raise for a label outside the vocabulary."""
    return FastforgetError(f"label {label} is outside the vocabulary of {vocabulary} (ignored labels are -100)")
