"""From accumulators to statistics, and the closing formulas of the sweeps: per row, once, in float64, for all backends.

`p_y` is the label's probability, "others" all tokens but the label. Everything is kept as the others' logsumexp and
the label's logit relative to it, so that log p_y and log(1 - p_y) keep their digits, at p_y = 1e-12 as at 1 - 1e-9.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from fastforget.backends.protocol import (
    FIELDS,
    FLOAT16_SCALE,
    GRADIENT_COEFFICIENTS,
    NEAR_SHIFT,
    GradientBlock,
    Tile,
)
from fastforget.backends.torch_passes import (
    above_mixture,
    finish_logits,
    finite_or_zero,
    label_column,
    log_total,
    times,
)

NAMES = tuple(field.name for field in FIELDS)
BY_NAME = {field.name: field for field in FIELDS}
DIFFERENTIABLE = tuple(field.name for field in FIELDS if field.differentiable)
EMPTY = {field.name: -1 if field.integer else 0 for field in FIELDS}  # what a field holds where the label is ignored


@dataclass(frozen=True)
class TileStatistic:
    """A statistic that plain torch collects from each tile's logits, on every backend.

    `update(state (k, r) or None at the first tile, logits (r, c))` returns the new state; `finish(state)` the value.
    """

    update: Callable[[Tensor | None, Tensor], Tensor]
    finish: Callable[[Tensor], Tensor]


def two_largest(state: Tensor | None, logits: Tensor) -> Tensor:
    """(2, r): the two largest logits so far; -infinity where there is no second."""
    if state is None:
        state = logits.new_full((2, len(logits)), -torch.inf)
    return torch.cat((state.T, logits), dim=1).topk(2, dim=1).values.T


TILE_STATISTICS = {"logp_top2_margin": TileStatistic(two_largest, lambda state: state[0] - state[1])}


def update_tile_statistics(states: dict[str, Tensor], names: Collection[str], tile: Tile, product: Tensor) -> None:
    """Bring the states of those of `names` that need tiles up to date, before the tile's products are overwritten."""
    wanted = [name for name in names if BY_NAME[name].needs == "tiles"]
    if not wanted:
        return
    logits = finish_logits(product, tile)
    for name in wanted:
        states[name] = TILE_STATISTICS[name].update(states.get(name) if tile.first else None, logits)


@dataclass(frozen=True)
class LabelResult:
    """What a label sweep's accumulators say of each row, (n,) float64; NaN where a logit is NaN or infinite."""

    gap: Tensor  # z_y - logsumexp over the others
    others: Tensor  # logsumexp over the others
    logp: Tensor
    log_not: Tensor  # log(1 - p_y)

    @classmethod
    def of(cls, accumulators: Tensor) -> LabelResult:
        """From accumulators of any dtype; of a vocabulary of one token the others are none."""
        top, total, rest, label_logit = accumulators[:4].double()
        base, log_sum = finite_or_zero(top), (total + rest).log()
        gap = (label_logit.masked_fill(label_logit == torch.inf, torch.nan) - base) - log_sum
        return cls(gap, base + log_sum, F.logsigmoid(gap), F.logsigmoid(-gap))


def label_fields(accumulators: Tensor, labels: Tensor, names: Collection[str], vocabulary: int) -> dict[str, Tensor]:
    """The statistics named, (n,) float64 or int64, as far as accumulators give them."""
    found = LabelResult.of(accumulators)
    label_logit = accumulators[3].double()
    fields = {"logp": found.logp, "label_logit": label_logit, "log_not_label": found.log_not}
    fields["lse"] = torch.logaddexp(label_logit, found.others).where(label_logit < torch.inf, torch.nan)
    if any(BY_NAME[name].needs == "moments" for name in names):
        fields |= moment_fields(accumulators, labels, found, vocabulary)
    return {name: fields[name] for name in names if name in fields}


