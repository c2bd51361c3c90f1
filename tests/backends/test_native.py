"""The C++ passes through the public functions, against the same float64 oracle as `test_stats.py`.

On each instruction set that this machine has: FASTFORGET_CPU is read at each call. The passes by themselves are tested
in `backends/test_native_passes.py`.
"""

import pytest
import torch
from hypothesis import given, settings
from kernel_device import needs_native
from oracle import DRAWS, MORE, NOISES, SHIFTS, check, check_divergence, check_states, problems, state_problems

import fastforget as ff
from fastforget.backends import tiling
from fastforget.backends.native import library
from fastforget.stats import DIVERGENCES

pytestmark = needs_native
FEW = settings(DRAWS, max_examples=12 * MORE)


@pytest.fixture
def small_tiles(monkeypatch):
    monkeypatch.setenv(tiling.OVERRIDE, "5x16")


@given(problem=problems())
@FEW
def test_token_stats_against_float64(instructions, problem):
    check(problem, "native")


@given(problem=problems())
@FEW
def test_token_stats_in_small_tiles_against_float64(instructions, small_tiles, problem):
    check(problem, "native")


@given(problem=problems())
@FEW
def test_token_stats_of_a_head_that_trains_against_float64(instructions, problem):
    check(problem, "native", train=True)


@pytest.mark.parametrize("kind", DIVERGENCES)
@given(problem=problems(), noise=NOISES, shift=SHIFTS)
@FEW
def test_divergence_against_float64(instructions, small_tiles, kind, problem, noise, shift):
    check_divergence(kind, problem, noise, shift, "native")


@given(problem=problems(), noise=NOISES, shift=SHIFTS)
@FEW
def test_divergence_from_a_known_reference_against_float64(instructions, small_tiles, problem, noise, shift):
    check_divergence("forward_kl", problem, noise, shift, "native", known=True)


@given(problem=state_problems())
@FEW
def test_states_against_formulas(instructions, problem):
    check_states(problem, "native")


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


def test_a_backend_that_cannot_be_loaded_says_why(monkeypatch):
    cpu = torch.device("cpu")
    assert ff.backends.pick("auto", cpu) == "native"
    monkeypatch.setattr(library, "status", lambda: library.NativeStatus(False, None, "it was built without a compiler"))
    assert ff.backends.pick("auto", cpu) == "torch"
    assert "without a compiler" in ff.backends.explain_auto(cpu)[1]
    with pytest.raises(ff.FastforgetError, match="backend 'native' cannot run here: it was built without"):
        ff.backends.pick("native", cpu)
