"""The tile passes in plain torch, float64 included: what every other backend is to be equal to, and runs anywhere.

A tile is a few hundred columns wide where memory matters, so the temporaries of these expressions stay small; products
are overwritten where that saves one.
"""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor

from fastforget.backends.protocol import (
    BASIC_ACCUMULATORS,
    FLOAT16_SCALE,
    LABEL_ACCUMULATORS,
    LAZY,
    NEAR_SHIFT,
    PAIRED_ACCUMULATORS,
    RECENTRE,
    CoupledBlock,
    GradientBlock,
    LabelBlock,
    LogitMap,
    PairedBlock,
    StateBlock,
    Tile,
)
from fastforget.backends.tiling import state_blocks

NEAR = 1.0  # where differences of probabilities are taken from expm1; beyond, their own difference is as good


class TorchPasses:
    """The passes of the `torch` backend."""

    name = "torch"

    def accumulator_dtype(self, products: torch.dtype) -> torch.dtype:
        """float64: vectors of a few numbers a row."""
        return torch.float64

    def row_dtype(self, operands: torch.dtype) -> torch.dtype:
        """float32, which a 16-bit weight is cast to a tile at a time; float64 for float64."""
        return torch.promote_types(operands, torch.float32)

    def label_tile(self, tile: Tile, product: Tensor, rows: Tensor | None, block: LabelBlock) -> None:
        """As `TilePasses.label_tile`."""
        if block.states is not None and tile.first == 0:
            self.state_pass(block.states)
        logits = finish_logits(product, tile)
        column, inside = label_column(block.labels, tile)
        previous = begun(block.accumulators, tile, ("top", "label_logit", "best"))
        top, total, label_logit = previous[0], previous[1], previous[3]
        at_label = logits.gather(1, column)[:, 0]
        slope = softcap_slope(logits, tile.logit_map)
        if block.moments:
            previous[6] += logits.sum(dim=1, dtype=torch.float64)
        hide_label_(logits, column, inside, -torch.inf)
        largest, index = logits.max(dim=1)
        # a mean of offsets from a lazy top would lose its digits to their size
        strict = block.moments or (rows is not None and rows.dtype == torch.float16)
        new_top = moved_top(top, largest.double(), strict)
        base = finite_or_zero(new_top)
        fade = (top - base).exp()
        offsets = logits.sub_(base[:, None].to(logits.dtype))
        weights = offsets.exp()
        tile_total = weights.sum(dim=1, dtype=torch.float64)
        new = previous.clone()
        new[0], new[1] = new_top, total * fade + tile_total
        new[3] = torch.where(inside, at_label.double(), label_logit)
        if block.moments:
            finite = offsets.masked_fill_(offsets == -torch.inf, 0.0)
            tile_mean = (weights * finite).sum(dim=1, dtype=torch.float64) / tile_total.where(tile_total > 0, 1.0)
            gaps = finite.sub_(tile_mean[:, None].to(finite.dtype)).square_().masked_fill_(weights == 0, 0.0)
            spread = (weights * gaps).sum(dim=1, dtype=torch.float64)
            mean = previous[4] + torch.where(top == -torch.inf, 0.0, top - base)
            share = tile_total / new[1].where(new[1] > 0, 1.0)
            gap = tile_mean - mean
            new[4] = mean + gap * share
            new[5] = previous[5] * fade + spread + gap.square() * (total * fade) * share
            best = previous[8]
            beats = (largest > best) | (largest.isnan() & ~best.isnan())  # the first NaN stays, as torch.argmax has it
            new[8] = torch.where(beats, largest.double(), best)
            new[9] = torch.where(beats, (index + tile.first).double(), previous[9])
        block.accumulators.copy_(new if block.moments else new[:BASIC_ACCUMULATORS])
        if block.grad is not None and tile.first:
            block.grad.mul_(fade[:, None].to(block.grad.dtype))
        if rows is not None:
            write(rows, weights, slope)

    def paired_tile(
        self,
        tile: Tile,
        policy: Tensor,
        reference: Tensor,
        rows: Tensor | None,
        reference_rows: Tensor | None,
        block: PairedBlock,
    ) -> None:
        """As `TilePasses.paired_tile`."""
        policy, reference = finish_logits(policy, tile), finish_logits(reference, tile)
        column, inside = label_column(block.labels, tile)
        slope = softcap_slope(policy, tile.logit_map)
        previous = begun(
            block.accumulators, tile, ("policy_top", "reference_top", "base", "policy_label", "reference_label")
        )
        new = previous.clone()
        for place, logits in ((9, policy), (10, reference)):
            new[place] = torch.where(inside, logits.gather(1, column)[:, 0].double(), previous[place])
            hide_label_(logits, column, inside, -torch.inf)
        absent = reference == -torch.inf
        gaps = (policy - reference).masked_fill_(absent, 0.0)
        for place, logits in ((0, policy), (2, reference)):
            new[place] = torch.maximum(previous[place], without_nan(logits.amax(dim=1)))
            base = finite_or_zero(new[place])
            fade = (previous[place] - base).exp()
            weights = (logits - base[:, None].to(logits.dtype)).exp()
            new[place + 1] = previous[place + 1] * fade + weights.sum(dim=1, dtype=torch.float64)
            if place == 2:
                here = torch.where(weights > 0, weights * gaps, 0.0) + 0.0 * weights  # no 0 times infinity, but NaN
                new[4] = times(fade, previous[4]) + here.sum(dim=1, dtype=torch.float64)
        strict = rows is not None and rows.dtype == torch.float16
        self.move_base(tile, previous, new, strict, block, policy.dtype)
        base, shift = (new[place][:, None].to(policy.dtype) for place in (5, 6))
        base = finite_or_zero(base)
        # near the policy's own top: taken off one by one, they would cost its digits, and so would their rounded sum
        policy_base = base + shift
        rest = ((finite_or_zero(new[5]) + new[6])[:, None] - policy_base).to(policy.dtype)
        above, offset = (policy - policy_base) - rest, reference - base
        gaps = torch.where(shift.abs() <= NEAR_SHIFT, gaps - shift, above - offset)  # it rounds at the shift's size
        probability, above = offset.exp(), above.exp()  # e^(z_p - shift - base) = probability * e^gap
        near = (gaps.abs() <= NEAR) & ~absent
        inner = gaps.where(near, 0.0)
        difference = torch.where(near, probability * torch.expm1(inner), above - probability)
        excess = torch.where(near, probability * expm1_excess(inner), above - probability - times(probability, gaps))
        excess = torch.where(absent, above, excess)
        new[7] += difference.sum(dim=1, dtype=torch.float64)
        new[8] += excess.clamp_(min=0.0).sum(dim=1, dtype=torch.float64)
        block.accumulators.copy_(new)
        if rows is not None:
            write(rows, difference, slope)
        if reference_rows is not None:
            write(reference_rows, probability, slope)

    @staticmethod
    def move_base(
        tile: Tile, previous: Tensor, new: Tensor, strict: bool, block: PairedBlock, dtype: torch.dtype
    ) -> None:
        """Set base and shift for this tile, numbers of the logits' dtype, and bring what was accumulated to them."""
        first = tile.first == 0
        old_base, old_shift = previous[5], previous[6]
        if block.shift is not None:
            shift = block.shift.double()
        else:
            apart = log_total(new[0], new[1]) - log_total(new[2], new[3])
            settled = apart.isfinite() & ((apart - old_shift).abs() > RECENTRE)
            shift = torch.where(apart.isfinite(), apart, 0.0) if first else torch.where(settled, apart, old_shift)
            shift = shift.to(dtype).double()
        no_reference, shifted = previous[2] == -torch.inf, shift != old_shift
        largest = torch.maximum(new[2], new[0] - shift).to(dtype).double()
        base = moved_top(old_base, largest, strict)
        base = torch.where(no_reference & shifted, largest, base)  # of a policy alone: the reference may lie far below
        new[5], new[6] = base, shift
        if first:
            new[7] = new[8] = 0.0
            return
        moved = old_base - finite_or_zero(base)  # -infinity before the first logit: then nothing has been accumulated
        fade = moved.exp()
        along = (moved + old_shift - shift).exp()  # of what stands relative to the shift
        # of a side that had no logit yet nothing was accumulated, and its factor may be anything, infinity too
        fade = fade.masked_fill(no_reference, 0.0)
        along = along.masked_fill((previous[0] == -torch.inf) & shifted, 0.0)
        scale = (previous[2] - old_base).exp().where(previous[2] > -torch.inf, 0.0)
        mass = previous[3] * scale
        moment = (previous[4] - old_shift * previous[3]) * scale
        new[7] = along * previous[7] + (along - fade) * mass
        of_mass = along - fade + fade * (shift - old_shift)
        excess = along * previous[8] + of_mass * mass + times(along - fade, moment)
        new[8] = excess.where(previous[8] < torch.inf, previous[8])  # infinite where q is and p is not: it stays so
        if block.grad is not None:
            block.grad.mul_(along[:, None].to(block.grad.dtype))
            if block.reference_grad is not None:
                block.grad.addcmul_(block.reference_grad, (along - fade)[:, None].to(block.grad.dtype))
                block.reference_grad.mul_(fade[:, None].to(block.grad.dtype))

    def coupled_tile(
        self,
        tile: Tile,
        policy: Tensor,
        reference: Tensor,
        rows: Tensor | None,
        policy_rows: Tensor | None,
        block: CoupledBlock,
    ) -> None:
        """As `TilePasses.coupled_tile`."""
        policy, reference = finish_logits(policy, tile), finish_logits(reference, tile)
        column, inside = label_column(block.labels, tile)
        slope = softcap_slope(policy, tile.logit_map)
        policy_top, policy_total, reference_top, reference_total, lse_gap, centre = block.normalisers[:, :, None]
        log_p = (policy - policy_top) - policy_total
        log_q = (reference - reference_top) - reference_total
        gap = torch.where(lse_gap.abs() <= NEAR_SHIFT, (policy - reference) - lse_gap, log_p - log_q)
        gap.masked_fill_((policy == -torch.inf) & (reference == -torch.inf), 0.0)
        p = log_p.exp()
        if block.kind == "reverse_kl":
            ratio, from_policy = gap, relative_entropy(log_p, log_q, -gap)
            from_reference = torch.zeros_like(p)
        else:
            above_p, above_q = above_mixture(gap)
            ratio, log_m = -above_p, torch.logaddexp(log_p, log_q) - math.log(2.0)
            from_policy = relative_entropy(log_p, log_m, above_p)
            from_reference = relative_entropy(log_q, log_m, above_q)
        ratio = times(p, ratio - centre)
        sums = []
        for values in (ratio, from_policy, from_reference, p):
            hide_label_(values, column, inside, 0.0)
            sums.append(values.sum(dim=1, dtype=torch.float64))
        found = torch.stack(sums)
        block.accumulators.copy_(found if tile.first == 0 else block.accumulators + found)
        if rows is not None:
            write(rows, ratio, slope)
        if policy_rows is not None:
            write(policy_rows, p, slope)

    def gradient_tile(
        self, tile: Tile, product: Tensor, projected: Tensor | None, rows: Tensor, block: GradientBlock
    ) -> None:
        """As `TilePasses.gradient_tile`."""
        logits = finish_logits(product, tile)
        column, inside = label_column(block.labels, tile)
        slope = softcap_slope(logits, tile.logit_map)
        each = block.coefficients[:, :, None]
        top, share, others, label, lse, entropy, offset_mean, unit, label_entry, largest, mean, middle = each
        hide_label_(logits, column, inside, -torch.inf)
        offsets = logits.sub_(top)
        units = offsets.exp() * share
        factor = lse - entropy * (offsets.clamp_(min=-200.0) - offset_mean)
        entry = label_entry
        if projected is not None:
            along = projected.to(logits.dtype) * tile.logit_map.scale - middle
            factor = factor + along
            entry = entry + label * along.gather(1, column)
        gradient = units.mul_(others * factor + unit)
        gradient.scatter_(1, column, torch.where(inside[:, None], entry, gradient.gather(1, column)))
        gradient += mean
        best, best_inside = label_column(block.argmax, tile)
        gradient.scatter_add_(1, best, torch.where(best_inside[:, None], largest, 0.0))
        write(rows, gradient, slope, scaled=False)

    def state_pass(self, block: StateBlock) -> None:
        """As `TilePasses.state_pass`, a few megabytes of states at a time."""
        for rows in state_blocks(len(block.states), block.states):
            targets = block.targets
            if targets.anchor is not None and targets.anchor.dim() == 2:
                targets = replace(targets, anchor=targets.anchor[rows])
            self.measure(StateBlock(block.states[rows], targets, block.values[:, rows], block.nearest[rows]))

    @staticmethod
    def measure(block: StateBlock) -> None:
        """Measure rows whose temporaries may be as large as they are."""
        targets = block.targets
        states = block.states.to(torch.promote_types(block.states.dtype, torch.float32))
        states = unit_vectors(states)[0] if targets.cosine else states
        if targets.anchor is not None:
            anchor = unit_vectors(targets.anchor)[0] if targets.cosine else targets.anchor
            block.values[0] = separation(states - anchor, targets.cosine, states, anchor)
        if targets.centres is not None:
            apart = torch.cdist(states, targets.centres, compute_mode="donot_use_mm_for_euclid_dist")
            if targets.cosine:
                undirected = (states == 0).all(dim=1)[:, None] | (targets.centres == 0).all(dim=1)
                apart = torch.where(undirected, 1.0, 0.5 * apart.square())
            unknown = apart.isnan().any(dim=1)
            torch.argmin(apart, dim=1, out=block.nearest)
            centres = targets.centres[block.nearest]
            pull = separation(states - centres, targets.cosine, states, centres)
            block.values[1] = torch.where(unknown, torch.nan, pull)


