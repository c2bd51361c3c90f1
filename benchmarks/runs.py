"""Run a benchmark: rows in processes of their own, results files, what all benchmarks take as options, the exit code.

A task is a function of a module, `task(say, *arguments)`, with arguments that JSON can hold. It runs in a process that
takes one task after another; one that crashes or hangs costs whose turn it was, and nobody else.
"""

from __future__ import annotations

import argparse
import datetime
import functools
import importlib
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import torch

from benchmarks.harness import (
    A_DAY,
    OUT_OF_TIME,
    RAN,
    ROOT,
    Answer,
    Effort,
    Record,
    Say,
    Step,
    commit,
    in_turn,
    machine,
    memory_mb,
    one_line,
    peak,
    versions,
)
from benchmarks.tables import MEASURED, NOT_MEASURED, goal_line, markdown

Results = dict[str, Any]
Task = Callable[..., None]
Runner = Callable[..., dict[str, Record]]  # (task, *arguments, seconds=) -> the records that it told
FORM = 2  # of results files; those of 2026-11-28 and before have none
PEAK_LIMIT = 600.0  # seconds for the memory of one contestant


class OpenProblem(Protocol):
    """A setting's inputs. whole_peak: memory counts from before a step was built, else from after its first call."""

    device_name: str
    whole_peak: bool

    def step_of(self, name: str, dry: bool) -> Step:
        """Build a contestant's step; NotMeasured where it cannot take part."""

    def errors(self, answer: Answer) -> Record:
        """Say how far an answer is from the truth, and in "flags" what of that is too far."""


class Died(Exception):
    """The process ended or was ended. turn: whose it was; records: what it had told before."""

    def __init__(self, reason: str, turn: str | None, records: dict[str, Record]) -> None:
        super().__init__(reason)
        self.turn, self.records = turn, records


class Worker:
    """A process that takes one task after another, and is started anew where one ended it."""

    process: subprocess.Popen[str] | None = None

    def run(self, task: Task, *arguments: Any, seconds: float) -> dict[str, Record]:
        """Run a task and return its records; raises Died."""
        if self.process is None:
            code = f"import sys; sys.path[:] = {sys.path}; from benchmarks.runs import serve; serve()"
            pipe = subprocess.PIPE
            self.process = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, text=True, stdin=pipe, stdout=pipe)
        process = self.process
        assert process.stdin is not None and process.stdout is not None
        records: dict[str, Record] = {}
        turn, why, done, began = None, "", False, time.monotonic()
        module = sys.modules[task.__module__].__spec__  # its name, also of the module that was run with -m
        timer = threading.Timer(seconds, process.kill)
        timer.start()
        try:
            process.stdin.write(json.dumps([module and module.name, task.__name__, arguments]) + "\n")
            process.stdin.flush()
            for line in process.stdout:
                name, record = json.loads(line)
                if name is None:
                    why, done = record or "", record is None
                    break
                turn = name
                if record is not None:
                    records[name] = record
        except BrokenPipeError:
            pass  # it ended before it took the task
        finally:
            late = time.monotonic() - began >= seconds
            timer.cancel()
            if not done:
                self.stop()
        if not done:
            ended = f"had not ended after {seconds:.0f} s" if late else f"ended with code {process.returncode}"
            raise Died(why or ended, turn, records)
        return records

    def stop(self) -> None:
        """End the process."""
        if self.process is not None:
            self.process.kill()
            self.process.communicate()
            self.process = None


def serve() -> None:
    """Do tasks, one a line of stdin, and tell records on stdout; what tasks print goes to stderr."""
    channel = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)

    def say(name: str | None, record: Record | str | None) -> None:
        channel.write(json.dumps([name, record]) + "\n")

    for line in sys.stdin:
        module, name, arguments = json.loads(line)
        try:
            getattr(importlib.import_module(module), name)(say, *arguments)
        except Exception as error:  # a lost device, say: the next task gets another process
            say(None, one_line(f"{type(error).__name__}: {error}"))
            return
        say(None, None)


def isolated(task: Task, *arguments: Any, seconds: float) -> dict[str, Record]:
    """Run a task in a process of its own; raises Died."""
    worker = Worker()
    try:
        return worker.run(task, *arguments, seconds=seconds)
    finally:
        worker.stop()


def here(task: Task, *arguments: Any, seconds: float) -> dict[str, Record]:
    """Run a task in this process, without a time limit: for debuggers, sanitizers and tests."""
    records: dict[str, Record] = {}
    task(lambda name, record: None if record is None else records.__setitem__(name, record), *arguments)
    return records


