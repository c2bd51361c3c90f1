"""GEMM, rows, GEMM: statistics and their gradients without ever holding N x V logits.

For a chunk of tokens that fits a byte budget, the products with the head are computed into a reused buffer, a backend's
row pass reads off the statistics and overwrites the row with a gradient over the logits, and a second product with the
head turns that row into a gradient over the hidden states. This happens in the *forward* pass: what is kept is (n, D),
and the backward pass only scales it by whatever the loss above turns out to be. Only where that cannot serve (entropy,
expected embedding, a head that trains) does the backward pass compute the products again, chunk by chunk.

A backend is a module with the row passes `label_pass`, `paired_pass`, `gradient_pass` and `row_dtype`; `chunked` has
them in torch, `native` in C++, `triton` as kernels. It may have more: `tiled_label_pass`, which does both products and
what is between them a tile of vocabulary at a time, wherever no row of logits has to be whole; `skipping_product`, for
`tail_mass`; and `state_pass`, for distances. Nothing here looks at a value on the device: no synchronisation.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastforget.backends import gemm, states
from fastforget.backends.chunks import Against, Chunks, LabelPass, passes_of
from fastforget.head import LMHead

NOT_DIFFERENTIABLE = {"logp_mean", "logp_var", "others_entropy", "argmax"}
NEEDS_RECOMPUTE = {"entropy", "expected_embedding"}
ALWAYS = ("logp", "lse", "log_not_label")  # what the backward pass needs, beside what was asked for


@dataclass
class Forward:
    """What the forward pass computed: `fields` by name, and what the backward pass needs."""

    fields: dict[str, Tensor]
    unit_grad: Tensor | None  # (n, D): (unit row - onehot(label)) @ scale W
    nearest: Tensor | None = None  # (n,): the nearest centre


def label_forward(
    hidden: Tensor,
    labels: Tensor,
    positions: Tensor | None,
    head: LMHead,
    names: Collection[str],
    compute_grad: bool,
    backend: str,
    tail_mass: float = 0.0,
    whole_rows: bool = True,
    against: Against | None = None,
) -> Forward:
    """Statistics of the kept rows of hidden (N, D); labels (n,) are those of the kept rows.

    `whole_rows`: the gradient of log(1 - p_y) is wanted too. It is p_y times the unit row, that of logp 1 - p_y times:
    this is what counts against `tail_mass`.
    """
    passes = passes_of(backend, gemm.compute_dtype(hidden))
    want_unit = compute_grad or "expected_embedding" in names
    skipping = tail_mass > 0 and compute_grad and hasattr(passes, "skipping_product") and not head.is_identity
    skipping = skipping and "expected_embedding" not in names  # a value, and exact
    skipping = skipping and head.weight.dtype.itemsize <= 4
    tiled = hasattr(passes, "tiled_label_pass") and not skipping and not head.is_identity
    chunks = Chunks(hidden, positions, head, tiled=tiled)
    unit_grad = chunks.empty_states() if want_unit else None
    expected = chunks.empty_states() if "expected_embedding" in names else None
    dropped = torch.zeros(chunks.count, dtype=chunks.dtype, device=hidden.device) if tail_mass > 0 else None
    parts: dict[str, list[Tensor]] = {}
    product = chunks.buffer()
    # rows in 16 bit are good for gradients, which are rounded to it anyway; an expected embedding is a value
    row_dtype = product.dtype if tiled or expected is not None else passes.row_dtype(head, hidden)
    written = product if row_dtype == product.dtype or not want_unit else chunks.buffer(row_dtype)
    for rows in chunks:
        count = rows.stop - rows.start
        state = chunks.of(hidden, rows)
        grad = None if unit_grad is None else unit_grad[rows]
        found: LabelPass
        if tiled:
            found = passes.tiled_label_pass(state, labels[rows], head, names, product, grad)
        else:
            gemm.product_into(product[:count], state, head)
            measured = {"against": chunks.against(against, rows)} if against and passes.MEASURES_STATES else {}
            found = passes.label_pass(
                product[:count],
                labels[rows],
                head,
                names,
                written[:count] if want_unit else None,
                padded=chunks.padded,
                masses=skipping,
                **measured,
            )
        for name, value in {**found.fields, **found.states}.items():
            parts.setdefault(name, []).append(value)
        if grad is None:
            continue
        if skipping:
            weight = None if whole_rows else found.fields["log_not_label"].exp()
            dropped[rows] = passes.skipping_product(found, labels[rows], head, weight, tail_mass, out=grad)  # type: ignore[index]
        elif not tiled:
            assert found.row is not None
            gemm.rows_to_hidden(found.row, head, out=grad)
        if found.row_scale is not None:
            grad.div_(found.row_scale[:, None])
        if expected is not None:
            torch.mul(grad, found.fields["log_not_label"].exp()[:, None], out=expected[rows])
            gemm.add_head_rows(expected[rows], labels[rows], found.fields["logp"].exp(), head)
        # The label's -1 is one row of the head: in the product, the others' small terms would be rounded against it
        label_slope = torch.ones_like(found.fields["lse"]) if found.label_slope is None else found.label_slope
        gemm.add_head_rows(grad, labels[rows], -label_slope, head)
    chunks.give_back()
    fields = {name: torch.cat(part) for name, part in parts.items()}
    if chunks.count == 0:
        fields = empty_fields(names, chunks.dtype, hidden.device)
    if expected is not None:
        fields["expected_embedding"] = expected
    if against and not {"distance", "pull"} & set(fields):  # no part of this backend's row pass, or there was no row
        fields |= measure_states(chunks, against, backend)
    if dropped is not None:
        fields["dropped_mass"] = dropped
    return Forward(fields, unit_grad, fields.pop("nearest", None))


def measure_states(chunks: Chunks, against: Against, backend: str) -> dict[str, Tensor]:
    """`distance`, `pull` and `nearest` (n,) of the kept rows, where the label pass did not measure them."""
    parts = []
    for rows in list(chunks.narrow(against.states)) or [slice(0, 0)]:
        part = chunks.against(against, rows)
        assert part.states is not None
        parts.append(state_forward(part.states, part.anchor, part.centres, part.metric, backend))
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def empty_fields(names: Collection[str], dtype: torch.dtype, device: torch.device) -> dict[str, Tensor]:
    """The fields of no token at all."""
    fields = {name: torch.empty(0, dtype=dtype, device=device) for name in {*names, *ALWAYS} - {"expected_embedding"}}
    if "argmax" in fields:
        fields["argmax"] = fields["argmax"].long()
    return fields


def label_backward(
    hidden: Tensor,
    labels: Tensor,
    positions: Tensor | None,
    head: LMHead,
    forward: Forward,
    upstream: dict[str, Tensor],
    train_weight: bool,
    train_bias: bool,
    backend: str,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Gradients over hidden (N, D) and over a head that trains, from the upstream gradients of the fields.

    Those of distance and pull are `states_backward`'s.
    """
    chunks = Chunks(hidden, positions, head)
    logp, log_not = forward.fields["logp"], forward.fields["log_not_label"]
    argmax = forward.fields.get("argmax")
    capped_mean = "logit_mean" in upstream and head.softcap is not None
    if train_weight or train_bias or capped_mean or NEEDS_RECOMPUTE & set(upstream):
        kept, grad_weight, grad_bias = recompute(
            chunks, labels, logp, log_not, argmax, upstream, train_weight, train_bias, backend
        )
        if positions is None:
            return torch.empty_like(hidden).copy_(kept), grad_weight, grad_bias  # its strides are what was promised
        grad = torch.zeros_like(hidden)
        chunks.scatter_scaled(kept, torch.ones_like(logp), grad)
        return grad, grad_weight, grad_bias
    assert forward.unit_grad is not None
    grad = torch.empty_like(hidden) if positions is None else torch.zeros_like(hidden)
    factor = unit_coefficient(upstream, logp, log_not)
    mean_row = None
    if "logit_mean" in upstream and not head.is_identity:
        mean_row = head.scale * head.weight.mean(dim=0, dtype=factor.dtype)
    for rows in chunks.narrow():
        part = forward.unit_grad[rows] * factor[rows, None]
        add_direct_gradients(part, chunks, rows, labels, argmax, upstream, mean_row)
        chunks.put(part, rows, grad)
    return grad, None, None


