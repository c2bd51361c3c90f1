"""y = x Wᵀ + bias + s (x Aᵀ) Bᵀ over a frozen weight W, behind autograd, and as a torch.library op under torch.compile.

W is cast from what it is stored as (`frozen_weight.py`) for the product, and again for the backward pass; no cast is
kept, and activations are never quantised: a CPU computes what a GPU does. Products run in the activations' dtype (under
autocast in its dtype, as those of nn.Linear); A and B keep theirs, float32 as PEFT makes them, and so do their
gradients:

    forward     T = x Aᵀ          y = x Wᵀ + bias + s T Bᵀ              saved: x where A trains, T where B trains
    backward    dT = dy B         dx = dy W + s dT A        dA = s dTᵀ x        dB = s dyᵀ T

Without an adapter the order of all sums is the same, so B = 0 changes no bit of y. What a call's launches cost on a
GPU, beside bitsandbytes' and PEFT's, was measured nowhere yet.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from typing import Any, get_type_hints

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fastforget.backends.opaque import opaque, or_empty
from fastforget.errors import FastforgetError
from fastforget.frozen_weight import FLOATS, FrozenWeight, cast_buffer, tiles

STORED = get_type_hints(FrozenWeight)
TENSORS = [place for place, kind in enumerate(STORED.values()) if kind not in (int, str)]
SCHEMA_TYPES = {Tensor: "Tensor", Tensor | None: "Tensor?", str: "str", int: "SymInt"}
WEIGHT_SCHEMA = ", ".join(f"{SCHEMA_TYPES[kind]} {name}" for name, kind in STORED.items())


def frozen_linear(
    x: Tensor,
    weight: FrozenWeight,
    bias: Tensor | None = None,
    lora_a: Tensor | None = None,
    lora_b: Tensor | None = None,
    scaling: float = 1.0,
) -> Tensor:
    """x Wᵀ + bias + scaling · (x Aᵀ) Bᵀ, (..., out), in the dtype that its products run in.

    Args:
        x: (..., in), of any strides; its dtype is that of the products, unless autocast says otherwise.
        bias: (out,), frozen.
        lora_a, lora_b: A (r, in) and B (out, r), both or neither; each gets a gradient in its own dtype.

    Raises:
        FastforgetError: x is no floating-point tensor of 16, 32 or 64 bits, or its width is not W's.
    """
    dtype = product_dtype(x)
    if dtype not in FLOATS or x.shape[-1] != weight.in_features:
        raise FastforgetError(
            f"a linear layer of {weight.in_features} inputs got {tuple(x.shape)} in {x.dtype}: its last dimension must "
            "be the layer's, in 16, 32 or 64-bit floating point"
        )
    bias = None if bias is None else bias.detach()
    if torch.compiler.is_compiling():
        return frozen_linear_op(x.to(dtype), lora_a, lora_b, bias, scaling, *weight)[0]
    return FrozenLinear.apply(x.to(dtype), lora_a, lora_b, bias, scaling, weight)


def product_dtype(x: Tensor) -> torch.dtype:
    """Return the dtype that nn.Linear's product would run in: autocast leaves float64 alone."""
    kind = x.device.type
    if x.dtype != torch.float64 and x.is_floating_point() and torch.is_autocast_enabled(kind):
        return torch.get_autocast_dtype(kind)
    return x.dtype


def without_autocast(x: Tensor) -> contextlib.AbstractContextManager[Any]:
    """No autocast where it is on (it takes host time): operands have their dtypes already."""
    kind = x.device.type
    return torch.autocast(kind, enabled=False) if torch.is_autocast_enabled(kind) else contextlib.nullcontext()


def frozen_linear_body(
    x: Tensor,
    lora_a: Tensor | None,
    lora_b: Tensor | None,
    bias: Tensor | None,
    scaling: float,
    *parts: Any,
) -> list[Tensor]:
    """y (..., out), and T = x Aᵀ (N, r) for the backward pass, empty without an adapter."""
    weight = FrozenWeight(*parts)
    with torch.cuda.device_of(x), without_autocast(x):
        rows = x.reshape(-1, weight.in_features)
        result = x.new_empty((*x.shape[:-1], weight.out_features))  # no view is returned: users may add to it in place
        flat = result.view(rows.shape[0], weight.out_features)
        bias = None if bias is None else bias.to(x.dtype)
        with cast_buffer(weight, x.dtype) as buffer:
            for part, tile in tiles(weight, x.dtype, buffer):
                if bias is None:
                    torch.mm(rows, tile.T, out=flat[:, part])
                else:
                    torch.addmm(bias[part], rows, tile.T, out=flat[:, part])
        inner = None
        if lora_a is not None and lora_b is not None:
            inner = rows @ lora_a.to(x.dtype).T
            flat.addmm_(inner, lora_b.to(x.dtype).T, alpha=scaling)
    return result, or_empty(inner, x)  # type: ignore[return-value]


