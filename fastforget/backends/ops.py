"""The sweeps behind autograd (see `opaque.py`): a body that computes, what it saves, and its backward.

Fields cross the border as their names, joined by commas.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Any

import torch
from torch import Tensor

from fastforget.backends import fields as closing
from fastforget.backends import passes_of
from fastforget.backends.blocks import SweepInput
from fastforget.backends.gradients import LabelContext, label_backward, scatter_scaled, states_backward
from fastforget.backends.opaque import differentiable, opaque, or_empty, or_zeros
from fastforget.backends.products import compute_dtype
from fastforget.backends.protocol import BASIC_ACCUMULATORS, LABEL_ACCUMULATORS, KnownReference, Targets
from fastforget.backends.shard_ops import sharded_divergence, sharded_stats
from fastforget.backends.state_ops import state_stats
from fastforget.backends.sweep import coupled_sweep, label_sweep, paired_sweep
from fastforget.head import LMHead

MEASURES = ("distance", "pull")  # of hidden states; all other names are statistics


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
        if head.shard is not None:
            return sharded_stats(hidden, labels, head, outputs, positions, targets, self.name)
        wanted = {*outputs, "logp", "log_not_label"}  # what the backward pass takes, and for nothing
        wanted |= {"argmax"} if "max_logit" in outputs else set()  # whose row of the head is its gradient
        targets = targets or Targets()
        names = [name for name in closing.NAMES if name in wanted]
        names += ["distance"] * (targets.anchor is not None) + ["pull"] * (targets.centres is not None)
        # of a head that trains all gradients come from the gradient sweep, and none is kept
        keeps = torch.is_grad_enabled() and hidden.requires_grad and not head.trainable
        values = token_stats(
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
            ",".join(names),
            keeps,
            self.name,
        )
        fields = dict(zip(names, values[: len(names)], strict=True))  # Dynamo of torch 2.9 knows no other zip
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
        if head.shard is not None:
            return sharded_divergence(hidden, ref_hidden, labels, head, kind, positions, label_shift, self.name)
        weight, bias = (None if tensor is None else tensor.detach() for tensor in (head.weight, head.bias))
        value, _, logp = divergence(
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
        distance, pull, _ = state_stats(hidden, *constants, targets.metric, self.name)
        found = {"distance": distance} if targets.anchor is not None else {}
        return found | ({"pull": pull} if targets.centres is not None else {})


def split(names: str) -> list[str]:
    """The names that a string joins."""
    return names.split(",") if names else []


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
    names: str,
    compute_grad: bool,
    backend: str,
) -> list[Tensor]:
    """The fields of `names`; then what the backward takes: accumulators, unit gradient, nearest centres."""
    given = SweepInput(
        passes_of(backend, hidden.dtype),
        hidden.detach(),
        labels,
        positions,
        LMHead(weight, bias, scale, softcap or None),
    )
    targets = Targets(anchor, centres, metric, states)
    with torch.cuda.device_of(hidden):  # Triton launches on whichever device is current
        found = label_sweep(given, [name for name in split(names) if name not in MEASURES], compute_grad, targets)
    fields = dict(found.fields)
    if found.states is not None:  # an op's results must not share memory
        fields |= {name: found.states.values[index].clone() for index, name in enumerate(MEASURES)}
    nearest = None if found.states is None or centres is None else found.states.nearest
    rest = [found.accumulators, or_empty(found.unit_grad, hidden), or_empty(nearest, labels)]
    return (*(fields[name] for name in split(names)), *rest)  # type: ignore[return-value]


def token_stats_fake(hidden: Tensor, labels: Tensor, *others: Any) -> list[Tensor]:
    """Shapes and dtypes of what `token_stats_body` returns."""
    weight, centres, names, compute_grad, backend = others[1], others[5], split(others[9]), others[10], others[11]
    count, dtype = len(labels), compute_dtype(hidden)
    needs = {name: closing.BY_NAME[name].needs if name not in MEASURES else "state" for name in names}
    found = []
    for name in names:
        shape = (count, hidden.shape[1]) if needs[name] == "embedding" else (count,)
        found.append(hidden.new_empty(shape, dtype=torch.long if closing.EMPTY.get(name) == -1 else dtype))
    rows = len(LABEL_ACCUMULATORS) if "moments" in needs.values() else BASIC_ACCUMULATORS
    accumulators = passes_of(backend, hidden.dtype).accumulator_dtype(dtype)
    kept_grad = compute_grad and weight is not None
    grad = hidden.new_empty((count, hidden.shape[1]), dtype=dtype) if kept_grad else None
    nearest = None if centres is None else torch.empty_like(labels)
    rest = [hidden.new_empty((rows, count), dtype=accumulators), or_empty(grad, hidden), or_empty(nearest, labels)]
    return [*found, *rest]


def save_token_stats(ctx: Any, inputs: Sequence[Any], output: Sequence[Tensor]) -> None:
    """Save what the backward takes."""
    tensors, (metric, scale, softcap, names, _, backend) = inputs[:8], inputs[8:]
    ctx.names = split(names)
    fields = dict(zip(ctx.names, output[: len(ctx.names)], strict=True))
    kept = [fields.get(name) for name in ("argmax", "expected_embedding", "logp", "log_not_label")]
    ctx.save_for_backward(*tensors, *kept, *output[-3:])
    ctx.scalars = (metric, scale, softcap, backend)
    ctx.set_materialize_grads(False)


def token_stats_grad(ctx: Any, grads: Sequence[Tensor | None], compute: Callable[..., Any]) -> tuple[Any, ...]:
    """Gradients over hidden, weight, bias and states."""
    given = {
        name: grad
        for name, grad in zip(ctx.names, grads[: len(ctx.names)], strict=True)
        if grad is not None and (name in closing.DIFFERENTIABLE or name in MEASURES)
    }
    needs = [ctx.needs_input_grad[index] for index in (0, 3, 4, 5)]
    results: list[Tensor | None] = [None] * 4
    if given and any(needs):
        found = compute(*ctx.saved_tensors, [*given.values()], ",".join(given), *ctx.scalars, *needs)
        results = [result if need else None for result, need in zip(found, needs, strict=True)]
    hidden, weight, bias, states = results
    return hidden, None, None, weight, bias, states, *[None] * 8


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
    names: str,
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
    fields = dict(zip(split(names), upstream, strict=True))
    of_states = {name: fields.pop(name) for name in MEASURES if name in fields}
    grad = grad_weight = grad_bias = None
    with torch.cuda.device_of(hidden):
        if fields and (need_hidden or need_weight or need_bias):
            head = LMHead(weight, bias, scale, softcap or None)
            given = SweepInput(passes_of(backend, hidden.dtype), hidden, labels, positions, head)
            kept = unit_grad if unit_grad.dim() == 2 else None
            context = LabelContext(given, accumulators, logp, log_not, kept, argmax, embedding)
            grad, grad_weight, grad_bias = label_backward(context, fields, need_weight, need_bias)
        grad_states = or_zeros(None, states, need_states)
        into_hidden = states is None and need_hidden
        grad = or_zeros(grad, hidden, need_hidden)
        if of_states and (into_hidden or need_states):
            targets = Targets(anchor, centres, metric, states)
            states_backward(grad if states is None else grad_states, hidden, positions, targets, nearest, of_states)
    return [grad, or_zeros(grad_weight, weight, need_weight), or_zeros(grad_bias, bias, need_bias), grad_states]


def token_stats_backward_fake(hidden: Tensor, *others: Any) -> list[Tensor]:
    """Shapes and dtypes of what `token_stats_backward_body` returns."""
    weight, bias, states = others[2:5]
    if weight is None:  # logits, whose gradient has contiguous rows
        hidden = torch.empty_like(hidden, memory_format=torch.contiguous_format)
    likes = (hidden, weight, bias, states)
    return [or_zeros(None, like, need) for like, need in zip(likes, others[-4:], strict=True)]


token_stats_backward = opaque("token_stats_backward", token_stats_backward_body, token_stats_backward_fake)
token_stats = differentiable(
    "token_stats", token_stats_body, token_stats_fake, save_token_stats, token_stats_grad, token_stats_backward
)


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
    if labels is None:
        count = len(hidden if positions is None else positions)
        labels = torch.full((count,), -1, dtype=torch.int64, device=hidden.device)
    head = LMHead(weight, bias, scale, softcap or None)
    given = SweepInput(passes_of(backend, hidden.dtype), hidden.detach(), labels, positions, head)
    known = None
    if others_embedding is not None and others_argmax is not None:
        known = KnownReference(others_embedding, others_argmax)
    with torch.cuda.device_of(hidden):
        if kind == "forward_kl":
            found = paired_sweep(given, ref_hidden, compute_grad, label_shift, known)
        else:
            found = coupled_sweep(
                given, ref_hidden, "jsd" if kind == "jsd" else "reverse_kl", compute_grad, label_shift
            )
    return found.value, or_empty(found.grad, hidden), found.logp  # type: ignore[return-value]


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


def divergence_grad(ctx: Any, grads: Sequence[Tensor | None], compute: Callable[..., Any]) -> tuple[Any, ...]:
    """The gradient over hidden."""
    hidden, positions, grad = ctx.saved_tensors
    upstream = grads[0]
    found = None
    if upstream is not None and ctx.needs_input_grad[0]:
        found = compute(grad, upstream, positions, hidden)
    return found, *[None] * 13


def scatter_scaled_fake(grad: Tensor, factor: Tensor, positions: Tensor | None, hidden: Tensor) -> Tensor:
    """Shape and dtype of what `scatter_scaled` returns."""
    return torch.empty_like(hidden)


scatter_scaled_rows = opaque("scatter_scaled", scatter_scaled, scatter_scaled_fake)
divergence = differentiable(
    "divergence", divergence_body, divergence_fake, save_divergence, divergence_grad, scatter_scaled_rows
)
