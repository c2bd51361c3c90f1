"""`make bench`: a short form of every benchmark on the CPU, a dated table and a plot, and the README's table from them.

    python -m benchmarks.bench [--only head,losses,step,scaling,rows] [--full]
    python -m benchmarks.bench --readme [FILE]        write the README's table from a results file; default the newest

Writes benchmarks/results/DATE-bench.json, .md and .png after each part, DATE-bench-full with `--full`, which takes the
sizes of the acceptance figures and minutes a part. Each part measures in processes of its own, with a limit. The exit
code is 1 where a part failed to run; goals that were missed are in the tables.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import shutil
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks import head, runs, step
from benchmarks.harness import RESULTS, ROOT
from benchmarks.tables import MEASURED, figure, plain, ratio, replace_block, table

README = ROOT / "README.md"
BEGIN, END = "<!-- bench: begin, written by python -m benchmarks.bench --readme -->", "<!-- bench: end -->"
QUICK = "--rounds 2 --contestants floor_rows,floor_tiled,floor_together,floor_together_known,ours,ours_known,eager"
# the benchmark, its options in short and in full, and seconds that the short form may take
PARTS: dict[str, tuple[Callable[[Sequence[str]], int], str, str, int]] = {
    "head": (head.main, f"nll --p flat --ignored 0.5 {QUICK},ours_torch,torch_lce,torch_lce_chunked,trl", "nll", 300),
    "losses": (head.main, f"losses {QUICK}", "losses", 240),
    "step": (step.main, "--methods grad_diff --batches 1 --warmup 0 --rounds 3", "--bits 32,8", 300),
    "scaling": (head.main, "scaling --short --rounds 2", "scaling --rounds 3", 180),
}
FULL_LIMIT = 3600


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the parts asked for; returns the exit code."""
    parser = runs.parser_of("bench", __doc__)
    known = (*PARTS, "rows")
    parser.add_argument("--only", type=runs.names_of("part", known), default=known, help=", ".join(known))
    parser.add_argument("--full", action="store_true", help="the sizes of the acceptance figures: many minutes")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the results; default %(default)s")
    parser.add_argument(
        "--readme", type=Path, nargs="?", const=Path(), help="write the README's table, measure nothing"
    )
    options = parser.parse_args(arguments)
    if options.readme is not None:
        return write_readme(options.readme if options.readme.name else newest())
    options.device, options.dry = "cpu", options.tiny
    target = options.out / f"{options.date}-bench{'-full' if options.full else ''}.json"
    results = runs.header("Benchmarks on the CPU", [], options)
    for name in options.only:
        with tempfile.TemporaryDirectory(prefix="fastforget-bench-") as folder:
            file = Path(folder) / f"{name}.json"
            print(f"{name} ...", flush=True)
            rows = run_passes(file) if name == "rows" else run_part(name, file, options)
            results["rows"] += [{**row, "name": f"{name}: {row['name']}", "part": name} for row in rows]
            runs.publish(results, target)
            if file.with_suffix(".png").is_file():
                shutil.copyfile(file.with_suffix(".png"), target.with_suffix(".png"))
    missing = [name for name in options.only if not any(row["part"] == name for row in results["rows"])]
    runs.conclude(results)
    print(*(f"{name}: failed to run" for name in missing), sep="\n")
    return 1 if missing else 0


def run_part(name: str, file: Path, options: argparse.Namespace) -> list[dict[str, Any]]:
    """Run a benchmark of contestants, and return its rows; a missed goal is no failure."""
    measure, short, full, limit = PARTS[name]
    words = (full if options.full else short).split()
    words += ["--device", "cpu", "--json", str(file), "--limit", str(FULL_LIMIT if options.full else limit)]
    try:
        measure([*words, *(["--tiny", "--here"] if options.tiny else [])])
    except Exception:
        traceback.print_exc()
    return list(json.loads(file.read_text(encoding="utf-8"))["rows"]) if file.is_file() else []


def run_passes(file: Path) -> list[dict[str, Any]]:
    """Run the tile passes under pytest-benchmark; they become one row."""
    command = f"-m pytest benchmarks/rows.py --benchmark-only -q -p no:cacheprovider --benchmark-json {file}"
    with contextlib.suppress(subprocess.TimeoutExpired):
        subprocess.run([sys.executable, *command.split()], cwd=ROOT, timeout=FULL_LIMIT)
    if not file.is_file() or not file.stat().st_size:
        return []
    found = {}
    for each in json.loads(file.read_text(encoding="utf-8"))["benchmarks"]:
        figures = {name.replace("_", " "): str(value) for name, value in each["extra_info"].items()}
        found[each["name"]] = {"status": MEASURED, "median_ms": 1e3 * each["stats"]["median"], "figures": figures}
    return [{"name": "tile passes", "contestants": found, "goals": []}]


def newest() -> Path:
    """Return the newest results file: of full runs, if there are any."""
    found = sorted(RESULTS.glob("*-bench.json")) + sorted(RESULTS.glob("*-bench-full.json"))
    if not found:
        raise SystemExit("bench: there are no results yet: run python -m benchmarks.bench")
    return found[-1]


def write_readme(source: Path, readme: Path = README) -> int:
    """Put the table of a results file between the README's markers."""
    results = json.loads(source.read_text(encoding="utf-8"))
    try:
        if results.get("form") != runs.FORM:
            raise ValueError(f"{source.name} was written by an older version: measure again")
        runs.write_whole(
            readme, replace_block(readme.read_text(encoding="utf-8"), BEGIN, END, block(results, source.stem))
        )
    except ValueError as error:
        print(f"bench: {error}", file=sys.stderr)
        return 2
    return 0


def block(results: Mapping[str, Any], stem: str) -> str:
    """Write the README's table: ours and peers of the head and of training steps, and where the rest is."""
    machine, files = results["machine"], f"benchmarks/results/{stem}"
    lines = [
        f"{results['date']}, {machine['cpu']}, {machine['torch_threads']} torch threads, commit {results['commit']}: "
        f"[tables]({files}.md), [every figure]({files}.json), [plot]({files}.png).",
    ]
    for part in ("head", "losses", "step"):
        found = []
        for row in results["rows"]:
            timed = {name: record for name, record in row["contestants"].items() if "median_ms" in record}
            for name, record in timed.items() if row["part"] == part else ():
                times = figure(ratio(row, name, row["ours"]), "{:.2f}")
                first = plain(row["name"]) if name == next(iter(timed)) else ""
                peak = figure(record.get("peak_mb"), "{:.0f}")
                found.append([first, record["about"], f"{record['median_ms']:.0f}", times, peak])
        lines += ["", *table((part, "", "ms", "× ours", "extra MB"), found)] if found else []
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
