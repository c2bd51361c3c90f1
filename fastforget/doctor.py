"""`fastforget doctor`: versions, devices, and which backend is in use and why.

Every finding stands alone: a package that is missing or broken is said in its row, and the other rows still come.
"""

from __future__ import annotations

import functools
import importlib.metadata
import os
import platform
import re
from collections.abc import Callable
from pathlib import Path

Row = tuple[str, str]

PACKAGES = ("fastforget", "torch", "transformers", "peft", "bitsandbytes", "accelerate", "triton")
OPTIONAL_PACKAGES = {"triton": "only GPU kernels need it"}
GIB = 2**30


def report() -> list[Row]:
    """List what this machine has and what fastforget does with it: (name, finding), in the order to print them."""
    rows = [("python", f"{platform.python_version()} on {platform.system()} {platform.machine()}")]
    rows += [(name, _version(name)) for name in PACKAGES]
    for name, findings in (
        ("cpu", _cpu),
        ("cuda", _cuda_devices),
        ("csrc", _native_library),
        ("backend auto", _automatic_backends),
    ):
        rows += _guarded(name, findings)
    return rows


def _guarded(name: str, findings: Callable[[], list[Row]]) -> list[Row]:
    try:
        return findings()
    except Exception as error:  # whatever is broken here is what the user came to find out
        return [(name, f"cannot be read: {type(error).__name__}: {error}")]


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        if name == "fastforget":
            return "not installed: runs from its folder"
        return f"not installed: {OPTIONAL_PACKAGES[name]}" if name in OPTIONAL_PACKAGES else "not installed"


def _cpu() -> list[Row]:
    rows = [("cpu", f"{_cpu_model()}; {os.cpu_count()} threads, {_usable_cpus()} usable")]
    rows += _guarded("memory", _memory)
    rows += _guarded("torch threads", _torch_threads)
    return rows


def _usable_cpus() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _memory() -> list[Row]:
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    finding = f"{total / GIB:.1f} GiB"
    meminfo = Path("/proc/meminfo")
    if meminfo.is_file():
        kibibytes = re.search(r"^MemAvailable:\s+(\d+) kB", meminfo.read_text(), re.MULTILINE)
        finding += f", {int(kibibytes[1]) / 2**20:.1f} GiB of it available" if kibibytes else ""
    return [("memory", finding)]


def _cpu_model() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        for line in cpuinfo.read_text(errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _torch_threads() -> list[Row]:
    import torch

    threads, usable, busy = torch.get_num_threads(), _usable_cpus(), round(os.getloadavg()[0])
    finding = str(threads)
    if busy and threads + busy > usable:
        finding += (
            f"; other processes keep about {busy} of {usable} usable busy, and torch's threads spin while they wait: "
            f"before Python starts set OMP_NUM_THREADS={max(1, usable - busy)}, or OMP_WAIT_POLICY=passive "
            "(docs/troubleshooting.md)"
        )
    return [("torch threads", finding)]


def _cuda_devices() -> list[Row]:
    import torch

    if not torch.cuda.is_available():
        built = torch.backends.cuda.is_built()
        return [("cuda", "no device found" if built else "none: this torch is built without CUDA")]
    rows = []
    for index in range(torch.cuda.device_count()):
        name = f"cuda:{index}"
        rows += _guarded(name, functools.partial(_cuda_row, name, index))
    return rows


def _cuda_row(name: str, index: int) -> list[Row]:
    return [(name, _cuda_device(index))]


def _cuda_device(index: int) -> str:
    import torch

    properties = torch.cuda.get_device_properties(index)
    with torch.cuda.device(index):
        has_bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
        free, total = torch.cuda.mem_get_info()
    bf16 = "bf16 in hardware" if has_bf16 else "no bf16 in hardware: float16 is used"
    capability = f"compute capability {properties.major}.{properties.minor}"
    return f"{properties.name}, {capability}; {total / GIB:.1f} GiB, {free / GIB:.1f} GiB of it free; {bf16}"


def _native_library() -> list[Row]:
    from fastforget.backends.native import library

    status = library.status()
    if not status.available:
        return [("csrc", f"not available: {status.reason}")]
    return [("csrc", f"loaded; instruction set {status.instruction_set}: {status.reason}")]


def _automatic_backends() -> list[Row]:
    import torch

    from fastforget.backends import explain_auto

    devices = [torch.device("cpu")]
    devices += [torch.device("cuda", index) for index in range(torch.cuda.device_count())]
    rows = []
    for device in devices:
        backend, reason = explain_auto(device)
        rows.append((f"backend auto, {device}", f"{backend}: {reason}"))
    return rows
