"""Measure contestants in turn: times, memory peaks, errors, and where it was measured.

A step is a function without arguments; its first call may compile, and its answer is compared with the truth. Records
are as `tables` describes them. `say(name, None)` announces whose turn it is, `say(name, record)` what was found.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import importlib.metadata
import os
import platform
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.tables import MEASURED
from fastforget import doctor

Record = dict[str, Any]
Answer = tuple[Tensor, Tensor]  # a loss and its gradient
Step = Callable[[], Answer | None]  # None: a step that has no answer, as a floor's
Say = Callable[[str, Record | None], None]

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
PACKAGES = ("torch", "triton", "transformers", "peft", "bitsandbytes", "fastforget")
PEERS = ("cut-cross-entropy", "liger-kernel", "quack-kernels", "trl")
RAN, OUT_OF_TIME = "ran, not timed", "not measured: out of time"
FIRST_CALLS, ROUNDS = 0.5, 0.8  # shares of the limit after which no first call, and no round, begins any more
A_DAY = 86400.0


class NotMeasured(Exception):
    """A contestant that cannot take part here; the message is what its record says."""


@dataclass(frozen=True)
class Effort:
    """How long to measure a setting. A dry run only shows that everything runs: it times nothing."""

    rounds: int = 7
    warmup: int = 1
    limit: float = A_DAY  # seconds
    memory: bool = True
    dry: bool = False


def in_turn(
    builds: Mapping[str, Callable[[], Step]],
    effort: Effort,
    device: str,
    say: Say,
    errors: Callable[[Answer], Record],
    began: float,
) -> None:
    """Build every contestant and call it once, then time all of them in turn, so that what else runs hits everybody.

    Args:
        builds: make a contestant's step; they may raise NotMeasured.
        errors: compares the answer of a first call with the truth; "flags" of its record say what is wrong.
        began: when the setting began, on `time.monotonic`; what was done since then counts against the limit.
    """
    steps: dict[str, Step] = {}
    records: dict[str, Record] = {}

    def guarded(name: str, action: Callable[[Step], Any]) -> Any:
        say(name, None)
        try:
            return action(steps[name])
        except Exception as error:
            records[name], _ = failed(error, device), steps.pop(name)
            return None

    for name, build in builds.items():
        say(name, None)
        records[name] = {"status": OUT_OF_TIME}
        if time.monotonic() - began <= FIRST_CALLS * effort.limit:
            try:
                started, step = time.monotonic(), build()
                answer = step()
                synchronize(device)
                records[name]["first_call_s"] = round(time.monotonic() - started, 2)
                records[name] |= errors(answer) if answer is not None else {}
                steps[name] = step
            except NotMeasured as reason:
                records[name] = {"status": str(reason)}
            except Exception as error:
                records[name] = failed(error, device)
        say(name, records[name])
        free_memory(device)
    times: dict[str, list[float]] = {name: [] for name in steps}
    for turn in range(0 if effort.dry else effort.warmup + effort.rounds):
        if turn > effort.warmup and time.monotonic() - began > ROUNDS * effort.limit:
            break
        for name in list(steps):
            seconds = guarded(name, lambda step: timed(step, device))
            if seconds is not None and turn >= effort.warmup:
                times[name].append(round(1e3 * seconds, 4))
    for name in list(steps):
        if effort.dry:
            del records[name]["first_call_s"]
            records[name]["status"] = RAN
        elif times[name]:
            records[name] |= {"status": MEASURED, "median_ms": statistics.median(times[name]), "runs_ms": times[name]}
        if device == "cuda" and effort.memory and not effort.dry:
            records[name] |= guarded(name, lambda step: peak(step, device)) or {}
    for name, record in records.items():
        say(name, record)
    steps.clear()
    free_memory(device)


def failed(error: Exception, device: str) -> Record:
    """Make the record of a contestant that raised. Raises where the device can do nothing more in this process."""
    if isinstance(error, torch.cuda.OutOfMemoryError):
        return {"status": "failed: out of memory"}
    synchronize(device)
    return {"status": f"failed: {one_line(f'{type(error).__name__}: {error}')}"}


def one_line(text: str) -> str:
    """Shorten a text to one line that names no folder of this machine."""
    for folder in (str(ROOT), tempfile.gettempdir(), os.path.expanduser("~")):
        text = text.replace(f"{folder}/", "") if folder != os.sep else text
    text = re.sub(r"(?<![\w./:~-])/(?:[^\s/'\":,;()]+/)+", "", text)  # not the path of a URL
    return " ".join(re.sub(r"\x1b\[[0-9;]*m", "", text).split())[:300]


def timed(step: Callable[[], object], device: str) -> float:
    """Return the seconds of one step: between events on a GPU, on the clock elsewhere."""
    if device != "cuda":
        began = time.perf_counter()
        step()
        return time.perf_counter() - began
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    begin.record()
    step()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1e3


def peak(action: Callable[[], object], device: str, loaded: float | None = None) -> Record:
    """Return how far memory rises in an action, in MB: "peak_mb" beyond `loaded`, "rise_mb" beyond what was there.

    On the CPU it is resident memory, of the whole process; that needs Linux, and a kernel that lets a process forget
    its own peak.
    """
    free_memory(device)
    try:
        before = memory_mb(device)
        if device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        else:
            Path("/proc/self/clear_refs").write_text("5")
        action()
        highest = torch.cuda.max_memory_allocated() / 1e6 if device == "cuda" else memory_mb(device, "VmHWM")
    except (OSError, ValueError) as error:
        return {"peak_mb": None, "peak_note": f"not measured: {type(error).__name__}"}
    return {
        "peak_mb": round(highest - (before if loaded is None else loaded), 1),
        "rise_mb": round(highest - before, 1),
    }


def memory_mb(device: str, field: str = "VmRSS") -> float:
    """Return what is allocated on a GPU, or a figure of this process's /proc status."""
    if device == "cuda":
        return torch.cuda.memory_allocated() / 1e6
    found = re.search(rf"^{field}:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)
    if found is None:
        raise ValueError(f"no {field}")
    return int(found[1]) * 1024 / 1e6


def free_memory(device: str) -> None:
    """Drop garbage; give freed heap memory back to the system, so that nobody's step is served from another's."""
    gc.collect()
    if device == "cpu" and sys.platform == "linux":
        with contextlib.suppress(OSError, AttributeError):
            ctypes.CDLL(None).malloc_trim(0)


def synchronize(device: str) -> None:
    """Wait for the device; what failed there is raised here."""
    if device == "cuda":
        torch.cuda.synchronize()


def machine(device: str = "cpu") -> Record:
    """Describe what is measured on: device, CPU, instruction sets, and how many cores this process and torch use."""
    found = dict(doctor.report())
    sets = f"torch {torch.backends.cpu.get_cpu_capability()}, csrc {found.get('csrc', 'unknown').partition(':')[0]}"
    cores = len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count()
    name = device
    if device == "cuda":
        properties = torch.cuda.get_device_properties(0)
        memory = f"{properties.total_memory / 2**30:.0f} GiB, CUDA {torch.version.cuda}"
        name = f"{properties.name} ({properties.major}.{properties.minor}, {memory})"
    cpu = found.get("cpu", platform.machine()).partition(";")[0]
    where: Record = {"device": name, "cpu": cpu, "instruction_sets": sets, "cores": cores}
    return where | {"torch_threads": torch.get_num_threads()}


def versions() -> dict[str, str]:
    """Return Python's version, and those of the packages that decide the figures."""
    found = {"python": platform.python_version()}
    for name in (*PACKAGES, *PEERS):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found


def commit() -> str | None:
    """Return the commit that is measured, "dirty" where files differ from it; None outside a git checkout."""
    command = ["git", "--no-optional-locks", "describe", "--always", "--abbrev=12", "--exclude=*", "--dirty"]
    found = ""
    with contextlib.suppress(OSError, subprocess.CalledProcessError):
        found = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()
    # a copy of the tree has no history: whoever made it says what it is of
    return os.environ.get("FASTFORGET_COMMIT") or found or None
