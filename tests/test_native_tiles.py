"""Rows of logits a tile of vocabulary at a time: what a tile may hold, and what tiles must add up to.

Draws of everything else go through the same code in `test_native.py`, in tiles of 16 columns.
"""

import math

import pytest
import torch
from kernel_device import needs_native
from test_native import instructions as instructions

import fastforget as ff
from fastforget.backends import gemm, native
from fastforget.head import LMHead

pytestmark = needs_native
STEP = 16  # columns of a tile
MOMENTS = ("entropy", "logp_var", "logit_mean", "argmax", "others_entropy", "max_logit")


def tiled(logits, labels, columns=STEP, names=(), **head):
    """Fields and the gradient over the logits, by a head that is the identity."""
    count, vocabulary = logits.shape
    grad = torch.full((count, vocabulary), torch.nan)  # nothing of it may be read
    buffer = torch.full((count, -(-min(columns, vocabulary) // STEP) * STEP), torch.nan)
    weight = torch.eye(vocabulary)
    found = native.tiled_label_pass(logits, labels, LMHead(weight, **head), names, buffer, grad)
    return found, grad


def of_others(logits, labels):
    """Softmax over the other tokens, in float64."""
    return torch.softmax(logits.double().scatter(1, labels[:, None], -torch.inf), dim=1)


@pytest.mark.parametrize("columns", [STEP, 3 * STEP, 128])
@pytest.mark.parametrize("vocabulary", [2, 15, 16, 17, 100])
@pytest.mark.parametrize("order", ["rising", "falling", "anyhow"])
def test_wherever_the_largest_logit_and_the_label_are(instructions, columns, vocabulary, order):
    """The largest so far rises in each tile, never after the first, or sometimes; a label in each place."""
    logits = torch.linspace(-60.0, 60.0, vocabulary).expand(vocabulary, vocabulary).contiguous()
    if order == "falling":
        logits = logits.flip(1).contiguous()
    elif order == "anyhow":
        logits = 30 * torch.randn(vocabulary, vocabulary, generator=torch.Generator().manual_seed(0))
    labels = torch.arange(vocabulary)
    found, grad = tiled(logits, labels, columns, MOMENTS)
    expected = of_others(logits, labels)
    # relative to the row's largest: a small weight is as far from its logit as the logits' own rounding
    assert ((grad - expected).abs() <= 2e-6 * expected.amax(1, keepdim=True)).all()
    assert (grad.diagonal() == 0).all()
    whole = native.label_pass(logits.clone(), labels, LMHead(None), MOMENTS, None)
    for name, value in whole.fields.items():
        assert torch.allclose(found.fields[name].double(), value.double(), rtol=1e-6, atol=2e-6), name


def test_a_memorised_label_costs_no_digits(instructions):
    """p_y = 1 - 1e-9: the gradient of log p_y is 1e-9 times the others' softmax, to a few units in the last place."""
    vocabulary = 70
    logits = torch.randn(vocabulary, vocabulary, generator=torch.Generator().manual_seed(1))
    labels = torch.arange(vocabulary)
    logits[labels, labels] = math.log(1e9 * vocabulary)
    hidden = logits.requires_grad_()
    stats = ff.token_stats(hidden, LMHead(torch.eye(vocabulary)), labels, backend="native")
    stats.logp.sum().backward()
    logp = torch.log_softmax(logits.detach().double(), dim=1)
    doubt = -torch.expm1(logp.gather(1, labels[:, None]))
    expected = -doubt * of_others(logits.detach(), labels)
    off_label = ~torch.eye(vocabulary, dtype=torch.bool)
    error = ((hidden.grad - expected).abs() / expected.abs())[off_label]
    assert error.max() <= 4e-6
    assert torch.allclose(hidden.grad.diagonal().double(), doubt[:, 0], rtol=1e-6)


@pytest.mark.parametrize("finite", [[0, 1], [3], [1, 3], [4], []])
def test_tiles_of_minus_infinity(instructions, finite):
    """Before, between and after tiles with logits; and a label that has no others at all."""
    generator = torch.Generator().manual_seed(2)
    logits = torch.full((1, 5 * STEP), -torch.inf)
    for tile in finite:
        logits[0, tile * STEP : (tile + 1) * STEP] = 20 * torch.randn(STEP, generator=generator)
    label = torch.tensor([finite[0] * STEP + 2 if finite else 7])
    logits[0, label] = 1.0
    weight, grad = torch.zeros(5 * STEP, 3), torch.full((1, 3), torch.nan)
    weight[:, 0] = torch.rand(5 * STEP, generator=generator)
    head = LMHead(weight, logits[0])
    found = native.tiled_label_pass(torch.zeros(1, 3), label, head, MOMENTS, torch.empty(1, STEP), grad)
    expected = of_others(logits, label).nan_to_num(0.0) @ weight.double()
    assert torch.allclose(grad.double(), expected, rtol=1e-6)
    logp = torch.log_softmax(logits.double(), dim=1).gather(1, label[:, None])[:, 0]
    assert torch.allclose(found.fields["logp"].double(), logp, rtol=1e-6, atol=1e-30)
    assert not any(value.isnan().any() for name, value in found.fields.items())


def test_nan_stays_in_its_row(instructions):
    generator = torch.Generator().manual_seed(3)
    hidden, weight = torch.randn(3, 8, generator=generator), torch.randn(4 * STEP, 8, generator=generator)
    hidden[1, 4] = torch.nan
    grad = torch.full((3, 8), torch.nan)
    labels = torch.tensor([5, 6, 7])
    found = native.tiled_label_pass(hidden, labels, LMHead(weight), MOMENTS, torch.full((3, STEP), torch.nan), grad)
    assert grad.isnan().any(1).tolist() == [False, True, False]
    for name in ("logp", "lse", "entropy", "max_logit"):
        assert found.fields[name].isnan().tolist() == [False, True, False], name


def test_nan_in_one_tile_reaches_the_whole_row(instructions):
    weight = torch.randn(4 * STEP, 8, generator=torch.Generator().manual_seed(5))
    for place in (0, STEP + 3, 4 * STEP - 1):
        broken = weight.clone()
        broken[place] = torch.nan
        grad = torch.zeros(1, 8)
        arguments = torch.ones(1, 8), torch.tensor([5]), LMHead(broken), (), torch.empty(1, STEP), grad
        assert native.tiled_label_pass(*arguments).fields["logp"].isnan().all() and grad.isnan().all()


@pytest.mark.parametrize("head", [{"scale": 0.25}, {"softcap": 5.0}, {"scale": 3.0, "softcap": 8.0, "bias": True}])
def test_scale_bias_and_softcap_in_tiles(instructions, monkeypatch, head):
    monkeypatch.setattr(gemm, "LOGIT_TILE_BYTES", 1)
    monkeypatch.setattr(gemm, "COLUMN_STEP", STEP)
    generator = torch.Generator().manual_seed(6)
    hidden, weight = (torch.randn(rows, 12, generator=generator) for rows in (9, 5 * STEP + 3))
    labels = torch.tensor([0, 1, STEP - 1, STEP, 40, 79, 80, 81, 82])
    bias = torch.randn(len(weight), generator=generator) if head.get("bias") else None
    head = {name: value for name, value in head.items() if name != "bias"}
    grads = []
    for backend, dtype in (("native", torch.float32), ("eager", torch.float64)):
        leaf = hidden.to(dtype, copy=True).requires_grad_()
        own = LMHead(weight.to(dtype), None if bias is None else bias.to(dtype), **head)
        stats = ff.token_stats(leaf, own, labels, outputs=("logp", "log_not_label", "lse"), backend=backend)
        (stats.logp.sum() + 2 * stats.log_not_label.sum() + 0.5 * stats.lse.sum()).backward()
        grads.append((stats.logp.detach(), leaf.grad))
    (logp, grad), (true_logp, true_grad) = grads
    assert torch.allclose(logp.double(), true_logp, rtol=2e-6, atol=2e-6)
    assert torch.allclose(grad.double(), true_grad, rtol=2e-5, atol=5e-6)


@pytest.mark.parametrize("layout", ["transposed", "strided", "expanded", "flipped"])
def test_states_of_any_strides(layout):
    """Kept rows without positions come as they are, as under torch.compile."""
    generator = torch.Generator().manual_seed(7)
    hidden = {
        "transposed": torch.randn(12, 9, generator=generator).T,
        "strided": torch.randn(9, 24, generator=generator)[:, ::2],
        "expanded": torch.randn(9, 1, generator=generator).expand(9, 12),
        "flipped": torch.randn(9, 12, generator=generator).flip(0),
    }[layout]
    head, labels = LMHead(torch.randn(50, 12, generator=generator)), torch.arange(9)
    grads = []
    for states in (hidden, hidden.contiguous()):
        leaf = states.detach().requires_grad_()
        ff.stats.kept_token_stats(leaf, head, labels, backend="native")["logp"].sum().backward()
        grads.append(leaf.grad)
    assert torch.equal(*grads)
    compiled = torch.compile(
        lambda states: ff.token_stats(states, head, labels, backend="native").logp, backend="eager"
    )
    assert torch.equal(compiled(hidden), ff.token_stats(hidden, head, labels, backend="native").logp)


def test_states_of_another_width_than_the_logits_are_measured_in_parts_of_their_own(monkeypatch):
    monkeypatch.setattr(gemm, "TILE_BYTES", 4 * 32 * 10)  # ten states of the width that is measured
    counts = []
    real = native.state_pass
    monkeypatch.setattr(native, "state_pass", lambda states, *rest: counts.append(len(states)) or real(states, *rest))
    generator = torch.Generator().manual_seed(8)
    logits, states = torch.randn(25, 7, generator=generator), torch.randn(25, 32, generator=generator)
    labels = torch.randint(7, (25,), generator=generator)
    stats = ff.token_stats_from_logits(logits, labels, states, anchor=states + 1, backend="native")
    assert counts == [10, 10, 5]
    assert torch.allclose(stats.distance, torch.full((25,), 32**0.5))


def test_a_tile_holds_rows_and_columns_within_its_bytes():
    for count in (1, 7, 1024, 5000, 100_000):
        for vocabulary in (1, 63, 2000, 50_272, 256_000):
            rows, columns = gemm.logit_tile(count, torch.empty(vocabulary, 8, device="meta"))
            assert rows * columns * 4 <= gemm.LOGIT_TILE_BYTES + rows * gemm.COLUMN_STEP * 4
            assert columns % gemm.COLUMN_STEP == 0 and rows <= gemm.LOGIT_TILE_ROWS


BROKEN = {
    "label or argmax is outside": lambda a: {"labels": torch.tensor([0, 50, 1, 2])},
    r"label or argmax is outside the": lambda a: {"labels": torch.tensor([0, -1, 1, 2])},
    "labels must be torch.int64": lambda a: {"labels": torch.tensor([0, 1, 2, 3], dtype=torch.int32)},
    "the buffer must have contiguous rows": lambda a: {"buffer": torch.zeros(STEP, 4).T},
    "the buffer must be torch.float32": lambda a: {"buffer": torch.zeros(4, STEP, dtype=torch.float64)},
    "the buffer must have 4 rows": lambda a: {"buffer": torch.zeros(3, STEP)},
    "rows of whole vectors": lambda a: {"buffer": torch.zeros(4, STEP + 1)},
    "have 4 rows of whole vectors": lambda a: {"buffer": torch.zeros(1, STEP).expand(4, STEP)},
    r"the gradient must be \(4, 6\)": lambda a: {"grad": torch.zeros(4, 5)},
}


@pytest.mark.parametrize("message", BROKEN)
def test_no_bad_pointer_is_passed(message):
    arguments = {
        "hidden": torch.randn(4, 6),
        "labels": torch.tensor([0, 49, 3, 4]),
        "head": LMHead(torch.randn(50, 6)),
        "names": ("entropy",),
        "buffer": torch.zeros(4, STEP),
        "grad": torch.zeros(4, 6),
    }
    native.tiled_label_pass(**arguments)
    arguments["grad"].zero_()
    arguments |= BROKEN[message](arguments)
    with pytest.raises(ff.FastforgetError, match=message):
        native.tiled_label_pass(**arguments)
    assert not arguments["grad"].any()