def finish_logits(product: Tensor, tile: Tile) -> Tensor:
    """Logits (r, c) of products, in a tensor of their own, float32 or float64."""
    given, dtype = tile.logit_map, torch.promote_types(product.dtype, torch.float32)
    logits = product.to(dtype, copy=True)
    if given.scale != 1.0:
        logits.mul_(given.scale)
    if given.bias is not None:
        logits.add_(given.bias[tile.first : tile.first + tile.columns])
    if given.softcap > 0:
        logits.div_(given.softcap).tanh_().mul_(given.softcap)
    return logits


def softcap_slope(logits: Tensor, logit_map: LogitMap) -> Tensor | None:
    """d z / d (z before the cap) = 1 - (z / cap)^2; None where there is no cap."""
    return None if logit_map.softcap <= 0 else 1.0 - (logits / logit_map.softcap).square()


def write(rows: Tensor, values: Tensor, slope: Tensor | None, scaled: bool = True) -> None:
    """Write a tile's rows for product 2; `scaled`: in float16 times FLOAT16_SCALE."""
    values = values if slope is None else values * slope
    rows.copy_(values * FLOAT16_SCALE if scaled and rows.dtype == torch.float16 else values)


def label_column(labels: Tensor, tile: Tile) -> tuple[Tensor, Tensor]:
    """(column (r, 1) inside the tile, clamped; whether the label is there (r,))."""
    column = labels - tile.first
    inside = (column >= 0) & (column < tile.columns)
    return column.clamp(0, tile.columns - 1)[:, None], inside


