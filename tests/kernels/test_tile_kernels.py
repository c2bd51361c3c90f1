"""The Triton kernels against the passes in plain torch, float64, over the same tiles (interpreted without a GPU)."""

import dataclasses
import itertools

import pytest
import torch
from kernel_device import DEVICE, needs_triton
from tile_problems import (
    PLAIN,
    coupled_sweep,
    finished,
    gradient_sweep,
    label_sweep,
    paired_sweep,
    placed,
    rows_for,
    strided,
    tiles,
)

from fastforget.backends import fields as closing
from fastforget.backends import protocol
from fastforget.backends.protocol import LabelBlock, LogitMap, StateBlock, StateTargets, Tile
from fastforget.backends.torch_passes import TorchPasses
from fastforget.errors import FastforgetError

triton_passes = pytest.importorskip("fastforget.backends.triton", reason="Triton is not installed")
from fastforget_kernels import coupled_tile, gradient_tile, label_tile, paired_tile  # noqa: E402

pytestmark = needs_triton
F32, BF16, F16, F64 = torch.float32, torch.bfloat16, torch.float16, torch.float64
ROWS, VOCABULARY, COLUMNS = 10, 437, 150
LAYOUT = {"columns": COLUMNS, "exact": False, "in_place": True}
STATISTICS = [field.name for field in protocol.FIELDS if field.needs in ("basic", "moments")]


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


CAPPED = LogitMap(random(VOCABULARY, seed=8), 0.7, 9.0)
LABELS = torch.tensor([0, COLUMNS - 1, COLUMNS, VOCABULARY - 1, 7, 200, 300, 70, 400, 12], device=DEVICE)


def both(sweep, *arguments, row_dtype, dtype=F32):
    """What a sweep gives with the kernels, and with the passes in plain torch over float64 products; in float64."""
    exact = F64 if row_dtype == F32 else row_dtype
    results = (
        sweep(triton_passes.TritonPasses(), *arguments, row_dtype, dtype, **LAYOUT),
        sweep(TorchPasses(), *arguments, exact, F64, **LAYOUT),
    )
    return [[each.double() for each in (result if isinstance(result, tuple) else (result,))] for result in results]


def products(seed=0):
    """Rows of every kind: tops that rise, fall, leap by 20 and 50, memorised labels, tiles of -infinity, NaN."""
    found = 2.0 * random(ROWS, VOCABULARY, seed=seed)
    ramp = torch.arange(VOCABULARY, device=DEVICE) / VOCABULARY
    found[0] += 60.0 * ramp
    found[1] -= 60.0 * ramp
    found[2, 310] += 20.0
    found[3, 310] += 50.0
    found[4, 7] = found[4].logsumexp(0) - 27.6  # p_y = 1e-12
    found[5, 200] = found[5].logsumexp(0) + 20.7  # 1 - p_y = 1e-9
    found[6, :COLUMNS] = -torch.inf
    found[6, COLUMNS:] -= 1e4
    found[7, COLUMNS:] = -torch.inf
    found[8] += 1e4
    found[9, [250, 260, 400]] = torch.nan
    return found


def close(found, expected, tolerance, scale=None):
    """Equal but for rounding, NaN and infinities in the same places; the row with NaN is the last and only one."""
    assert torch.equal(found.isnan(), expected.isnan())
    infinite = expected.isinf()
    assert torch.equal(found[infinite], expected[infinite])
    scale = expected.abs().clamp(min=1.0) if scale is None else scale
    error = ((found - expected).abs() / scale)[expected.isfinite()]
    assert error.numel() and error.max() <= tolerance, error.max()


def close_rows(found, expected, row_dtype, floor=0.0):
    """Written rows, against the largest in each; `floor`: the rounding of what they are made of; NaN row by row."""
    tolerance, whole = {F32: 2e-5, BF16: 1e-2, F16: 2e-3}[row_dtype], ~expected.isnan().any(dim=1)
    assert torch.equal(~found.isnan().any(dim=1), whole)
    scale = (expected.abs().amax(dim=1, keepdim=True) + floor / tolerance).clamp(min=1e-30).expand_as(expected)
    close(found[whole], expected[whole], tolerance, scale[whole])


