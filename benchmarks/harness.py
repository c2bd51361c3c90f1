"""Measure contestants in turn, peaks in processes of their own; results files, common options, and the exit code.

A step is a function without arguments; its first call may compile, and its answer is compared with the truth. Records
are as `tables` describes them. Contestants of a row share one process; a results file is written after each row.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import datetime
import gc
import importlib
import importlib.metadata
import json
import os
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from benchmarks.tables import MEASURED, NOT_MEASURED, goal_line, markdown
from fastforget import doctor

Record = dict[str, Any]
Results = dict[str, Any]
Answer = tuple[Tensor, Tensor]  # a loss and its gradient
Step = Callable[[], Answer | None]  # None: a step that has no answer, as a floor's
Runner = Callable[..., Record]  # (task, *arguments, seconds=): a task is a function that returns a record

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
PEERS = ("cut-cross-entropy", "liger-kernel", "quack-kernels", "trl")
RAN, OUT_OF_TIME = "ran, not timed", "not measured: out of time"
FIRST_CALLS, ROUNDS = 0.5, 0.8  # shares of the limit after which no first call, and no round, begins any more
FORM = 2  # of results files; those of 2026-11-28 and before have none
A_DAY, PEAK_LIMIT = 86400.0, 600.0  # seconds of everything, of the memory of one contestant


class NotMeasured(Exception):
    """A contestant that cannot take part here; the message is what its record says."""


class Problem(Protocol):
    """A setting's inputs. whole_peak: memory counts from before a step was built, else from after its first call.

    Where contestants go one after the other (`--alone`) it has `release(record)` too, which drops what a step has left,
    and `profile(step)`, which is added to the record.
    """

    device_name: str
    whole_peak: bool

    def step_of(self, name: str, dry: bool) -> Step:
        """Build a contestant's step; NotMeasured where it cannot take part."""

    def errors(self, answer: Answer) -> Record:
        """Say how far an answer is from the truth, and in "flags" what of that is too far."""


def measure_rows(
    results: Results,
    module: str,
    settings: Mapping[Any, Sequence[str]],
    contestants: Mapping[str, tuple[str, str]],
    finish: Callable[[Results], None],
    options: argparse.Namespace,
) -> None:
    """Measure setting by setting, and print and write each row when it is done; all share the seconds of --limit.

    Args:
        module: its `Problem(setting)` has the steps.
        settings: who is measured in each. contestants: what each is, and its role, "ours", "peer" or "floor".
        finish: adds to a row, {"name", "setting", "contestants"}, whom ours is, goals and notes.
    """
    until = time.monotonic() + options.limit
    for number, (setting, names) in enumerate(settings.items()):
        began, records, given = time.monotonic(), dict[str, Record](), asdict(setting)
        limit = (until - began) / (len(settings) - number)
        print(f"{number + 1}/{len(settings)} {setting.name}:", flush=True)
        if limit > 0:
            problem = importlib.import_module(module).Problem(given)
            for group in [[name] for name in names] if options.alone else [names]:
                now, rest = time.monotonic(), len(names) - len(records)
                share = (began + limit - now) / rest if options.alone else limit
                records |= in_turn(problem, group, options, now if options.alone else began, share)
                if options.alone:
                    problem.release(records[group[0]])
            del problem
            free_memory(options.device)
        for name in names:
            record = records.setdefault(name, {"status": OUT_OF_TIME})
            if "median_ms" in record and "peak_mb" not in record and not options.no_memory:
                record |= isolated(measure_peak, module, name, given, seconds=PEAK_LIMIT)
            record["about"], record["role"] = contestants[name]
            print(f"    {name}: {record.get('median_ms', record['status'])}", *record.get("flags", ()), flush=True)
        results["rows"].append({"name": setting.name, "setting": given, "contestants": records, "goals": []})
        if not options.dry:
            finish(results["rows"][-1])
        publish(results, options.json)