def hide_label_(values: Tensor, column: Tensor, inside: Tensor, value: float) -> None:
    """Overwrite each row's entry at the label with `value`, where the label is in the tile."""
    values.scatter_(1, column, values.gather(1, column).masked_fill_(inside[:, None], value))


def begun(accumulators: Tensor, tile: Tile, infinite: tuple[str, ...]) -> Tensor:
    """The accumulators of the tiles so far, float64 and all of them; as they are before the first tile."""
    names = PAIRED_ACCUMULATORS if "base" in infinite else LABEL_ACCUMULATORS
    found = accumulators.new_zeros(len(names), accumulators.shape[1], dtype=torch.float64)
    if tile.first:
        found[: len(accumulators)] = accumulators
        return found
    for name in infinite:
        found[names.index(name)] = -math.inf
    return found


def without_nan(largest: Tensor) -> Tensor:
    """Largest logits in float64, -infinity for NaN: a running largest passes over it."""
    return largest.double().masked_fill(largest.isnan(), -math.inf)


def moved_top(top: Tensor, largest: Tensor, strict: bool) -> Tensor:
    """The lazy top after logits whose largest is `largest`; `strict`: the largest so far. NaN moves nothing."""
    limit = top if strict else top + LAZY
    return torch.where(largest > limit, largest, top)