def moment_fields(accumulators: Tensor, labels: Tensor, found: LabelResult, vocabulary: int) -> dict[str, Tensor]:
    """Mean and variance of log p under p, the others' entropy, the plain mean, and the largest logit."""
    _, total, rest, label_logit, mean, deviations, plain, plain_rest, best, index = accumulators.double()
    total = total + rest
    logp, log_not = found.logp, found.log_not
    p_label, p_others = logp.exp(), log_not.exp()
    mean_label = torch.where(p_label == 0, 0.0, logp)
    mean_others = torch.where(p_others == 0, 0.0, mean - total.log() + log_not)
    spread = torch.where(total == 0, 0.0, deviations / total)
    logp_mean = p_label * mean_label + p_others * mean_others
    variance = p_label * (mean_label - logp_mean).square() + p_others * (spread + (mean_others - logp_mean).square())
    # the first of equals, and the first NaN before everything, as torch.argmax has it
    equal = (label_logit == best) | (label_logit.isnan() & best.isnan())
    label_first = torch.where(equal, labels < index, (label_logit > best) | label_logit.isnan())
    return {
        "entropy": -logp_mean,
        "logp_mean": logp_mean,
        "logp_var": variance,
        "others_entropy": torch.where(total == 0, 0.0, total.log() - mean),
        "logit_mean": (plain + plain_rest) / vocabulary,
        "max_logit": torch.maximum(best, label_logit),
        "argmax": torch.where(label_first, labels, index.long()),
        "others_argmax": index.long(),
    }


def unit_factor(upstream: Mapping[str, Tensor], logp: Tensor, log_not: Tensor) -> Tensor:
    """The unit gradient's factor: d logp = -(1 - p_y) unit, d lse = (1 - p_y) unit + onehot, d log(1 - p_y) = p_y unit.

    `unit` is the others' softmax - onehot: of order 1 on a memorised token too, where p - onehot underflows.
    """
    others = log_not.exp()
    factor: Tensor | None = None
    for name, sign in (("lse", 1.0), ("logp", -1.0)):
        if name in upstream:
            part = upstream[name] * others * sign
            factor = part if factor is None else factor + part
    if "log_not_label" in upstream:
        part = upstream["log_not_label"] * logp.exp()
        factor = part if factor is None else factor + part
    return torch.zeros_like(logp) if factor is None else factor


def gradient_coefficients(
    accumulators: Tensor, upstream: Mapping[str, Tensor], projected_mean: Tensor | None, vocabulary: int
) -> Tensor:
    """(GRADIENT_COEFFICIENTS, n) float64 for any mix of upstream gradients (n,) by field."""
    found = LabelResult.of(accumulators)
    top, total, rest, label_logit = accumulators[:4].double()
    zero = torch.zeros_like(found.logp)
    given = {name: gradient.double() for name, gradient in upstream.items()}
    p_label, p_others = found.logp.exp(), found.log_not.exp()
    base, total = finite_or_zero(top), total + rest
    unit = unit_factor({**given, "lse": zero}, found.logp, found.log_not)  # that of lse is p itself
    entry = p_label * given.get("lse", zero) - unit + given.get("label_logit", zero)
    offset_mean = zero
    if "entropy" in given:
        mean, label_offset = accumulators[4].double(), label_logit - base
        offset_mean = p_others * mean + torch.where(p_label == 0, 0.0, p_label * label_offset)
        from_mean = torch.where(p_label == 0, 0.0, p_others * (label_offset - mean))
        entry = entry - given["entropy"] * p_label * from_mean
    rows = {
        "top": base,
        "share": torch.where(total == 0, 0.0, 1.0 / total),
        "others_probability": p_others,
        "label_probability": p_label,
        "lse": given.get("lse", zero),
        "entropy": given.get("entropy", zero),
        "offset_mean": offset_mean,
        "unit": unit,
        "label_entry": entry,
        "max_logit": given.get("max_logit", zero),
        "logit_mean": given.get("logit_mean", zero) / vocabulary,
        "projected_mean": zero if projected_mean is None else projected_mean.double(),
    }
    return torch.stack([rows[name] for name in GRADIENT_COEFFICIENTS])


@dataclass(frozen=True)
class PairedResult:
    """KL(q||p) of each row, log p_y, and what its gradient is made of; (n,) float64.

    gradient = scale * (rows * S1 + reference * E + label * slope_y * W_y), E the reference's embedding over the others
    (S2 / reference_total of the written rows, or as it is cached).
    """

    value: Tensor
    logp: Tensor
    rows: Tensor
    reference: Tensor
    label: Tensor
    reference_total: Tensor  # what S2 is divided by to be E


