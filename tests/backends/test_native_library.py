"""The C++ library: its arithmetic, states, threads, and what is refused before a pointer is passed."""

import pytest
import torch
from kernel_device import needs_native
from tile_problems import PLAIN, label_sweep, paired_sweep, strided

from fastforget import backends
from fastforget.backends.native import NativePasses, library
from fastforget.backends.native.passes import DTYPES
from fastforget.backends.protocol import (
    COUPLED_NORMALISERS,
    GRADIENT_COEFFICIENTS,
    LABEL_ACCUMULATORS,
    PAIRED_ACCUMULATORS,
    CoupledBlock,
    GradientBlock,
    LabelBlock,
    LogitMap,
    PairedBlock,
    Tile,
)
from fastforget.errors import FastforgetError

pytestmark = needs_native


def one_tile(logits, rows=None, labels=None, moments=False):
    """The label pass over one tile of plain logits; its accumulators."""
    count, vocabulary = logits.shape
    accumulators = strided(len(LABEL_ACCUMULATORS) if moments else 4, count)
    labels = torch.zeros(count, dtype=torch.int64) if labels is None else labels
    tile = Tile(0, vocabulary, vocabulary, vocabulary, PLAIN)
    NativePasses().label_tile(tile, logits, rows, LabelBlock(labels, accumulators, None))
    return accumulators


def test_the_exponential_is_right_to_two_units_in_the_last_place(instructions):
    gaps = torch.cat([torch.linspace(-87, 0, 20001), -torch.logspace(-8, 1.9, 5001)])
    rows = torch.zeros(len(gaps), 3)
    one_tile(torch.stack([gaps, torch.zeros_like(gaps), gaps], 1), rows)  # the label's column is left out
    truth = gaps.double().exp()
    assert float(((rows[:, 2] - truth).abs() / (truth * 2**-23)).max()) < 2.0


@pytest.mark.parametrize("columns", [3, 16])
@pytest.mark.parametrize("dtype", list(DTYPES)[1:])
def test_16_bit_numbers_are_widened_and_narrowed_as_in_torch(instructions, dtype, columns):
    """As a label's logit; and written as a gradient that is the same everywhere; one by one and in whole vectors."""
    numbers = torch.arange(-32768, 32768, dtype=torch.int32).to(torch.int16).view(dtype)
    logits = torch.stack([numbers] + [torch.zeros_like(numbers)] * (columns - 1), 1)
    assert torch.equal(one_tile(logits)[3].nan_to_num(1.5), numbers.double().nan_to_num(1.5))
    wanted = torch.cat([numbers.float(), torch.randn(70000) * 10 ** torch.linspace(-40, 38, 70000)])
    labels, rows = torch.zeros(len(wanted), dtype=torch.int64), torch.zeros(len(wanted), columns, dtype=dtype)
    coefficients = torch.zeros(len(GRADIENT_COEFFICIENTS), len(wanted))
    coefficients[10] = wanted
    tile = Tile(0, columns, columns, columns, PLAIN)
    NativePasses().gradient_tile(tile, torch.zeros(rows.shape), None, rows, GradientBlock(labels, labels, coefficients))
    assert torch.equal(rows[:, 1].nan_to_num(1.5), wanted.to(dtype).nan_to_num(1.5))


def test_threads_change_no_bit(instructions):
    generator = torch.Generator().manual_seed(2)
    policy, reference = (4 * torch.randn(37, 4999, generator=generator) for _ in range(2))
    labels = torch.randint(0, 4999, (37,), generator=generator)
    logit_map, layout = LogitMap(torch.randn(4999, generator=generator), 0.7, 20.0), {"columns": 2500, "in_place": True}
    threads, results = torch.get_num_threads(), []
    try:
        for count in (1, 3):
            torch.set_num_threads(count)
            label = label_sweep(NativePasses(), policy, labels, logit_map, True, torch.float32, **layout)
            arguments = policy, reference, labels, logit_map, None, torch.float32, torch.float32
            results.append([*label, *paired_sweep(NativePasses(), *arguments, **layout)])
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(*pair) for pair in zip(*results, strict=True))