def in_turn(
    problem: Problem, names: Sequence[str], options: argparse.Namespace, began: float, limit: float
) -> dict[str, Record]:
    """Build every contestant and call it once, then time all of them in turn, so that what else runs hits everybody.

    Args:
        options: rounds, warmup, no_memory, and dry: then nothing is timed.
        began: when the setting began, on `time.monotonic`; what was done since then counts against the limit.
    """
    device, steps, times = problem.device_name, dict[str, Step](), dict[str, list[float]]()
    loaded = memory_mb(device) if problem.whole_peak and device == "cuda" else None
    records: dict[str, Record] = {}

    def first_call(name: str) -> None:
        started, step = time.monotonic(), problem.step_of(name, options.dry)
        answer = step()
        synchronize(device)
        records[name] |= {} if options.dry else {"first_call_s": round(time.monotonic() - started, 2)}
        records[name] |= {} if answer is None else problem.errors(answer)
        records[name]["status"] = RAN if options.dry else OUT_OF_TIME
        steps[name], times[name] = step, []

    def take_turn(name: str, action: Callable[[], object]) -> None:
        try:
            with time_limit(max(1.0, limit + began - time.monotonic())):
                action()
        except NotMeasured as reason:
            records[name] = {"status": str(reason)}
        except Exception as error:
            records[name], _ = failed(error, device), steps.pop(name, None)

    for name in names:
        records[name] = {"status": OUT_OF_TIME}
        if time.monotonic() - began <= FIRST_CALLS * limit:
            take_turn(name, lambda: first_call(name))  # noqa: B023  # called at once
        free_memory(device)
    for turn in range(0 if options.dry else options.warmup + options.rounds):
        if turn > options.warmup and time.monotonic() - began > ROUNDS * limit:
            break
        for name in list(steps):
            take_turn(name, lambda: times[name].append(round(1e3 * timed(steps[name], device), 4)))  # noqa: B023
    for name in list(steps):
        runs = times[name][options.warmup :]
        if runs:
            records[name] |= {"status": MEASURED, "median_ms": statistics.median(runs), "runs_ms": runs}
        if runs and device == "cuda" and options.alone >= problem.whole_peak and not options.no_memory:
            take_turn(name, lambda: records[name].update(peak(steps[name], device, loaded)))  # noqa: B023
        if runs and options.alone:
            take_turn(name, lambda: records[name].update(problem.profile(steps[name])))  # type: ignore[attr-defined]  # noqa: B023
    return records


@contextlib.contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Raise TimeoutError in what takes longer: a library that compiles for too long costs no one else a turn."""

    def ring(*_: object) -> None:
        raise TimeoutError(f"had not ended after {seconds:.0f} s")

    if seconds >= A_DAY / 2:
        yield
        return
    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def failed(error: Exception, device: str) -> Record:
    """Make the record of a contestant that raised. Raises where the device can do nothing more in this process."""
    if isinstance(error, torch.cuda.OutOfMemoryError):
        return {"status": "failed: out of memory"}
    synchronize(device)
    return {"status": f"failed: {one_line(f'{type(error).__name__}: {error}')}"}


def one_line(text: str) -> str:
    """Shorten a text to one line that names no folder of this machine."""
    for folder in (str(ROOT), tempfile.gettempdir(), os.path.expanduser("~")):
        text = text.replace(f"{folder}/", "")
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


def measure_peak(module: str, name: str, setting: Mapping[str, Any]) -> Record:
    """Measure how far a contestant's step raises the memory of a process that runs nobody else; a task."""
    problem: Problem = importlib.import_module(module).Problem(setting)
    loaded = memory_mb(problem.device_name) if problem.whole_peak else None
    step = problem.step_of(name, False)
    step()
    step()
    return peak(step, problem.device_name, loaded)


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
    beyond = before if loaded is None else loaded
    found = {"peak_mb": highest - beyond, "rise_mb": highest - before, "highest_mb": highest}
    return {name: round(megabytes, 1) for name, megabytes in found.items()}


def memory_mb(device: str, field: str = "VmRSS") -> float:
    """Return what is allocated on a GPU, or a figure of this process's /proc status."""
    if device == "cuda":
        return torch.cuda.memory_allocated() / 1e6
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(lines[field].split()[0]) * 1024 / 1e6


def free_memory(device: str) -> None:
    """Drop garbage; give freed heap memory back to the system, so that nobody's step is served from another's."""
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()
    if device == "cpu" and sys.platform == "linux":
        with contextlib.suppress(OSError, AttributeError):
            ctypes.CDLL(None).malloc_trim(0)


def synchronize(device: str) -> None:
    """Wait for the device; what failed there is raised here."""
    if device == "cuda":
        torch.cuda.synchronize()


