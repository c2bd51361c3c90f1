"""GEMM, rows, GEMM in plain torch: statistics and their gradients without ever holding N x V logits.

For a chunk of tokens that fits a byte budget, the logits are computed into a reused buffer, the row pass reads off
the statistics and overwrites the row with a gradient over the logits, and a second product with the head turns that
row into a gradient over the hidden states. This happens in the *forward* pass: what is kept is (n, D), and the
backward pass only scales it by whatever the loss above turns out to be. Only where that cannot serve (entropy,
expected embedding, a head that trains) does the backward pass recompute the logits, chunk by chunk.

The label row that is written is

    unit = softmax over the *other* tokens - onehot(label)        so that   p - onehot = (1 - p_y) * unit

One row thus serves the NLL (times 1 - p_y), log(1 - p_y) (times p_y) and unlikelihood, and stays O(1) on memorised
tokens, where p - onehot itself would underflow. Its -1 is one row of the head, and is added after the product: inside
it, the small terms of the other tokens would be rounded against it.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from fastforget.backends import OUTPUTS, gemm
from fastforget.backends.paired import divergence  # noqa: F401 - the backend's second function
from fastforget.backends.states import state_stats  # noqa: F401 - and its third
from fastforget.head import LMHead

NOT_DIFFERENTIABLE = {"logp_mean", "logp_var", "argmax"}
NEEDS_RECOMPUTE = {"entropy", "expected_embedding"}


def label_stats(hidden: Tensor, labels: Tensor, head: LMHead, outputs: Collection[str]) -> dict[str, Tensor]:
    """Per-token statistics; see `fastforget.stats.token_stats` for the fields."""
    names = tuple(name for name in OUTPUTS if name in outputs or name in ("logp", "lse"))
    compute_grad = torch.is_grad_enabled() and (hidden.requires_grad or head.trainable)
    fields = LabelStats.apply(hidden, head.weight, head.bias, labels, head, names, compute_grad)
    return dict(zip(names, fields, strict=True))


def label_rows(logits: Tensor, labels: Tensor, names: Collection[str]) -> dict[str, Tensor]:
    """The row pass: statistics of each row, overwritten with softmax over the other tokens (0 at the label)."""
    fields: dict[str, Tensor] = {}
    column = labels[:, None]
    label_logit = logits.gather(1, column)[:, 0]
    if "max_logit" in names or "argmax" in names:
        fields["max_logit"], fields["argmax"] = logits.max(dim=1)
    if "logit_mean" in names:
        fields["logit_mean"] = logits.mean(dim=1)

    # Everything is centred on the largest of the *other* logits: log p_y and log(1 - p_y) then both keep their full
    # relative precision, at p_y = 1e-12 as at 1 - p_y = 1e-9.
    logits.scatter_(1, column, -torch.inf)
    shift = logits.amax(dim=1)
    shift = torch.where(shift.isfinite(), shift, 0.0)  # a vocabulary of one token has no others
    logits.sub_(shift[:, None])
    moments = {"entropy", "logp_mean", "logp_var"} & set(names)
    offsets = logits.clone().scatter_(1, column, 0.0) if moments else None
    total = logits.exp_().sum(dim=1)
    lse_others = shift + total.log()
    fields["label_logit"] = label_logit
    fields["logp"] = logp = F.logsigmoid(label_logit - lse_others)
    fields["log_not_label"] = log_not = F.logsigmoid(lse_others - label_logit)
    fields["lse"] = torch.logaddexp(label_logit, lse_others)
    logits.div_(torch.where(total > 0, total, 1.0)[:, None])
    if offsets is not None:
        fields |= moments_of_logp(logits, offsets, total, logp, log_not)
    return fields


def moments_of_logp(others: Tensor, offsets: Tensor, total: Tensor, logp: Tensor, log_not: Tensor) -> dict[str, Tensor]:
    """Mean and variance of log p under p, from moments of z - max over the other tokens (`others`, 0 at the label)."""
    first = (others * offsets).sum(dim=1)
    spread = (others * offsets.sub_(first[:, None]).square_()).sum(dim=1)
    p_label, p_others = logp.exp(), log_not.exp()
    mean_others = torch.where(p_others > 0, first - total.log() + log_not, 0.0)
    mean = p_label * logp + p_others * mean_others
    variance = p_label * (logp - mean).square() + p_others * (spread + (mean_others - mean).square())
    return {"entropy": -mean, "logp_mean": mean, "logp_var": variance}


class LabelStats(torch.autograd.Function):
    """Statistics of kept rows; the gradient over hidden states is computed in the forward pass."""

    @staticmethod
    def forward(ctx, hidden, weight, bias, labels, head, names, compute_grad):
        dtype = gemm.compute_dtype(hidden)
        count = hidden.shape[0]
        vocabulary = hidden.shape[1] if head.is_identity else weight.shape[0]
        want_unit = compute_grad or "expected_embedding" in names
        unit_grad: Any = torch.empty(hidden.shape, dtype=dtype, device=hidden.device) if want_unit else None
        expected: Any = torch.empty_like(unit_grad) if "expected_embedding" in names else None
        fields: dict[str, list[Tensor]] = {}
        buffer = gemm.chunk_buffer(count, vocabulary, hidden)
        for rows in gemm.row_chunks(count, vocabulary, dtype):
            logits = buffer[: rows.stop - rows.start]
            gemm.logits_into(logits, hidden[rows], head)
            slope = gemm.softcap_slope(logits, head) if want_unit else None
            row_fields = label_rows(logits, labels[rows], names)
            for name, value in row_fields.items():
                fields.setdefault(name, []).append(value)
            if want_unit:
                label_slope = torch.ones_like(row_fields["lse"])
                if slope is not None:
                    logits.mul_(slope)
                    label_slope = slope.gather(1, labels[rows, None])[:, 0]
                gemm.rows_to_hidden(logits, head, out=unit_grad[rows])
                if expected is not None:
                    torch.mul(unit_grad[rows], row_fields["log_not_label"].exp()[:, None], out=expected[rows])
                gemm.add_head_rows(unit_grad[rows], labels[rows], -label_slope, head)
        stats = {name: torch.cat(parts) if parts else hidden.new_empty(0) for name, parts in fields.items()}
        if count == 0:
            stats = empty_fields(names, dtype, hidden.device)
        if expected is not None:
            stats["expected_embedding"] = expected
            gemm.add_head_rows(expected, labels, stats["logp"].exp(), head)
        ctx.head, ctx.names = head, names
        ctx.set_materialize_grads(False)
        if compute_grad:
            argmax = stats.get("argmax")
            ctx.save_for_backward(unit_grad, hidden, labels, argmax, stats["logp"], stats["log_not_label"])
        outputs = tuple(stats[name] for name in names)
        ctx.mark_non_differentiable(*(stats[name] for name in names if name in NOT_DIFFERENTIABLE))
        return outputs

    @staticmethod
    @once_differentiable
    def backward(ctx, *grads):
        unit_grad, hidden, labels, argmax, logp, log_not = ctx.saved_tensors
        head: LMHead = ctx.head
        upstream = {name: grad for name, grad in zip(ctx.names, grads, strict=True) if grad is not None}
        capped_mean = "logit_mean" in upstream and head.softcap is not None
        if head.trainable or capped_mean or NEEDS_RECOMPUTE & set(upstream):
            grad_hidden, grad_weight, grad_bias = recompute(head, hidden, labels, argmax, logp, log_not, upstream)
        else:
            grad_hidden = unit_grad * unit_coefficient(upstream, logp, log_not)[:, None]
            add_direct_gradients(grad_hidden, head, hidden, labels, argmax, upstream)
            grad_weight = grad_bias = None
        return grad_hidden.to(hidden.dtype), grad_weight, grad_bias, None, None, None, None


def empty_fields(names: Collection[str], dtype: torch.dtype, device: torch.device) -> dict[str, Tensor]:
    """The fields of no token at all."""
    always = {*names, "logp", "lse", "log_not_label"} - {"expected_embedding"}
    fields = {name: torch.empty(0, dtype=dtype, device=device) for name in always}
    if "argmax" in fields:
        fields["argmax"] = fields["argmax"].long()
    return fields


def unit_coefficient(upstream: dict[str, Tensor], logp: Tensor, log_not: Tensor) -> Tensor:
    """The unit row's factor: d logp = -(1 - p_y) unit, d lse = (1 - p_y) unit + onehot, d log(1 - p_y) = p_y unit."""
    zero = torch.zeros_like(logp)
    outer = upstream.get("lse", zero) - upstream.get("logp", zero)
    return outer * log_not.exp() + upstream.get("log_not_label", zero) * logp.exp()


