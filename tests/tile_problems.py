"""Random tiles, how they lie in memory, and sweeps of passes over them through an identity head.

What product 2 adds up there is the written rows side by side, and what fades earlier tiles shows.
"""

import torch
from hypothesis import strategies as st

from fastforget.backends.protocol import (
    LABEL_ACCUMULATORS,
    PAIRED_ACCUMULATORS,
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
    """The values in rows that are longer than what a pass may touch; NaN where it may write anything."""
    rows, columns = values.shape
    storage = torch.full((rows, tile.padded + 3), LEFT, dtype=dtype or values.dtype)
    storage[:, columns : tile.padded] = torch.nan
    storage[:, :columns] = values
    return storage[:, :columns]


def untouched(tensor, tile):
    return bool((tensor._base[:, tile.padded :] == LEFT).all())


def strided(names, rows, dtype=torch.float64):
    """Accumulators of a block inside a longer buffer; what they hold must not be read."""
    return torch.full((names, rows + 3), torch.nan, dtype=dtype)[:, 1 : rows + 1]


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


def label_sweep(passes, logits, labels, logit_map, moments, row_dtype=None, dtype=torch.float32, **layout):
    """Accumulators and the rows side by side."""
    rows, vocabulary = logits.shape
    accumulators = strided(len(LABEL_ACCUMULATORS) if moments else 4, rows)
    grad = torch.full((rows, vocabulary), torch.nan, dtype=torch.promote_types(dtype, torch.float32))
    for tile in tiles(vocabulary, mapped(logit_map, grad.dtype), **layout):
        columns = slice(tile.first, tile.first + tile.columns)
        product, written = placed(logits[:, columns], tile, dtype), None
        if row_dtype is not None:
            in_place = layout["in_place"] and row_dtype == dtype
            written = product if in_place else placed(torch.zeros_like(product), tile, row_dtype)
        before = product.clone()
        passes.label_tile(tile, product, written, LabelBlock(labels, accumulators, None if written is None else grad))
        assert untouched(product, tile) and (written is None or untouched(written, tile))
        if written is not None:
            grad[:, columns] = written
        if written is not product:
            assert torch.equal(product.nan_to_num(), before.nan_to_num()), "a model's logits stay as they are"
    return accumulators, grad


def size(logits):
    """What a rounding of logits is relative to: weights are as far off as their logits are."""
    found = logits[logits.isfinite()].abs()
    return max(1.0, float(found.max())) if len(found) else 1.0


def close(found, truth, tolerance):
    found, truth = found.double(), truth.double()
    return bool((((found - truth).abs() <= tolerance) | (found == truth) | (found.isnan() & truth.isnan())).all())


def paired_sweep(passes, policy, reference, labels, logit_map, shift, dtype, row_dtype, **layout):
    """Accumulators, S1 and S2."""
    rows, vocabulary = policy.shape
    accumulators = strided(len(PAIRED_ACCUMULATORS), rows)
    grads = [torch.full((rows, vocabulary), torch.nan, dtype=dtype) for _ in range(2)]
    for tile in tiles(vocabulary, mapped(logit_map, dtype), **layout):
        columns = slice(tile.first, tile.first + tile.columns)
        products = [placed(each[:, columns], tile, dtype) for each in (policy, reference)]
        written = products
        if not layout["in_place"] or row_dtype != dtype:
            written = [placed(torch.zeros_like(each), tile, row_dtype) for each in products]
        chosen = shift is None
        block = PairedBlock(labels, accumulators, shift, grads[0], grads[1] if chosen else None)
        passes.paired_tile(tile, *products, written[0], written[1] if chosen else None, block)
        assert all(untouched(each, tile) for each in (*products, *written))
        for grad, each in zip(grads, written, strict=True):
            grad[:, columns] = each
    return accumulators, *grads