def isolated(task: Callable[..., Record], *arguments: Any, seconds: float) -> Record:
    """Run a task in a process of its own, with arguments that JSON can hold; that it died is a record, too."""
    module = sys.modules[task.__module__].__spec__  # its name, also of the module that was run with -m
    call = (
        f"here(getattr(importlib.import_module({module and module.name!r}), {task.__name__!r}), *{list(arguments)!r})"
    )
    code = f"import sys; sys.path[:] = {sys.path}; from benchmarks.harness import *; print('\\n' + json.dumps({call}))"
    try:
        ended = subprocess.run(
            [sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, text=True, timeout=seconds
        )
        if ended.returncode == 0:
            return dict(json.loads(ended.stdout.splitlines()[-1]))
    except subprocess.TimeoutExpired:
        return {"status": f"failed: had not ended after {seconds:.0f} s"}
    return {"status": f"failed: the process ended with code {ended.returncode}"}


def here(task: Callable[..., Record], *arguments: Any, seconds: float = A_DAY) -> Record:
    """Run a task in this process."""
    try:
        return task(*arguments)
    except Exception as error:
        return failed(error, "cpu")


def header(title: str, about: Sequence[str], options: argparse.Namespace) -> Results:
    """Begin a results file: what was measured, where, when and with what. `options` has device, date and dry."""
    found = {name: finding for name, finding in doctor.report() if name not in ("cuda", "memory")}
    for name in PEERS:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "not installed"
    found |= {
        "torch threads": str(torch.get_num_threads()),
        "torch on the CPU": torch.backends.cpu.get_cpu_capability(),
    }
    found["device"] = torch.cuda.get_device_name() if options.device == "cuda" else options.device
    return {
        "form": FORM,
        "title": title,
        "about": list(about),
        "date": str(options.date),
        "measured": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "commit": commit(),
        "dry_run": options.dry,
        "machine": found,
        "rows": [],
    }


def commit() -> str | None:
    """Return the commit that is measured, "dirty" where files differ from it; None outside a git checkout."""
    command = ["git", "--no-optional-locks", "describe", "--always", "--abbrev=12", "--exclude=*", "--dirty"]
    found = ""
    with contextlib.suppress(OSError, subprocess.CalledProcessError):
        found = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()
    # a copy of the tree has no history: whoever made it says what it is of
    return os.environ.get("FASTFORGET_COMMIT") or found or None


def write_whole(path: Path, data: str | bytes) -> None:
    """Write a file whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_name(f".{path.name}.part")
    scratch.write_bytes(data.encode() if isinstance(data, str) else data)
    scratch.replace(path)


def publish(results: Results, path: Path | None) -> None:
    """Write a results file, and its tables beside it as .md; nothing without a path."""
    if path is not None:
        write_whole(path, json.dumps(results, indent=2, ensure_ascii=False) + "\n")
        write_whole(path.with_suffix(".md"), markdown(results))


def conclude(results: Results) -> int:
    """Print the tables, what the limit has cut, and what is wrong with ours; return the exit code.

    It is 1 where ours failed, is wrong or missed a goal; peers that are missing, fail or are wrong are findings.
    """
    print("\n" + markdown(results))
    problems = []
    for row in results["rows"]:
        cut = [name for name, record in row["contestants"].items() if record["status"] == OUT_OF_TIME]
        if cut:
            print(f"cut by the limit: {row['name']}: {', '.join(cut)}")
        found = [goal_line(goal) for goal in row["goals"] if goal["met"] is False]
        for name, record in row["contestants"].items():
            if record.get("role") == "ours":
                fine = record["status"].startswith((MEASURED, RAN, NOT_MEASURED))
                found += [] if fine else [f"{name}: {record['status']}"]
                found += [f"{name}: wrong: {flag}" for flag in record.get("flags", ())]
        problems += [f"{row['name']}: {problem}" for problem in found]
    print("\n".join(problems) or "Ours ran, is right, and missed no goal that was set.")
    return 1 if problems else 0


def parser_of(module: str, documentation: str | None) -> argparse.ArgumentParser:
    """Make a parser with the options that all benchmarks share; the documentation is its help."""
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(f"python -m benchmarks.{module}", description=documentation, formatter_class=form)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--rounds", type=int, help="timed runs of each")
    parser.add_argument("--warmup", type=int, help="runs before them")
    parser.add_argument("--limit", type=float, default=A_DAY, help="seconds for everything; what was cut is printed")
    parser.add_argument("--no-memory", action="store_true", help="do not measure peak memory")
    parser.add_argument("--tiny", action="store_true", help="sizes of no interest: a dry run, no figure of speed")
    parser.add_argument("--seed", type=int, default=0)
    parser.set_defaults(alone=False)
    parser.add_argument("--date", type=datetime.date.fromisoformat, default=datetime.date.today(), help="YYYY-MM-DD")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of dated results; default %(default)s")
    parser.add_argument("--json", type=Path, help="file of the results; the tables go beside it, as .md")
    return parser


def names_of(what: str, known: Collection[str]) -> Callable[[str], tuple[str, ...]]:
    """Make a reader of comma-separated names, each of them known."""

    def read(text: str) -> tuple[str, ...]:
        names = tuple(dict.fromkeys(name.strip() for name in text.split(",")))
        for name in names:
            if name not in known:
                raise argparse.ArgumentTypeError(f"unknown {what} {name!r}: choose from {', '.join(known)}")
        return names

    return read