def finite_or_zero(top: Tensor) -> Tensor:
    """The logit to subtract: 0 where there was none (-infinity), so that -infinity stays what it is."""
    return torch.where(top == -torch.inf, 0.0, top)


def log_total(top: Tensor, total: Tensor) -> Tensor:
    """The logsumexp that a top and the total relative to it stand for; -infinity for none."""
    return finite_or_zero(top) + total.log()


def times(probability: Tensor, factor: Tensor) -> Tensor:
    """Their product, 0 where the probability is 0 and the factor infinite; NaN stays."""
    return probability * factor.masked_fill((probability == 0) & factor.isinf(), 0.0)


def expm1_excess(gap: Tensor) -> Tensor:
    """(e^x - 1) - x >= 0 for |x| <= 1, with full relative precision near 0: x^2/2 + x^3/6 + ..."""
    series = torch.ones_like(gap)
    for divisor in range(20 if gap.dtype == torch.float64 else 12, 2, -1):
        series.mul_(gap).div_(divisor).add_(1.0)
    return series.mul_(gap.square()).mul_(0.5)


def relative_entropy(log_from: Tensor, log_to: Tensor, gap: Tensor) -> Tensor:
    """from * (expm1(gap) - gap) >= 0, gap = log to - log from: what KL(from||to) sums."""
    probability = log_from.exp()
    near = gap.abs() <= NEAR
    close = probability * expm1_excess(gap.where(near, 0.0))
    far = log_to.exp() - probability - times(probability, gap)
    return torch.where(near, close, far.clamp(min=0.0))


