"""Whole training steps against the loops that people write: seconds, peak memory, and the same losses and gradients.

    python -m benchmarks.step --device cpu --json FILE                     an OPT of 6 layers, built from config
    python -m benchmarks.step --device cpu --bits 8
    python -m benchmarks.step --device cuda --shape opt-1.3b,llama-3.1-8b --bits 8
    python -m benchmarks.step --device cpu --tiny                          a dry run: no figure of speed
    python -m benchmarks.step --table FILE                                 the tables of a results file

The loops are those of `step_loops`, which says how they were made comparable. Loops take turns in one process, each
peak is measured in a process of its own, and that all compute the same is checked in a third. The exit code is 1 where
ours failed, computes something else or missed a goal, else 0.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import json
import os
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks import step_measure
from benchmarks.head import header, whole
from benchmarks.head_measure import Effort, Record, facts
from benchmarks.head_worker import Died, Worker
from benchmarks.proof import iso_date, names_of
from benchmarks.step_loops import LOOPS, METHODS
from benchmarks.step_problem import SHAPES, StepSetting
from benchmarks.step_table import goal_line, goals, markdown
from benchmarks.surroundings import without_paths, write_whole
from fastforget.backends import pick

Task = Callable[..., None]
Runner = Callable[..., dict[str, Record]]  # (task, its arguments..., seconds=) -> records


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, write, print; returns the exit code."""
    options = parse(arguments)
    if options.table:
        print(markdown(json.loads(options.table.read_text(encoding="utf-8"))))
        return 0
    runner = here if options.here else isolated
    effort = Effort(options.rounds, options.warmup, options.limit, not options.no_memory, options.dry)
    results = header(options, facts(options.device))
    settings = settings_of(options)
    for setting in settings:
        with tempfile.TemporaryDirectory(prefix="fastforget-step-") as folder:
            base = Path(folder) / "base"
            try:
                runner(step_measure.make_base, setting, base, seconds=options.limit)
            except Died as death:
                print(f"step: the model could not be built: {death}", file=sys.stderr)
                return 1
            for method in options.methods:
                print(f"{method}, {setting.name}: ", end="", flush=True)
                row = measure_row(runner, setting, base, method, options.loops, effort)
                results["rows"].append(row)
                print(row["contestants"].get("ours_later", {}).get("status", "done"), flush=True)
                if options.json:
                    text = json.dumps(without_paths(results), indent=2, ensure_ascii=False)
                    write_whole(options.json, text + "\n")
                    write_whole(options.json.with_suffix(".md"), markdown(results))
    print("\n" + markdown(results))
    problems = [f"{row['name']}: {problem}" for row in results["rows"] for problem in problems_of(row)]
    print("\n".join(problems) or "Ours ran, computes the same, and missed no goal that was set.")
    return 1 if problems else 0


def measure_row(
    runner: Runner, setting: StepSetting, base: Path, method: str, loops: Sequence[str], effort: Effort
) -> dict[str, Any]:
    """One method: its loops' seconds and peaks, and the check."""
    records: dict[str, Record] = {name: {"status": "failed: nothing came back"} for name in loops}
    try:
        # twice the limit: the first calls and the last round are not interrupted
        records |= runner(step_measure.time_loops, setting, base, method, loops, effort, seconds=2 * effort.limit)
    except Died as death:
        records |= {name: {"status": f"failed: {death}"} for name in loops}
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else None  # of the last minute, our own included
    for name in step_measure.names_of_peaks(effort, records):
        try:
            records[name] |= runner(step_measure.peak_of, setting, base, method, name, seconds=effort.limit)[name]
        except Died as death:
            records[name] |= {"peak_mb": None, "peak_note": f"failed: {death}"}
    try:
        checked = runner(step_measure.check, setting, base, method, seconds=effort.limit)["check"]
    except Died as death:
        checked = {"flags": [f"the check failed: {death}"]}
    row: dict[str, Any] = {
        "name": f"{method}: {setting.name}",
        "method": method,
        "about": METHODS[method],
        "setting": dataclasses.asdict(setting),
        "load_average": load,
        "backend": pick("auto", torch.device(setting.device)),
        "contestants": records,
        "check": checked,
    }
    row["goals"] = [] if effort.dry else goals(row)
    return row