def add_direct_gradients(
    grad: Tensor, head: LMHead, hidden: Tensor, labels: Tensor, argmax: Tensor | None, upstream: dict[str, Tensor]
) -> None:
    """Add the gradients that are single rows of the head (label_logit, lse's label part, max_logit) or their mean."""
    single = [(labels, upstream.get("lse")), (labels, upstream.get("label_logit")), (argmax, upstream.get("max_logit"))]
    for index, coefficient in single:
        if coefficient is None or index is None or len(grad) == 0:
            continue
        if head.softcap is not None:
            logit = head_logit(head, hidden, index)
            coefficient = coefficient * (1.0 - (logit / head.softcap).square())
        gemm.add_head_rows(grad, index, coefficient, head)
    if "logit_mean" in upstream:
        coefficient = upstream["logit_mean"][:, None]
        if head.is_identity:
            grad += coefficient / grad.shape[1]
        else:
            grad += coefficient * (head.scale * head.weight.mean(dim=0, dtype=grad.dtype))


def head_logit(head: LMHead, hidden: Tensor, index: Tensor) -> Tensor:
    """The capped logit (n,) of one token a row."""
    dtype = gemm.compute_dtype(hidden)
    assert head.softcap is not None
    logit = (hidden.to(dtype) * head.weight[index].to(dtype)).sum(dim=1) * head.scale
    if head.bias is not None:
        logit = logit + head.bias[index].to(dtype)
    return torch.tanh(logit / head.softcap) * head.softcap


