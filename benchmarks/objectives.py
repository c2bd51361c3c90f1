"""Every preset: what its job does to a small memorised set, and the peak memory of its step.

    python -m benchmarks.objectives [--only convergence,memory] [--presets "npo,npo beta=1"] [--jobs 2]

Writes objectives.json and objectives.md under benchmarks/results/ after each row; rows of other presets, measured on
the same machine with the same versions, stay. The exit code is 1 where a preset failed, became NaN, does not collapse
though it is known to, or its step needs more memory than was asked for; 2 for bad arguments; else 0.
"""

from __future__ import annotations

import argparse
import datetime
import json
import queue
import sys
import tempfile
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from benchmarks import objectives_measure
from benchmarks.head import whole
from benchmarks.head_measure import MEASURED, Record
from benchmarks.head_worker import Died, Worker
from benchmarks.objectives_measure import FACTS, Scale, StepSize
from benchmarks.objectives_table import BASELINE, markdown, problems_of, rows_of, verdict
from benchmarks.proof import DEFAULT_RUNS, OVERRIDES, PRESETS_HELP, iso_date, names_of, presets, with_overrides
from benchmarks.step import Runner, isolated
from benchmarks.surroundings import RESULTS, commit, machine, versions, without_paths, write_whole
from fastforget.errors import FastforgetError
from fastforget.objectives.presets import PRESETS

ROW_LIMIT, BASE_LIMIT = 900.0, 1800.0  # seconds of a row, of making the model; a job takes about ten
NAME = "objectives.json"


@dataclass(frozen=True)
class Plan:
    """What to measure, how large, and where the results go."""

    out: Path
    date: str
    only: tuple[str, ...] = ("convergence", "memory")
    presets: tuple[str, ...] = DEFAULT_RUNS
    jobs: int = 1
    scale: Scale = field(default_factory=Scale)
    step: StepSize = field(default_factory=StepSize)

    def runs(self, suite: str) -> list[str]:
        """The presets of a suite, each with its options after it."""
        chosen = with_overrides(self.presets)
        first = [BASELINE] if suite == "memory" else []
        return list(dict.fromkeys([*first, *chosen]))


class Results:
    """Both files. Rows that an earlier run left are kept, where they are of the same surroundings and not planned now.

    Raises:
        FastforgetError: the file there cannot be read, or was measured on another machine or with other versions.
    """

    def __init__(self, plan: Plan) -> None:
        self.path = plan.out / NAME
        self.planned = {suite: plan.runs(suite) for suite in plan.only}
        header: dict[str, Any] = {"date": plan.date, "machine": machine(), "versions": versions()}
        self.values = {**header, "sets": None, "step": None, "rows": []}
        if self.path.exists():
            self.keep(header)
        plan.out.mkdir(parents=True, exist_ok=True)  # now, not after the first row

    def keep(self, header: dict[str, Any]) -> None:
        """Take over what an earlier run measured."""
        try:
            earlier = json.loads(self.path.read_text(encoding="utf-8"))
            others = [row for row in earlier["rows"] if row["preset"] not in self.planned.get(row["suite"], ())]
            surroundings = {name: earlier[name] for name in ("machine", "versions")}
            self.values |= {"sets": earlier["sets"], "step": earlier["step"], "rows": others}
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            raise FastforgetError(f"{self.path} is not a results file: remove it, or give another --out") from None
        for name, value in surroundings.items():
            if others and value != header[name]:
                raise FastforgetError(f"{self.path} was measured with another {name}: remove it, or give another --out")

    def add(self, suite: str, preset: str, started_at: str | None, record: Record) -> None:
        """A row more, on disk."""
        measured = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        row = {"suite": suite, "preset": preset, "measured": measured, "commit": started_at, **record}
        self.values["rows"].append(without_paths(row))
        done = record["status"] if record["status"] != MEASURED else ""
        if record["status"] == MEASURED:
            done = verdict(record["report"]) if suite == "convergence" else f"{record['peak_mb']} MB"
        print(f"{suite}, {preset}: {done}", flush=True)
        self.write()

    def write(self) -> None:
        """Both files, whole."""
        write_whole(self.path, json.dumps(self.values, indent=2, ensure_ascii=False) + "\n")
        used = {name: value for name, value in OVERRIDES.items() if name in PRESETS}
        notes = [f"`{name}` runs with `{value}`: the models here have two layers." for name, value in used.items()]
        write_whole(self.path.with_suffix(".md"), markdown(self.values, self.planned, notes))