def frozen_linear_fake(x: Tensor, lora_a: Tensor | None, *others: Any) -> list[Tensor]:
    """Shapes and dtypes of what `frozen_linear_body` returns."""
    out_features = others[5]
    inner = None if lora_a is None else x.new_empty((x.numel() // x.shape[-1], lora_a.shape[0]))
    return [x.new_empty((*x.shape[:-1], out_features)), or_empty(inner, x)]


FORWARD_SCHEMA = f"(Tensor x, Tensor? lora_a, Tensor? lora_b, Tensor? bias, float scaling, {WEIGHT_SCHEMA}) -> Tensor[]"
frozen_linear_op = opaque("frozen_linear", frozen_linear_body, frozen_linear_fake, FORWARD_SCHEMA).op


def save_frozen_linear(ctx: Any, inputs: Sequence[Any], output: Sequence[Tensor]) -> None:
    """Save what the backward takes: the weight by reference, and of the activations only what A and B need."""
    x, lora_a, lora_b, _, ctx.scaling, *parts = inputs
    _, needs_a, needs_b = ctx.needs_input_grad[:3]
    kept = (x if needs_a else None, output[1] if needs_b else None, lora_a, lora_b)
    ctx.save_for_backward(*kept, *(parts[place] for place in TENSORS))
    for place in TENSORS:
        parts[place] = None
    ctx.parts = parts
    ctx.set_materialize_grads(False)


def frozen_linear_backward(ctx: Any, grad: Tensor | None, run: Callable[..., list[Tensor]]) -> tuple[Any, ...]:
    """Gradients over x, A and B, by the body or the op of the backward pass."""
    found: list[Tensor | None] = [None] * 3
    needs = ctx.needs_input_grad[:3]
    if grad is not None and any(needs):
        x, inner, lora_a, lora_b, *tensors = ctx.saved_tensors
        parts = list(ctx.parts)
        for place, tensor in zip(TENSORS, tensors, strict=True):
            parts[place] = tensor
        results = run(grad, x, inner, lora_a, lora_b, *needs, ctx.scaling, *parts)
        found = [result if need else None for result, need in zip(results, needs, strict=True)]
    return *found, *[None] * (2 + len(ctx.parts))


class FrozenLinear(torch.autograd.Function):
    """`frozen_linear_op` in eager mode; with a `setup_context` of its own a call would take 50 microseconds more."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tensor:
        *others, weight = inputs
        output = frozen_linear_body(*others, *weight)
        save_frozen_linear(ctx, (*others, *weight), output)
        return output[0]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor | None) -> tuple[Any, ...]:
        return frozen_linear_backward(ctx, grad, frozen_linear_backward_body)[: len(ctx.needs_input_grad)]


def frozen_linear_backward_body(
    grad: Tensor,
    x: Tensor | None,
    inner: Tensor | None,
    lora_a: Tensor | None,
    lora_b: Tensor | None,
    need_x: bool,
    need_a: bool,
    need_b: bool,
    scaling: float,
    *parts: Any,
) -> list[Tensor]:
    """Gradients over x (..., in), A and B; empty where one is not needed."""
    weight = FrozenWeight(*parts)
    grad_x = grad_a = grad_b = grad_inner = None
    with torch.cuda.device_of(grad), without_autocast(grad):
        rows = grad.reshape(-1, weight.out_features)
        if lora_b is not None and (need_x or need_a):
            grad_inner = rows @ lora_b.to(grad.dtype)
        if need_x:
            grad_x = grad.new_empty((*grad.shape[:-1], weight.in_features))
            flat = grad_x.view(rows.shape[0], weight.in_features)
            with cast_buffer(weight, grad.dtype) as buffer:
                for part, tile in tiles(weight, grad.dtype, buffer):
                    if part.start == 0:
                        torch.mm(rows[:, part], tile, out=flat)
                    else:
                        flat.addmm_(rows[:, part], tile)
            if lora_a is not None and grad_inner is not None:
                flat.addmm_(grad_inner, lora_a.to(grad.dtype), alpha=scaling)
        if need_a and x is not None and lora_a is not None and grad_inner is not None:
            grad_a = scaled_product(grad_inner.T, x.reshape(-1, weight.in_features), scaling, lora_a.dtype)
        if need_b and inner is not None and lora_b is not None:
            grad_b = scaled_product(rows.T, inner, scaling, lora_b.dtype)
    return [or_empty(found, grad) for found in (grad_x, grad_a, grad_b)]


def frozen_linear_backward_fake(
    grad: Tensor,
    x: Tensor | None,
    inner: Tensor | None,
    lora_a: Tensor | None,
    lora_b: Tensor | None,
    need_x: bool,
    need_a: bool,
    need_b: bool,
    *others: Any,
) -> list[Tensor]:
    """Shapes and dtypes of what `frozen_linear_backward_body` returns."""
    grad_x = grad.new_empty((*grad.shape[:-1], others[4])) if need_x else None
    pairs = ((lora_a, need_a), (lora_b, need_b))
    factors = [torch.empty_like(factor) if factor is not None and need else None for factor, need in pairs]
    return [or_empty(found, grad) for found in (grad_x, *factors)]


BACKWARD_SCHEMA = (
    "(Tensor grad, Tensor? x, Tensor? inner, Tensor? lora_a, Tensor? lora_b, bool need_x, bool need_a, bool need_b, "
    f"float scaling, {WEIGHT_SCHEMA}) -> Tensor[]"
)
frozen_linear_backward_op = opaque(
    "frozen_linear_backward", frozen_linear_backward_body, frozen_linear_backward_fake, BACKWARD_SCHEMA
).op


def frozen_linear_op_backward(ctx: Any, grads: Sequence[Tensor | None]) -> tuple[Any, ...]:
    """Gradients over the op's arguments."""
    return frozen_linear_backward(ctx, grads[0], frozen_linear_backward_op)


frozen_linear_op.register_autograd(frozen_linear_op_backward, setup_context=save_frozen_linear)


def scaled_product(left: Tensor, right: Tensor, scaling: float, dtype: torch.dtype) -> Tensor:
    """scaling · left @ right, summed over the tokens in float32 (float64) and returned in a dtype."""
    wide = torch.promote_types(left.dtype, torch.float32)
    if left.dtype == wide:
        found = left @ right
    elif left.is_cuda:
        found = torch.mm(left, right, out_dtype=wide)
    else:
        found = left.to(wide) @ right.to(wide)
    return found.mul_(scaling).to(dtype)
