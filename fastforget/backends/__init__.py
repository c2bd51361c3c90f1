"""Who computes the statistics, and which of them `auto` picks.

`eager` is the oracle: it holds all logits and leaves gradients to autograd. The others are tile passes (plain `torch`,
C++ on the CPU as `native`, kernels on a GPU as `triton`) under one sweep: see `docs/internals.md`.
"""

from __future__ import annotations

import functools
import importlib.util
import os
import shutil

import torch

from fastforget.backends.native import library as library
from fastforget.backends.protocol import Backend, TilePasses
from fastforget.errors import FastforgetError

BACKENDS = ("eager", "torch", "native", "triton")
TRITON_DEVICES = ("cuda", "xpu")  # ROCm calls itself cuda


def explain_auto(device: torch.device) -> tuple[str, str]:
    """The backend that `auto` picks on a device, and why."""
    if device.type == "cpu":  # interpreted kernels are for tests: only who names them gets them
        missing = why_not_native(device)
        if missing is None:
            return "native", "fused C++ passes over tiles of logits, between two products; plain torch for float64"
        return "torch", f"passes over tiles of logits in plain torch; no C++ passes: {missing}"
    missing = why_not_triton(device)
    if missing is None:
        return "triton", "fused passes over tiles of logits, between two products with the head"
    return "torch", f"passes over tiles of logits in plain torch; no Triton kernels: {missing}"


def why_not_native(device: torch.device) -> str | None:
    """Why the C++ passes cannot run on a device, or None where they can."""
    if device.type != "cpu":
        return f"they need the CPU, not {device.type}"
    status = library.status()
    return None if status.available else status.reason


def why_not_triton(device: torch.device) -> str | None:
    """Why the Triton kernels cannot run on a device, or None where they can."""
    if device.type not in TRITON_DEVICES and os.environ.get("TRITON_INTERPRET") != "1":
        return f"they need a GPU, not {device.type}"
    if not has_triton():
        return 'triton is not installed (pip install "fastforget[gpu]")'
    if device.type in TRITON_DEVICES and not has_compiler():
        return "Triton builds its launchers with a C compiler, and there is none: install gcc, or set CC"
    if device.type == "cuda" and torch.version.hip is None and torch.cuda.get_device_capability(device) < (8, 0):
        return "they need compute capability 8.0 or newer"
    return None


@functools.cache
def has_triton() -> bool:
    """Whether Triton is installed."""
    return importlib.util.find_spec("triton") is not None


@functools.cache
def has_compiler() -> bool:
    """Whether there is a C compiler where Triton looks for one."""
    return any(map(shutil.which, (os.environ.get("CC", "cc"), "gcc", "clang")))


@torch.compiler.assume_constant_result  # it looks at the machine, which torch.compile cannot trace
def pick(backend: str, device: torch.device) -> str:
    """The name of the backend that runs where the user named `backend`.

    Raises:
        FastforgetError: an unknown name (the known ones are listed), or Triton or the C++ passes where they cannot run.
    """
    if backend == "auto":
        return explain_auto(device)[0]
    if backend not in BACKENDS:
        raise FastforgetError(f"unknown backend {backend!r}: choose one of auto, {', '.join(BACKENDS)}")
    if backend in ("native", "triton"):
        missing = why_not_native(device) if backend == "native" else why_not_triton(device)
        if missing is not None:
            raise FastforgetError(f"backend {backend!r} cannot run here: {missing}; choose auto or torch")
    return backend


def backend_of(name: str, device: torch.device) -> Backend:
    """The backend that runs on a device where the user named `name`; raises as `pick` does."""
    from fastforget.backends.eager import EagerBackend
    from fastforget.backends.ops import SweepBackend

    picked = pick(name, device)
    return EagerBackend() if picked == "eager" else SweepBackend(picked)


def passes_of(backend: str, dtype: torch.dtype) -> TilePasses:
    """A backend's tile passes; those of float64 are plain torch's."""
    return _passes("torch" if dtype == torch.float64 else backend)


@functools.cache
def _passes(backend: str) -> TilePasses:
    if backend == "native":
        from fastforget.backends.native import NativePasses

        return NativePasses()
    if backend == "triton":
        from fastforget.backends.triton import TritonPasses

        return TritonPasses()
    from fastforget.backends.torch_passes import TorchPasses

    return TorchPasses()