@pytest.mark.parametrize(
    "row_dtype, capped, moments",
    [(F32, 0, 1), (F32, 1, 0), (BF16, 0, 0), (BF16, 1, 1), (F16, 0, 1), (F16, 0, 0), (F16, 1, 1)],
)
def test_label_pass(row_dtype, capped, moments):
    logit_map = CAPPED if capped else PLAIN
    results = both(label_sweep, products(), LABELS, logit_map, moments, row_dtype=row_dtype)
    names = STATISTICS if moments else STATISTICS[:4]
    found, expected = (closing.label_fields(each, LABELS, names, VOCABULARY) for each, _ in results)
    for name in names:
        if name in ("argmax", "others_argmax"):
            assert torch.equal(found[name][:-1], expected[name][:-1])
        else:
            close(found[name], expected[name], 2e-5 if logit_map is CAPPED else 5e-6)
    if moments:  # the first NaN is the largest, as torch.argmax has it
        assert results[0][0][8, -1].isnan() and results[0][0][9, -1] == 250
    close_rows(*(grad / (each[1] + each[2])[:, None] for each, grad in results), row_dtype)
    if logit_map is PLAIN:  # the lazy top is a decision, not a number that rounds
        assert torch.equal(results[0][0][0][:-1], results[1][0][0][:-1])


def reference_products(policy):
    """What stands beside `products`: almost the same, shifted, one-hot elsewhere, far away."""
    found = policy + 1e-3 * random(ROWS, VOCABULARY, seed=3)
    found[1] = policy[1] + 70.0  # the same distribution
    found[2:4] += random(2, VOCABULARY, seed=4)
    found[3, :COLUMNS] += 25.0
    found[4, 420] = policy[4].max() + 40.0
    found[5] = 2.0 * random(VOCABULARY, seed=5)
    return found


def paired_gradient(accumulators, grad, reference_grad, labels, given, float16):
    """(the closed result, the gradient over the logits) of a sweep."""
    result = closing.paired_result(accumulators, labels, -2.0, float16)
    gradient = result.rows[:, None] * grad
    if not given:
        gradient += (result.reference / result.reference_total)[:, None] * reference_grad
    return result, gradient


@pytest.mark.parametrize(
    "row_dtype, capped, labelled, given",
    [(F32, 0, 1, 0), (F32, 0, 1, 1), (F32, 1, 0, 0), (BF16, 1, 1, 1), (BF16, 0, 0, 0), (F16, 0, 1, 1), (F16, 1, 1, 0)],
)
def test_paired_pass(row_dtype, capped, labelled, given):
    policy, logit_map = products(), CAPPED if capped else PLAIN
    reference = reference_products(policy)
    labels = LABELS if labelled else torch.full_like(LABELS, -1)
    shift = None
    if given:
        best = reference.nan_to_num(-torch.inf).argmax(dim=1, keepdim=True)
        shift = (policy - reference).nan_to_num(0.0).gather(1, best)[:, 0]
        shift = 0.1 * shift if logit_map is CAPPED else shift
    sweeps = both(paired_sweep, policy, reference, labels, logit_map, shift, row_dtype=row_dtype)
    found, expected = (paired_gradient(*sweep, labels, given, row_dtype == F16) for sweep in sweeps)
    # what float32 logits are worth; twice in rows that cancel against each other
    spread = 30.0 if logit_map is CAPPED else (policy - reference).nan_to_num(0.0, 0.0, 0.0).abs().amax(dim=1)
    floor = 2.0**-23 * (1.0 + torch.as_tensor(spread, dtype=F64))
    value = expected[0].value
    close(found[0].value, value, 5e-4, value.nan_to_num(0.0) + floor)
    if labelled:
        close(found[0].logp, expected[0].logp, 1e-5)
    close_rows(found[1], expected[1], row_dtype, floor.expand(ROWS)[:, None])