def state_forward(
    hidden: Tensor, anchor: Tensor | None, centres: Tensor | None, metric: str, backend: str
) -> dict[str, Tensor]:
    """`distance`, `pull` and `nearest` (n,) of any layer's states, as far as there are an anchor and centres."""
    passes = passes_of(backend, gemm.compute_dtype(hidden))
    measure = getattr(passes, "state_pass", states.measure)
    return measure(hidden, None, anchor, centres, metric)


def states_backward(
    grad: Tensor,
    hidden: Tensor,
    positions: Tensor | None,
    against: Against,
    nearest: Tensor,
    upstream: dict[str, Tensor],
) -> None:
    """Add the gradients of `distance` and `pull` to `grad` (N, D)."""
    measured = hidden if against.states is None else against.states
    for name, points, index in (("distance", against.anchor, None), ("pull", against.centres, nearest)):
        if name in upstream and points is not None:
            states.add_gradient(grad, measured, positions, points, index, against.metric, upstream[name])


def unit_coefficient(upstream: dict[str, Tensor], logp: Tensor, log_not: Tensor) -> Tensor:
    """The unit row's factor: d logp = -(1 - p_y) unit, d lse = (1 - p_y) unit + onehot, d log(1 - p_y) = p_y unit."""
    zero = torch.zeros_like(logp)
    outer = upstream.get("lse", zero) - upstream.get("logp", zero)
    return outer * log_not.exp() + upstream.get("log_not_label", zero) * logp.exp()