def problems_of(row: dict[str, Any]) -> list[str]:
    """What is wrong with ours in a row, a line each."""
    found = [
        f"{name}: {record['status']}"
        for name, record in row["contestants"].items()
        if LOOPS[name].role == "ours" and record["status"].startswith("failed")
    ]
    found += [f"does not compute the same: {flag}" for flag in row["check"]["flags"]]
    return found + [goal_line(goal) for goal in row["goals"] if goal["met"] is False]


def isolated(task: Task, *arguments: Any, seconds: float) -> dict[str, Record]:
    """Run a task in a process of its own."""
    worker = Worker()
    try:
        return worker.run(task, *arguments, seconds=seconds)
    finally:
        worker.stop()


def here(task: Task, *arguments: Any, seconds: float) -> dict[str, Record]:
    """Run a task in this process: for debuggers and tests."""
    records: dict[str, Record] = {}

    def say(name: str, record: Record | None) -> None:
        if record is not None:
            records[name] = record

    task(*arguments, say)
    return records


def settings_of(options: argparse.Namespace) -> list[StepSetting]:
    """All rows: each shape with each number of bits."""
    common = {
        name: getattr(options, name)
        for name in ("device", "sequences", "length", "labelled", "rank", "batches", "seed")
    }
    if options.tiny:
        common["ragged"] = True  # also what padding does is then compared
    return [StepSetting(shape=shape, bits=bits, **common) for shape in options.shape for bits in options.bits]


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The options, with what follows from others filled in; bad ones end with exit code 2."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.step", description=(__doc__ or "").splitlines()[0])
    shapes = [name for name in SHAPES if name != "tiny"]
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--shape", type=names_of("shape", shapes), default=("small",), help=", ".join(shapes))
    parser.add_argument("--bits", type=bits, default=(32,), help="of the base: 32, 16, 8 or 4; comma-separated")
    parser.add_argument("--methods", type=names_of("method", METHODS), default=tuple(METHODS), help="default: all")
    parser.add_argument("--loops", type=names_of("loop", LOOPS), default=tuple(LOOPS), help=", ".join(LOOPS))
    parser.add_argument("--sequences", type=whole, help="of each side; default 8")
    parser.add_argument("--length", type=whole, help="tokens of a sequence; default 128")
    parser.add_argument("--labelled", type=float, default=0.4, help="share of the tokens; default 0.4")
    parser.add_argument("--rank", type=whole, default=8, help="of LoRA; default 8")
    parser.add_argument("--batches", type=whole, default=2, help="of an epoch; default 2")
    parser.add_argument("--rounds", type=whole, default=7, help="timed steps of each loop; default 7")
    parser.add_argument("--warmup", type=int, default=1, help="rounds before them, after an epoch; default 1")
    parser.add_argument("--limit", type=float, default=900.0, help="seconds for one method's rounds; default 900")
    parser.add_argument("--no-memory", action="store_true", help="do not measure peak memory")
    parser.add_argument("--tiny", action="store_true", help="a model of no interest: a dry run, no figure of speed")
    parser.add_argument("--here", action="store_true", help="all in this process")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--date", type=iso_date, default=datetime.date.today().isoformat(), help="default: today")
    parser.add_argument("--json", type=Path, help="file of the results; the tables go beside it, as .md")
    parser.add_argument("--table", type=Path, help="print the tables of a results file, and measure nothing")
    options = parser.parse_args(arguments)
    if not 0 < options.labelled < 1:
        parser.error(f"--labelled is a share between 0 and 1, not {options.labelled:g}")
    if options.tiny:
        options.shape = ("tiny",)
    options.sequences = options.sequences or (3 if options.tiny else 8)
    options.length = options.length or (24 if options.tiny else 128)
    options.dry = options.tiny
    return options


def bits(text: str) -> tuple[int, ...]:
    """Comma-separated numbers of bits."""
    return tuple(int(name) for name in names_of("number of bits", ("32", "16", "8", "4"))(text))


if __name__ == "__main__":
    sys.exit(main())
