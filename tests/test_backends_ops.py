"""What the backends promise of the machine: torch.compile traces through them, and nothing synchronises."""

import ast
from pathlib import Path

import pytest
import torch
from kernel_device import OURS, device_of
from torch.utils._python_dispatch import TorchDispatchMode

import fastforget as ff
from fastforget.backends import OUTPUTS, ops
from fastforget.divergences import DIVERGENCES, kept_divergence, kept_divergence_and_logp
from fastforget.stats import kept_token_stats

DIFFERENTIABLE = [name for name in OUTPUTS if name not in ("logp_mean", "logp_var", "others_entropy", "argmax")]


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
    """Every op: statistics with states, a divergence, states alone."""
    head = ff.LMHead(weight)
    stats = ff.token_stats(
        hidden,
        head,
        labels,
        positions=positions,
        outputs=("logp", "entropy"),
        anchor=hidden.detach() + 1,
        centres=weight[:3].detach(),
        backend=backend,
    )
    ref_hidden, shift = hidden.detach() + 0.1, {"labels": labels, "label_shift": -2.0}
    kl = ff.divergence(hidden, ref_hidden, LMHead_frozen(weight), positions=positions, backend=backend, **shift)
    distance, pull = ff.hidden_stats(hidden, weight[0].detach(), weight[:2].detach(), backend=backend)
    own = stats.logp.square().sum() + stats.entropy.sum() + stats.distance.sum() + stats.pull.sum()
    return own + kl.sum() + distance.sum() + pull.sum()


def LMHead_frozen(weight):
    return ff.LMHead(weight.detach())


@pytest.mark.parametrize("backend", OURS)
@pytest.mark.parametrize("train", [False, True])
@pytest.mark.parametrize("with_positions", [True, False])
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


@pytest.mark.parametrize("outputs", [("logp",), OUTPUTS])
@pytest.mark.parametrize("tail_mass", [0.0, 1e-3])
def test_fake_implementations_tell_the_truth(outputs, tail_mass):
    """torch's own checks of a custom op: schema, fake tensors, autograd registration."""
    hidden, weight, labels = problem("torch")
    names = ",".join(
        [*(name for name in OUTPUTS if name in outputs or name in ("logp", "lse", "log_not_label", "argmax"))]
    )
    arguments = (
        hidden.requires_grad_(),
        labels.clamp(min=0),
        None,
        weight,
        None,
        None,
        hidden.detach() + 1,
        weight[:3],
        "l2",
        1.0,
        0.0,
        names + ",distance,pull" + (",dropped_mass" if tail_mass else ""),
        True,
        tail_mass,
        False,
        "torch",
    )
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(ops.token_stats_op, arguments, test_utils=checks)


@pytest.mark.parametrize("backend", ["eager", *OURS])
@pytest.mark.parametrize("shift", [0.0, -2.0])
def test_log_probabilities_told_beside_a_divergence(backend, shift):
    device = device_of(backend)
    generator = torch.Generator().manual_seed(0)
    hidden, reference = (torch.randn(7, 6, generator=generator).to(device) for _ in range(2))
    head = ff.LMHead(torch.randn(33, 6, generator=generator).to(device), scale=0.7, softcap=5.0)
    labels = torch.randint(33, (7,), generator=generator).to(device)
    expected = kept_token_stats(hidden, head, labels, outputs=("logp",), backend=backend)["logp"]
    alone = kept_divergence(hidden, reference, head, "forward_kl", labels=labels, label_shift=shift, backend=backend)
    found, logp = kept_divergence_and_logp(
        hidden.requires_grad_(), reference, head, "forward_kl", labels, label_shift=shift, backend=backend
    )
    torch.testing.assert_close(logp, expected, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(found.detach(), alone, rtol=1e-6, atol=1e-7)
    assert not logp.requires_grad and torch.autograd.grad(found.sum(), hidden)[0].abs().sum() > 0


def test_fake_implementations_of_the_others_tell_the_truth():
    hidden, weight, labels = problem("torch")
    hidden.requires_grad_()
    positions = torch.tensor([0, 3])
    rest = (weight, None, 1.0, 0.0)
    for arguments in (
        (hidden, hidden.detach() + 1, positions, labels[positions], *rest, -2.0, "forward_kl", True, True, "torch"),
        (hidden.detach(), hidden.detach() + 1, None, None, *rest, 0.0, "jsd", False, False, "torch"),
    ):
        torch.library.opcheck(ops.divergence_op, arguments)
    for anchor, centres in ((weight[0], weight[:2]), (weight[0], None), (None, weight[:2])):
        torch.library.opcheck(ops.state_stats_op, (hidden, anchor, centres, "cosine", "torch"))


class NoLooking(TorchDispatchMode):
    """Refuses what brings a value to the host, or needs one to know its own size."""

    REFUSED = ("_local_scalar_dense", "item", "is_nonzero", "nonzero", "masked_select", "equal", "unique", "_unique2")

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.__name__.partition(".")[0]
        assert name not in self.REFUSED, f"{name} synchronises"
        if name in ("index", "index_put", "index_put_", "_index_put_impl_"):
            assert not any(index is not None and index.dtype == torch.bool for index in args[1]), "a boolean index"
        if name == "repeat_interleave":
            assert (kwargs and "output_size" in kwargs) or isinstance(args[1], int), "its size is on the device"
        if function.namespace == "fastforget":  # our own ops: look inside
            with self:
                return getattr(ops, f"{name}_op")._init_fn(*args, **(kwargs or {}))
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("backend", OURS)
def test_nothing_looks_at_a_value(monkeypatch, backend):
    """The traced operations hold none that synchronises with a device, nor do launchers read one on the host."""
    for module in (ff.stats, ff.divergences):
        monkeypatch.setattr(module, "check_labels", lambda *_: None)  # looks, but at labels on the CPU only
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
        stats = ff.token_stats(
            leaf, ff.LMHead(weight), labels, positions=positions, outputs=OUTPUTS, backend=backend, tail_mass=0.01
        )
        sum(getattr(stats, name).sum() for name in DIFFERENTIABLE).backward()
        ff.token_stats(
            leaf, ff.LMHead(weight), labels, positions=positions, backend=backend, tail_mass=0.01
        ).logp.sum().backward()
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


def test_no_kernel_launcher_or_driver_names_what_brings_values_to_the_host():
    """By their sources, too: on the CPU some of these leave no trace among the operations."""
    forbidden = {"item", "tolist", "cpu", "numpy", "nonzero", "masked_select", "synchronize", "unique"}
    root = Path(ff.__file__).parents[1]
    files = [*root.glob("kernels/*_rows.py"), root / "kernels" / "skipping.py", root / "kernels" / "launching.py"]
    files += [
        root / "fastforget" / "backends" / f"{name}.py" for name in ("driver", "ops", "triton", "in_place", "gemm")
    ]
    assert len(files) >= 10
    for file in files:
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
                assert node.func.attr not in forbidden, f"{file.name}:{node.lineno} calls .{node.func.attr}()"
