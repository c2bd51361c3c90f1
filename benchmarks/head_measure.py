"""Measures one setting in this process: contestants in turn, medians, peak memory, errors against float64.

A contestant that is missing or raises is a record of its own and does not end the others; what ends the process is
`head_worker`'s business.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import platform
import re
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.floors import NotMeasured, Step
from benchmarks.head_problem import Problem, Setting
from benchmarks.peers import CONTESTANTS, step_of

Record = dict[str, Any]
Say = Callable[[str, Record | None], None]  # (contestant, its record; None: its turn has come)

MEASURED, RAN, OUT_OF_TIME = "measured", "ran, not timed", "not measured: out of time"
FIRST_CALLS, ROUNDS = 0.5, 0.8  # shares of the time limit at which no first call, and no round, begins any more


@dataclass(frozen=True)
class Effort:
    """How long to measure. A dry run only shows that everything runs: it times nothing."""

    rounds: int = 20
    warmup: int = 3
    limit: float = 120.0  # seconds for one setting
    memory: bool = True
    dry: bool = False


def measure(setting: Setting, names: Sequence[str], effort: Effort, say: Say) -> None:
    """Measure contestants in turn; `say` gets a contestant's name before each of its turns, and its record after."""
    started = time.monotonic()
    if setting.device == "cuda":
        torch.cuda.empty_cache()  # of the setting before, which had other shapes
    problem = Problem(setting)
    problem.truth  # noqa: B018  # before anybody is measured: it takes memory, and caches what losses need
    steps: dict[str, Step] = {}
    records: dict[str, Record] = {}
    for name in names:
        say(name, None)
        if time.monotonic() - started > FIRST_CALLS * effort.limit:
            records[name] = {"status": OUT_OF_TIME}
        elif effort.dry and CONTESTANTS[name].slow_start:
            records[name] = {"status": "not measured: compiles for too long for a dry run"}
        else:
            records[name] = first_call(name, problem, steps)
        say(name, records[name])
        free_memory(setting.device)
    times: dict[str, list[float]] = {name: [] for name in steps}
    for turn in range(1 if effort.dry else effort.warmup + effort.rounds):
        if turn > effort.warmup and time.monotonic() - started > ROUNDS * effort.limit:
            break
        for name in list(steps):
            say(name, None)
            seconds = guarded(name, records, steps, timed, setting.device)
            if seconds is not None and turn >= effort.warmup:
                times[name].append(seconds)
    for name in list(steps):
        if effort.dry:
            del records[name]["first_call_s"]
        records[name] |= {"status": RAN} if effort.dry else summary(times[name])
        if setting.device == "cuda" and effort.memory and not effort.dry:
            say(name, None)
            peak = guarded(name, records, steps, cuda_peak, setting.device)
            if peak is not None:
                records[name]["peak_mb"] = peak
    for name in names:
        say(name, records[name])
    steps.clear()
    free_memory(setting.device)


def first_call(name: str, problem: Problem, steps: dict[str, Step]) -> Record:
    """Build a contestant, run it once (some compile), and compare its answer with float64."""
    record: Record = {"status": OUT_OF_TIME}  # until it was timed
    began = time.monotonic()
    try:
        step = step_of(name, problem)
        answer = step()
        synchronize(problem.setting.device)
        record["first_call_s"] = round(time.monotonic() - began, 2)
        if answer is not None:
            record |= problem.errors(answer)
    except NotMeasured as reason:
        return {"status": str(reason)}
    except Exception as error:
        return failed(error, problem.setting.device)
    steps[name] = step
    return record


def guarded(
    name: str,
    records: dict[str, Record],
    steps: dict[str, Step],
    figure: Callable[[Step, str], float],
    device: str,
) -> float | None:
    """A figure of one step of a contestant; where it raises, its record says so and it has no turn any more."""
    try:
        return figure(steps[name], device)
    except Exception as error:
        records[name] = failed(error, device)
        del steps[name]
        return None


def failed(error: Exception, device: str) -> Record:
    """The record of a contestant that raised. Raises where the device can do nothing more in this process."""
    if isinstance(error, torch.cuda.OutOfMemoryError):
        return {"status": "failed: out of memory"}
    synchronize(device)
    return {"status": f"failed: {one_line(error)}"}


def one_line(error: Exception) -> str:
    """An error as a line that is not too long."""
    text = " ".join(re.sub(r"\x1b\[[0-9;]*m", "", str(error)).split())
    return f"{type(error).__name__}: {text[:300]}"


def timed(step: Step, device: str) -> float:
    """Seconds of one step: between events on a GPU, on the clock elsewhere."""
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


def summary(times: Sequence[float]) -> Record:
    """Median and all runs, in milliseconds."""
    if not times:
        return {"status": OUT_OF_TIME}
    runs = [round(1e3 * seconds, 4) for seconds in times]
    return {"status": MEASURED, "median_ms": statistics.median(runs), "runs_ms": runs}


def cuda_peak(step: Step, device: str) -> float:
    """Megabytes that one step allocates beyond what lay there before; the gradient counts, the inputs do not."""
    free_memory(device)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    step()
    torch.cuda.synchronize()
    return round((torch.cuda.max_memory_allocated() - before) / 1e6, 1)


def cpu_peak(setting: Setting, name: str) -> Record:
    """The same of a process that runs nobody else: how far its resident memory rises in one step, after a first one.

    Needs Linux, and a kernel that lets a process forget its own peak.
    """
    problem = Problem(setting)
    problem.truth  # noqa: B018  # see above
    steps: dict[str, Step] = {}
    record = first_call(name, problem, steps)
    if name not in steps:
        return {"peak_mb": None, "peak_note": record["status"]}
    free_memory("cpu")
    try:
        Path("/proc/self/clear_refs").write_text("5")
        before = status_mb("VmRSS")
        steps[name]()
        return {"peak_mb": round(status_mb("VmHWM") - before, 1)}
    except (OSError, ValueError) as error:
        return {"peak_mb": None, "peak_note": f"not measured: {type(error).__name__}"}


def status_mb(field: str) -> float:
    """A figure of this process's /proc status, in megabytes."""
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


def facts(device: str) -> Record:
    """What the device is."""
    if device != "cuda":
        return {"name": platform.machine()}
    properties = torch.cuda.get_device_properties(0)
    return {
        "name": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "memory_gib": round(properties.total_memory / 2**30, 1),
        "cuda": torch.version.cuda,
    }