class Pool:
    """Worker processes; a row takes one that is free, and the next goes on in it."""

    def __init__(self, size: int) -> None:
        self.workers = [Worker() for _ in range(size)]
        self.free: queue.SimpleQueue[Worker] = queue.SimpleQueue()
        for worker in self.workers:
            self.free.put(worker)

    def run(self, task: Callable[..., None], *arguments: Any, seconds: float) -> dict[str, Record]:
        """A task's records; raises Died as `Worker.run` does."""
        worker = self.free.get()
        try:
            return worker.run(task, *arguments, seconds=seconds)
        finally:
            self.free.put(worker)

    def stop(self) -> None:
        """End the processes."""
        for worker in self.workers:
            worker.stop()


def row_of(runner: Runner, task: Callable[..., None], preset: str, *arguments: Any) -> Record:
    """A preset's record; that its process died is one, too."""
    try:
        return runner(task, preset, *arguments, seconds=ROW_LIMIT)[preset]
    except Died as death:
        return {"status": f"failed: {death}"}


def convergence(plan: Plan, folder: Path, results: Results, runner: Runner | None) -> None:
    """A job of each preset, `plan.jobs` of them at once."""
    pool = Pool(plan.jobs)
    run, at = runner or pool.run, commit()
    try:
        print("convergence: training the base ...", flush=True)
        sets = run(objectives_measure.make_base, plan.scale, folder, seconds=BASE_LIMIT)[FACTS]
        results.values["sets"] = sets | {"steps": plan.scale.steps}
        with ThreadPoolExecutor(plan.jobs) as threads:
            rows = {
                threads.submit(row_of, run, objectives_measure.converge, preset, folder, plan.scale.steps): preset
                for preset in plan.runs("convergence")
            }
            try:
                for row in as_completed(rows):
                    results.add("convergence", rows[row], at, row.result())
            except BaseException:  # interrupted: no further row begins
                threads.shutdown(wait=False, cancel_futures=True)
                raise
    finally:
        pool.stop()


def memory(plan: Plan, folder: Path, results: Results, runner: Runner | None) -> None:
    """A step of each preset, one after the other, each in a process of its own."""
    run, at = runner or isolated, commit()
    run(objectives_measure.make_model, plan.step, folder, seconds=BASE_LIMIT)
    results.values["step"] = asdict(plan.step)
    for preset in plan.runs("memory"):
        results.add("memory", preset, at, row_of(run, objectives_measure.step_peak, preset, folder, plan.step))


SUITES = {"convergence": convergence, "memory": memory}


def measure(plan: Plan, runner: Runner | None = None) -> list[str]:
    """Run the suites asked for; a line for each thing that failed or was missed. `runner` replaces the processes."""
    results = Results(plan)
    problems = []
    for suite in plan.only:
        with tempfile.TemporaryDirectory(prefix="fastforget-objectives-") as folder:
            try:
                SUITES[suite](plan, Path(folder), results, runner)
            except Died as death:
                problems.append(f"{suite}: the model could not be made: {death}")
        rows = rows_of(results.values, suite)
        problems += problems_of(suite, {preset: rows[preset] for preset in plan.runs(suite) if preset in rows})
    return problems


def main(arguments: Sequence[str] | None = None, runner: Runner | None = None, plan: Plan | None = None) -> int:
    """Measure and write; returns the exit code. `plan` gives the sizes, where they are not the table's."""
    options = parse(arguments)
    given = {name: getattr(options, name) for name in ("out", "date", "only", "presets", "jobs")}
    try:
        problems = measure(replace(plan, **given) if plan else Plan(**given), runner)
    except (FastforgetError, OSError) as error:
        print(f"objectives: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("objectives: interrupted; the rows that were measured are kept", file=sys.stderr)
        return 130
    print("\n".join(problems) or "Every preset ran, and nothing was missed.")
    return 1 if problems else 0


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The options; bad ones end with exit code 2."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.objectives", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("--only", type=names_of("suite", SUITES), default=tuple(SUITES), help="suites, comma-separated")
    parser.add_argument("--presets", type=presets, default=DEFAULT_RUNS, help=PRESETS_HELP)
    parser.add_argument("--jobs", type=whole, default=1, help="jobs at once, one thread each; default 1")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the results; default %(default)s")
    parser.add_argument("--date", type=iso_date, default=datetime.date.today().isoformat(), help="default: today")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
