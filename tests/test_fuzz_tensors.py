"""Random arguments to the tensor-level functions, of any strides, with NaN and infinity in some rows.

Only FastforgetError is raised, by all backends or by none; finite numbers give finite ones, the same on all backends;
NaN in a row gives NaN in that row, and every other row is as it is without.
"""

import os
import random

import pytest
import torch
from kernel_device import OURS, device_of

import fastforget as ff
from fastforget.backends.fields import DIFFERENTIABLE, NAMES

EMBEDDINGS = ("expected_embedding", "others_embedding")
ROUNDING = {torch.float64: 1e-9, torch.float32: 1e-4, torch.bfloat16: 2e-2, torch.float16: 4e-3}
LAYOUTS = ("plain", "transposed", "every other", "one column", "sliced", "expanded")


def laid_out(tensor, layout):
    """The same numbers with other strides; of some layouts the first row or column, for all."""
    if tensor.dim() == 1:
        if layout == "every other":
            return torch.stack([tensor, tensor], dim=1)[:, 0]
        if layout == "sliced":
            return torch.cat([tensor[:1], tensor, tensor[:1]])[1 : 1 + len(tensor)]
        return tensor[:1].expand(tensor.shape) if layout == "expanded" and len(tensor) else tensor
    match layout:
        case "transposed":
            return tensor.T.contiguous().T
        case "every other":
            return torch.stack([tensor, tensor], dim=2).flatten(1)[:, ::2]
        case "one column":
            return tensor[:, :1].expand(tensor.shape)
        case "sliced":
            return torch.nn.functional.pad(tensor, (3, 2, 1, 1))[1 : 1 + len(tensor), 3 : 3 + tensor.shape[1]]
        case "expanded" if len(tensor):
            return tensor[:1].expand(tensor.shape)
    return tensor


class Problem:
    """One random call: `run(backend, poisoned)` returns {name: tensor (N, ...)} of its values and gradients."""

    def __init__(self, seed):
        draw = self.draw = random.Random(seed)
        torch.manual_seed(seed)
        self.kind = draw.choice(("token_stats", "token_stats", "from_logits", "divergence", "hidden_stats"))
        self.rows, self.width = draw.choice((0, 1, 2, 5, 9)), draw.choice((1, 2, 7, 16))
        self.vocabulary = draw.choice((1, 2, 7, 40, 101))
        self.dtype = draw.choice((torch.float32, torch.float32, torch.bfloat16, torch.float16, torch.float64))
        self.hidden = self.tensor(self.rows, self.vocabulary if self.kind == "from_logits" else self.width)
        self.reference = self.tensor(*self.hidden.shape)
        weight = self.tensor(self.vocabulary, self.width, spread=self.width**-0.5)
        bias = self.tensor(self.vocabulary) if draw.random() < 0.3 else None
        self.softcap = draw.choice((None, None, 30.0))
        self.weight = weight.requires_grad_() if draw.random() < 0.3 and self.kind == "token_stats" else weight
        self.bias, self.scale = bias, draw.choice((1.0, 0.25))
        labels = torch.randint(0, self.vocabulary, (self.rows,))
        labels[torch.rand(self.rows) < draw.choice((0.0, 0.4, 1.0))] = -100
        self.labels = laid_out(labels, draw.choice(LAYOUTS))
        kept = (labels != -100).nonzero()[:, 0]
        self.positions = (
            kept[torch.randperm(len(kept))[: draw.randrange(len(kept) + 1)]] if draw.random() < 0.4 else None
        )
        without = EMBEDDINGS if self.softcap or self.kind == "from_logits" else ()
        named = [name for name in NAMES if name not in without]
        self.outputs = draw.sample(named, draw.randrange(len(named) + 1))
        states = self.rows, self.width
        self.anchor = draw.choice((None, self.tensor(self.width), self.tensor(*states), "label"))
        if self.anchor == "label" and self.kind != "token_stats":
            self.anchor = self.tensor(*states)
        self.centres = self.tensor(draw.choice((1, 3, 20)), self.width) if draw.random() < 0.4 else None
        self.targets = {"anchor": self.anchor, "centres": self.centres, "metric": draw.choice(("l2", "cosine"))}
        self.targets["margin"] = draw.choice((None, 1.5))
        self.divergence = draw.choice(("forward_kl", "reverse_kl", "jsd"))
        self.poison = (
            draw.choice((torch.nan, torch.nan, torch.inf, -torch.inf, 3e38)),
            draw.randrange(self.hidden.shape[1]),
        )
        self.poisoned_row = draw.randrange(self.rows) if self.rows else None

    def tensor(self, *shape, spread=1.0):
        return laid_out((torch.randn(shape) * spread).to(self.dtype), self.draw.choice(LAYOUTS))

    def run(self, backend, poisoned):
        device = device_of(backend)
        hidden = self.hidden.to(device)
        if poisoned:
            hidden = hidden.clone()
            hidden[self.poisoned_row, self.poison[1]] = self.poison[0]
        hidden = hidden.detach().requires_grad_()
        place = lambda value: value.to(device) if isinstance(value, torch.Tensor) else value  # noqa: E731
        weight = place(self.weight).detach().requires_grad_(self.weight.requires_grad)
        head = ff.LMHead(weight, place(self.bias), self.scale, self.softcap)
        labels, positions = place(self.labels), place(self.positions)
        targets = {name: place(value) for name, value in self.targets.items()}
        if self.kind == "hidden_stats":
            values = dict(zip(("distance", "pull"), ff.hidden_stats(hidden, **targets, backend=backend), strict=True))
        elif self.kind == "divergence":
            options = {"positions": positions, "backend": backend}
            values = {"divergence": ff.divergence(hidden, place(self.reference), head, self.divergence, **options)}
        else:
            options = {"positions": positions, "outputs": self.outputs, "backend": backend}
            if self.kind == "from_logits":
                stats = ff.token_stats_from_logits(hidden, labels, **options)
            else:
                stats = ff.token_stats(hidden, head, labels, **targets, **options)
            values = vars(stats)
        values = {name: value for name, value in values.items() if value is not None}
        flowing = [name for name in values if name in (*DIFFERENTIABLE, "distance", "pull", "divergence")]
        loss = sum(values[name].sum() for name in flowing if values[name].requires_grad)
        if isinstance(loss, torch.Tensor):
            loss.backward()
            values["gradient"] = hidden.grad
        return {name: value.detach().double().cpu() for name, value in values.items()}


