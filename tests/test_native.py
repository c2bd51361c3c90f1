"""The C++ row passes, through the same public functions and against the same float64 oracle as `test_stats.py`.

On each instruction set that this machine has: FASTFORGET_CPU is read at each call.
"""

import math

import pytest
import test_backends_states
import test_stats
import torch
from hypothesis import given, settings
from kernel_device import WHY_NOT_NATIVE, needs_native
from test_stats import DRAWS, NOISES, SHIFTS, check, problems

import fastforget as ff
from fastforget.backends import OUTPUTS, gemm, library, native
from fastforget.backends.library import INSTRUCTION_SETS, OVERRIDE
from fastforget.divergences import DIVERGENCES
from fastforget.head import LMHead

pytestmark = needs_native
HERE = library.instruction_set() if WHY_NOT_NATIVE is None else -1
SETS = [
    pytest.param(name, marks=pytest.mark.skipif(index > HERE, reason="not on this machine"))
    for index, name in enumerate(INSTRUCTION_SETS)
]
FEW = settings(DRAWS, max_examples=40)


@pytest.fixture(params=SETS)
def instructions(request, monkeypatch):
    """Each instruction set in turn."""
    monkeypatch.setenv(OVERRIDE, request.param)
    assert library.status().instruction_set == request.param
    return request.param


@pytest.fixture
def small_chunks(monkeypatch):
    monkeypatch.setattr(gemm, "CHUNK_BYTES", 3000)
    monkeypatch.setattr(gemm, "TILE_BYTES", 700)
    monkeypatch.setattr(gemm, "LOGIT_TILE_BYTES", 700)
    monkeypatch.setattr(gemm, "LOGIT_TILE_ROWS", 5)
    monkeypatch.setattr(gemm, "COLUMN_STEP", 16)


@given(problem=problems())
@FEW
def test_token_stats_against_float64(instructions, problem):
    check(problem, "native")


@given(problem=problems())
@FEW
def test_token_stats_in_many_chunks_against_float64(instructions, small_chunks, problem):
    check(problem, "native")


@given(problem=problems())
@FEW
def test_token_stats_of_a_head_that_trains_against_float64(instructions, problem):
    check(problem, "native", train=True)


@pytest.mark.parametrize("kind", DIVERGENCES)
@given(problem=problems(), noise=NOISES, shift=SHIFTS)
@FEW
def test_divergence_against_float64(instructions, small_chunks, kind, problem, noise, shift):
    test_stats.check_divergence(kind, problem, noise, shift, "native")


@given(problem=test_backends_states.problems())
@FEW
def test_states_against_formulas(instructions, problem):
    test_backends_states.check(problem, "native")


@pytest.mark.parametrize("vocabulary", [1, 2, 509, 5003])
@pytest.mark.parametrize("label_probability", [1e-12, 0.5, 1 - 1e-9])
def test_extreme_probabilities_row_by_row(instructions, vocabulary, label_probability):
    """The pass itself: p_y = 1e-12 and 1 - p_y = 1e-9 keep their digits, and so do uniform and one-hot rows."""
    logits = torch.zeros(1, vocabulary)
    if vocabulary > 1:
        logits[0, 1] = math.log(label_probability / (1 - label_probability) * (vocabulary - 1))
    labels = torch.tensor([min(1, vocabulary - 1)])
    truth = logits.double()
    found = native.label_pass(logits, labels, LMHead(None), OUTPUTS, logits).fields
    others = truth.scatter(1, labels[:, None], -torch.inf)
    log_probs = truth.log_softmax(1)
    assert float(found["logp"]) == pytest.approx(float(log_probs[0, labels[0]]), rel=1e-6)
    assert float(found["log_not_label"]) == pytest.approx(float(others.logsumexp(1) - truth.logsumexp(1)), rel=1e-6)
    assert torch.allclose(logits.double(), others.softmax(1).nan_to_num(0.0), rtol=1e-6, atol=0)
    mean = (log_probs.exp() * log_probs).sum()
    assert float(found["logp_mean"]) == pytest.approx(float(mean), rel=1e-6, abs=1e-12)
    variance = (log_probs.exp() * (log_probs - mean).square()).sum()
    assert float(found["logp_var"]) == pytest.approx(float(variance), rel=1e-5, abs=1e-12)
    assert float(found["others_entropy"]) == pytest.approx(math.log(max(vocabulary - 1, 1)), rel=1e-6)


