"""token_stats and divergence against float64 on full logits.

The rule (DESIGN section 6): per draw, error <= 1.5 x eager's error + 4 u scale; over many rows, RMS error <= 1.5 x
eager's. Eager is plain PyTorch on materialised float32 logits.
"""

import math

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

import fastforget as ff
from fastforget.backends import gemm
from fastforget.stats import DIVERGENCES, OUTPUTS

DIFFERENTIABLE = [name for name in OUTPUTS if name not in ("logp_mean", "logp_var", "argmax")]
DRAWS = settings(max_examples=25, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))


@pytest.fixture
def small_chunks(monkeypatch):
    monkeypatch.setattr(gemm, "CHUNK_BYTES", 3000)
    monkeypatch.setattr(gemm, "TILE_BYTES", 700)


@st.composite
def problems(draw):
    """Hidden states, head and labels of any shape, from uniform to one-hot distributions."""
    rows, width = draw(st.integers(1, 9)), draw(st.integers(1, 17))
    vocabulary = draw(st.sampled_from([1, 2, 7, 101, 257]))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 10**6)))
    dtype = draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float16]))
    sharpness = draw(st.sampled_from([0.0, 1e-3, 1.0, 30.0] + ([1e4] if dtype == torch.float32 else [])))
    weight = (torch.randn(vocabulary, width, generator=generator) / width**0.5).to(dtype)
    hidden = torch.randn(rows, 2 * width, generator=generator)[:, ::2].mul(sharpness).to(dtype)  # strided
    labels = torch.randint(0, vocabulary, (rows,), generator=generator)
    if draw(st.booleans()):  # memorised: the label is the likeliest token
        labels = (hidden.float() @ weight.float().T).argmax(dim=1)
    labels[torch.rand(rows, generator=generator) < draw(st.sampled_from([0.0, 0.4, 1.0]))] = -100
    bias = torch.randn(vocabulary, generator=generator).to(dtype) if draw(st.booleans()) else None
    scale = draw(st.sampled_from([1.0, 0.0625]))
    softcap = draw(st.sampled_from([None, None, 30.0]))
    return hidden, weight, bias, scale, softcap, labels, draw(st.booleans())


def evaluate(problem, backend, dtype=None, train=False):
    """All fields, and d (sum of u * field) for each differentiable field, u fixed random numbers."""
    hidden, weight, bias, scale, softcap, labels, with_positions = problem
    dtype = dtype or hidden.dtype
    hidden = hidden.to(dtype).requires_grad_()
    weight = weight.to(dtype).clone().requires_grad_(train)
    bias = None if bias is None else bias.to(dtype).clone().requires_grad_(train)
    leaves = [leaf for leaf in (hidden, weight, bias) if leaf is not None and leaf.requires_grad]
    names = [name for name in OUTPUTS if not (softcap and name == "expected_embedding")]
    positions = (labels != -100).nonzero()[:, 0] if with_positions else None
    head = ff.LMHead(weight, bias, scale, softcap)
    stats = ff.token_stats(hidden, head, labels, positions=positions, outputs=names, backend=backend)
    values, gradients = {}, {}
    for index, name in enumerate(names):
        value = getattr(stats, name)
        values[name] = value.detach()
        if name not in DIFFERENTIABLE or (name == "log_not_label" and len(weight) == 1):
            continue
        upstream = torch.randn(value.shape, generator=torch.Generator().manual_seed(index)).to(value.dtype)
        grads = torch.autograd.grad((value * upstream).sum(), leaves, retain_graph=True, allow_unused=True)
        for leaf, grad in zip(("hidden", "weight", "bias"), grads, strict=False):
            gradients[f"d {name} / d {leaf}"] = torch.zeros(1) if grad is None else grad
    return values, gradients


def worst(result, oracle):
    return float((result.double() - oracle).abs().nan_to_num(0.0).max()) if oracle.numel() else 0.0


