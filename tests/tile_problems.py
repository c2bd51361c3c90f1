"""Random tiles, how they lie in memory, and sweeps of passes over them through an identity head.

What product 2 adds up there is the written rows side by side, and what fades earlier tiles shows.
"""

import torch
from hypothesis import strategies as st

from fastforget.backends.protocol import (
    COUPLED_ACCUMULATORS,
    LABEL_ACCUMULATORS,
    PAIRED_ACCUMULATORS,
    CoupledBlock,
    GradientBlock,
    LabelBlock,
    LogitMap,
    PairedBlock,
    Tile,
)
from fastforget.backends.torch_passes import finish_logits

PLAIN = LogitMap(None, 1.0, 0.0)
LEFT = 7.0  # what memory that no pass may write holds


def spread(kind, rows, vocabulary, generator):
    """Logits (rows, vocabulary) of one kind."""
    noise = torch.randn(rows, vocabulary, generator=generator)
    slope = torch.linspace(-90.0, 90.0, vocabulary).expand(rows, -1)
    if kind == "one-hot":
        noise[torch.arange(rows), torch.randint(vocabulary, (rows,), generator=generator)] += 80.0
    if kind == "masked":  # whole tiles, and single tokens, of a padded vocabulary
        hidden = torch.rand(vocabulary, generator=generator) < 0.3
        hidden |= (torch.rand(vocabulary // 16 + 1, generator=generator) < 0.5).repeat_interleave(16)[:vocabulary]
        noise[:, hidden] = -torch.inf
    return {"rising": slope + noise, "falling": noise - slope, "wide": 40 * noise}.get(kind, noise)


@st.composite
def problems(draw):
    """Logits, labels, a logit map, and how tiles lie in memory."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**20)))
    rows, vocabulary = draw(st.integers(1, 4)), draw(st.sampled_from([1, 2, 15, 16, 17, 40, 67, 100]))
    kind = draw(st.sampled_from(["near", "rising", "falling", "wide", "one-hot", "masked"]))
    logits = spread(kind, rows, vocabulary, generator)
    labels = torch.randint(vocabulary, (rows,), generator=generator)
    own = torch.arange(rows), labels
    logits[own] = logits[own].nan_to_num(neginf=0.0)  # a label is never masked
    softcap = draw(st.sampled_from([0.0, 0.0, 9.0]))
    bias = torch.randn(vocabulary, generator=generator) if draw(st.booleans()) else None
    logit_map = LogitMap(bias, draw(st.sampled_from([1.0, 1.0, 0.7])), softcap)
    layout = {"columns": draw(st.sampled_from([16, 32, 48, 128])), "exact": draw(st.booleans())}
    layout["in_place"] = draw(st.booleans())
    return logits, labels, logit_map, layout, generator


def tiles(vocabulary, logit_map, columns, exact=True, **_):
    for first in range(0, vocabulary, columns):
        width = min(columns, vocabulary - first)
        yield Tile(first, width, vocabulary, width if exact else -(-width // 16) * 16, logit_map)


def placed(values, tile, dtype=None):
    """A tile's columns in rows that are longer than what a pass may touch; NaN where it may write anything."""
    values = values[:, tile.first : tile.first + tile.columns]
    storage = torch.full((len(values), tile.padded + 3), LEFT, dtype=dtype or values.dtype, device=values.device)
    storage[:, tile.columns : tile.padded] = torch.nan
    storage[:, : tile.columns] = values
    return storage[:, : tile.columns]


def rows_for(product, tile, dtype, in_place):
    """Where a pass writes its rows: over the product, as narrow ones too, or in memory of their own."""
    if dtype is None:
        return None
    if in_place and (dtype == product.dtype or dtype.itemsize < product.dtype.itemsize):
        return product._base.view(dtype)[:, : tile.columns]
    return placed(torch.zeros(len(product), tile.vocabulary, device=product.device), tile, dtype)


def untouched(tensor, tile):
    return bool((tensor._base[:, tile.padded :] == LEFT).all())


def apart(rows, product):
    return rows.data_ptr() != product.data_ptr()


def strided(names, rows, dtype=torch.float64, device=None):
    """Accumulators of a block inside a longer buffer; what they hold must not be read."""
    return torch.full((names, rows + 3), torch.nan, dtype=dtype, device=device)[:, 1 : rows + 1]


def mapped(logit_map, dtype):
    bias = None if logit_map.bias is None else logit_map.bias.to(dtype)
    return LogitMap(bias, logit_map.scale, logit_map.softcap)


def finished(logits, logit_map, labels=None):
    """The logits in float64, hidden at labels that are not negative; and the slopes of the softcap."""
    whole = Tile(0, logits.shape[1], logits.shape[1], logits.shape[1], mapped(logit_map, torch.float64))
    found = finish_logits(logits.double(), whole)
    slope = 1.0 - (found / logit_map.softcap).square() if logit_map.softcap else torch.ones_like(found)
    if labels is not None:
        there = labels >= 0
        found[there, labels[there]] = -torch.inf
        slope[there, labels[there]] = 0.0
    return found, slope


class Sweep:
    """A pass over the tiles of some logits: where they lie, its accumulators, and its rows side by side."""

    def __init__(self, passes, logits, logit_map, accumulators, row_dtype, dtype, layout, sides=1):
        self.numbers = torch.promote_types(dtype, torch.float32)
        self.row_dtype, self.dtype, self.in_place = row_dtype, dtype, layout["in_place"]
        self.tiles = tiles(logits.shape[1], mapped(logit_map, self.numbers), **layout)
        kept = passes.accumulator_dtype(dtype)
        self.accumulators = strided(accumulators, len(logits), kept, logits.device)
        self.grads = [
            torch.full(logits.shape, torch.nan, dtype=self.numbers, device=logits.device) for _ in range(sides)
        ]

    def place(self, tile, *logits):
        """The products of a tile, and the rows for each of them."""
        products = [placed(each, tile, self.dtype) for each in logits]
        return products, [rows_for(each, tile, self.row_dtype, self.in_place) for each in products]

    def keep(self, tile, products, rows):
        """Check that a pass wrote where it may, and take its rows."""
        own = [each for each, product in zip(rows, products, strict=True) if each is not None and apart(each, product)]
        assert all(untouched(each, tile) for each in (*products, *own))
        for grad, written in zip(self.grads, rows, strict=True):
            if written is not None:
                grad[:, tile.first : tile.first + tile.columns] = written


def label_sweep(passes, logits, labels, logit_map, moments, row_dtype=None, dtype=torch.float32, states=None, **layout):
    """Accumulators and the rows side by side."""
    sweep = Sweep(passes, logits, logit_map, len(LABEL_ACCUMULATORS) if moments else 4, row_dtype, dtype, layout)
    block = LabelBlock(labels, sweep.accumulators, None if row_dtype is None else sweep.grads[0], states)
    for tile in sweep.tiles:
        [product], [rows] = sweep.place(tile, logits)
        before = product.clone()
        passes.label_tile(tile, product, rows, block)
        sweep.keep(tile, [product], [rows])
        if rows is None or apart(rows, product):
            assert torch.equal(product.nan_to_num(), before.nan_to_num()), "a model's logits stay as they are"
    return sweep.accumulators, sweep.grads[0]


def paired_sweep(passes, policy, reference, labels, logit_map, shift, row_dtype, dtype, **layout):
    """Accumulators, S1 and, unless a shift is given, S2."""
    sweep = Sweep(passes, policy, logit_map, len(PAIRED_ACCUMULATORS), row_dtype, dtype, layout, sides=2)
    chosen = shift is None
    block = PairedBlock(labels, sweep.accumulators, shift, sweep.grads[0], sweep.grads[1] if chosen else None)
    for tile in sweep.tiles:
        products, rows = sweep.place(tile, policy, reference)
        passes.paired_tile(tile, *products, rows[0], rows[1] if chosen else None, block)
        sweep.keep(tile, products, rows)
    return sweep.accumulators, *sweep.grads


def coupled_sweep(passes, kind, policy, reference, labels, logit_map, normalisers, row_dtype, dtype, **layout):
    """Accumulators and the rows of both sides."""
    sweep = Sweep(passes, policy, logit_map, len(COUPLED_ACCUMULATORS), row_dtype, dtype, layout, sides=2)
    block = CoupledBlock(kind, labels, normalisers.to(sweep.numbers), sweep.accumulators)
    for tile in sweep.tiles:
        products, rows = sweep.place(tile, policy, reference)
        passes.coupled_tile(tile, *products, *rows, block)
        sweep.keep(tile, products, rows)
    return sweep.accumulators, *sweep.grads


def gradient_sweep(passes, logits, projected, labels, argmax, logit_map, coefficients, row_dtype, dtype, **layout):
    """The rows side by side."""
    sweep = Sweep(passes, logits, logit_map, 0, row_dtype, dtype, layout)
    block = GradientBlock(labels, argmax, coefficients.to(sweep.numbers))
    for tile in sweep.tiles:
        products, rows = sweep.place(tile, logits)
        along = None if projected is None else placed(projected, tile, sweep.numbers)
        passes.gradient_tile(tile, *products, along, *rows, block)
        sweep.keep(tile, products, rows)
    return sweep.grads[0]


def size(logits):
    """What a rounding of logits is relative to: weights are as far off as their logits are."""
    found = logits[logits.isfinite()].abs()
    return max(1.0, float(found.max())) if len(found) else 1.0


def close(found, truth, tolerance):
    found, truth = found.double(), truth.double()
    return bool((((found - truth).abs() <= tolerance) | (found == truth) | (found.isnan() & truth.isnan())).all())