def test_a_probability_far_below_what_float32_holds(instructions):
    """1 - p_y = e^-200: its logarithm and the softmax over the others are there all the same."""
    logits = torch.tensor([[200.0, 1.0, 0.0, 0.0]])
    found = native.label_pass(logits, torch.tensor([0]), LMHead(None), (), logits).fields
    assert float(found["log_not_label"]) == pytest.approx(math.log(math.e + 2) - 200, rel=1e-6)
    expected = torch.tensor([[0.0, math.e, 1.0, 1.0]]) / (math.e + 2)
    assert torch.allclose(logits, expected, rtol=1e-6, atol=0)


def test_a_block_far_below_the_top_does_not_spoil_the_moments(instructions):
    logits = torch.zeros(1, 3 * 2048)
    logits[0, 0] = 100.0  # every other block's total is about e^-100 times its length
    truth = logits.double().log_softmax(1)
    found = native.label_pass(logits, torch.tensor([5]), LMHead(None), ("entropy",), None).fields
    assert all(value.isfinite().all() for value in found.values())
    assert float(found["logp_mean"]) == pytest.approx(float((truth.exp() * truth).sum()), abs=1e-9)


@pytest.mark.parametrize("dtype", native.DTYPES)
@pytest.mark.parametrize("out_dtype", native.DTYPES)
@pytest.mark.parametrize("vocabulary", [300, 2048, 4101])
def test_logits_of_any_dtype_and_stride_are_written_in_place_or_apart(instructions, dtype, out_dtype, vocabulary):
    generator = torch.Generator().manual_seed(0)
    storage = torch.full((5, vocabulary + 100), 7.0, dtype=dtype)
    logits = storage[:, 51 : 51 + vocabulary]
    logits.copy_(3 * torch.randn(5, vocabulary, generator=generator))
    labels = torch.randint(0, vocabulary, (5,), generator=generator)
    truth = logits.double().scatter(1, labels[:, None], -torch.inf).softmax(1)
    out = logits if dtype == out_dtype else torch.empty(5, vocabulary, dtype=out_dtype)
    found = native.label_pass(logits, labels, LMHead(None), (), out, masses=True)
    scale = 1.0 if found.row_scale is None else found.row_scale[:, None].double()
    half, smallest = torch.finfo(out_dtype).eps / 2, 2.0**-25 if out_dtype == torch.float16 else 0.0
    assert ((out.double() / scale - truth).abs() <= (half + 3e-6) * truth + smallest / scale).all()
    assert (storage[:, :51] == 7).all() and (storage[:, 51 + vocabulary :] == 7).all(), "written outside the rows"
    tiles = torch.nn.functional.pad(truth, (0, -vocabulary % native.TILE)).view(5, -1, native.TILE).sum(2)
    assert torch.allclose(found.masses.double(), tiles, rtol=1e-6)
    if out_dtype == torch.float16:  # a row scaled to the top of float16's range loses no small entry
        assert ((out == 0) == (truth == 0)).all()


