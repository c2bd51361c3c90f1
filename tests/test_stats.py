"""token_stats: its formulas, extremes, rows, NaN and errors (random problems are in `backends/test_oracle.py`)."""

import math

import pytest
import torch
from kernel_device import OURS, device_of, needs_native, needs_triton
from oracle import evaluate, realistic
from torch.utils._python_dispatch import TorchDispatchMode

import fastforget as ff
from fastforget.backends import sweep, tiling
from fastforget.backends.fields import DIFFERENTIABLE
from fastforget.backends.fields import NAMES as OUTPUTS
from fastforget.stats import DIVERGENCES

SLOW = [pytest.mark.slow]  # minutes in Triton's interpreter


@pytest.mark.parametrize(
    ("backend", "rows", "vocabulary"),
    [
        ("torch", 320, 5003),
        pytest.param("native", 320, 1009, marks=needs_native),
        pytest.param("triton", 64, 257, marks=needs_triton),
        pytest.param("triton", 320, 1009, marks=[*needs_triton, *SLOW]),
    ],
)
def test_rms_error_of_statistics_and_gradients_over_many_rows(backend, rows, vocabulary):
    hidden, weight, labels = realistic(rows=rows, vocabulary=vocabulary)
    problem = (hidden, weight, None, 1.0, None, labels, True)
    oracle, eager, ours = (
        evaluate(problem, name, dtype) for name, dtype in (("eager", torch.float64), ("eager", None), (backend, None))
    )
    for part in (0, 1):
        for name, expected in oracle[part].items():
            if name in ("argmax", "others_argmax"):
                continue
            error, theirs = (
                float((result[part][name].double() - expected).square().mean().sqrt()) for result in (ours, eager)
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
        others = [p[index] / (1 - p[label]) for index in range(31) if index != label]
        expected["others_entropy"] = -math.fsum(q * math.log(q) for q in others)
        expected["others_argmax"] = max((index for index in range(31) if index != label), key=z.__getitem__)
        expected["logp_top2_margin"] = max(z) - sorted(z)[-2]
        expected["logp_var"] = math.fsum(q * (math.log(q) - mean) ** 2 for q in p)
        for name, value in expected.items():
            assert float(getattr(stats, name)[row]) == pytest.approx(value, rel=1e-9, abs=1e-9), name
        tau = sum(q * weight[index].double() for index, q in enumerate(p))
        assert torch.allclose(stats.expected_embedding[row], tau, rtol=0, atol=1e-12)
        rest = (tau - p[label] * weight[label].double()) / (1 - p[label])
        assert torch.allclose(stats.others_embedding[row], rest, rtol=0, atol=1e-12)


@pytest.mark.parametrize("label_probability", [1e-12, 1 - 1e-9])
def test_extreme_label_probabilities(label_probability):
    vocabulary = 50
    other = math.log((1 - label_probability) / (vocabulary - 1))
    logits = torch.full((1, vocabulary), other, dtype=torch.float64)
    logits[0, 7] = math.log(label_probability)
    labels = torch.tensor([7])
    narrow = logits.float().requires_grad_()
    stats = ff.token_stats_from_logits(narrow, labels, outputs=("log_not_label", "others_entropy"))
    assert float(stats.others_entropy) == pytest.approx(math.log(vocabulary - 1), rel=1e-6)
    assert not stats.others_entropy.requires_grad
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


@pytest.mark.parametrize("outputs", [("log_not_label",), ("log_not_label", "entropy")])
@pytest.mark.parametrize("train", [False, True])
def test_log_not_label_of_a_memorised_token_has_its_gradient(outputs, train):
    """1 - p_y = e^-200 is 0 in float32; the gradient is softmax over the other tokens - onehot all the same."""
    hidden = torch.tensor([[200.0, 1.0, 0.0, 0.0]], requires_grad=True)
    weight = torch.eye(4, requires_grad=train)
    stats = ff.token_stats(hidden, ff.LMHead(weight), torch.tensor([0]), outputs=outputs)
    sum(getattr(stats, name).sum() for name in outputs).backward()  # the entropy's own gradient is 0 here
    total = math.e + 2
    expected = torch.tensor([-1.0, math.e / total, 1 / total, 1 / total])
    assert torch.allclose(hidden.grad[0], expected, rtol=1e-5, atol=0)
    if train:
        assert torch.allclose(weight.grad, expected[:, None] * hidden.detach(), rtol=1e-5, atol=0)


def test_entropy_gradient_of_equal_logits_is_zero():
    """With equal logits it is exactly 0; log p + entropy would leave the rounding of log V."""
    logits = torch.zeros(1, 7).requires_grad_()
    ff.token_stats_from_logits(logits, torch.tensor([0]), outputs=("entropy",)).entropy.sum().backward()
    assert logits.grad.abs().max() == 0


def test_expected_embedding_is_not_rounded_against_the_label_row():
    """The label's head row is large here and its probability small: the mean must not carry its rounding."""
    weight = torch.randn(2000, 3, generator=torch.Generator().manual_seed(0))
    weight[7] = 1e4
    hidden = torch.tensor([[-1e-2, -1e-2, -1e-2]])
    ours, truth = (
        ff.token_stats(hidden.to(dtype), ff.LMHead(weight.to(dtype)), torch.tensor([7]), outputs=["expected_embedding"])
        for dtype in (torch.float32, torch.float64)
    )
    assert torch.allclose(ours.expected_embedding.double(), truth.expected_embedding, rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_each_output_alone_and_of_no_token_at_all(name):
    """Each field is asked for by itself: another one that happens to be there must not be needed."""
    hidden, weight, labels = realistic(rows=5, vocabulary=31)
    for kept in (labels, torch.full_like(labels, -100), None):
        rows = hidden[:0] if kept is None else hidden
        grads = []
        for backend in ("eager", "torch"):
            leaf = rows.double().requires_grad_()
            kept = labels[:0] if kept is None else kept
            stats = ff.token_stats(leaf, ff.LMHead(weight.double()), kept, outputs=[name], backend=backend)
            grads.append(torch.autograd.grad(getattr(stats, name).sum(), leaf)[0])
        assert torch.allclose(*grads, rtol=1e-9, atol=1e-12)


def test_fields_that_were_not_asked_for_are_absent():
    hidden, weight, labels = realistic(rows=2)
    stats = ff.token_stats(hidden, ff.LMHead(weight), labels, outputs=["entropy"])
    assert {name for name in OUTPUTS if getattr(stats, name) is not None} == {"logp", "lse", "entropy"}


def test_positions_choose_the_rows():
    hidden, weight, labels = realistic(rows=6)
    every = ff.token_stats(hidden, ff.LMHead(weight), labels)
    some = ff.token_stats(hidden, ff.LMHead(weight), labels, positions=torch.tensor([4, 1]))
    assert some.logp[[1, 4]].tolist() == pytest.approx(every.logp[[1, 4]].tolist(), rel=1e-6)
    assert (some.logp[[0, 2, 3, 5]] == 0).all()
    value = ff.divergence(hidden, hidden + 1, ff.LMHead(weight), positions=torch.tensor([3]))
    assert value[3] > 0 and (value[[0, 1, 2, 4, 5]] == 0).all()


@pytest.mark.parametrize("backend", ["eager", *OURS])
def test_nan_is_not_hidden(backend):
    hidden, weight, labels = (each.to(device_of(backend)) for each in realistic(rows=3, vocabulary=301))
    other = hidden.clone()
    other[1, 0] = torch.nan
    stats = ff.token_stats(
        other, ff.LMHead(weight), labels, outputs=OUTPUTS, anchor=hidden[0], centres=hidden[:2], backend=backend
    )
    for name in (set(OUTPUTS) | {"distance", "pull"}) - {"argmax", "others_argmax"}:
        value = getattr(stats, name).reshape(3, -1)
        assert value[1].isnan().all() and value[[0, 2]].isfinite().all(), name
    for kind in DIVERGENCES:
        for pair in ((other, hidden), (hidden, other)):
            value = ff.divergence(*pair, ff.LMHead(weight), kind, backend=backend)
            assert value.isnan().tolist() == [False, True, False], kind


def test_mixed_upstream_gradients_in_one_loss():
    hidden, weight, labels = realistic(rows=12, vocabulary=101)

    def gradient(backend, dtype):
        leaf = hidden.to(dtype).requires_grad_()
        stats = ff.token_stats(leaf, ff.LMHead(weight.to(dtype)), labels, outputs=DIFFERENTIABLE, backend=backend)
        loss = (stats.logp * stats.lse - stats.log_not_label + stats.entropy.square() + stats.max_logit).sum()
        return torch.autograd.grad(loss + (stats.expected_embedding * hidden.to(dtype)).sum(), leaf)[0]

    assert torch.allclose(gradient("torch", torch.float64), gradient("eager", torch.float64), rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("backend", ["torch", pytest.param("native", marks=needs_native)])
def test_no_tensor_holds_all_logits(monkeypatch, backend):
    monkeypatch.setattr(tiling, "CPU_BYTES", 2**19)
    largest = 0

    class Recorder(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            nonlocal largest
            result = function(*args, **(kwargs or {}))
            for tensor in torch.utils._pytree.tree_leaves(result):
                if isinstance(tensor, torch.Tensor):
                    largest = max(largest, tensor.numel() * tensor.element_size())
            return result

    hidden, weight, labels = realistic(rows=400, width=16, vocabulary=5003)  # 8 MB of float32 logits
    hidden.requires_grad_()
    with Recorder():
        stats = ff.token_stats(hidden, ff.LMHead(weight), labels, outputs=OUTPUTS, backend=backend)
        sum(getattr(stats, name).sum() for name in DIFFERENTIABLE).backward()
        trained = ff.LMHead(weight.clone().requires_grad_())
        ff.token_stats(hidden, trained, labels, backend=backend).logp.sum().backward()
        for kind in DIVERGENCES:
            ff.divergence(hidden, hidden.detach(), ff.LMHead(weight), kind, backend=backend).sum().backward()
    assert weight.numel() * 4 < largest <= 2**20


def test_evaluation_pays_no_second_product(monkeypatch):
    hidden, weight, labels = realistic(rows=8)
    monkeypatch.setattr(sweep, "accumulate", lambda *args, **kwargs: pytest.fail("a gradient was computed"))
    with torch.no_grad():
        ff.token_stats(hidden.requires_grad_(), ff.LMHead(weight), labels)


def test_errors_say_what_is_wrong():
    hidden, weight, labels = realistic(rows=4)
    head, far = ff.LMHead(weight), hidden[0] + 1
    cases = [
        ("labels must be", lambda: ff.token_stats(hidden, head, labels[:2])),
        ("labels must be .* not a list", lambda: ff.token_stats(hidden, head, labels.tolist())),
        (r"labels must be .* not int64 \(\)", lambda: ff.token_stats(hidden, head, labels[0])),
        (r"hidden must be .* not float32 \(\)", lambda: ff.token_stats(hidden[0, 0], head, labels)),
        ("hidden must be .* not a list", lambda: ff.token_stats(hidden.tolist(), head, labels)),
        ("hidden must be .* not float8", lambda: ff.token_stats(hidden.to(torch.float8_e4m3fn), head, labels)),
        (r"the logits must be .* not float32 \(\)", lambda: ff.token_stats_from_logits(hidden[0, 0], labels[:0])),
        (
            "hidden must be .* not int64",
            lambda: ff.token_stats_from_logits(hidden, labels, hidden.long(), anchor=far),
        ),
        ("anchor must be .* not a list", lambda: ff.token_stats(hidden, head, labels, anchor=[0.0] * 96)),
        ("anchor must be .* not float32", lambda: ff.token_stats(hidden, head, labels, anchor=far[0])),
        ("centres must be .* not a list", lambda: ff.hidden_stats(hidden, centres=[[0.0] * 96])),
        ("ref_hidden must be .* not a list", lambda: ff.divergence(hidden, hidden.tolist(), head)),
        ("outside the vocabulary", lambda: ff.token_stats(hidden, head, labels + 10**6, anchor="label")),
        ("the head's weight must be a tensor", lambda: ff.LMHead(weight.tolist())),
        ("a quantised head", lambda: ff.LMHead(weight.to(torch.float8_e4m3fn))),
        ("outside the vocabulary", lambda: ff.token_stats(hidden, head, labels + 10**6)),
        ("unknown output 'nll'", lambda: ff.token_stats(hidden, head, labels, outputs=("nll",))),
        ("unknown backend 'cuda'", lambda: ff.token_stats(hidden, head, labels, backend="cuda")),
        ("hidden has D = 95", lambda: ff.token_stats(hidden[:, 1:], head, labels)),
        ("label_shift must be finite and at most 0", lambda: ff.divergence(hidden, hidden, head, label_shift=1.0)),
        ("give labels", lambda: ff.divergence(hidden, hidden, head, label_shift=-1.0)),
        ("labels must be", lambda: ff.divergence(hidden, hidden, head, labels=labels[:2], label_shift=-1.0)),
        ("outside the voc", lambda: ff.divergence(hidden, hidden, head, labels=labels + 10**6, label_shift=-1.0)),
        ("unknown divergence", lambda: ff.divergence(hidden, hidden, head, "kl")),
        ("must agree", lambda: ff.divergence(hidden, hidden[:2], head)),
        ("needs a frozen head", lambda: ff.divergence(hidden, hidden, ff.LMHead(weight.clone().requires_grad_()))),
        (
            "without a softcap",
            lambda: ff.token_stats(hidden, ff.LMHead(weight, softcap=3.0), labels, outputs=("expected_embedding",)),
        ),
        ("tail_mass is retired", lambda: ff.token_stats(hidden, head, labels, tail_mass=1e-3)),
        ("quantised head", lambda: ff.LMHead(torch.zeros(4, 4, dtype=torch.int8))),
    ]
    for message, call in cases:
        with pytest.raises(ff.FastforgetError, match=message):
            call()


@pytest.mark.parametrize("backend", OURS)
def test_logits_of_any_strides_get_their_gradient(backend):
    logits = torch.randn(20, 3, generator=torch.Generator().manual_seed(0)).to(device_of(backend)).t().requires_grad_()
    labels = torch.tensor([0, 5, 3])
    ff.token_stats_from_logits(logits, labels, backend=backend).logp.sum().backward()
    truth = logits.detach().double().cpu().requires_grad_()
    truth.log_softmax(1).gather(1, labels[:, None]).sum().backward()
    assert torch.allclose(logits.grad.cpu().double(), truth.grad, rtol=1e-5, atol=1e-7)


def test_positions_are_distinct_rows():
    hidden, weight, labels = realistic(rows=4)
    head = ff.LMHead(weight)
    wrong = ([0, 4], [0, -1], [0, 0])
    for positions in (*map(torch.tensor, wrong), torch.tensor([0.0]), torch.tensor([[1]]), [1]):
        for call in (
            lambda positions: ff.token_stats(hidden, head, labels, positions=positions),
            lambda positions: ff.token_stats_from_logits(hidden, labels % 96, positions=positions, in_place=True),
            lambda positions: ff.divergence(hidden, hidden, head, positions=positions),
        ):
            with pytest.raises(ff.FastforgetError, match="position"):
                call(positions)