def check(problem, train=False):
    hidden, weight, _, _, _, labels, _ = problem
    oracle, eager, chunked = (
        evaluate(problem, backend, dtype, train)
        for backend, dtype in (("eager", torch.float64), ("eager", None), ("chunked", None))
    )
    kept = labels != -100
    logits = ff.LMHead(*(None if part is None else part.double() for part in problem[1:3]), *problem[3:5]).logits(
        hidden.double()
    )
    scale = max(1.0, float(logits.detach().abs().max()))
    for name, expected in oracle[0].items():
        if name == "argmax":
            ours = logits[kept].gather(1, chunked[0][name][kept, None])[:, 0]
            assert torch.allclose(ours, logits[kept].max(dim=1).values, rtol=0, atol=4 * 2**-24 * scale)
            assert (chunked[0][name][~kept] == -1).all()
            continue
        size = max(scale, float(expected.abs().nan_to_num(0.0, posinf=0.0, neginf=0.0).max()))
        finite = expected.isfinite()
        assert torch.equal(chunked[0][name].isfinite(), finite) or name == "log_not_label"
        error, theirs = (worst(result[0][name][finite], expected[finite]) for result in (chunked, eager))
        assert error <= 1.5 * theirs + 4 * 2**-24 * size, (name, error, theirs, size)
        assert (chunked[0][name][~kept] == 0).all()
    rounding = torch.finfo(hidden.dtype).eps / 2  # of the gradient that is returned
    for name, expected in oracle[1].items():
        size = float(weight.double().norm(dim=1).max()) * len(labels) * max(1.0, float(hidden.detach().abs().max()))
        error, theirs = (worst(result[1][name], expected) for result in (chunked, eager))
        assert error <= 1.5 * theirs + 4 * (2**-24) * size * scale + 2 * rounding * float(expected.abs().max()), name
        assert chunked[1][name].isfinite().all(), name


@given(problems())
@DRAWS
def test_token_stats_against_float64(problem):
    check(problem)


@given(problems())
@DRAWS
def test_token_stats_of_a_head_that_trains_against_float64(problem):
    check(problem, train=True)


@given(problem=problems())
@DRAWS
def test_token_stats_in_many_chunks_against_float64(small_chunks, problem):
    check(problem)


def realistic(seed=0, rows=320, width=96, vocabulary=5003):
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(vocabulary, width, generator=generator) / width**0.5
    hidden = 3 * torch.randn(rows, width, generator=generator)
    labels = torch.randint(0, vocabulary, (rows,), generator=generator)
    labels[::2] = (hidden[::2] @ weight.T).argmax(dim=1)
    return hidden, weight, labels


def test_rms_error_of_statistics_and_gradients_over_many_rows():
    hidden, weight, labels = realistic()
    problem = (hidden, weight, None, 1.0, None, labels, True)
    oracle, eager, chunked = (
        evaluate(problem, backend, dtype)
        for backend, dtype in (("eager", torch.float64), ("eager", None), ("chunked", None))
    )
    for part in (0, 1):
        for name, expected in oracle[part].items():
            if name == "argmax":
                continue
            error, theirs = (
                float((result[part][name].double() - expected).square().mean().sqrt()) for result in (chunked, eager)
            )
            # a gather of weights has no error at all in eager: one rounding is allowed
            assert error <= 1.5 * theirs + 2**-24 * float(expected.square().mean().sqrt()), (name, error, theirs)


def test_formulas_written_out():
    """The right-hand sides from the definitions, in float64, not from our code."""
    hidden, weight, labels = realistic(rows=6, vocabulary=31)
    stats = ff.token_stats(hidden.double(), ff.LMHead(weight.double()), labels, outputs=OUTPUTS)
    for row, label in enumerate(labels.tolist()):
        z = [float(value) for value in weight.double() @ hidden[row].double()]
        total = math.fsum(math.exp(value) for value in z)
        p = [math.exp(value) / total for value in z]
        expected = {
            "logp": math.log(p[label]),
            "lse": math.log(total),
            "label_logit": z[label],
            "log_not_label": math.log(math.fsum(p[index] for index in range(31) if index != label)),
            "max_logit": max(z),
            "logit_mean": math.fsum(z) / 31,
            "entropy": -math.fsum(q * math.log(q) for q in p),
            "logp_mean": math.fsum(q * math.log(q) for q in p),
            "argmax": z.index(max(z)),
        }
        mean = expected["logp_mean"]
        expected["logp_var"] = math.fsum(q * (math.log(q) - mean) ** 2 for q in p)
        for name, value in expected.items():
            assert float(getattr(stats, name)[row]) == pytest.approx(value, rel=1e-9, abs=1e-9), name
        tau = sum(q * weight[index].double() for index, q in enumerate(p))
        assert torch.allclose(stats.expected_embedding[row], tau, rtol=0, atol=1e-12)


