"""What the backends promise of the machine: torch.compile traces through them, and nothing synchronises."""

import ast
from pathlib import Path

import pytest
import torch
from helpers import NoLooking
from kernel_device import OURS, device_of

import fastforget as ff
from fastforget.backends import backend_of, ops, state_ops
from fastforget.backends.fields import DIFFERENTIABLE
from fastforget.backends.fields import NAMES as OUTPUTS
from fastforget.stats import DIVERGENCES


@pytest.fixture(autouse=True)
def nothing_compiled_yet():
    torch._dynamo.reset()


def problem(backend, rows=5, width=8, vocabulary=40):
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(vocabulary, width, generator=generator)
    hidden = torch.randn(rows, width, generator=generator)
    labels = torch.randint(0, vocabulary, (rows,), generator=generator)
    labels[1] = -100
    device = device_of(backend)
    return hidden.to(device), weight.to(device), labels.to(device)


def loss_of(hidden, weight, labels, positions, backend):
    """Every op: statistics with states, of a model's logits too, a divergence, states alone."""
    given = {"positions": positions, "outputs": ("logp", "entropy"), "backend": backend}
    against = {"anchor": hidden.detach() + 1, "centres": weight[:3].detach(), "margin": 20.0}
    ref_hidden, shift = hidden.detach() + 0.1, {"labels": labels, "label_shift": -2.0}
    frozen = ff.LMHead(weight.detach())
    kl = ff.divergence(hidden, ref_hidden, frozen, positions=positions, backend=backend, **shift)
    distance, pull = ff.hidden_stats(hidden, weight[0].detach(), weight[:2].detach(), backend=backend)
    total = kl.sum() + distance.sum() + pull.sum()
    for stats in (
        ff.token_stats(hidden, ff.LMHead(weight), labels, **given, **against),
        ff.token_stats_from_logits(hidden @ weight.T, labels, hidden, **given, **against),
    ):
        total = (
            total + stats.logp.square().sum() + stats.entropy.square().sum() + stats.distance.sum() + stats.pull.sum()
        )
    return total


@pytest.mark.parametrize("backend", OURS)
@pytest.mark.parametrize(("train", "with_positions"), [(False, True), (True, False)])
def test_compile_traces_the_whole_function(backend, train, with_positions):
    hidden, weight, labels = problem(backend)
    positions = torch.tensor([0, 2, 3, 4], device=hidden.device) if with_positions else None
    results = []
    for function in (loss_of, torch.compile(loss_of, fullgraph=True, backend="aot_eager")):
        leaf, trained = hidden.clone().requires_grad_(), weight.clone().requires_grad_(train)
        loss = function(leaf, trained, labels, positions, backend)
        loss.backward()
        results.append((loss.detach(), leaf.grad, *([trained.grad] if train else [])))
    for expected, compiled in zip(*results, strict=True):
        assert torch.allclose(compiled, expected, rtol=1e-5, atol=1e-6)


def test_compile_with_inductor():
    hidden, weight, labels = problem("torch")
    compiled = torch.compile(loss_of, fullgraph=True)
    positions = torch.tensor([0, 2, 3, 4])
    assert float(compiled(hidden, weight, labels, positions, "torch")) == pytest.approx(
        float(loss_of(hidden, weight, labels, positions, "torch")), rel=1e-5
    )


