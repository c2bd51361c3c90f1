"""The Triton kernels, through the same public functions and against the same float64 oracle as `test_stats.py`.

Without a GPU they run in Triton's interpreter (`TRITON_INTERPRET=1`, set in conftest.py), with small blocks so that a
row has many of them. Tests marked `gpu` are the same suite on a device.
"""

import math

import pytest
import test_backends_states
import test_stats
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_device import DEVICE, OURS, WHY_NOT, device_of, needs_triton
from test_stats import DRAWS, NOISES, SHIFTS, check, problems, realistic

import fastforget as ff
from fastforget.backends import gemm
from fastforget.divergences import DIVERGENCES

# The interpreter takes about 0.1 s for a row: a short sample in `make test`, the rest in `make proof` and on a GPU
FEW = settings(DRAWS, max_examples=100 if DEVICE.type == "cuda" else 6)
MANY = settings(DRAWS, max_examples=100)
SMALL = problems(most_rows=3)
pytestmark = needs_triton
if WHY_NOT is None:
    from fastforget_kernels import label_rows, paired_rows
    from fastforget_kernels.label_rows import FIELDS


@pytest.fixture
def small_chunks(monkeypatch):
    monkeypatch.setattr(gemm, "CHUNK_BYTES", 3000)
    monkeypatch.setattr(gemm, "DEVICE_CHUNK_BYTES", 3000)


@given(problem=SMALL)
@FEW
def test_token_stats_against_float64(problem):
    check(problem, "triton")


@given(problem=SMALL)
@FEW
def test_token_stats_in_many_chunks_against_float64(small_chunks, problem):
    check(problem, "triton")


@given(problem=SMALL)
@FEW
def test_token_stats_of_a_head_that_trains_against_float64(problem):
    check(problem, "triton", train=True)


