"""Runs of the real command `fastforget demo`, and one date's file of what they measured."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterable, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from benchmarks.demo_table import Run, markdown, missed
from benchmarks.surroundings import commit, machine, versions, without_paths, write_whole
from fastforget.errors import FastforgetError
from fastforget.objectives.presets import DEFAULT_PRESET

LONGEST_RUN = 1800.0  # seconds; a run takes about two minutes, and one that hangs must not hold up the others
RECORD_FIELDS = {"preset", "seed", "measured", "commit", "error", "report"}

LONGEST_NAME = 100  # characters of an output folder's name that come from the preset and its options
BOX = " \t─│╭╮╰╯"  # typer draws its own errors into a box: the last line is its lower edge

Runner = Callable[[str, int], Mapping[str, Any]]  # (preset with options, seed) -> its report.json; raises RunFailed


class RunFailed(Exception):
    """A run ended without a report; the message is its one line of why."""


class DemoRuns:
    """The demo's runs of one date: measured one by one, and on disk after each, as JSON and as Markdown tables.

    Args:
        planned: what this proof will measure. Records of these from an earlier proof of the same date are dropped,
            unless `resume`; records of other runs stay.

    Raises:
        FastforgetError: the date's file cannot be read, or was measured on another machine or with other versions.
    """

    def __init__(self, folder: Path, date: str, planned: Iterable[Run], *, resume: bool, runner: Runner) -> None:
        self.path = folder / f"{date}-demo.json"
        folder.mkdir(parents=True, exist_ok=True)  # now, not after the first run
        self.planned = list(dict.fromkeys(planned))
        self.runner = runner
        self.header: dict[str, Any] = {"date": date, "machine": machine(), "versions": versions()}
        self.records: dict[Run, dict[str, Any]] = {}
        for record in self.earlier_records():
            run = (record["preset"], record["seed"])
            # a run that failed was not measured: resuming tries it again
            if run not in self.planned or (resume and record["report"] is not None):
                self.records[run] = record

    def earlier_records(self) -> list[dict[str, Any]]:
        """What the date's file holds already."""
        if not self.path.exists():
            return []
        try:
            earlier = json.loads(self.path.read_text(encoding="utf-8"))
            surroundings, records = {name: earlier[name] for name in ("machine", "versions")}, list(earlier["runs"])
            readable = all(record.keys() >= RECORD_FIELDS for record in records)
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            readable = False
        if not readable:
            raise FastforgetError(f"{self.path} is not a results file: remove it, or give another --date or --out")
        for name, value in surroundings.items():
            if value != self.header[name]:
                raise FastforgetError(f"{self.path} was measured with another {name}: give another --date or --out")
        return records

    def measure(self, runs: Iterable[Run]) -> list[str]:
        """Measure what has no record yet; a line for each of the runs that failed, and each figure that was missed."""
        problems: list[str] = []
        for run in runs:
            name = f"{run[0]}, seed {run[1]}"
            if run not in self.records:
                print(f"{name}: running ...", flush=True)
                self.records[run] = self.record(run)
            self.write()  # also for a record that was kept: the tables may be of an older form, or lost
            found = findings(self.records[run])
            print(f"{name}: {'; '.join(found) or 'done'}", flush=True)
            problems += [f"{name}: {finding}" for finding in found]
        return problems

    def record(self, run: Run) -> dict[str, Any]:
        """Run it; a failure is a record too."""
        report, error = None, None
        started_at = commit()  # the code that runs, whatever is committed meanwhile
        try:
            report = without_paths(dict(self.runner(*run)))
        except RunFailed as failure:
            error = without_paths(str(failure))
        measured = datetime.now(UTC).isoformat(timespec="seconds")
        values = {"measured": measured, "commit": started_at, "error": error, "report": report}
        return {"preset": run[0], "seed": run[1], **values}

    def write(self) -> None:
        """Both files, planned runs first; those not measured yet are named in the tables."""
        runs = [run for run in dict.fromkeys([*self.planned, *self.records]) if run in self.records]
        results = {**self.header, "runs": [self.records[run] for run in runs]}
        write_whole(self.path, json.dumps(results, indent=2, ensure_ascii=False) + "\n")
        write_whole(self.path.with_suffix(".md"), markdown(results, self.planned))


def findings(record: Mapping[str, Any]) -> list[str]:
    """Why the run failed, or which acceptance figures it missed: only the default preset has to meet them."""
    if record["report"] is None:
        return [f"failed: {record['error']}"]
    return [f"missed {line}" for line in missed(record["report"])] if record["preset"] == DEFAULT_PRESET else []


def run_command(folder: Path, preset: str, seed: int) -> Mapping[str, Any]:
    """The report of the real command, run below `folder`; the preset's options follow its name, as NAME=VALUE.

    Its cache lies there too (on Linux, where XDG_CACHE_HOME names it): the first run with a seed trains the base, as
    it does for a new user, and the seconds do not depend on what earlier runs have left behind.

    Raises:
        RunFailed: it ended with an error, without a report, or not at all.
    """
    name, *options = preset.split()
    out = folder / f"{re.sub(r'[^A-Za-z0-9_.=+-]', '_', preset)[:LONGEST_NAME]}-seed{seed}"
    script = Path(sys.executable).with_name("fastforget")
    command = [str(script)] if script.is_file() else [sys.executable, "-m", "fastforget.cli"]
    command += ["demo", "--preset", name, "--seed", str(seed), "--out", str(out), "--overwrite"]
    for option in options:
        command += ["--preset-option", option]
    environment = {**os.environ, "OMP_WAIT_POLICY": "PASSIVE", "XDG_CACHE_HOME": str(folder / "cache")}
    try:
        ended = subprocess.run(
            command, env=environment, capture_output=True, text=True, errors="replace", timeout=LONGEST_RUN
        )
    except subprocess.TimeoutExpired:
        raise RunFailed(f"it had not ended after {LONGEST_RUN:.0f} s") from None
    except OSError as error:
        raise RunFailed(f"it could not be started: {error.strerror}") from error
    if ended.returncode != 0:
        lines = [line.strip(BOX) for line in ended.stderr.splitlines() if line.strip(BOX)]
        why = f"killed by signal {-ended.returncode}" if ended.returncode < 0 else f"exit code {ended.returncode}"
        raise RunFailed(f"{lines[-1]} ({why})" if lines else why)
    try:
        report = json.loads((out / "report.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise RunFailed(f"it ended well, but its report.json cannot be read: {error}") from error
    if not isinstance(report, dict):
        raise RunFailed(f"it ended well, but its report.json holds a {type(report).__name__}")
    return report
