"""The sweeps behind autograd, and as torch.library ops where torch.compile traces.

Each is a body that computes, a function that saves what the backward takes, and the backward. In eager mode they are an
autograd.Function (a custom op would take 0.2 ms of host time a call); while compiling a custom op, opaque to the
compiler, with a fake implementation. What crosses that border is plain: tensors, numbers, and fields by their places in
CODES. An empty tensor stands for what is not needed, as an op returns a fixed number of them;
bodies return tuples, which a Function asks for, and whose annotation an op's schema would not take.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fastforget.backends import fields as closing
from fastforget.backends import passes_of
from fastforget.backends.gradients import LabelContext, label_backward, scatter_scaled, states_backward
from fastforget.backends.products import compute_dtype
from fastforget.backends.protocol import BASIC_ACCUMULATORS, LABEL_ACCUMULATORS, KnownReference, Targets
from fastforget.backends.state_ops import (
    StateStatsFunction,
    call,
    or_empty,
    or_zeros,
    remember_signature,
    state_stats_op,
)
from fastforget.backends.sweep import DivergenceSweep, coupled_sweep, label_sweep, paired_sweep
from fastforget.head import LMHead

CODES = (*closing.NAMES, "distance", "pull")
ARGUMENTS = 14  # of the token_stats op


class SweepBackend:
    """A backend of tile passes, as `protocol.Backend` has it."""

    def __init__(self, name: str) -> None:
        self.name = name

    def token_stats(
        self,
        hidden: Tensor,
        labels: Tensor,
        head: LMHead,
        outputs: Collection[str],
        *,
        positions: Tensor | None = None,
        targets: Targets | None = None,
    ) -> dict[str, Tensor]:
        """As `Backend.token_stats`."""
        wanted = {*outputs, "logp", "log_not_label"}  # what the backward pass takes, and for nothing
        wanted |= {"argmax"} if "max_logit" in outputs else set()  # whose row of the head is its gradient
        targets = targets or Targets()
        names = [name for name in closing.NAMES if name in wanted]
        names += ["distance"] * (targets.anchor is not None) + ["pull"] * (targets.centres is not None)
        # of a head that trains all gradients come from the gradient sweep, and none is kept
        keeps = torch.is_grad_enabled() and hidden.requires_grad and not head.trainable
        values = call(token_stats_op, TokenStatsFunction)(
            hidden,
            labels.contiguous(),
            positions,
            head.weight,
            head.bias,
            targets.states,
            targets.anchor,
            targets.centres,
            targets.metric,
            head.scale,
            head.softcap or 0.0,
            [CODES.index(name) for name in names],
            keeps,
            self.name,
        )
        fields = dict(zip(names, values, strict=False))
        return {
            name: value.detach() if name in closing.EMPTY and name not in closing.DIFFERENTIABLE else value
            for name, value in fields.items()
            if name in outputs or name in ("distance", "pull")
        }

    def divergence(
        self,
        hidden: Tensor,
        ref_hidden: Tensor,
        head: LMHead,
        kind: str,
        *,
        labels: Tensor | None = None,
        positions: Tensor | None = None,
        label_shift: float = 0.0,
        known: KnownReference | None = None,
    ) -> tuple[Tensor, Tensor]:
        """As `Backend.divergence`."""
        weight, bias = (None if tensor is None else tensor.detach() for tensor in (head.weight, head.bias))
        value, _, logp = call(divergence_op, DivergenceFunction)(
            hidden,
            ref_hidden.detach(),
            positions,
            None if labels is None else labels.contiguous(),
            weight,
            bias,
            None if known is None else known.others_embedding,
            None if known is None else known.others_argmax,
            head.scale,
            head.softcap or 0.0,
            label_shift,
            kind,
            torch.is_grad_enabled() and hidden.requires_grad,
            self.name,
        )
        return value, logp.detach()

    def state_stats(self, hidden: Tensor, targets: Targets) -> dict[str, Tensor]:
        """As `Backend.state_stats`."""
        constants = [None if tensor is None else tensor.detach() for tensor in (targets.anchor, targets.centres)]
        distance, pull, _ = call(state_stats_op, StateStatsFunction)(hidden, *constants, targets.metric, self.name)
        found = {"distance": distance} if targets.anchor is not None else {}
        return found | ({"pull": pull} if targets.centres is not None else {})


def token_stats_body(
    hidden: Tensor,
    labels: Tensor,
    positions: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    states: Tensor | None,
    anchor: Tensor | None,
    centres: Tensor | None,
    metric: str,
    scale: float,
    softcap: float,
    codes: Sequence[int],
    compute_grad: bool,
    backend: str,
) -> list[Tensor]:
    """The fields of `codes`; then what the backward takes: accumulators, unit gradient, nearest centres."""
    names = [CODES[code] for code in codes]
    targets = Targets(anchor, centres, metric, states)
    with torch.cuda.device_of(hidden):  # Triton launches on whichever device is current
        found = label_sweep(
            passes_of(backend, hidden.dtype),
            hidden,
            labels,
            positions,
            LMHead(weight, bias, scale, softcap or None),
            [name for name in names if name in closing.BY_NAME],
            compute_grad,
            targets or None,
        )
    fields = dict(found.fields)
    if found.states is not None:  # an op's results must not share memory
        fields |= {name: found.states.values[index].clone() for index, name in enumerate(("distance", "pull"))}
    nearest = None if found.states is None or centres is None else found.states.nearest
    rest = [found.accumulators, or_empty(found.unit_grad, hidden), or_empty(nearest, labels)]
    return (*(fields[name] for name in names), *rest)  # type: ignore[return-value]


token_stats_op = torch.library.custom_op("fastforget::token_stats", token_stats_body, mutates_args=())
remember_signature(token_stats_body)


@token_stats_op.register_fake
def token_stats_fake(hidden: Tensor, labels: Tensor, *others: Any) -> list[Tensor]:
    """Shapes and dtypes of what `token_stats_body` returns."""
    weight, centres, codes, compute_grad, backend = others[1], others[5], others[9], others[10], others[11]
    count, dtype = len(labels), compute_dtype(hidden)
    found = []
    for name in (CODES[code] for code in codes):
        field = closing.BY_NAME.get(name)
        shape = (count, hidden.shape[1]) if field and field.needs == "embedding" else (count,)
        found.append(hidden.new_empty(shape, dtype=torch.long if field and field.integer else dtype))
    moments = any(CODES[code] in closing.BY_NAME and closing.BY_NAME[CODES[code]].needs == "moments" for code in codes)
    rows = len(LABEL_ACCUMULATORS) if moments else BASIC_ACCUMULATORS
    accumulators = passes_of(backend, hidden.dtype).accumulator_dtype(dtype)
    kept_grad = compute_grad and weight is not None
    grad = hidden.new_empty((count, hidden.shape[1]), dtype=dtype) if kept_grad else None
    nearest = None if centres is None else torch.empty_like(labels)
    rest = [hidden.new_empty((rows, count), dtype=accumulators), or_empty(grad, hidden), or_empty(nearest, labels)]
    return [*found, *rest]


def save_token_stats(ctx: Any, inputs: Sequence[Any], output: Sequence[Tensor]) -> None:
    """Save what the backward takes."""
    tensors, (metric, scale, softcap, codes, _, backend) = inputs[:8], inputs[8:]
    ctx.names = [CODES[code] for code in codes]
    fields = dict(zip(ctx.names, output, strict=False))
    kept = [fields.get(name) for name in ("argmax", "expected_embedding", "logp", "log_not_label")]
    ctx.save_for_backward(*tensors, *kept, *output[-3:])
    ctx.scalars = (metric, scale, softcap, backend)
    ctx.set_materialize_grads(False)


def token_stats_backward(ctx: Any, grads: Sequence[Tensor | None]) -> tuple[Any, ...]:
    """Gradients over hidden, weight, bias and states."""
    given = {
        name: grad
        for name, grad in zip(ctx.names, grads, strict=False)
        if grad is not None and (name in closing.DIFFERENTIABLE or name not in closing.EMPTY)
    }
    needs = [ctx.needs_input_grad[index] for index in (0, 3, 4, 5)]
    results: list[Tensor | None] = [None] * 4
    if given and any(needs):
        run = token_stats_backward_op if torch.compiler.is_compiling() else token_stats_backward_body
        codes = [CODES.index(name) for name in given]
        found = run(*ctx.saved_tensors, list(given.values()), codes, *ctx.scalars, *needs)  # type: ignore[call-arg]
        results = [result if need else None for result, need in zip(found, needs, strict=True)]
    hidden, weight, bias, states = results
    return hidden, None, None, weight, bias, states, *[None] * (ARGUMENTS - 6)


token_stats_op.register_autograd(token_stats_backward, setup_context=save_token_stats)


class TokenStatsFunction(torch.autograd.Function):
    """`token_stats_op` in eager mode."""

    setup_context = staticmethod(save_token_stats)

    forward = staticmethod(token_stats_body)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
        return token_stats_backward(ctx, grads)


def token_stats_backward_body(
    hidden: Tensor,
    labels: Tensor,
    positions: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    states: Tensor | None,
    anchor: Tensor | None,
    centres: Tensor | None,
    argmax: Tensor | None,
    embedding: Tensor | None,
    logp: Tensor,
    log_not: Tensor,
    accumulators: Tensor,
    unit_grad: Tensor,
    nearest: Tensor,
    upstream: Sequence[Tensor],
    codes: Sequence[int],
    metric: str,
    scale: float,
    softcap: float,
    backend: str,
    need_hidden: bool,
    need_weight: bool,
    need_bias: bool,
    need_states: bool,
) -> list[Tensor]:
    """Gradients over hidden, weight, bias and states; zeros where one is needed and there is none, else empty."""
    given = dict(zip((CODES[code] for code in codes), upstream, strict=True))
    of_states: dict[str, Tensor] = {name: given.pop(name) for name in ("distance", "pull") if name in given}
    grad = grad_weight = grad_bias = None
    with torch.cuda.device_of(hidden):
        if given and (need_hidden or need_weight or need_bias):
            head = LMHead(weight, bias, scale, softcap or None)
            kept = unit_grad if unit_grad.dim() == 2 else None
            context = LabelContext(
                hidden, labels, positions, head, accumulators, logp, log_not, kept, argmax, embedding
            )
            passes = passes_of(backend, hidden.dtype)
            grad, grad_weight, grad_bias = label_backward(passes, context, given, need_weight, need_bias)
        grad_states = or_zeros(None, states, need_states)
        into_hidden = states is None and need_hidden
        grad = or_zeros(grad, hidden, need_hidden)
        if of_states and (into_hidden or need_states):
            targets = Targets(anchor, centres, metric, states)
            states_backward(grad if states is None else grad_states, hidden, positions, targets, nearest, of_states)
    return [grad, or_zeros(grad_weight, weight, need_weight), or_zeros(grad_bias, bias, need_bias), grad_states]


token_stats_backward_op = torch.library.custom_op(
    "fastforget::token_stats_backward", token_stats_backward_body, mutates_args=()
)


@token_stats_backward_op.register_fake
def token_stats_backward_fake(hidden: Tensor, *others: Any) -> list[Tensor]:
    """Shapes and dtypes of what `token_stats_backward_body` returns."""
    weight, bias, states = others[2:5]
    if weight is None:  # logits, whose gradient has contiguous rows
        hidden = torch.empty_like(hidden, memory_format=torch.contiguous_format)
    likes = (hidden, weight, bias, states)
    return [or_zeros(None, like, need) for like, need in zip(likes, others[-4:], strict=True)]


def divergence_body(
    hidden: Tensor,
    ref_hidden: Tensor,
    positions: Tensor | None,
    labels: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    others_embedding: Tensor | None,
    others_argmax: Tensor | None,
    scale: float,
    softcap: float,
    label_shift: float,
    kind: str,
    compute_grad: bool,
    backend: str,
) -> list[Tensor]:
    """The divergence (n,); its gradient (n, D) for the backward pass; log p_y (n,)."""
    passes, head = passes_of(backend, hidden.dtype), LMHead(weight, bias, scale, softcap or None)
    if labels is None:
        count = len(hidden if positions is None else positions)
        labels = torch.full((count,), -1, dtype=torch.int64, device=hidden.device)
    common = (passes, hidden, ref_hidden, labels, positions, head)
    found: DivergenceSweep
    with torch.cuda.device_of(hidden):
        if kind == "forward_kl":
            known = None
            if others_embedding is not None and others_argmax is not None:
                known = KnownReference(others_embedding, others_argmax)
            found = paired_sweep(*common, compute_grad, label_shift, known)
        else:
            found = coupled_sweep(*common, "jsd" if kind == "jsd" else "reverse_kl", compute_grad, label_shift)
    return found.value, or_empty(found.grad, hidden), found.logp  # type: ignore[return-value]


divergence_op = torch.library.custom_op("fastforget::divergence", divergence_body, mutates_args=())
remember_signature(divergence_body)


@divergence_op.register_fake
def divergence_fake(hidden: Tensor, ref_hidden: Tensor, positions: Tensor | None, *others: Any) -> list[Tensor]:
    """Shapes and dtypes of what `divergence_body` returns."""
    compute_grad = others[9]
    count, dtype = len(hidden if positions is None else positions), compute_dtype(hidden)
    grad = hidden.new_empty((count, hidden.shape[1]), dtype=dtype) if compute_grad else None
    value = hidden.new_empty(count, dtype=dtype)
    return [value, or_empty(grad, hidden), torch.empty_like(value)]


def save_divergence(ctx: Any, inputs: Sequence[Any], output: Sequence[Tensor]) -> None:
    """Save what the backward takes."""
    ctx.save_for_backward(inputs[0], inputs[2], output[1])
    ctx.set_materialize_grads(False)


def divergence_backward(ctx: Any, grads: Sequence[Tensor | None]) -> tuple[Any, ...]:
    """The gradient over hidden."""
    hidden, positions, grad = ctx.saved_tensors
    upstream = grads[0]
    found = None
    if upstream is not None and ctx.needs_input_grad[0]:
        run = scatter_scaled_op if torch.compiler.is_compiling() else scatter_scaled
        found = run(grad, upstream, positions, hidden)
    return found, *[None] * 13


divergence_op.register_autograd(divergence_backward, setup_context=save_divergence)
scatter_scaled_op = torch.library.custom_op("fastforget::scatter_scaled", scatter_scaled, mutates_args=())


@scatter_scaled_op.register_fake
def scatter_scaled_fake(grad: Tensor, factor: Tensor, positions: Tensor | None, hidden: Tensor) -> Tensor:
    """Shape and dtype of what `scatter_scaled` returns."""
    return torch.empty_like(hidden)


class DivergenceFunction(torch.autograd.Function):
    """`divergence_op` in eager mode."""

    setup_context = staticmethod(save_divergence)

    forward = staticmethod(divergence_body)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
        return divergence_backward(ctx, grads)