@given(problem=SMALL, parts=st.integers(2, 5))
@FEW
def test_token_stats_of_rows_that_are_split_over_programs(problem, parts):
    def split(count, vocabulary, device):
        length = -(-vocabulary // parts // 128) * 128  # a multiple of the block
        return -(-vocabulary // length), length

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(label_rows, "split", split)
        check(problem, "triton")


@pytest.mark.parametrize("kind", DIVERGENCES)
@given(problem=SMALL, noise=NOISES, shift=SHIFTS)
@FEW
def test_divergence_against_float64(kind, problem, noise, shift):
    test_stats.check_divergence(kind, problem, noise, shift, "triton")


@given(problem=test_backends_states.problems())
@settings(DRAWS, max_examples=15)
def test_states_against_formulas(problem):
    test_backends_states.check(problem, "triton")


@pytest.mark.parametrize("centre_count", [0, 1, 16, 33])
@pytest.mark.parametrize("metric", ["l2", "cosine"])
@pytest.mark.parametrize("outputs", [("logp",), ("logp", "entropy")])
def test_states_and_labels_in_one_pass_are_what_they_are_apart(centre_count, metric, outputs):
    """One launch for both, or two where moments are asked for as well: the same values and gradients."""
    hidden, weight, labels = realistic(rows=9, width=24, vocabulary=131)
    labels[4] = -100
    anchor = hidden + 0.1
    centres = torch.randn(centre_count, 24, generator=torch.Generator().manual_seed(1)) if centre_count else None
    results = []
    for backend in ("triton", "eager"):
        device = device_of(backend)
        leaf = hidden.to(device).clone().requires_grad_()
        stats = ff.token_stats(
            leaf,
            ff.LMHead(weight.to(device)),
            labels.to(device),
            outputs=outputs,
            anchor=anchor,
            centres=centres,
            metric=metric,
            margin=5.0,
            backend=backend,
        )
        fields = [stats.logp, stats.distance, *([] if centres is None else [stats.pull])]
        loss = sum((index + 1) * field.sum() for index, field in enumerate(fields))
        results.append([value.cpu() for value in (*fields, torch.autograd.grad(loss, leaf)[0])])
    for ours, theirs in zip(*results, strict=True):
        assert torch.allclose(ours, theirs, rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("vocabulary", [1, 2, 509])
@pytest.mark.parametrize("label_probability", [1e-12, 0.5, 1 - 1e-9])
def test_extreme_probabilities_row_by_row(vocabulary, label_probability):
    """The kernel itself: p_y = 1e-12 and 1 - p_y = 1e-9 keep their digits, and so do uniform and one-hot rows."""
    logits = torch.zeros(1, vocabulary, device=DEVICE)
    if vocabulary > 1:
        logits[0, 1] = math.log(label_probability / (1 - label_probability) * (vocabulary - 1))
    labels = torch.tensor([min(1, vocabulary - 1)], device=DEVICE)
    truth = logits.double()
    found = label_rows.label_rows(logits, labels, moments=True, out=logits)
    fields = dict(zip(FIELDS, found.fields[:, 0].double(), strict=True))
    others = truth.scatter(1, labels[:, None], -torch.inf)
    log_probs = truth.log_softmax(1)
    assert float(fields["logp"]) == pytest.approx(float(log_probs[0, labels[0]]), rel=1e-6)
    assert float(fields["log_not_label"]) == pytest.approx(float(others.logsumexp(1) - truth.logsumexp(1)), rel=1e-6)
    unit = others.softmax(1).nan_to_num(0.0)
    assert torch.allclose(logits.double(), unit, rtol=1e-6, atol=0)
    mean = (log_probs.exp() * log_probs).sum()
    assert float(fields["logp_mean"]) == pytest.approx(float(mean), rel=1e-5, abs=1e-12)
    variance = (log_probs.exp() * (log_probs - mean).square()).sum()
    assert float(fields["logp_var"]) == pytest.approx(float(variance), rel=1e-5, abs=1e-12)
    assert float(fields["others_entropy"]) == pytest.approx(math.log(max(vocabulary - 1, 1)), rel=1e-6)


def test_a_block_far_below_the_top_does_not_spoil_the_moments():
    """Its total is a subnormal number, one over which is infinite."""
    logits = torch.zeros(1, 3 * 2048, device=DEVICE)
    logits[0, 0] = 100.0  # every other block's total is about e^-100 times its length
    truth = logits.double().log_softmax(1)
    found = label_rows.label_rows(logits, torch.tensor([5], device=DEVICE), moments=True).fields[:, 0].cpu().double()
    mean = (truth.exp() * truth).sum().cpu()
    assert found.isfinite().all()
    assert float(found[FIELDS.index("logp_mean")]) == pytest.approx(float(mean), abs=1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("in_place", [True, False])
def test_logits_of_any_dtype_and_stride_are_written_in_place_or_apart(dtype, in_place):
    generator = torch.Generator().manual_seed(0)
    storage = torch.full((5, 400), 7.0, dtype=dtype, device=DEVICE)
    logits = storage[:, 50:350]
    logits.copy_(3 * torch.randn(5, 300, generator=generator))
    labels = torch.randint(0, 300, (5,), generator=generator).to(DEVICE)
    truth = logits.double().scatter(1, labels[:, None], -torch.inf).softmax(1)
    out = logits if in_place else torch.empty(5, 300, dtype=dtype, device=DEVICE)
    found = label_rows.label_rows(logits, labels, out=out, masses=True)
    written = out.double() / found.fields[FIELDS.index("row_scale")].double()[:, None]
    assert (written - truth).abs().max() <= torch.finfo(dtype).eps * truth.max()
    assert torch.allclose(found.masses.double().sum(1), truth.sum(1), rtol=1e-6)
    assert (storage[:, :50] == 7).all() and (storage[:, 350:] == 7).all(), "nothing outside the rows is written"
    if dtype == torch.float16:  # a row scaled to the top of float16's range loses no small entry
        assert ((out == 0) == (truth == 0)).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("noise", [1e-3, 1e-2])
@pytest.mark.parametrize("kind", DIVERGENCES)
def test_divergence_near_the_reference_in_16_bit(monkeypatch, dtype, noise, kind):
    """At p = q + little, where every LoRA run begins: error <= 1.5 x eager's, both rounded to the operands' dtype."""
    monkeypatch.setattr(paired_rows, "INTERPRETED_BLOCK", 2048)  # fewer steps: quicker
    hidden, ref_hidden, weight = near_the_reference(dtype, noise)
    truth = divergence_gradient(hidden.double(), ref_hidden.double(), weight.double(), kind, "eager")
    eager = divergence_gradient(hidden.float(), ref_hidden.float(), weight.float(), kind, "eager")
    ours = divergence_gradient(hidden, ref_hidden, weight, kind, "triton")
    rounded = eager.to(dtype).double()
    error, theirs = ((result.double() - truth).square().mean().sqrt() for result in (ours, rounded))
    assert error <= 1.5 * theirs, (float(error), float(theirs))


@pytest.mark.parametrize("noise", [1e-3, 1e-2])
def test_a_difference_of_two_expected_embeddings_would_fail_that(noise):
    """tau_p - tau_q from bf16 rows of probabilities: why the paired pass writes p - q itself."""
    hidden, ref_hidden, weight = near_the_reference(torch.bfloat16, noise)
    truth = divergence_gradient(hidden.double(), ref_hidden.double(), weight.double(), "forward_kl", "eager")
    eager = divergence_gradient(hidden.float(), ref_hidden.float(), weight.float(), "forward_kl", "eager")
    embeddings = [
        ((states.float() @ weight.float().T).softmax(1).bfloat16().float() @ weight.float())
        for states in (hidden, ref_hidden)
    ]
    difference = (embeddings[0] - embeddings[1]).bfloat16().double()
    error, theirs = ((result.double() - truth).square().mean().sqrt() for result in (difference, eager.bfloat16()))
    assert error > 28 * theirs, (float(error), float(theirs))  # 110 to 720 times, measured


def near_the_reference(dtype, noise):
    generator = torch.Generator().manual_seed(5)
    weight = (torch.randn(5003, 48, generator=generator) / 48**0.5).to(dtype)
    ref_hidden = (2 * torch.randn(32, 48, generator=generator)).to(dtype)
    hidden = (ref_hidden.float() + noise * torch.randn(32, 48, generator=generator)).to(dtype)
    return hidden, ref_hidden, weight


def divergence_gradient(hidden, ref_hidden, weight, kind, backend):
    hidden, ref_hidden, weight = (each.to(device_of(backend)) for each in (hidden, ref_hidden, weight))
    leaf = hidden.clone().requires_grad_()
    value = ff.divergence(leaf, ref_hidden, ff.LMHead(weight), kind, backend=backend)
    return torch.autograd.grad(value.sum(), leaf)[0].cpu()


@pytest.mark.slow
@pytest.mark.parametrize("test", ["plain", "trained", "chunks"])
def test_token_stats_against_float64_in_many_draws(monkeypatch, test):
    if test == "chunks":
        monkeypatch.setattr(gemm, "CHUNK_BYTES", 3000)
        monkeypatch.setattr(gemm, "DEVICE_CHUNK_BYTES", 3000)
    given(problem=SMALL)(MANY(lambda problem: check(problem, "triton", train=test == "trained")))()


@pytest.mark.slow
@pytest.mark.parametrize("kind", DIVERGENCES)
def test_divergence_against_float64_in_many_draws(kind):
    run = MANY(lambda problem, noise, shift: test_stats.check_divergence(kind, problem, noise, shift, "triton"))
    given(problem=SMALL, noise=NOISES, shift=SHIFTS)(run)()


@pytest.mark.parametrize("backend", OURS)
def test_a_logit_of_minus_infinity_costs_no_gradient(backend):
    """Padded vocabulary has such a bias: where gradients are computed anew (entropy), it must add nothing."""
    device = device_of(backend)
    generator = torch.Generator().manual_seed(0)
    weight, hidden = torch.randn(40, 8, generator=generator), torch.randn(3, 8, generator=generator)
    bias = torch.zeros(40)
    bias[-5:] = -torch.inf
    labels = torch.tensor([1, 2, 3])

    def gradient(name, head, states):
        states = states.clone().requires_grad_()
        found = ff.token_stats(states, head, labels.to(states.device), outputs=("logp", "entropy"), backend=name)
        (found.logp + found.entropy).sum().backward()
        return states.grad

    ours = gradient(backend, ff.LMHead(weight.to(device), bias.to(device)), hidden.to(device))
    short = gradient("eager", ff.LMHead(weight[:-5].double()), hidden.double())
    torch.testing.assert_close(ours.cpu().double(), short, rtol=1e-5, atol=1e-6)