@pytest.mark.parametrize("backend", ["eager", *OURS])
@pytest.mark.parametrize("shift", [0.0, -2.0])
def test_log_probabilities_told_beside_a_divergence(backend, shift):
    device = device_of(backend)
    generator = torch.Generator().manual_seed(0)
    hidden, reference = (torch.randn(7, 6, generator=generator).to(device) for _ in range(2))
    head = ff.LMHead(torch.randn(33, 6, generator=generator).to(device), scale=0.7, softcap=5.0)
    labels = torch.randint(33, (7,), generator=generator).to(device)
    computes = backend_of(backend, device)
    expected = computes.token_stats(hidden, labels, head, ("logp",))["logp"]
    shifted = {"labels": labels, "label_shift": shift}
    alone = ff.divergence(hidden, reference, head, backend=backend, **shifted)
    found, logp = computes.divergence(hidden.requires_grad_(), reference, head, "forward_kl", **shifted)
    torch.testing.assert_close(logp, expected, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(found.detach(), alone, rtol=1e-6, atol=1e-7)
    assert not logp.requires_grad and torch.autograd.grad(found.sum(), hidden)[0].abs().sum() > 0


def test_fake_implementations_tell_the_truth():
    """torch's own checks of a custom op: schema, fake tensors, autograd registration."""
    hidden, weight, labels = problem("torch")
    hidden.requires_grad_()
    for outputs in (("logp",), OUTPUTS):
        names = ",".join((*outputs, "distance", "pull"))
        given = hidden, labels.clamp(min=0), None, weight, None, None, hidden.detach() + 1, weight[:3], "l2"
        checks = ("test_schema", "test_autograd_registration", "test_faketensor")
        torch.library.opcheck(ops.token_stats.op, (*given, 1.0, 0.0, names, True, "torch"), test_utils=checks)
    positions = torch.tensor([0, 3])
    embedding, argmax = torch.zeros(2, 8), torch.tensor([1, 2])
    given = hidden, hidden.detach() + 1, positions, labels[positions], weight, None
    for rest in ((embedding, argmax, 1.0, 0.0, -2.0), (None, None, 1.0, 0.0, 0.0)):
        torch.library.opcheck(ops.divergence.op, (*given, *rest, "forward_kl", True, "torch"))
        torch.library.opcheck(ops.divergence.op, (hidden.detach(), *given[1:], *rest, "jsd", False, "torch"))
    for anchor, centres in ((weight[0], weight[:2]), (weight[0], None), (None, weight[:2])):
        torch.library.opcheck(state_ops.state_stats.op, (hidden, anchor, centres, "cosine", "torch"))
    torch.library.opcheck(state_ops.checked_labels.op, (labels, 40, -100))


@pytest.mark.parametrize("backend", OURS)
def test_nothing_looks_at_a_value(monkeypatch, backend):
    """The traced operations hold none that synchronises with a device, nor do launchers read one on the host."""
    # these look, but at labels on the CPU only
    monkeypatch.setattr(ff.arguments, "check_vocabulary", lambda *_: None)
    for module in (ff.arguments, ff.stats):
        monkeypatch.setattr(module, "check_positions", lambda *_: None)
        monkeypatch.setattr(module, "checked_labels", lambda labels, *_: labels.clamp(min=0))
    hidden, weight, labels = problem(backend)
    positions = torch.tensor([0, 2, 3, 4])
    launch = None
    if backend == "triton":  # the interpreter itself works on the host: not what is asked about
        from triton.runtime import interpreter

        launch = interpreter.GridExecutor.__call__

        def outside(*args, **kwargs):
            with torch.utils._python_dispatch._disable_current_modes():
                return launch(*args, **kwargs)

        monkeypatch.setattr(interpreter.GridExecutor, "__call__", outside)
    leaf = hidden.requires_grad_()
    with NoLooking():
        loss_of(leaf, weight, labels, positions, backend).backward()
        stats = ff.token_stats(leaf, ff.LMHead(weight), labels, positions=positions, outputs=OUTPUTS, backend=backend)
        sum(getattr(stats, name).sum() for name in DIFFERENTIABLE).backward()
        for kind in DIVERGENCES:
            ff.divergence(leaf, hidden.detach() + 1, ff.LMHead(weight), kind, backend=backend).sum().backward()
        logits = (leaf @ weight.T).contiguous()
        ff.token_stats_from_logits(
            logits, labels, positions=positions, backend=backend, in_place=True
        ).logp.sum().backward()


def test_the_guard_itself_sees_a_look():
    with NoLooking(), pytest.raises(AssertionError, match="synchronises"):
        float(torch.ones(1).sum())
    with NoLooking(), pytest.raises(AssertionError, match="boolean"):
        torch.ones(3)[torch.tensor([True, False, True])]


def test_no_launcher_or_driver_calls_for_a_value():
    """By their sources, too: on the CPU some of these leave no trace among the operations."""
    forbidden = {"item", "tolist", "cpu", "numpy", "nonzero", "masked_select", "synchronize", "unique"}
    root = Path(ff.__file__).parents[1]
    files = [*root.glob("kernels/*_tile.py"), root / "kernels" / "state_rows.py", root / "kernels" / "launching.py"]
    names = ("sweep", "blocks", "fields", "gradients", "products", "ops", "state_ops", "triton", "in_place")
    files += [root / "fastforget" / "backends" / f"{name}.py" for name in names]
    assert len(files) >= 10
    for file in files:
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
                assert node.func.attr not in forbidden, f"{file.name}:{node.lineno} calls .{node.func.attr}()"
