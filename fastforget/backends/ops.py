"""The driver as torch.library ops, so that `torch.compile` traces through them, and autograd over the ops.

Three ops, `token_stats`, `divergence` and `state_stats`, and one more for the backward pass of each. What crosses their
border is plain: tensors, numbers and names. They take `compute_grad` from outside: inside a custom op grad mode cannot
be seen. An empty tensor stands for what is not needed, as an op returns a fixed number of them.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection, Sequence
from typing import Any

import torch
from torch import Tensor

from fastforget.backends import OUTPUTS, driver, gemm
from fastforget.backends.chunks import Against, Chunks
from fastforget.backends.paired_driver import divergence_forward
from fastforget.head import LMHead

SEPARATOR = ","  # names cross the border as one string


def on_device(body: Callable[..., Any]) -> Callable[..., Any]:
    """The body of an op, run on the device of its first tensor: Triton launches on whichever device is current."""

    @functools.wraps(body)
    def run(first: Tensor, *others: Any) -> Any:
        with torch.cuda.device_of(first):
            return body(first, *others)

    return run


def label_stats(
    hidden: Tensor,
    labels: Tensor,
    head: LMHead,
    outputs: Collection[str],
    *,
    backend: str,
    positions: Tensor | None = None,
    tail_mass: float = 0.0,
    against: Against | None = None,
) -> dict[str, Tensor]:
    """{field: (n,) or (n, D)} of the kept rows of hidden (N, D); labels (n,) are theirs.

    With `tail_mass` > 0 also `dropped_mass`; with `against` also `distance` and `pull`, as far as it has an anchor and
    centres.
    """
    wanted = {*outputs, *driver.ALWAYS}
    if "max_logit" in wanted:  # its gradient is the head's row of the argmax
        wanted.add("argmax")
    names = [name for name in OUTPUTS if name in wanted]
    names += ["dropped_mass"] * (tail_mass > 0)
    against = against or Against()
    names += ["distance"] * (against.anchor is not None) + ["pull"] * (against.centres is not None)
    wants_grad = any(tensor is not None and tensor.requires_grad for tensor in (hidden, head.weight, head.bias))
    found = token_stats_op(
        hidden,
        labels,
        positions,
        head.weight,
        head.bias,
        against.states,
        against.anchor,
        against.centres,
        against.metric,
        head.scale,
        head.softcap or 0.0,
        SEPARATOR.join(names),
        torch.is_grad_enabled() and wants_grad,
        tail_mass,
        "log_not_label" in outputs,
        backend,
    )
    fields = dict(zip(names, found, strict=False))
    return {name: value.detach() if name in driver.NOT_DIFFERENTIABLE else value for name, value in fields.items()}


@torch.library.custom_op("fastforget::token_stats", mutates_args=())
@on_device
def token_stats_op(
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
    tail_mass: float,
    whole_rows: bool,
    backend: str,
) -> list[Tensor]:
    """The fields named; then what the backward pass needs: the gradient (n, D), and the nearest centres (n,)."""
    forward = driver.label_forward(
        hidden,
        labels,
        positions,
        LMHead(weight, bias, scale, softcap or None),
        names.split(SEPARATOR),
        compute_grad,
        backend,
        tail_mass,
        whole_rows,
        Against(states, anchor, centres, metric),
    )
    unit_grad = forward.unit_grad if compute_grad else None
    fields = [forward.fields[name] for name in names.split(SEPARATOR)]
    return [*fields, or_empty(unit_grad, hidden), or_empty(forward.nearest, labels)]


@token_stats_op.register_fake
def token_stats_fake(hidden: Tensor, labels: Tensor, *others: Any) -> list[Tensor]:
    """Shapes and dtypes of what `token_stats_op` returns."""
    centres, names, compute_grad = others[5], others[9], others[10]
    dtype = gemm.compute_dtype(hidden)
    fields = []
    for name in names.split(SEPARATOR):
        shape = (len(labels), hidden.shape[1]) if name == "expected_embedding" else (len(labels),)
        fields.append(hidden.new_empty(shape, dtype=torch.long if name == "argmax" else dtype))
    unit_grad = hidden.new_empty(len(labels), hidden.shape[1], dtype=dtype) if compute_grad else None
    nearest = None if centres is None else torch.empty_like(labels)
    return [*fields, or_empty(unit_grad, hidden), or_empty(nearest, labels)]


def save_token_stats(ctx: Any, inputs: Sequence[Any], output: list[Tensor]) -> None:
    """Save what the backward op takes."""
    tensors, (metric, scale, softcap, names, _, _, _, backend) = inputs[:8], inputs[8:]
    fields = dict(zip(names.split(SEPARATOR), output, strict=False))
    argmax = fields.get("argmax")
    ctx.save_for_backward(*tensors, fields["logp"], fields["log_not_label"], argmax, *output[-2:])
    ctx.scalars = (metric, scale, softcap, backend)
    ctx.names = names.split(SEPARATOR)
    ctx.set_materialize_grads(False)


def token_stats_backward(ctx: Any, grads: list[Tensor | None]) -> tuple[Any, ...]:
    """Gradients over hidden, weight, bias and states."""
    upstream = {
        name: grad
        for name, grad in zip(ctx.names, grads, strict=False)
        if grad is not None and name not in driver.NOT_DIFFERENTIABLE
    }
    needs = [ctx.needs_input_grad[index] for index in (0, 3, 4, 5)]
    results: list[Tensor | None] = [None] * 4
    if upstream and any(needs):
        found = token_stats_backward_op(
            *ctx.saved_tensors, list(upstream.values()), SEPARATOR.join(upstream), *ctx.scalars, *needs
        )
        results = [result if need else None for result, need in zip(found, needs, strict=True)]
    hidden, weight, bias, states = results
    return hidden, None, None, weight, bias, states, *[None] * 10


token_stats_op.register_autograd(token_stats_backward, setup_context=save_token_stats)


@torch.library.custom_op("fastforget::token_stats_backward", mutates_args=())
@on_device
def token_stats_backward_op(
    hidden: Tensor,
    labels: Tensor,
    positions: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    states: Tensor | None,
    anchor: Tensor | None,
    centres: Tensor | None,
    logp: Tensor,
    log_not_label: Tensor,
    argmax: Tensor | None,
    unit_grad: Tensor,
    nearest: Tensor,
    upstream: list[Tensor],
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
    """Gradients over hidden, weight, bias and states, as far as they are needed."""
    given = dict(zip(names.split(SEPARATOR), upstream, strict=True))
    of_states: dict[str, Tensor] = {name: given.pop(name) for name in ("distance", "pull") if name in given}
    fields = {"logp": logp, "log_not_label": log_not_label}
    if argmax is not None:
        fields["argmax"] = argmax
    grad = grad_weight = grad_bias = None
    if given and (need_hidden or need_weight or need_bias):
        grad, grad_weight, grad_bias = driver.label_backward(
            hidden,
            labels,
            positions,
            LMHead(weight, bias, scale, softcap or None),
            driver.Forward(fields, unit_grad),
            given,
            need_weight,
            need_bias,
            backend,
        )
    grad = or_zeros(grad, hidden, need_hidden)
    grad_states = or_zeros(None, states, need_states)
    if of_states:
        into = grad if states is None else grad_states
        driver.states_backward(into, hidden, positions, Against(states, anchor, centres, metric), nearest, of_states)
    grad_weight, grad_bias = or_zeros(grad_weight, weight, need_weight), or_zeros(grad_bias, bias, need_bias)
    return [grad, grad_weight, grad_bias, grad_states]


@token_stats_backward_op.register_fake
def token_stats_backward_fake(hidden: Tensor, *others: Any) -> list[Tensor]:
    """Shapes and dtypes of what `token_stats_backward_op` returns."""
    weight, bias, states = others[2:5]
    return [or_zeros(None, like, need) for like, need in zip((hidden, weight, bias, states), others[-4:], strict=True)]


def divergence(
    hidden: Tensor,
    ref_hidden: Tensor,
    head: LMHead,
    kind: str,
    *,
    backend: str,
    positions: Tensor | None = None,
    labels: Tensor | None = None,
    label_shift: float = 0.0,
    tell_logp: bool = False,
) -> tuple[Tensor, Tensor]:
    """(n,) forward KL(q||p), reverse KL(p||q) or JSD of the kept rows; q is of the reference, p of the model.

    With labels (n,) of the kept rows, q is of the reference's logits with `label_shift` added at each label >= 0. With
    `tell_logp`, also the model's log p_y (n,), without a gradient; else an empty tensor.
    """
    compute_grad = torch.is_grad_enabled() and hidden.requires_grad
    weight, bias = (None if tensor is None else tensor.detach() for tensor in (head.weight, head.bias))
    scalars = (head.scale, head.softcap or 0.0, label_shift, kind, compute_grad, tell_logp, backend)
    value, _, logp = divergence_op(hidden, ref_hidden.detach(), positions, labels, weight, bias, *scalars)
    return value, logp.detach()


@torch.library.custom_op("fastforget::divergence", mutates_args=())
@on_device
def divergence_op(
    hidden: Tensor,
    ref_hidden: Tensor,
    positions: Tensor | None,
    labels: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    scale: float,
    softcap: float,
    label_shift: float,
    kind: str,
    compute_grad: bool,
    tell_logp: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """The divergence (n,); its gradient (n, D) for the backward pass; log p_y (n,) where it is to be told."""
    head = LMHead(weight, bias, scale, softcap or None)
    value, grad, logp = divergence_forward(
        hidden, ref_hidden, positions, head, kind, compute_grad, backend, labels, label_shift, tell_logp
    )
    return value, or_empty(grad, hidden), or_empty(logp, hidden)


@divergence_op.register_fake
def divergence_fake(
    hidden: Tensor, ref_hidden: Tensor, positions: Tensor | None, *others: Any
) -> tuple[Tensor, Tensor, Tensor]:
    """Shapes and dtypes of what `divergence_op` returns."""
    compute_grad, tell_logp = others[7:9]
    count, dtype = len(hidden if positions is None else positions), gemm.compute_dtype(hidden)
    grad = hidden.new_empty(count, hidden.shape[1], dtype=dtype) if compute_grad else None
    logp = hidden.new_empty(count, dtype=dtype) if tell_logp else None
    return hidden.new_empty(count, dtype=dtype), or_empty(grad, hidden), or_empty(logp, hidden)


def save_divergence(ctx: Any, inputs: Sequence[Any], output: tuple[Tensor, Tensor, Tensor]) -> None:
    """Save what the backward op takes."""
    ctx.save_for_backward(inputs[0], inputs[2], output[1])
    ctx.set_materialize_grads(False)


def divergence_backward(ctx: Any, upstream: Tensor | None, *_: Tensor | None) -> tuple[Any, ...]:
    """The gradient over hidden."""
    hidden, positions, grad = ctx.saved_tensors
    needed = upstream is not None and ctx.needs_input_grad[0]
    return divergence_backward_op(hidden, positions, grad, upstream) if needed else None, *[None] * 12


divergence_op.register_autograd(divergence_backward, setup_context=save_divergence)


@torch.library.custom_op("fastforget::divergence_backward", mutates_args=())
@on_device
def divergence_backward_op(hidden: Tensor, positions: Tensor | None, grad: Tensor, upstream: Tensor) -> Tensor:
    """The gradient over hidden (N, D)."""
    out = torch.empty_like(hidden) if positions is None else torch.zeros_like(hidden)
    Chunks(hidden, positions, LMHead(None)).scatter_scaled(grad, upstream, out)
    return out


@divergence_backward_op.register_fake
def divergence_backward_fake(hidden: Tensor, *others: Any) -> Tensor:
    """Shape and dtype of what `divergence_backward_op` returns."""
    return torch.empty_like(hidden)


def state_stats(
    hidden: Tensor, anchor: Tensor | None, centres: Tensor | None, metric: str, *, backend: str
) -> tuple[Tensor | None, Tensor | None]:
    """(distance (n,) from the anchor, pull (n,): distance from the nearest centre) of hidden (n, D).

    anchor: (n, D) or (D,); centres: (K, D); both constants, of any floating dtype. What was not given is None.
    """
    constants = [None if tensor is None else tensor.detach() for tensor in (anchor, centres)]
    distance, pull, _ = state_stats_op(hidden, *constants, metric, backend)
    return None if anchor is None else distance, None if centres is None else pull


@torch.library.custom_op("fastforget::state_stats", mutates_args=())
@on_device
def state_stats_op(
    hidden: Tensor, anchor: Tensor | None, centres: Tensor | None, metric: str, backend: str
) -> tuple[Tensor, Tensor, Tensor]:
    """distance (n,), pull (n,), and the nearest centre (n,)."""
    found = driver.state_forward(hidden, anchor, centres, metric, backend)
    distance, pull, nearest = (or_empty(found.get(name), hidden) for name in ("distance", "pull", "nearest"))
    return distance, pull, nearest.long()


@state_stats_op.register_fake
def state_stats_fake(
    hidden: Tensor, anchor: Tensor | None, centres: Tensor | None, metric: str, backend: str
) -> tuple[Tensor, Tensor, Tensor]:
    """Shapes and dtypes of what `state_stats_op` returns."""
    found = hidden.new_empty(len(hidden), dtype=gemm.compute_dtype(hidden))
    distance = or_empty(None if anchor is None else found, hidden)
    pull = or_empty(None if centres is None else torch.empty_like(found), hidden)
    return distance, pull, hidden.new_empty(0 if centres is None else len(hidden), dtype=torch.long)


def save_state_stats(ctx: Any, inputs: Sequence[Any], output: Sequence[Tensor]) -> None:
    """Save what the backward op takes."""
    hidden, anchor, centres, ctx.metric, _ = inputs
    ctx.save_for_backward(hidden, anchor, centres, output[2])
    ctx.set_materialize_grads(False)


def state_stats_backward(ctx: Any, distance: Tensor | None, pull: Tensor | None, _: Tensor | None) -> tuple[Any, ...]:
    """The gradient over hidden."""
    hidden, anchor, centres, nearest = ctx.saved_tensors
    upstream = {"distance": distance if anchor is not None else None, "pull": pull if centres is not None else None}
    given = {name: grad for name, grad in upstream.items() if grad is not None}
    if not given or not ctx.needs_input_grad[0]:
        return (None,) * 5
    names, grads = SEPARATOR.join(given), list(given.values())
    grad = state_stats_backward_op(hidden, anchor, centres, nearest, grads, names, ctx.metric)
    return grad, None, None, None, None


state_stats_op.register_autograd(state_stats_backward, setup_context=save_state_stats)


@torch.library.custom_op("fastforget::state_stats_backward", mutates_args=())
@on_device
def state_stats_backward_op(
    hidden: Tensor,
    anchor: Tensor | None,
    centres: Tensor | None,
    nearest: Tensor,
    upstream: list[Tensor],
    names: str,
    metric: str,
) -> Tensor:
    """The gradient over hidden (n, D)."""
    grad = torch.zeros_like(hidden)
    against = Against(None, anchor, centres, metric)
    given = dict(zip(names.split(SEPARATOR), upstream, strict=True))
    driver.states_backward(grad, hidden, None, against, nearest, given)
    return grad


@state_stats_backward_op.register_fake
def state_stats_backward_fake(hidden: Tensor, *others: Any) -> Tensor:
    """Shape and dtype of what `state_stats_backward_op` returns."""
    return torch.empty_like(hidden)


def or_empty(tensor: Tensor | None, like: Tensor) -> Tensor:
    """The tensor, or an empty one on the same device."""
    return like.new_empty(0) if tensor is None else tensor


def or_zeros(grad: Tensor | None, like: Tensor | None, needed: bool) -> Tensor:
    """The gradient; zeros where it is needed and there is none; empty where it is not needed."""
    if not needed or like is None:
        return torch.empty(0)
    return torch.zeros_like(like) if grad is None else grad