def above_mixture(gap: Tensor) -> tuple[Tensor, Tensor]:
    """(log m - log p, log m - log q), m = (p + q) / 2, of gap = log p - log q; both exact where the two are close."""
    size = gap.abs()
    from_larger = torch.log1p(0.5 * torch.expm1(-size))
    from_smaller = torch.where(size == torch.inf, torch.inf, size + from_larger)
    less = gap <= 0
    return torch.where(less, from_smaller, from_larger), torch.where(less, from_larger, from_smaller)


def unit_vectors(vectors: Tensor) -> tuple[Tensor, Tensor]:
    """(vectors / length, length); a vector of length 0 stays 0."""
    length = torch.linalg.vector_norm(vectors, dim=-1, keepdim=True)
    return vectors * torch.where(length > 0, 1.0 / length, length), length[..., 0]


def separation(difference: Tensor, cosine: bool, states: Tensor, points: Tensor) -> Tensor:
    """(r,) the distance that a difference stands for; a cosine distance is 1 where either unit vector is 0."""
    if not cosine:
        return torch.linalg.vector_norm(difference, dim=1)
    undirected = (states == 0).all(dim=1) | (points == 0).all(dim=-1)
    return torch.where(undirected, 1.0, 0.5 * difference.square().sum(dim=1))