def without_the_dead(
    runner: Runner, task: Task, names: list[str], *arguments: Any, seconds: float
) -> dict[str, Record]:
    """Run `task(say, names, *arguments)` until nobody dies: whose turn it was is left out, and the others go on."""
    left, found = list(names), dict[str, Record]()
    until = time.monotonic() + 2 * seconds
    while left:
        try:
            return found | runner(task, left, *arguments, seconds=seconds)
        except Died as death:
            found |= {name: {"status": f"failed: {death}"} for name in left if death.turn in (name, None)}
            left = [name for name in left if name not in found]
            if time.monotonic() > until:
                return found | {name: death.records.get(name, {"status": OUT_OF_TIME}) for name in left}
    return found


def measure(say: Say, names: Sequence[str], module: str, setting: Mapping[str, Any], effort: Mapping[str, Any]) -> None:
    """Measure contestants of a setting in turn; a task."""
    began = time.monotonic()
    problem: OpenProblem = importlib.import_module(module).open_problem(setting)
    builds = {name: functools.partial(problem.step_of, name, effort["dry"]) for name in names}
    in_turn(builds, Effort(**effort), problem.device_name, say, problem.errors, began)


def measure_peak(say: Say, name: str, module: str, setting: Mapping[str, Any]) -> None:
    """Measure how far a contestant's step raises the memory of a process that runs nobody else; a task."""
    problem: OpenProblem = importlib.import_module(module).open_problem(setting)
    loaded = memory_mb(problem.device_name) if problem.whole_peak else None
    step = problem.step_of(name, False)
    step()
    step()
    say(name, peak(step, problem.device_name, loaded))


@dataclass(frozen=True)
class Benchmark:
    """What is measured: a module whose `open_problem(setting)` has steps, and who takes part in it.

    contestants: what each is, and its role: "ours", "peer" or "floor". names_of: who is measured in a setting.
    finish: adds to a row, {"name", "setting", "contestants"}, whom ours is, goals and notes.
    """

    module: str
    title: str
    about: tuple[str, ...]
    contestants: Mapping[str, tuple[str, str]]
    names_of: Callable[[Any], list[str]]
    finish: Callable[[Results], None]


def measure_rows(benchmark: Benchmark, settings: Sequence[Any], options: argparse.Namespace) -> Results:
    """Measure setting by setting, and print and write each row when it is done; all share the seconds of --limit."""
    results, worker = header(benchmark.title, benchmark.about, options), Worker()
    until = time.monotonic() + options.limit
    try:
        for number, setting in enumerate(settings):
            limit = (until - time.monotonic()) / (len(settings) - number)
            effort = Effort(options.rounds, options.warmup, limit, not options.no_memory, options.dry)
            print(f"{number + 1}/{len(settings)} {setting.name}:", flush=True)
            names, given = benchmark.names_of(setting), asdict(setting)
            found = {}
            if limit > 0:
                inputs = (benchmark.module, given, asdict(effort))
                found = without_the_dead(here if options.here else worker.run, measure, names, *inputs, seconds=limit)
            records = {name: found.get(name, {"status": OUT_OF_TIME}) for name in names}
            for name, record in records.items() if effort.memory else ():
                if "median_ms" in record and "peak_mb" not in record:
                    try:
                        record |= isolated(measure_peak, name, benchmark.module, given, seconds=PEAK_LIMIT)[name]
                    except Died as death:
                        record["peak_note"] = f"failed: {death}"
            for name, record in records.items():
                record["about"], record["role"] = benchmark.contestants[name]
                print(f"    {name}: {record.get('median_ms', record['status'])}", *record.get("flags", ()), flush=True)
            row = {"name": setting.name, "setting": given, "contestants": records, "goals": []}
            if not options.dry:
                benchmark.finish(row)
            results["rows"].append(row)
            publish(results, options.json)
    finally:
        worker.stop()
    return results


def header(title: str, about: Sequence[str], options: argparse.Namespace) -> Results:
    """Begin a results file: what was measured, where, when and with what. `options` has device, date and dry."""
    return {
        "form": FORM,
        "title": title,
        "about": list(about),
        "date": str(options.date),
        "measured": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "commit": commit(),
        "dry_run": options.dry,
        "machine": machine(options.device),
        "versions": versions(),
        "rows": [],
    }


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
        records = row["contestants"]
        cut = [name for name, record in records.items() if record["status"] == OUT_OF_TIME]
        if cut:
            print(f"cut by the limit: {row['name']}: {', '.join(cut)}")
        found = [goal_line(goal) for goal in row["goals"] if goal["met"] is False]
        for name, record in records.items():
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
    parser.add_argument("--here", action="store_true", help="in this process: a contestant that crashes ends the run")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--date", type=datetime.date.fromisoformat, default=datetime.date.today(), help="YYYY-MM-DD")
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
