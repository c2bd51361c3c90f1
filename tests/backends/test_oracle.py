"""Every backend through the public functions against the float64 oracle (`oracle.py`), over random problems.

Without a GPU Triton's kernels run in its interpreter (`TRITON_INTERPRET=1`, set in conftest.py), at about 0.1 s for a
row: a short sample in `make test`, the rest in `make proof` (FASTFORGET_DRAWS) and on a device.
"""

from zlib import crc32

import pytest
import torch
from hypothesis import given, seed, settings
from hypothesis import strategies as st
from kernel_device import DEVICE
from oracle import (
    DRAWS,
    MORE,
    NOISES,
    SHIFTS,
    check,
    check_divergence,
    check_states,
    divergence_of,
    problems,
    realistic,
    state_problems,
)

from fastforget.backends import tiling
from fastforget.stats import DIVERGENCES

EXAMPLES = {"torch": 30, "native": 12, "triton": 100 if DEVICE.type == "cuda" else 6}
STATE_EXAMPLES = {"torch": 200, "native": 12, "triton": 15}


def draw(name, examples, test, **strategies):
    """Run a test on so many draws, which its name decides."""
    seed(crc32(name.encode()))(settings(DRAWS, max_examples=examples * MORE)(given(**strategies)(test)))()


def problems_for(backend):
    return problems(most_rows=3 if backend == "triton" else 9)


@pytest.mark.parametrize("how", ["whole", "in small tiles", "of a head that trains"])
def test_token_stats(each_backend, how, monkeypatch):
    if how == "in small tiles":
        monkeypatch.setenv(tiling.OVERRIDE, "2x64" if each_backend == "triton" else "4x16")

    def test(problem):
        check(problem, each_backend, train=how == "of a head that trains")

    draw(how, EXAMPLES[each_backend], test, problem=problems_for(each_backend))


@pytest.mark.parametrize("kind", [*DIVERGENCES, "forward_kl from a known reference"])
def test_divergence(each_backend, kind, monkeypatch):
    known = kind not in DIVERGENCES
    if each_backend != "triton" or known:
        monkeypatch.setenv(tiling.OVERRIDE, "2x64" if each_backend == "triton" else "4x16")

    def test(problem, noise, shift):
        check_divergence(kind.partition(" ")[0], problem, noise, shift, each_backend, known=known)

    draw(kind, EXAMPLES[each_backend], test, problem=problems_for(each_backend), noise=NOISES, shift=SHIFTS)


def test_hidden_stats(each_backend, monkeypatch):
    def test(problem, block_bytes):
        monkeypatch.setattr(tiling, "CPU_STATE_BYTES", block_bytes)
        check_states(problem, each_backend)

    sizes = st.sampled_from([600, tiling.CPU_STATE_BYTES])
    draw("states", STATE_EXAMPLES[each_backend], test, problem=state_problems(), block_bytes=sizes)


@pytest.mark.parametrize("kind", DIVERGENCES)
@pytest.mark.parametrize("softcap", [None, 5.0])
@pytest.mark.parametrize("noise", [1e-3, 1e-2, 1.0, 30.0])
def test_rms_error_of_divergences_over_many_rows(each_backend, kind, softcap, noise, monkeypatch):
    """At p = q + little, where every LoRA run begins, and far from there; exactly 0 at p = q."""
    if each_backend == "triton":
        pytest.skip("test_triton.py has its own, of fewer rows and 16 bits")
    monkeypatch.setenv(tiling.OVERRIDE, "64x256")
    generator = torch.Generator().manual_seed(3)
    weight = torch.randn(2003, 32, generator=generator) / 32**0.5
    hidden = 3 * torch.randn(256, 32, generator=generator)
    ref_hidden = hidden + noise * torch.randn(256, 32, generator=generator)
    oracle, eager, ours = (
        divergence_of(hidden, ref_hidden, weight, softcap, kind, backend, dtype)
        for backend, dtype in (("eager", torch.float64), ("eager", torch.float32), (each_backend, torch.float32))
    )
    assert (ours[0] >= 0).all()
    for part in (0, 1):
        error, theirs = ((result[part].double() - oracle[part]).square().mean().sqrt() for result in (ours, eager))
        scale = float(oracle[part].square().mean().sqrt())
        assert error <= 1.5 * theirs + 2**-24 * scale, (part, float(error), float(theirs))


@pytest.mark.parametrize("kind", DIVERGENCES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_divergence_of_equal_states_is_zero(each_backend, kind, dtype):
    hidden, weight, _ = realistic(rows=8, vocabulary=211)
    value, grad = divergence_of(hidden, hidden, weight, None, kind, each_backend, dtype)
    assert (value.abs() <= (0 if kind != "jsd" else 1e-12)).all() and grad.abs().max() < 1e-6