@pytest.mark.parametrize("kind", ["reverse_kl", "jsd"])
@pytest.mark.parametrize("row_dtype, capped", [(F32, 0), (BF16, 1)])
def test_coupled_pass(kind, row_dtype, capped):
    policy, logit_map = products(), CAPPED if capped else PLAIN
    reference = reference_products(policy)
    logits = [finished(each, logit_map)[0] for each in (policy, reference)]
    others = [each.scatter(1, LABELS[:, None], -torch.inf) for each in logits]
    tops = [each.amax(dim=1) for each in others]
    totals = [each.logsumexp(dim=1) - top for each, top in zip(others, tops, strict=True)]
    gap = tops[0] - tops[1] + totals[0] - totals[1]
    normalisers = torch.stack([tops[0], totals[0], tops[1], totals[1], gap, 0.1 * random(ROWS).double()]).float()
    arguments = kind, policy, reference, LABELS, logit_map, normalisers
    results = both(coupled_sweep, *arguments, row_dtype=row_dtype)
    floor = 2.0**-22 * (30.0 if capped else 1.0 + (policy - reference).nan_to_num(0.0, 0.0, 0.0).abs().amax())
    for found, expected in zip(results[0][0], results[1][0], strict=True):
        close(found, expected, 1e-4, expected.abs() + floor)
    for found, expected in zip(*(result[1:] for result in results), strict=True):
        close_rows(found, expected, row_dtype, floor)


@pytest.mark.parametrize(
    "dtype, row_dtype, projects",
    [(F32, F32, 1), (F32, F32, 0), (F32, BF16, 1), (F32, BF16, 0), (BF16, BF16, 0), (F16, F16, 0)],
)
def test_gradient_pass(dtype, row_dtype, projects):
    logit_map = CAPPED if dtype == F32 else PLAIN
    logits = products().clamp(min=-1e4, max=1e4).nan_to_num(0.0) if dtype == F16 else products()
    logits, projected = logits.to(dtype), random(ROWS, VOCABULARY, seed=6)
    accumulators, _ = label_sweep(TorchPasses(), logits.float(), LABELS, logit_map, True, None, F64, **LAYOUT)
    names = ("logp", "lse", "label_logit", "log_not_label", "max_logit", "logit_mean", "entropy")
    upstream = dict(zip(names, random(len(names), ROWS, seed=7), strict=True))
    coefficients = closing.gradient_coefficients(accumulators, upstream, random(ROWS) if projects else None, VOCABULARY)
    argmax = closing.label_fields(accumulators, LABELS, ["argmax"], VOCABULARY)["argmax"]
    arguments = logits, projected if projects else None, LABELS, argmax, logit_map, coefficients
    [found], [expected] = both(gradient_sweep, *arguments, row_dtype=row_dtype, dtype=dtype)
    tolerance = {F32: 1e-4, BF16: 1e-2, F16: 2e-3}[row_dtype]  # of the offsets of logits near 1e4
    scale = expected.abs().amax(dim=1, keepdim=True).clamp(min=1e-30).expand_as(expected)
    close(found, expected, tolerance, scale)


@pytest.mark.parametrize("cosine", [False, True])
@pytest.mark.parametrize(
    "dtype, centre_count, anchored", [(F32, 1, "rows"), (BF16, 16, "one"), (F16, 33, None), (BF16, 0, "rows")]
)
def test_state_pass(dtype, cosine, centre_count, anchored):
    """By itself, and with the first tile of a label sweep."""
    width = 37
    states = random(ROWS, width, seed=1).to(dtype)
    states[0], states[1], states[4, 5] = 0.0, torch.nan, torch.inf
    anchor = {"rows": random(ROWS, width, seed=2), "one": random(width, seed=2), None: None}[anchored]
    if anchored == "rows":
        anchor[2], anchor[3] = states[2], 0.0
    centres = random(centre_count, width, seed=3) if centre_count else None
    if cosine and centres is not None:
        centres = torch.nn.functional.normalize(centres, dim=1)
    results = []
    for passes, kind in ((triton_passes.TritonPasses(), F32), (TorchPasses(), F64)):
        targets = [None if each is None else each.to(kind) for each in (anchor, centres)]
        for sweeps in (False, True):
            values = torch.full((2, 3 * ROWS), -1.0, dtype=kind, device=DEVICE)[:, ROWS : 2 * ROWS]
            nearest = torch.full((ROWS,), -1, device=DEVICE)
            given = states.to(kind) if kind == F64 else states
            block = StateBlock(given, StateTargets(*targets, cosine), values, nearest)
            if sweeps:
                label_sweep(passes, products(), LABELS, PLAIN, False, BF16, kind, block, **LAYOUT)
            else:
                passes.state_pass(block)
            nearest[[0, 1, 4]] = 0 if centre_count else -1  # of NaN, and of no direction, any
            results.append((values.double(), nearest))
    for values, nearest in results[:2]:
        close(values, results[2][0], 2e-6)
        assert torch.equal(nearest, results[2][1])


