"""Tile shapes on a GPU: the label sweep, forward and backward of the mean NLL, beside the two products unchunked.

    python -m benchmarks.tiles [--device cuda] [--budget SECONDS] [--json FILE] [--tiny]

One row for each shape of the head's benchmark, one column for each FASTFORGET_TILE; the default of `tiling.py` comes
first. Shapes take turns tile by tile, so that a budget that ends early has seen every one. Table and JSON are written
after each time; what there was no time for is said. `--tiny` is a dry run on the CPU, and holds no figure of speed.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.floors import Step, floor_unchunked
from benchmarks.head import GPU_SHAPES
from benchmarks.head_measure import OUT_OF_TIME, facts, failed, free_memory, timed
from benchmarks.head_problem import Problem, Setting
from benchmarks.peers import ours
from benchmarks.surroundings import commit, machine, write_whole
from fastforget.backends.tiling import OVERRIDE

DEFAULT, PRODUCTS = "default", "two products"
TILES = ("1024x8192", "1024x16384", "1024x4096", "2048x8192", "2048x4096", "512x8192", "4096x4096", "8192x8192")
TINY_SHAPES, TINY_TILES = ((32, 300), (16, 200)), ("4x64", "8x100")
ROUNDS, WARMUP = 5, 1


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and write; the exit code is 1 where something failed."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.tiles", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--budget", type=float, default=35.0, help="seconds after which nothing begins; default 35")
    parser.add_argument("--json", type=Path, help="file of the results; the table goes beside it, as .md")
    parser.add_argument("--tiny", action="store_true", help="shapes of no interest: a dry run")
    options = parser.parse_args(arguments)
    until = time.monotonic() + options.budget
    shapes, tiles = (TINY_SHAPES, TINY_TILES) if options.tiny else (GPU_SHAPES, TILES)
    common: dict[str, Any] = {"tokens": 8 if options.tiny else 8192, "device": options.device}
    common["dtype"] = "bfloat16" if options.device == "cuda" else "float32"
    results: dict[str, Any] = {
        "machine": machine(facts(options.device)["name"]),
        "torch": torch.__version__,
        "commit": os.environ.get("FASTFORGET_COMMIT") or commit(),
        "dry_run": options.tiny,
        "rows": {f"D {width}, V {vocabulary}": {} for width, vocabulary in shapes},
    }
    # the operands of all four shapes are 3 GB: they are drawn once, and stay
    problems = [Problem(Setting(hidden=width, vocabulary=vocabulary, **common)) for width, vocabulary in shapes]
    for name in (PRODUCTS, DEFAULT, *tiles):
        for row, problem in zip(results["rows"], problems, strict=True):
            row_of = results["rows"][row]
            row_of[name] = OUT_OF_TIME if time.monotonic() > until else measured(problem, name)
            write(results, options.json)
            print(f"{row}, {name}: {cell(row_of, name)}", flush=True)
    print("\n" + table(results))
    return (
        1 if any(str(value).startswith("failed") for row in results["rows"].values() for value in row.values()) else 0
    )


def measured(problem: Problem, name: str) -> float | str:
    """Milliseconds of a step, or why there are none."""
    device = problem.setting.device
    try:
        with tile(name):
            step: Step = floor_unchunked(problem) if name == PRODUCTS else ours(problem)
            times = [timed(step, device) for _ in range(WARMUP + ROUNDS)][WARMUP:]
        return 1e3 * statistics.median(times)
    except Exception as error:
        return str(failed(error, device)["status"])
    finally:
        free_memory(device)


@contextlib.contextmanager
def tile(name: str) -> Iterator[None]:
    """FASTFORGET_TILE, while it is looked at."""
    before = os.environ.pop(OVERRIDE, None)
    try:
        if name not in (DEFAULT, PRODUCTS):
            os.environ[OVERRIDE] = name
        yield
    finally:
        os.environ.pop(OVERRIDE, None)
        if before is not None:
            os.environ[OVERRIDE] = before


def write(results: dict[str, Any], path: Path | None) -> None:
    """Results and table so far."""
    if path is not None:
        write_whole(path, json.dumps(results, indent=2) + "\n")
        write_whole(path.with_suffix(".md"), table(results))


def cell(row: dict[str, float | str], name: str) -> str:
    """Milliseconds, and times the two products."""
    value, products = row.get(name), row.get(PRODUCTS)
    if not isinstance(value, float):
        return str(value or "")
    return f"{value:.2f}" + (f" ({value / products:.2f})" if isinstance(products, float) and name != PRODUCTS else "")


def table(results: dict[str, Any]) -> str:
    """In Markdown: a line for each tile, a column for each shape."""
    rows = results["rows"]
    names = dict.fromkeys(name for row in rows.values() for name in row)
    about = "A dry run: no figure of speed. " if results["dry_run"] else ""
    about += (
        f"{results['machine']['device']}, torch {results['torch']}, commit {results['commit']}; ms (× two products)."
    )
    lines = [f"| tile | {' | '.join(rows)} |", "|---|" + "--:|" * len(rows)]
    lines += [f"| {name} | {' | '.join(cell(row, name) for row in rows.values())} |" for name in names]
    return "\n".join([about, "", *lines]) + "\n"


if __name__ == "__main__":
    sys.exit(main())