def assert_close(value, expected, rounding, where):
    """Hold values to those expected, within `rounding` of the largest; infinities are equal."""
    size = float(expected.abs().nan_to_num(0.0, 0.0, 0.0).amax()) if expected.numel() else 0.0
    allowed = rounding * max(1.0, size)
    same = (value == expected) | ((value - expected).abs() <= allowed)
    assert value.shape == expected.shape and same.all(), (where, value, expected)


def attempt(problem, backend, poisoned):
    """What a call returns, or why it is refused."""
    try:
        return problem.run(backend, poisoned)
    except ff.FastforgetError as error:
        return str(error)


def check(seed, backends):
    """One problem on all backends; whether it was computed."""
    problem = Problem(seed)
    plain = {backend: attempt(problem, backend, False) for backend in ("eager", *backends)}
    expected = plain["eager"]
    for backend, found in plain.items():
        where = f"seed {seed}, {backend}"
        assert isinstance(found, str) == isinstance(expected, str), (where, found)
        if isinstance(found, str):
            continue
        assert found.keys() == expected.keys(), where
        for name, value in found.items():
            infinite = problem.vocabulary == 1 and name in ("log_not_label", "logp_top2_margin")
            assert infinite or value.isfinite().all(), (where, name)
            if name not in ("argmax", "others_argmax"):  # of ties
                assert_close(value, expected[name], ROUNDING[problem.dtype], f"{where}, {name}")
    if isinstance(expected, str) or not problem.rows:
        return not isinstance(expected, str)
    row, is_nan = problem.poisoned_row, problem.poison[0] != problem.poison[0]
    computed = problem.kind in ("hidden_stats", "divergence") or int(problem.labels[row]) != -100
    if problem.positions is not None and problem.kind != "hidden_stats":
        computed = computed and row in problem.positions.tolist()
    others = [index for index in range(problem.rows) if index != row or not computed]
    for backend in plain:
        found = attempt(problem, backend, True)
        assert not isinstance(found, str), (seed, backend, found)
        for name, value in found.items():
            where = f"seed {seed}, {backend}, {name}, row {row} of {problem.poison[0]}"
            assert_close(value[others], plain[backend][name][others], 1e-5, where)
            if computed and is_nan and name not in ("argmax", "others_argmax"):
                at_label = problem.kind == "from_logits" and problem.poison[1] == int(problem.labels[row])
                kept = problem.kind == "from_logits" and (name == "label_logit") != at_label
                kept = kept and (name == "label_logit" or name.startswith("others_") or name == "gradient")
                kept = kept or (problem.vocabulary == 1 and name.startswith("others_"))  # there are no others
                assert kept or value[row].isnan().any(), where
    return True


@pytest.mark.timeout(120)
def test_a_sample_on_the_cpu(monkeypatch):
    monkeypatch.setenv("FASTFORGET_TILE", "4x16")
    backends = [
        each
        for each in ("torch", "native")
        if ff.backends.why_not_native(torch.device("cpu")) is None or each == "torch"
    ]
    assert sum(check(seed, backends) for seed in range(150)) > 90


@pytest.mark.parametrize("backend", OURS[2:])
@pytest.mark.timeout(120)
def test_a_sample_of_the_kernels(backend, monkeypatch):
    monkeypatch.setenv("FASTFORGET_TILE", "4x64")
    assert sum(check(seed, [backend]) for seed in range(1000, 1012)) > 6


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("backend", OURS)
def test_many(backend):
    count = int(os.environ.get("FASTFORGET_FUZZ", "1000"))
    assert sum(check(seed, [backend]) for seed in range(2000, 2000 + count)) > count // 2