ROWS = torch.zeros(4, 50)
BROKEN = {
    "labels must be": {"labels": torch.zeros(4, dtype=torch.int32)},
    r"labels must be \(4,\) of int64": {"labels": torch.zeros(3, dtype=torch.int64)},
    "labels must have elements side by side": {"labels": torch.zeros(8, dtype=torch.int64)[::2]},
    "outside the vocabulary": {"labels": torch.tensor([0, 1, 50, 3])},
    "is outside the vocabulary": {"labels": torch.tensor([0, -1, 5, 3])},
    "products must have elements side by side": {"product": torch.zeros(50, 4).T},
    r"products must be \(4, 50\) of float32, bfloat16": {"product": ROWS.double()},
    "products must be ordinary": {"product": ROWS.to("meta")},
    r"written rows must be \(4, 50\)": {"rows": torch.zeros(4, 49)},
    "or rows overlap": {"rows": torch.zeros(1, 50).expand(4, 50)},
    "wrong, or rows": {"product": ROWS.view(torch.bfloat16)[:, :50], "rows": ROWS},
    "no 64 elements in the last row": {"padded": 64},
    "the bias must be": {"bias": torch.zeros(49)},
    "accumulators must be": {"accumulators": torch.zeros(4, 4)},
    r"the gradient must be \(4, 2\)": {"grad": torch.zeros(3, 2)},
    "the gradient must have": {"grad": torch.zeros(6, 4).T},
}


@pytest.mark.parametrize("message", BROKEN)
def test_no_bad_pointer_is_passed(message):
    given = {"labels": torch.tensor([0, 49, 3, 4]), "product": ROWS, "rows": ROWS.clone(), "padded": 50, "bias": None}
    given |= {"accumulators": torch.zeros(4, 4, dtype=torch.float64), "grad": torch.zeros(4, 2)} | BROKEN[message]
    tile = Tile(0, 50, 50, given["padded"], LogitMap(given["bias"], 1.0, 0.0))
    block = LabelBlock(given["labels"], given["accumulators"], given["grad"])
    with pytest.raises(FastforgetError, match=message):
        NativePasses().label_tile(tile, given["product"], given["rows"], block)
    assert not given["rows"].any() and not given["accumulators"].any(), "nothing is written before all is checked"


def test_no_bad_index_or_tile_reaches_the_others():
    tile, passes, labels = Tile(0, 50, 50, 50, PLAIN), NativePasses(), torch.tensor([0, -9, 3, 50])
    paired = PairedBlock(labels, strided(len(PAIRED_ACCUMULATORS), 4), None, None, None)
    coupled = CoupledBlock("jsd", labels, torch.zeros(len(COUPLED_NORMALISERS), 4), strided(4, 4))
    gradient = GradientBlock(labels.clamp(0, 49), labels, torch.zeros(len(GRADIENT_COEFFICIENTS), 4))
    for message, call in {
        "native paired pass: a label": lambda: passes.paired_tile(tile, ROWS, ROWS, None, None, paired),
        "native jsd pass: a label": lambda: passes.coupled_tile(tile, ROWS, ROWS, None, None, coupled),
        "native gradient pass: a label or arg": lambda: passes.gradient_tile(tile, ROWS, None, ROWS, gradient),
        "an argument is wrong": lambda: passes.gradient_tile(Tile(1, 50, 50, 50, PLAIN), ROWS, None, ROWS, gradient),
    }.items():
        with pytest.raises(FastforgetError, match=message):
            call()


def test_a_backend_that_cannot_be_loaded_says_why(monkeypatch):
    cpu = torch.device("cpu")
    assert backends.pick("auto", cpu) == "native"
    monkeypatch.setattr(library, "status", lambda: library.NativeStatus(False, None, "it was built without a compiler"))
    assert backends.pick("auto", cpu) == "torch"
    assert "without a compiler" in backends.explain_auto(cpu)[1]
    with pytest.raises(FastforgetError, match="backend 'native' cannot run here: it was built without"):
        backends.pick("native", cpu)