@pytest.mark.parametrize("label_probability", [1e-12, 1 - 1e-9])
def test_extreme_label_probabilities(label_probability):
    vocabulary = 50
    other = math.log((1 - label_probability) / (vocabulary - 1))
    logits = torch.full((1, vocabulary), other, dtype=torch.float64)
    logits[0, 7] = math.log(label_probability)
    labels = torch.tensor([7])
    narrow = logits.float().requires_grad_()
    stats = ff.token_stats_from_logits(narrow, labels, outputs=("log_not_label",))
    # the truth by formula: autograd in float64 loses p_y = 1e-12 itself to cancellation
    unit = torch.full((1, vocabulary), 1 / (vocabulary - 1), dtype=torch.float64)
    unit[0, 7] = -1.0
    truth = {
        "logp": (math.log(label_probability), -(1 - label_probability) * unit),
        "log_not_label": (math.log1p(-label_probability), label_probability * unit),
    }
    for name, (value, gradient) in truth.items():
        # float32 logits of size 30 carry an error of 2^-24 * 30 in every exponent
        assert float(getattr(stats, name).detach()) == pytest.approx(value, rel=1e-5), name
        ours = torch.autograd.grad(getattr(stats, name).sum(), narrow, retain_graph=True)[0].double()
        assert torch.allclose(ours, gradient, rtol=1e-5, atol=0), name


def test_mixed_upstream_gradients_in_one_loss():
    hidden, weight, labels = realistic(rows=12, vocabulary=101)

    def gradient(backend, dtype):
        leaf = hidden.to(dtype).requires_grad_()
        stats = ff.token_stats(leaf, ff.LMHead(weight.to(dtype)), labels, outputs=DIFFERENTIABLE, backend=backend)
        loss = (stats.logp * stats.lse - stats.log_not_label + stats.entropy.square() + stats.max_logit).sum()
        return torch.autograd.grad(loss + (stats.expected_embedding * hidden.to(dtype)).sum(), leaf)[0]

    assert torch.allclose(gradient("chunked", torch.float64), gradient("eager", torch.float64), rtol=1e-9, atol=1e-11)


def divergence_of(hidden, ref_hidden, weight, softcap, kind, backend, dtype):
    leaf = hidden.to(dtype).requires_grad_()
    value = ff.divergence(
        leaf, ref_hidden.to(dtype), ff.LMHead(weight.to(dtype), softcap=softcap), kind, backend=backend
    )
    return value.detach(), torch.autograd.grad(value.sum(), leaf)[0]


@pytest.mark.parametrize("kind", DIVERGENCES)
@pytest.mark.parametrize("softcap", [None, 5.0])
@pytest.mark.parametrize("noise", [1e-3, 1e-2, 1.0, 30.0])
def test_divergence_rms_against_float64(small_chunks, kind, softcap, noise):
    generator = torch.Generator().manual_seed(3)
    weight = torch.randn(503, 32, generator=generator) / 32**0.5
    hidden = 3 * torch.randn(256, 32, generator=generator)
    ref_hidden = hidden + noise * torch.randn(256, 32, generator=generator)
    oracle, eager, chunked = (
        divergence_of(hidden, ref_hidden, weight, softcap, kind, backend, dtype)
        for backend, dtype in (("eager", torch.float64), ("eager", torch.float32), ("chunked", torch.float32))
    )
    assert (chunked[0] >= 0).all()
    for part in (0, 1):
        error, theirs = ((result[part].double() - oracle[part]).square().mean().sqrt() for result in (chunked, eager))
        scale = float(oracle[part].square().mean().sqrt())
        assert error <= 1.5 * theirs + 2**-24 * scale, (part, float(error), float(theirs))