def recompute(
    head: LMHead,
    hidden: Tensor,
    labels: Tensor,
    argmax: Tensor | None,
    logp: Tensor,
    log_not: Tensor,
    upstream: dict[str, Tensor],
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Gradients over hidden states and a trainable head for any mix of upstream gradients, by one more logits pass."""
    dtype = gemm.compute_dtype(hidden)
    vocabulary = hidden.shape[1] if head.is_identity else head.weight.shape[0]
    grad_hidden = torch.empty(hidden.shape, dtype=dtype, device=hidden.device)
    weight_trains = head.weight is not None and head.weight.requires_grad
    bias_trains = head.bias is not None and head.bias.requires_grad
    grad_weight = torch.zeros(head.weight.shape, dtype=dtype, device=hidden.device) if weight_trains else None
    grad_bias = torch.zeros(vocabulary, dtype=dtype, device=hidden.device) if bias_trains else None
    embedding_grad = upstream.get("expected_embedding")
    coefficient = unit_coefficient({**upstream, "lse": torch.zeros_like(logp)}, logp, log_not)
    buffer = gemm.chunk_buffer(hidden.shape[0], vocabulary, hidden)
    weighted: Any = torch.empty_like(buffer) if embedding_grad is not None else None
    for rows in gemm.row_chunks(hidden.shape[0], vocabulary, dtype):
        logits = buffer[: rows.stop - rows.start]
        gemm.logits_into(logits, hidden[rows], head)
        slope = gemm.softcap_slope(logits, head)
        column = labels[rows, None]
        offsets = logits.sub_(logits.amax(dim=1, keepdim=True))
        probs = offsets.exp()
        probs.div_(probs.sum(dim=1, keepdim=True))
        row = torch.zeros_like(probs)
        if "entropy" in upstream:  # centred: log p + entropy would carry the rounding of log V
            mean = (probs * offsets).sum(dim=1, keepdim=True)
            row -= upstream["entropy"][rows, None] * probs * (offsets - mean)
        if embedding_grad is not None:
            projected = weighted[: rows.stop - rows.start]
            gemm.logits_into(projected, embedding_grad[rows].to(dtype), LMHead(head.weight, None, head.scale))
            row += probs * (projected - (probs * projected).sum(dim=1, keepdim=True))
            if grad_weight is not None:  # tau is itself a product with the weight
                grad_weight.addmm_(probs.T, embedding_grad[rows].to(dtype), alpha=head.scale)
        if "lse" in upstream:
            row += upstream["lse"][rows, None] * probs
        # softmax over the other tokens from their own logits: p / (1 - p_y) is 0 / 0 on a memorised token
        unit = torch.softmax(offsets.scatter_(1, column, -torch.inf), dim=1).scatter_(1, column, -1.0)
        row += coefficient[rows, None] * unit
        if "label_logit" in upstream:
            row.scatter_add_(1, column, upstream["label_logit"][rows, None])
        if "max_logit" in upstream and argmax is not None:
            row.scatter_add_(1, argmax[rows, None], upstream["max_logit"][rows, None])
        if "logit_mean" in upstream:
            row += upstream["logit_mean"][rows, None] / vocabulary
        if slope is not None:
            row *= slope
        gemm.rows_to_hidden(row, head, out=grad_hidden[rows])
        if grad_weight is not None:
            gemm.rows_to_weight(row, hidden[rows], head, out=grad_weight)
        if grad_bias is not None:
            grad_bias += row.sum(dim=0)
    if grad_weight is not None:
        grad_weight = grad_weight.to(head.weight.dtype)
    if grad_bias is not None and head.bias is not None:
        grad_bias = grad_bias.to(head.bias.dtype)
    return grad_hidden, grad_weight, grad_bias
