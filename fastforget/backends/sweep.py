"""The sweep: statistics and gradients over the hidden states without ever holding N x V logits, on every backend.

    for a block of rows                                      (about 1,000: they keep the products busy)
        for a tile of the vocabulary                         (it stays in a cache)
            product 1   logits of the tile = states @ W.T
            a pass      accumulators brought up to date; the logits overwritten with a row for product 2
            product 2   grad += row @ W

`label_sweep` costs two products, `paired_sweep` four (three where the reference's embedding is known), and what needs
the normaliser inside the row itself a second sweep: `gradient_sweep` (entropy, expected embedding, a head that trains,
logits that a model has produced) and the second half of `coupled_sweep` (reverse KL, JSD). Gradients are computed in
the forward pass wherever they are the upstream gradient times a vector that is known then.

Nothing here looks at a value on the device: no synchronisation.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fastforget.backends import fields as closing
from fastforget.backends import tiling
from fastforget.backends.blocks import StateMeasures, StateRows, SweepInput, Tiling
from fastforget.backends.combine_shards import share_label, share_paired
from fastforget.backends.products import accumulate, add_head_rows, compute_dtype, head_logit, label_slope, product
from fastforget.backends.protocol import (
    BASIC_ACCUMULATORS,
    COUPLED_ACCUMULATORS,
    FLOAT16_SCALE,
    LABEL_ACCUMULATORS,
    PAIRED_ACCUMULATORS,
    CoupledBlock,
    Coupling,
    GradientBlock,
    KnownReference,
    LabelBlock,
    PairedBlock,
    Targets,
)
from fastforget.head import LMHead


@dataclass(frozen=True)
class LabelSweep:
    """What a label sweep found of n rows."""

    accumulators: Tensor  # (LABEL_ACCUMULATORS or the basic ones, n)
    fields: dict[str, Tensor]  # (n,), or (n, D) for embeddings; float32 (float64), or int64
    unit_grad: Tensor | None  # (n, D) scale * (the others' softmax - onehot(y)) @ W; see `fields.unit_factor`
    states: StateMeasures | None


def label_sweep(
    given: SweepInput, names: Collection[str], compute_grad: bool, targets: Targets | None = None
) -> LabelSweep:
    """Statistics of the kept rows.

    Two products; one where neither a gradient nor an embedding is wanted. Of logits there is no unit gradient: theirs
    is `gradient_sweep`'s.
    """
    embeddings = [name for name in names if closing.BY_NAME[name].needs == "embedding"]
    writes = (compute_grad or bool(embeddings)) and not given.head.is_identity
    row_dtype = given.written_dtype() if writes else None
    if embeddings:  # values, which are not to be rounded to 16 bit on the way
        row_dtype = compute_dtype(given.hidden)
    plan = Tiling(given, row_dtype=row_dtype)
    moments = any(closing.BY_NAME[name].needs == "moments" for name in names)
    accumulators = plan.empty_accumulators(len(LABEL_ACCUMULATORS) if moments else BASIC_ACCUMULATORS)
    grad = plan.empty_states() if writes else None
    states_of = StateRows(given.hidden, plan.kept, targets) if targets else None
    labels = plan.head.own_labels(given.labels)
    found: dict[str, list[Tensor]] = {}
    for rows in plan.blocks():
        states = plan.states(given.hidden, rows)
        block = LabelBlock(
            labels[rows],
            accumulators[:, rows],
            None if grad is None else grad[rows],
            None if states_of is None else states_of.block(rows),
        )
        tile_states: dict[str, Tensor] = {}
        for views, weight in plan.tiles(len(states)):
            logits = product(states, weight, views.products[0])
            closing.update_tile_statistics(tile_states, names, views.tile, logits)
            written = None if block.grad is None else views.rows[0]
            given.passes.label_tile(views.tile, logits, written, block)
            if block.grad is not None:
                accumulate(views.rows[0], weight, block.grad, views.tile.first == 0)
        for name, state in tile_states.items():
            found.setdefault(name, []).append(closing.TILE_STATISTICS[name].finish(state))
    shard, vocabulary = plan.head.shard, plan.vocabulary
    if shard is not None:
        accumulators, vocabulary = share_label(accumulators, grad, shard), shard.vocabulary
    fields = closing.label_fields(accumulators, given.labels, names, vocabulary)
    for name in names:
        if closing.BY_NAME[name].needs == "tiles":
            fields[name] = torch.cat(found[name]) if name in found else accumulators.new_empty(0)
    for name, value in fields.items():  # an op's results must not share memory, and the label's logit is an accumulator
        fields[name] = value if value.dtype == torch.int64 else value.to(plan.dtype, copy=name == "label_logit")
    if grad is not None:
        close_label_(grad, accumulators, labels, plan, embeddings, fields)
    measures = None if states_of is None else states_of.measures
    return LabelSweep(accumulators, fields, grad if compute_grad else None, measures)


def close_label_(
    grad: Tensor, accumulators: Tensor, labels: Tensor, plan: Tiling, embeddings: list[str], fields: dict[str, Tensor]
) -> None:
    """Turn the sum of weights times W into the unit gradient, in place, and add the embeddings to the fields."""
    head, dtype = plan.head, plan.dtype
    total = (accumulators[1] + accumulators[2]).double()
    share = torch.where(total == 0, 0.0, head.scale / total)
    share = (share / FLOAT16_SCALE if plan.row_dtype == torch.float16 else share).to(dtype)
    slope = label_slope(accumulators[3], head).to(dtype)
    for name in embeddings:
        fields[name] = torch.empty_like(grad)
    for rows in tiling.state_blocks(len(grad), grad):
        part = grad[rows].mul_(share[rows, None])
        if "others_embedding" in embeddings:
            fields["others_embedding"][rows] = part
        if "expected_embedding" in embeddings:
            found = closing.LabelResult.of(accumulators[:, rows])
            expected = torch.mul(part, found.log_not.exp().to(dtype)[:, None], out=fields["expected_embedding"][rows])
            add_head_rows(expected, labels[rows], found.logp.exp(), head)
        # the label's -1 is one row of the head: in the product, the others' small terms would be rounded against it
        if head.shard is None:
            add_head_rows(part, labels[rows], -slope[rows], head)
        else:
            add_label_rows(part, labels[rows], -slope[rows], head)
    if head.shard is not None:
        head.shard.add_up(grad)


@dataclass(frozen=True)
class DivergenceSweep:
    """A divergence (n,) of the kept rows, its gradient (n, D) over their states, log p_y (n,), 0 without a label."""

    value: Tensor
    grad: Tensor | None
    logp: Tensor


def paired_sweep(
    given: SweepInput,
    ref_hidden: Tensor,
    compute_grad: bool,
    label_shift: float = 0.0,
    known: KnownReference | None = None,
) -> DivergenceSweep:
    """Forward KL(q||p) of the kept rows of hidden from those of ref_hidden (N, D), q with its label's logit shifted.

    Without a label in a row, `known` is of all tokens' embedding and argmax.
    """
    head = given.head
    row_dtype = given.written_dtype() if compute_grad else None
    if head.softcap is not None or head.is_identity or not compute_grad:
        known = None  # under a softcap rows carry the policy's slopes, which the reference's embedding knows nothing of
    plan = Tiling(given, buffers=2, row_dtype=row_dtype)
    accumulators = plan.empty_accumulators(len(PAIRED_ACCUMULATORS))
    value, logp = (accumulators.new_empty(plan.kept.count, dtype=plan.dtype) for _ in range(2))
    grad = plan.empty_states() if compute_grad else None
    embedding = plan.empty_states(plan.shape.rows) if compute_grad and known is None else None
    labels = head.own_labels(given.labels)
    for rows in plan.blocks():
        policy, reference = plan.states(given.hidden, rows), plan.states(ref_hidden, rows)
        shift = None
        if known is not None:
            likeliest = known.others_argmax[rows]
            shift = head_logit(head, policy, likeliest) - head_logit(head, reference, likeliest)
        block = PairedBlock(
            labels[rows],
            accumulators[:, rows],
            shift,
            None if grad is None else grad[rows],
            None if embedding is None else embedding[: len(policy)],
        )
        for views, weight in plan.tiles(len(policy)):
            logits = product(policy, weight, views.products[0]), product(reference, weight, views.products[1])
            row = None if block.grad is None else views.rows[0]
            reference_row = None if block.reference_grad is None else views.rows[1]
            given.passes.paired_tile(views.tile, *logits, row, reference_row, block)
            if block.grad is not None:
                accumulate(views.rows[0], weight, block.grad, views.tile.first == 0)
            if block.reference_grad is not None:
                accumulate(views.rows[1], weight, block.reference_grad, views.tile.first == 0)
        if head.shard is not None:
            block = share_paired(block, head.shard)
        result = closing.paired_result(block.accumulators, given.labels[rows], label_shift, row_dtype == torch.float16)
        value[rows], logp[rows] = result.value, result.logp
        if block.grad is not None:
            close_paired_(block, result, head, None if known is None else known.others_embedding[rows])
    if head.shard is not None and grad is not None:
        head.shard.add_up(grad)
    return DivergenceSweep(value, grad, logp)


def close_paired_(block: PairedBlock, result: closing.PairedResult, head: LMHead, known: Tensor | None) -> None:
    """Turn S1 into the gradient of KL over the states, in place."""
    grad = block.grad
    assert grad is not None
    grad.mul_((head.scale * result.rows).to(grad.dtype)[:, None])
    if known is not None:  # the head's scale is in it
        grad.addcmul_(known.to(grad.dtype), result.reference.to(grad.dtype)[:, None])
    elif block.reference_grad is not None:
        total = result.reference_total
        factor = torch.where(total == 0, 0.0, head.scale * result.reference / total)
        grad.addcmul_(block.reference_grad, factor.to(grad.dtype)[:, None])
    add_label_rows(grad, block.labels, result.label * label_slope(block.accumulators[9], head), head)


def add_label_rows(grad: Tensor, labels: Tensor, coefficient: Tensor, head: LMHead) -> None:
    """Add `coefficient * scale * W[label]` to grad (r, D) where there is a label, and its row in this process."""
    if head.shard is not None:
        labels = labels.where(labels < len(head.weight), -1)
    add_head_rows(grad, labels.clamp(min=0), torch.where(labels >= 0, coefficient, 0.0), head)


def coupled_sweep(
    given: SweepInput, ref_hidden: Tensor, kind: Coupling, compute_grad: bool, label_shift: float = 0.0
) -> DivergenceSweep:
    """Reverse KL(p||q) or JSD, as `paired_sweep`; both normalisers come from label sweeps of their own.

    Two products for these, four more (two without a gradient) here.
    """
    head = given.head
    any_label = replace(given, labels=given.labels.clamp(min=0))
    policy_side, reference_side = (
        label_sweep(replace(any_label, hidden=states), ("argmax",), False) for states in (given.hidden, ref_hidden)
    )
    row_dtype = None
    if compute_grad:  # p x is not bounded as float16 would have it
        row_dtype = given.written_dtype()
        row_dtype = torch.float32 if row_dtype == torch.float16 else row_dtype
    plan = Tiling(given, buffers=2, row_dtype=row_dtype)
    accumulators = plan.empty_accumulators(len(COUPLED_ACCUMULATORS))
    value, logp = (accumulators.new_empty(plan.kept.count, dtype=plan.dtype) for _ in range(2))
    grad = plan.empty_states() if compute_grad else None
    mean = plan.empty_states(plan.shape.rows) if compute_grad else None
    for rows in plan.blocks():
        policy, reference = plan.states(given.hidden, rows), plan.states(ref_hidden, rows)
        likeliest = policy_side.fields["argmax"][rows]
        labelled = closing.label_normalisers(
            policy_side.accumulators[:, rows],
            reference_side.accumulators[:, rows],
            given.labels[rows] >= 0,
            label_shift,
            (head_logit(head, policy, likeliest), head_logit(head, reference, likeliest)),
            kind,
        )
        block = CoupledBlock(kind, given.labels[rows], labelled.normalisers.to(plan.dtype), accumulators[:, rows])
        for views, weight in plan.tiles(len(policy)):
            logits = product(policy, weight, views.products[0]), product(reference, weight, views.products[1])
            written = (None, None) if grad is None else views.rows
            given.passes.coupled_tile(views.tile, *logits, written[0], written[1], block)
            if grad is not None and mean is not None:
                accumulate(views.rows[0], weight, grad[rows], views.tile.first == 0)
                accumulate(views.rows[1], weight, mean[: len(policy)], views.tile.first == 0)
        result = closing.coupled_result(block.accumulators, labelled, block.labels, kind)
        value[rows], logp[rows] = result.value, labelled.log_p
        if grad is not None and mean is not None:
            part = grad[rows].mul_(result.rows * head.scale)
            part.addcmul_(mean[: len(policy)], (head.scale * result.policy).to(part.dtype)[:, None])
            add_label_rows(part, block.labels, result.label * label_slope(labelled.policy_label, head), head)
    return DivergenceSweep(value, grad, logp)


@dataclass(frozen=True)
class Trained:
    """Gradients of a head that trains, float32 (float64), which a gradient sweep adds to; None for what does not."""

    weight: Tensor | None = None
    bias: Tensor | None = None


def gradient_sweep(
    given: SweepInput,
    accumulators: Tensor,
    argmax: Tensor | None,
    upstream: Mapping[str, Tensor],
    out: Tensor,
    embedding: tuple[Tensor, Tensor] | None = None,
    trained: Trained | None = None,
) -> None:
    """Write the gradient over hidden (N, D), or over logits (N, V), into `out`, for any mix of upstream gradients (n,).

    Rows that are not kept are left as they are. Two products more (three with `embedding`, another for each of the
    head's gradients); none for logits, which `out` may be. `embedding`: the expected embedding (n, D) and its upstream
    gradient.
    """
    head, trained = given.head, trained or Trained()
    row_dtype = given.written_dtype()
    if row_dtype != torch.bfloat16 or trained.weight is not None or trained.bias is not None:
        row_dtype = compute_dtype(given.hidden)  # float16 would need a scale that is not known
    plan = Tiling(given, 1 if embedding is None else 2, None if head.is_identity else row_dtype)
    projected_mean = None if embedding is None else (embedding[0] * embedding[1]).sum(dim=1)
    coefficients = closing.gradient_coefficients(accumulators, upstream, projected_mean, plan.vocabulary)
    coefficients = coefficients.to(plan.dtype)
    argmax = torch.full_like(given.labels, -1) if argmax is None else argmax
    for rows in plan.blocks():
        states = plan.states(given.hidden, rows)
        block = GradientBlock(given.labels[rows], argmax[rows], coefficients[:, rows].contiguous())
        grad = plan.empty_states(0 if head.is_identity else len(states))
        along = None if embedding is None else embedding[1][rows].to(plan.operands)
        for views, weight in plan.tiles(len(states)):
            logits = product(states, weight, views.products[0])
            if weight is None:  # written where they belong, or over a copy of the kept rows
                written = out[rows] if given.positions is None else logits
                given.passes.gradient_tile(views.tile, logits, None, written, block)
                if given.positions is not None:
                    plan.kept.put(written, rows, out)
                continue
            projected = None if along is None else product(along, weight, views.products[1])
            if along is not None and trained.weight is not None:
                closing.add_embedding_gradient_(
                    trained.weight[views.columns], views.tile, logits, along, head.scale, block
                )
            row = views.rows[0]
            given.passes.gradient_tile(views.tile, logits, projected, row, block)
            accumulate(row, weight, grad, views.tile.first == 0)
            if trained.weight is not None:
                trained.weight[views.columns].addmm_(row.T, states.to(row.dtype), alpha=head.scale)
            if trained.bias is not None:
                trained.bias[views.columns] += row.sum(dim=0)
        if not head.is_identity:
            plan.kept.put(grad.mul_(head.scale), rows, out)