@pytest.mark.parametrize("dtype", [F32, BF16, F16], ids=str)
def test_logits_of_one_token_and_of_a_model(dtype):
    """A vocabulary of one, and whole rows of logits with any stride that are only read."""
    passes = triton_passes.TritonPasses()
    for vocabulary, moments in itertools.product((1, VOCABULARY), (False, True)):
        logits = products().nan_to_num(0.0).clamp(-1e4, 1e4).to(dtype)[:, :vocabulary]
        tile = Tile(0, vocabulary, vocabulary, vocabulary, PLAIN)
        labels, accumulators = LABELS.clamp(max=vocabulary - 1), strided(10 if moments else 4, ROWS, F32, DEVICE)
        before = logits.clone()
        passes.label_tile(tile, logits, None, LabelBlock(labels, accumulators, None))
        assert torch.equal(logits, before)
        found = closing.label_fields(accumulators, labels, ["logp", "lse", "log_not_label"], vocabulary)
        expected = logits.double().log_softmax(dim=1).gather(1, labels[:, None])[:, 0]
        close(found["logp"], expected, 5e-6)
        close(found["lse"], logits.double().logsumexp(dim=1), 5e-6)


def test_layouts_that_kernels_would_misread_are_refused():
    passes, tile = triton_passes.TritonPasses(), next(tiles(VOCABULARY, PLAIN, **LAYOUT))
    product = placed(products(), tile)
    rows = rows_for(product, tile, BF16, in_place=True)
    block = LabelBlock(LABELS, strided(4, ROWS, F32, DEVICE), random(ROWS, VOCABULARY))
    passes.label_tile(tile, product, rows, block)
    wrong_blocks = [
        dataclasses.replace(block, labels=LABELS.int()),
        dataclasses.replace(block, labels=LABELS.repeat(2)[::2]),
        dataclasses.replace(block, accumulators=strided(5, ROWS, F32, DEVICE)),
        dataclasses.replace(block, accumulators=block.accumulators.double()),
        dataclasses.replace(block, grad=block.grad.T.contiguous().T),
    ]
    for wrong in wrong_blocks:
        with pytest.raises(FastforgetError, match="Triton kernels take"):
            passes.label_tile(tile, product, rows, wrong)
    for wrong_product, wrong_rows, wrong_tile in (
        (product.T.contiguous().T, rows, tile),
        (product.double(), rows, tile),
        (product, rows[:, :10], tile),
        (product.contiguous(), rows, tile),  # no `padded` elements a row
        (product, product.view(BF16)[:, :COLUMNS].as_strided(rows.shape, (200, 1)), tile),  # rows over others' logits
        (product, rows, tile._replace(logit_map=LogitMap(random(9), 1.0, 0.0))),
        (product, rows, tile._replace(padded=10**6)),
    ):
        with pytest.raises(FastforgetError, match="Triton kernels take"):
            passes.label_tile(wrong_tile, wrong_product, wrong_rows, block)


def test_kernels_and_protocol_name_the_same_numbers():
    assert label_tile.ACCUMULATORS == protocol.LABEL_ACCUMULATORS
    assert label_tile.BASIC == protocol.BASIC_ACCUMULATORS
    assert paired_tile.ACCUMULATORS == protocol.PAIRED_ACCUMULATORS
    assert coupled_tile.ACCUMULATORS == protocol.COUPLED_ACCUMULATORS
    assert coupled_tile.NORMALISERS == protocol.COUPLED_NORMALISERS
    assert gradient_tile.COEFFICIENTS == protocol.GRADIENT_COEFFICIENTS
