"""The row passes of the `chunked` backend, in plain torch: what happens between the two products with the head.

A chunk's products come in, in a buffer that may be overwritten; statistics and a row over the logits go out. The label
row that is written is

    unit = softmax over the *other* tokens                so that   p - onehot = (1 - p_y) * (unit - onehot)

One row thus serves the NLL (times 1 - p_y), log(1 - p_y) (times p_y) and unlikelihood, and stays O(1) on memorised
tokens, where p - onehot itself would underflow.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from fastforget.backends import gemm
from fastforget.backends.chunks import LabelPass, PairedPass
from fastforget.backends.paired import KINDS, close_row_, shift_label_
from fastforget.head import LMHead

ANY_DTYPE = False  # products come in float32 or float64
MEASURES_STATES = False  # the driver does, apart
OVERWRITES_PRODUCTS = True  # also where no row is wanted


def row_dtype(head: LMHead, hidden: Tensor) -> torch.dtype:
    """The dtype of written rows: they stay in the buffer of the products."""
    return gemm.compute_dtype(hidden)


def label_pass(
    product: Tensor,
    labels: Tensor,
    head: LMHead,
    names: Collection[str],
    out: Tensor | None,
    *,
    padded: int | None = None,
    masses: bool = False,
) -> LabelPass:
    """Statistics of each row, and the row written over it; no tile masses: the driver does without."""
    logits = gemm.finish_logits_(product, head)
    slope = gemm.softcap_slope(logits, head) if out is not None else None
    fields = label_rows(logits, labels, names)
    label_slope = None
    if slope is not None:
        logits.mul_(slope)
        label_slope = slope.gather(1, labels[:, None])[:, 0]
    return LabelPass(fields, logits, label_slope=label_slope)


def label_rows(logits: Tensor, labels: Tensor, names: Collection[str]) -> dict[str, Tensor]:
    """Statistics of each row, overwritten with softmax over the other tokens (0 at the label)."""
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
    moments = {"entropy", "logp_mean", "logp_var", "others_entropy"} & set(names)
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
    """Mean and variance of log p under p, and the others' own entropy.

    From moments of z - max over the other tokens; `others` is their softmax, 0 at the label, and `total` the sum that
    it was divided by.
    """
    offsets = without_minus_infinity(offsets)
    first = (others * offsets).sum(dim=1)
    spread = (others * offsets.sub_(first[:, None]).square_()).sum(dim=1)
    p_label, p_others = logp.exp(), log_not.exp()
    mean_others = torch.where(p_others > 0, first - total.log() + log_not, 0.0)
    mean = p_label * logp + p_others * mean_others
    variance = p_label * (logp - mean).square() + p_others * (spread + (mean_others - mean).square())
    others_entropy = torch.where(total == 0, 0.0, total.log() - first)  # no others: a vocabulary of one token
    return {"entropy": -mean, "logp_mean": mean, "logp_var": variance, "others_entropy": others_entropy}


def without_minus_infinity(offsets: Tensor) -> Tensor:
    """Logits of minus infinity as 0: their probability is 0, and 0 times infinity would be NaN."""
    return offsets.masked_fill(offsets == -torch.inf, 0.0)


def paired_pass(
    policy: Tensor,
    reference: Tensor,
    head: LMHead,
    kind: str,
    out: Tensor | None,
    padded: int | None = None,
    labels: Tensor | None = None,
    label_shift: float = 0.0,
) -> PairedPass:
    """A divergence of each row, and where `out` is given its gradient over the logits."""
    policy, reference = gemm.finish_logits_(policy, head), gemm.finish_logits_(reference, head)
    slope = gemm.softcap_slope(policy, head) if out is not None else None
    if labels is not None:
        shift_label_(reference, labels, label_shift)
    value, row = KINDS[kind](gemm.log_softmax_(policy), gemm.log_softmax_(reference), out is not None)
    if row is not None and labels is not None:
        close_row_(row, labels)
    if row is not None and slope is not None:
        row.mul_(slope)
    return PairedPass(value, row)


def gradient_pass(
    product: Tensor,
    labels: Tensor,
    head: LMHead,
    coefficients: Mapping[str, Tensor],
    *,
    argmax: Tensor | None,
    projected: Tensor | None,
    out: Tensor,
    padded: int | None = None,
) -> Tensor:
    """The gradient over the logits for any mix of upstream gradients (the formula: kernels/gradient_rows.py)."""
    logits = gemm.finish_logits_(product, head)
    slope = gemm.softcap_slope(logits, head)
    column = labels[:, None]
    offsets = logits.sub_(logits.amax(dim=1, keepdim=True))
    probs = offsets.exp()
    probs.div_(probs.sum(dim=1, keepdim=True))
    row = torch.zeros_like(probs)
    if "entropy" in coefficients:  # centred: log p + entropy would carry the rounding of log V
        finite = without_minus_infinity(offsets)
        mean = (probs * finite).sum(dim=1, keepdim=True)
        row -= coefficients["entropy"][:, None] * probs * (finite - mean)
    if projected is not None:
        projected.mul_(head.scale)
        row += probs * (projected - (probs * projected).sum(dim=1, keepdim=True))
    if "lse" in coefficients:
        row += coefficients["lse"][:, None] * probs
    # softmax over the other tokens from their own logits: p / (1 - p_y) is 0 / 0 on a memorised token
    unit = torch.softmax(offsets.scatter_(1, column, -torch.inf), dim=1).scatter_(1, column, -1.0)
    row += coefficients["unit"][:, None] * unit
    if "label_logit" in coefficients:
        row.scatter_add_(1, column, coefficients["label_logit"][:, None])
    if "max_logit" in coefficients and argmax is not None:
        row.scatter_add_(1, argmax[:, None], coefficients["max_logit"][:, None])
    if "logit_mean" in coefficients:
        row += coefficients["logit_mean"][:, None] / row.shape[1]
    return row if slope is None else row.mul_(slope)