@pytest.mark.parametrize("dtype", native.DTYPES)
def test_every_16_bit_number_is_widened_and_narrowed_as_torch_does(instructions, dtype):
    """Through the state pass: |x - 0| is the widened number; and through the label pass what is narrowed."""
    if dtype == torch.float32:
        numbers = torch.randn(70000) * 10 ** torch.linspace(-40, 38, 70000)
    else:
        numbers = torch.arange(-32768, 32768, dtype=torch.int32).to(torch.int16).view(dtype)
    numbers = numbers[numbers.isfinite()]
    found = native.state_pass(numbers[:, None], None, torch.zeros(1), None, "l2")["distance"]
    representable = numbers.float().abs() > 1e-15  # whose square float32 holds
    representable &= numbers.float().abs() < 1e18
    expected = numbers.float().abs()
    assert torch.allclose(found[representable], expected[representable], rtol=2e-7, atol=0)


def test_the_exponential_is_right_to_two_units_in_the_last_place(instructions):
    """Over the whole range: rows of two tokens, the other one at 0."""
    gaps = torch.cat([torch.linspace(-87, 0, 20001), -torch.logspace(-8, 1.9, 5001)])
    logits = torch.stack([torch.zeros_like(gaps), gaps, torch.full_like(gaps, -math.inf)], 1)
    rows = torch.zeros(len(gaps), 3)
    native.label_pass(logits, torch.full((len(gaps),), 2), LMHead(None), (), rows)
    truth = logits.double().softmax(1)[:, 1]
    ulps = (rows[:, 1].double() - truth).abs() / (truth * 2**-23)
    assert float(ulps.max()) < 2.5, "with the division's rounding"


@pytest.mark.parametrize("kind", DIVERGENCES)
def test_divergence_near_the_reference(instructions, kind):
    """At p = q + little, where every LoRA run begins, over long rows; and exactly 0 at p = q."""
    generator = torch.Generator().manual_seed(5)
    weight = torch.randn(5003, 48, generator=generator) / 48**0.5
    reference = 2 * torch.randn(32, 48, generator=generator)
    for noise in (1e-3, 1e-2, 1.0):
        results = []
        hidden = reference + noise * torch.randn(32, 48, generator=generator)
        for backend, dtype in (("native", torch.float32), ("eager", torch.float32), ("eager", torch.float64)):
            leaf = hidden.to(dtype).requires_grad_()
            value = ff.divergence(leaf, reference.to(dtype), ff.LMHead(weight.to(dtype)), kind, backend=backend)
            results.append((value.detach().double(), torch.autograd.grad(value.sum(), leaf)[0].double()))
        for ours, eager, truth in zip(*results, strict=True):
            error, theirs = (float((each - truth).square().mean().sqrt()) for each in (ours, eager))
            assert error <= 1.5 * theirs + 2**-24 * float(truth.square().mean().sqrt())
    assert (ff.divergence(reference, reference, ff.LMHead(weight), kind, backend="native") == 0).all()


def test_instruction_sets_and_threads_agree(monkeypatch):
    """The same within rounding; of one instruction set bit for bit, however many threads there are."""
    generator = torch.Generator().manual_seed(2)
    logits = 4 * torch.randn(37, 4999, generator=generator)
    labels = torch.randint(0, 4999, (37,), generator=generator)
    head = LMHead(torch.empty(4999, 1), torch.randn(4999, generator=generator), 0.7, 20.0)
    results = []
    threads = torch.get_num_threads()
    try:
        for name, count in [(name, 1) for name in INSTRUCTION_SETS[: HERE + 1]] + [(INSTRUCTION_SETS[HERE], 3)]:
            monkeypatch.setenv(OVERRIDE, name)
            torch.set_num_threads(count)
            rows = torch.empty_like(logits)
            found = native.label_pass(logits, labels, head, ("entropy",), rows).fields
            results.append({**found, "rows": rows})
    finally:
        torch.set_num_threads(threads)
    for name, value in results[-1].items():
        assert torch.equal(value, results[-2][name]), name
        for other in results[:-2]:
            assert torch.allclose(other[name], value, rtol=3e-6, atol=1e-6), name