def paired_result(accumulators: Tensor, labels: Tensor, label_shift: float, scaled: bool) -> PairedResult:
    """Close the paired sweep. `scaled`: rows were written in float16, times FLOAT16_SCALE.

    The label is split off: with g the label's logit relative to the others' logsumexp, KL(q||p) is that of two outcomes
    with logits g_q and g_p, plus (1 - q_y) times the others' own; and only g_q knows of a shifted label.
    """
    policy_top, policy_total, reference_top, reference_total, moment = accumulators[:5].double()
    base, shift, difference, excess, policy_label, reference_label = accumulators[5:].double()
    reference_lse = log_total(reference_top, reference_total)
    apart = log_total(policy_top, policy_total) - reference_lse - shift  # log of the totals' ratio, from the lse
    base = finite_or_zero(base)
    ratio = difference / (reference_lse - base).exp()  # and where it is near 1, less 1: from the difference itself
    near = ratio.abs() < 0.5
    apart = torch.where(near, ratio.where(near, 0.0).log1p(), apart)
    mean = excess / (reference_lse - base).exp()
    others = torch.where(near, mean - (ratio - apart), apart + shift - moment / reference_total).clamp(min=0.0)
    none = (policy_total == 0) & (reference_total == 0)  # a vocabulary of one token
    others, apart = others.masked_fill(none, 0.0), apart.masked_fill(none, 0.0)

    has_label = labels >= 0
    reference_gap = reference_label + label_shift - reference_lse  # g_q
    moved = policy_label - reference_label - label_shift - shift - apart  # g_p - g_q, from differences
    own = policy_label - log_total(policy_top, policy_total) - reference_gap  # and from the policy alone
    moved = torch.where(shift.abs() <= NEAR_SHIFT, moved, own)
    moved = torch.where(has_label & ~none, moved, 0.0)
    reference_gap = torch.where(has_label, reference_gap, -torch.inf)
    policy_gap = torch.where(has_label, reference_gap + moved, -torch.inf)
    outcomes = torch.where(has_label, two_outcomes(reference_gap, moved), 0.0)
    p_others, q_others = torch.sigmoid(-policy_gap), torch.sigmoid(-reference_gap)
    larger = torch.where(moved > 0, policy_gap, reference_gap)
    smaller = torch.where(moved > 0, reference_gap, policy_gap)
    doubt = torch.sigmoid(larger) * torch.sigmoid(-smaller) * torch.expm1(-moved.abs())  # -|q_y - p_y|
    label_moved = torch.where(moved > 0, doubt, -doubt)  # q_y - p_y
    total = (reference_lse - base + apart).exp()
    factor = torch.where(none, 0.0, p_others / total)
    return PairedResult(
        value=outcomes + times(q_others, others),
        logp=torch.where(has_label, F.logsigmoid(policy_gap), 0.0),
        rows=factor / FLOAT16_SCALE if scaled else factor,
        reference=torch.where(none, 0.0, label_moved + p_others * torch.expm1(-apart)),
        label=-label_moved,
        reference_total=(reference_lse - base).exp() * (FLOAT16_SCALE if scaled else 1.0),
    )


def two_outcomes(gap: Tensor, moved: Tensor) -> Tensor:
    """KL of two outcomes with logit `gap` from those with `gap + moved`: of the likelier one's doubt, so exact."""
    sign = torch.where(gap > 0, -1.0, 1.0)
    start, step = gap * sign, moved * sign
    return (F.softplus(start + step) - F.softplus(start) - times(torch.sigmoid(start), step)).clamp(min=0.0)


@dataclass(frozen=True)
class LabelNormalisers:
    """Both normalisers of each row, as the coupled pass takes them, and the label's log-probabilities; float64."""

    normalisers: Tensor  # (COUPLED_NORMALISERS, n)
    log_p: Tensor  # (n,), 0 without a label
    log_q: Tensor
    policy_label: Tensor  # z_p of the label