@pytest.mark.parametrize("kind", DIVERGENCES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_divergence_of_equal_states_is_zero(kind, dtype):
    hidden, weight, _ = realistic(rows=8, vocabulary=211)
    value, grad = divergence_of(hidden, hidden, weight, None, kind, "chunked", dtype)
    assert (value.abs() <= (0 if kind != "jsd" else 1e-12)).all() and grad.abs().max() < 1e-6


@pytest.mark.parametrize("kind", DIVERGENCES)
def test_divergence_of_one_hot_distributions_is_finite(kind):
    logits = torch.tensor([[1e4, 0.0, -1e4], [0.0, 1e4, 5.0]])
    reference = torch.tensor([[0.0, 1e4, 3.0], [0.0, 1e4, 5.0]])
    value = ff.divergence(logits.requires_grad_(), reference, ff.LMHead(None), kind)
    value.sum().backward()
    truth = ff.divergence(logits.detach().double(), reference.double(), ff.LMHead(None), kind, backend="eager")
    assert torch.allclose(value.detach().double(), truth, rtol=1e-6) and logits.grad.isfinite().all()


def test_chunked_never_holds_all_logits():
    largest = 0

    class Recorder(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            nonlocal largest
            result = function(*args, **(kwargs or {}))
            for tensor in torch.utils._pytree.tree_leaves(result):
                if isinstance(tensor, torch.Tensor):
                    largest = max(largest, tensor.numel() * tensor.element_size())
            return result

    hidden, weight, labels = realistic(rows=4096, width=16, vocabulary=20011)  # 328 MB of float32 logits
    hidden.requires_grad_()
    with Recorder():
        ff.token_stats(hidden, ff.LMHead(weight), labels).logp.sum().backward()
        ff.divergence(hidden, hidden.detach(), ff.LMHead(weight)).sum().backward()
    assert largest <= gemm.CHUNK_BYTES


def test_evaluation_pays_no_second_product(monkeypatch):
    hidden, weight, labels = realistic(rows=8)
    monkeypatch.setattr(gemm, "rows_to_hidden", lambda *args, **kwargs: pytest.fail("a gradient was computed"))
    with torch.no_grad():
        ff.token_stats(hidden.requires_grad_(), ff.LMHead(weight), labels)


def test_errors_say_what_is_wrong():
    hidden, weight, labels = realistic(rows=4)
    head = ff.LMHead(weight)
    cases = [
        ("labels must be", lambda: ff.token_stats(hidden, head, labels[:2])),
        ("outside the vocabulary", lambda: ff.token_stats(hidden, head, labels + 10**6)),
        ("unknown output 'nll'", lambda: ff.token_stats(hidden, head, labels, outputs=("nll",))),
        ("unknown backend 'cuda'", lambda: ff.token_stats(hidden, head, labels, backend="cuda")),
        ("hidden has D = 95", lambda: ff.token_stats(hidden[:, 1:], head, labels)),
        ("unknown divergence", lambda: ff.divergence(hidden, hidden, head, "kl")),
        ("must agree", lambda: ff.divergence(hidden, hidden[:2], head)),
        ("needs a frozen head", lambda: ff.divergence(hidden, hidden, ff.LMHead(weight.clone().requires_grad_()))),
        (
            "without a softcap",
            lambda: ff.token_stats(hidden, ff.LMHead(weight, softcap=3.0), labels, outputs=("expected_embedding",)),
        ),
        ("quantised head", lambda: ff.LMHead(torch.zeros(4, 4, dtype=torch.int8))),
    ]
    for message, call in cases:
        with pytest.raises(ff.FastforgetError, match=message):
            call()