BROKEN = {
    "labels must be torch.int64": lambda a: {"labels": a["labels"].int()},
    r"labels must be torch.int64 \(4,\)": lambda a: {"labels": a["labels"][:3]},
    "labels must be contiguous": lambda a: {"labels": a["labels"].repeat_interleave(2)[::2]},
    "outside the vocabulary": lambda a: {"labels": a["labels"] + 50},
    "products must have contiguous rows": lambda a: {"product": a["product"].T.contiguous().T},
    "products must be torch.float32 or": lambda a: {"product": a["product"].double()},
    r"written rows must be \(4, 50\)": lambda a: {"out": torch.empty(4, 49)},
    "written rows must be torch.float32 or": lambda a: {"out": torch.empty(4, 50, dtype=torch.int32)},
    "on the CPU, not torch.strided on meta": lambda a: {"product": a["product"].to("meta")},
    r"the bias must be torch.float32 \(50,\)": lambda a: {"head": LMHead(torch.empty(49, 2), torch.zeros(49))},
    "cannot be overwritten with": lambda a: {"out": a["product"].view(torch.bfloat16)[:, :50]},
}


@pytest.mark.parametrize("message", BROKEN)
def test_no_bad_pointer_is_passed_by_the_label_pass(message):
    arguments = {
        "product": torch.randn(4, 50),
        "labels": torch.tensor([0, 49, 3, 4]),
        "head": LMHead(None),
        "names": ("entropy",),
        "out": None,
    }
    native.label_pass(**arguments)
    arguments |= BROKEN[message](arguments)
    before = arguments["product"].clone()
    with pytest.raises(ff.FastforgetError, match=message):
        native.label_pass(**arguments)
    assert before.is_meta or torch.equal(before, arguments["product"]), "nothing is written before all is checked"


def test_no_bad_pointer_is_passed_by_the_others():
    rows, labels, head = torch.randn(4, 50), torch.tensor([0, 49, 3, 4]), LMHead(None)
    zeros = {"unit": torch.zeros(4)}
    cases = [
        ("the reference's products must be", lambda: native.paired_pass(rows, rows[:, :9], head, "jsd", None)),
        ("the policy's products must be", lambda: native.paired_pass(rows.half(), rows.half(), head, "jsd", None)),
        ("written rows must be", lambda: native.paired_pass(rows, rows, head, "jsd", rows[:2])),
        ("labels must be", lambda: native.paired_pass(rows, rows, head, "jsd", None, labels=labels[:2])),
        ("outside the voc", lambda: native.paired_pass(rows, rows, head, "jsd", None, labels=labels + 9)),
        (
            "outside the vocabulary",
            lambda: native.gradient_pass(rows, labels, head, zeros, argmax=labels + 9, projected=None, out=rows),
        ),
        (
            "argmax must be",
            lambda: native.gradient_pass(rows, labels, head, zeros, argmax=labels[:2], projected=None, out=rows),
        ),
        (
            "projected products must be",
            lambda: native.gradient_pass(rows, labels, head, zeros, argmax=None, projected=rows.T, out=rows),
        ),
        ("hidden states must be", lambda: native.state_pass(rows.double(), None, rows[0], None, "l2")),
        ("centres must be", lambda: native.state_pass(rows, None, None, rows[:, :9], "l2")),
    ]
    for message, call in cases:
        with pytest.raises(ff.FastforgetError, match=message):
            call()


def test_a_backend_that_cannot_be_loaded_says_why(monkeypatch, tmp_path):
    cpu = torch.device("cpu")
    assert ff.backends.pick("auto", cpu) == "native"
    monkeypatch.setattr(library, "status", lambda: library.NativeStatus(False, None, "it was built without a compiler"))
    assert ff.backends.pick("auto", cpu) == "chunked"
    assert "without a compiler" in ff.backends.explain_auto(cpu)[1]
    with pytest.raises(ff.FastforgetError, match="backend 'native' cannot run here: it was built without"):
        ff.backends.pick("native", cpu)