def add_direct_gradients(
    grad: Tensor,
    chunks: Chunks,
    rows: slice,
    labels: Tensor,
    argmax: Tensor | None,
    upstream: dict[str, Tensor],
    mean_row: Tensor | None,
) -> None:
    """Add, for some kept rows, the gradients that are single rows of the head (label_logit, lse's label part,
    max_logit) or the mean of all."""
    head = chunks.head
    for index, name in ((labels, "lse"), (labels, "label_logit"), (argmax, "max_logit")):
        if name not in upstream or index is None:
            continue
        coefficient = upstream[name][rows]
        if head.softcap is not None:
            logit = head_logit(head, chunks.of(chunks.hidden, rows), index[rows])
            coefficient = coefficient * (1.0 - (logit / head.softcap).square())
        gemm.add_head_rows(grad, index[rows], coefficient, head)
    if "logit_mean" in upstream:
        coefficient = upstream["logit_mean"][rows, None]
        grad += coefficient / grad.shape[1] if mean_row is None else coefficient * mean_row


def head_logit(head: LMHead, hidden: Tensor, index: Tensor) -> Tensor:
    """The capped logit (n,) of one token a row."""
    dtype = gemm.compute_dtype(hidden)
    assert head.softcap is not None
    logit = (hidden.to(dtype) * head.weight[index].to(dtype)).sum(dim=1) * head.scale
    if head.bias is not None:
        logit = logit + head.bias[index].to(dtype)
    return torch.tanh(logit / head.softcap) * head.softcap


def recompute(
    chunks: Chunks,
    labels: Tensor,
    logp: Tensor,
    log_not: Tensor,
    argmax: Tensor | None,
    upstream: dict[str, Tensor],
    train_weight: bool,
    train_bias: bool,
    backend: str,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Gradients over hidden states and a trainable head for any mix of upstream gradients, by one more logits pass."""
    head, hidden, dtype = chunks.head, chunks.hidden, chunks.dtype
    passes = passes_of(backend, dtype)
    grad_hidden = chunks.empty_states()
    grad_weight = torch.zeros_like(head.weight, dtype=dtype) if train_weight else None
    grad_bias = torch.zeros(chunks.vocabulary, dtype=dtype, device=hidden.device) if train_bias else None
    embedding_grad = upstream.get("expected_embedding")
    coefficients = {name: upstream[name] for name in upstream if name != "expected_embedding"}
    coefficients.pop("logp", None)
    coefficients.pop("log_not_label", None)
    coefficients["unit"] = unit_coefficient({**upstream, "lse": torch.zeros_like(logp)}, logp, log_not)
    product = chunks.buffer()
    projected: Any = chunks.buffer() if embedding_grad is not None else None
    # a head that trains gets its gradient from rows in float32; float16 rows would need a scale that is not known
    narrow = passes.row_dtype(head, hidden)
    out_dtype = narrow if narrow == torch.bfloat16 and not (train_weight or train_bias) else dtype
    written = product if out_dtype == product.dtype else chunks.buffer(out_dtype)
    for rows in chunks:
        count = rows.stop - rows.start
        state = chunks.of(hidden, rows)
        gemm.product_into(product[:count], state, head)
        along = None
        if embedding_grad is not None:
            along = projected[:count]
            gemm.product_into(along, embedding_grad[rows].to(dtype), head)
            if grad_weight is not None:  # tau is itself a product with the weight
                probs = torch.softmax(gemm.finish_logits_(product[:count].clone(), head), dim=1)
                grad_weight.addmm_(probs.T, embedding_grad[rows].to(dtype), alpha=head.scale)
        row = passes.gradient_pass(
            product[:count],
            labels[rows],
            head,
            {name: value[rows] for name, value in coefficients.items()},
            argmax=None if argmax is None else argmax[rows],
            projected=along,
            out=written[:count],
            padded=chunks.padded,
        )
        gemm.rows_to_hidden(row, head, out=grad_hidden[rows])
        if grad_weight is not None:
            gemm.rows_to_weight(row, state, head, out=grad_weight)
        if grad_bias is not None:
            grad_bias += row.sum(dim=0)
    chunks.give_back()
    if grad_weight is not None:
        grad_weight = grad_weight.to(head.weight.dtype)
    if grad_bias is not None and head.bias is not None:
        grad_bias = grad_bias.to(head.bias.dtype)
    return grad_hidden, grad_weight, grad_bias