def label_normalisers(
    policy: Tensor, reference: Tensor, there: Tensor, label_shift: float, likeliest: tuple[Tensor, Tensor], kind: str
) -> LabelNormalisers:
    """From the accumulators of two label sweeps over the same labels; where there is none any token stood for it.

    `likeliest`: both logits of the policy's likeliest token, whose x is the centre: where p and q lie apart, x is
    nearly the same for all that p holds, and rows of p x less their mean would cancel.
    """
    rows, lses, log_probs = [], [], []
    for accumulators, shift in ((policy, 0.0), (reference, label_shift)):
        found = LabelResult.of(accumulators)
        added = torch.where(there, shift, 0.0)
        lse = torch.logaddexp(accumulators[3].double() + added, found.others)
        base = torch.maximum(accumulators[3], accumulators[8]).double()  # the largest, so that no digit goes to it
        base = torch.where(base.isfinite(), base, 0.0)
        rows += [base, lse - base]
        lses.append(lse)
        log_probs.append(torch.where(there, F.logsigmoid(found.gap + added), 0.0))
    gap = lses[0] - lses[1]
    at_likeliest = likeliest[0].double() - likeliest[1].double() - gap
    centre = at_likeliest if kind == "reverse_kl" else -above_mixture(at_likeliest)[0]
    normalisers = torch.stack([*rows, gap, centre.nan_to_num(0.0, 0.0, 0.0)])
    return LabelNormalisers(normalisers, log_probs[0], log_probs[1], policy[3])


@dataclass(frozen=True)
class CoupledResult:
    """Reverse KL or JSD of each row, and what its gradient is made of; (n,) float64, `rows` one number for all.

    gradient = scale * (rows * S1 + policy * S0 + label * slope_y * W_y).
    """

    value: Tensor
    rows: float
    policy: Tensor
    label: Tensor


def coupled_result(accumulators: Tensor, labelled: LabelNormalisers, labels: Tensor, kind: str) -> CoupledResult:
    """Close the coupled sweep."""
    ratio, from_policy, from_reference, probability = accumulators.double()
    log_p, log_q = labelled.log_p, labelled.log_q
    gap = log_p - log_q
    if kind == "reverse_kl":
        first, second, half = summand(log_p, -gap), torch.zeros_like(gap), 1.0
    else:
        above_p, above_q = above_mixture(gap)
        first, second, half = summand(log_p, above_p), summand(log_q, above_q), 0.5
    has_label = labels >= 0
    from_policy = from_policy + torch.where(has_label, first, 0.0)
    from_reference = from_reference + torch.where(has_label, second, 0.0)
    off_centre = from_policy - labelled.normalisers[-1]
    label = torch.where(has_label, -half * (ratio - off_centre * probability), 0.0)
    return CoupledResult(half * (from_policy + from_reference), half, -half * off_centre, label)


def summand(log_from: Tensor, gap: Tensor) -> Tensor:
    """What KL sums of one token, from * (expm1(gap) - gap) >= 0, float64."""
    probability = log_from.exp()
    close = probability * gap.square() * (0.5 + gap / 6.0)
    middle = probability * (torch.expm1(gap.clamp(max=1.0)) - gap)
    far = (log_from + gap).exp() - probability - times(probability, gap)  # of a probability too small to be there
    value = torch.where(gap.abs() < 1e-5, close, torch.where(gap < 1.0, middle, far))
    return value.clamp(min=0.0)


def add_embedding_gradient_(
    weight_grad: Tensor, tile: Tile, product: Tensor, upstream: Tensor, scale: float, block: GradientBlock
) -> None:
    """Add what a head's rows get of an expected embedding themselves, scale * p^T @ upstream, to a tile's (c, D).

    What reaches them through p is the gradient pass's.
    """
    top, share, p_others, p_label = block.coefficients[:4, :, None]
    probability = finish_logits(product, tile).sub_(top).exp_().mul_(share * p_others)
    column, inside = label_column(block.labels, tile)
    probability.scatter_(1, column, torch.where(inside[:, None], p_label, probability.gather(1, column)))
    weight_grad.addmm_(probability.T, upstream.to(probability.dtype), alpha=scale)
