"""Computations that torch.compile takes as they are: plain calls in eager mode, torch.library ops while it traces.

A custom op takes 0.2 ms of host time a call, so eager mode goes without: an `autograd.Function`, or the body itself.
What crosses the border is plain: tensors, numbers and strings. An op returns a fixed number of tensors, so an empty
one stands for what is not needed. Bodies return tuples, which a Function asks for, though an op's schema wants the
annotation of a list.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


@dataclass(frozen=True)
class Opaque:
    """A computation in both forms; `op` is what is registered with torch.library as `fastforget::name`."""

    op: Any
    eager: Callable[..., Any]

    def __call__(self, *arguments: Any) -> Any:
        return (self.op if torch.compiler.is_compiling() else self.eager)(*arguments)


def opaque(name: str, body: Callable[..., Any], fake: Callable[..., Any], schema: str | None = None) -> Opaque:
    """Make a computation without a gradient opaque; `fake` gives shapes and dtypes of what the body returns.

    `schema`: of the op, where the body's annotations do not tell it.
    """
    op = torch.library.custom_op(f"fastforget::{name}", body, mutates_args=(), schema=schema)
    op.register_fake(fake)
    return Opaque(op, body)


def differentiable(
    name: str,
    body: Callable[..., Any],
    fake: Callable[..., Any],
    save: Callable[..., None],
    backward: Callable[[Any, Sequence[Tensor | None], Callable[..., Any]], Any],
    computes: Opaque,
) -> Opaque:
    """Make a computation opaque whose `backward(ctx, grads, compute)` finds what `save` left in ctx.

    `compute` is the form of `computes` that goes with the forward's: while backward passes are traced, torch 2.11 does
    not say that it compiles.
    """
    op = opaque(name, body, fake).op
    op.register_autograd(lambda ctx, grads: backward(ctx, grads, computes.op), setup_context=save)
    # a Function with a `setup_context` looks its forward's signature up at each call: 30 microseconds if it is not kept
    body.__signature__ = inspect.signature(body)  # type: ignore[attr-defined]

    class Eager(torch.autograd.Function):
        forward = staticmethod(body)
        setup_context = staticmethod(save)

        @staticmethod
        @once_differentiable
        def backward(ctx: Any, *grads: Tensor | None) -> Any:
            return backward(ctx, grads, computes.eager)

    return Opaque(op, Eager.apply)


def or_empty(tensor: Tensor | None, like: Tensor) -> Tensor:
    """The tensor, or an empty one on the same device."""
    return like.new_empty(0) if tensor is None else tensor


def or_zeros(grad: Tensor | None, like: Tensor | None, needed: bool) -> Tensor:
    """The gradient; zeros where it is needed and there is none; empty where it is not needed."""
    if not needed or like is None:
        return torch.empty(0)
    return torch.zeros_like(like) if grad is None else grad
