"""How time and memory of `ff.token_stats`, forward and backward, grow with the tokens N and the vocabulary V.

    python -m benchmarks.scaling [--short] [--json FILE]      the plot goes beside the file, as .png
    python -m benchmarks.scaling --plot FILE                  draws a results file again

Expected: time linear in N V, and extra memory that V does not move. Eager, which holds the logits, is measured beside
it where they fit. The exit code is 1 where ours failed or missed that, else 0.
"""

from __future__ import annotations

import argparse
import datetime
import json
import math
import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import fastforget as ff
from benchmarks.head import header, whole
from benchmarks.head_measure import MEASURED, Record, Say, facts, failed, free_memory, status_mb, timed
from benchmarks.head_worker import Died, Worker
from benchmarks.proof import iso_date
from benchmarks.step_measure import forget_peak
from benchmarks.step_table import goal_line
from benchmarks.surroundings import RESULTS, without_paths, write_whole
from fastforget.backends import pick

EAGER_ELEMENTS = 2**27  # of logits: 0.5 GB in float32, of which eager holds several
SLOPES = (0.9, 1.1)  # of log time over log N V: 1 is linear
FIXED_MB = 128.0  # memory that is asked of ours: this, and three of N x D
COLOURS = {"ours": "#0072b2", "eager": "#d55e00"}


@dataclass(frozen=True)
class Point:
    """One shape. sweep: "N" or "V", whichever the other points of its line differ in."""

    sweep: str
    tokens: int
    vocabulary: int
    hidden: int


def points_of(short: bool) -> list[Point]:
    """A line over N, 256 to 8192, and one over V, 8k to 256k; in short 256 to 4096 and 8k to 128k."""
    hidden, fixed, every = (256, 512, 4) if short else (512, 1024, 2)
    tokens = [256 * every**power for power in range(3 if short else 6)]
    vocabularies = [8192 * every**power for power in range(3 if short else 6)]
    over_tokens = [Point("N", count, 32768, hidden) for count in tokens]
    return over_tokens + [Point("V", fixed, vocabulary, hidden) for vocabulary in vocabularies]


def ours(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """The mean NLL, by `ff.token_stats`."""
    return -ff.token_stats(hidden, ff.LMHead(weight), labels).logp.mean()


def eager(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """The same on all logits."""
    return F.cross_entropy(hidden @ weight.T, labels)


LOSSES: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {"ours": ours, "eager": eager}


def measure_point(point: Point, rounds: int, say: Say) -> None:
    """Median seconds and peak extra memory of one shape; a worker's task."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(point.tokens, point.hidden, generator=generator).requires_grad_()
    weight = F.normalize(torch.randn(point.vocabulary, point.hidden, generator=generator), dim=1)
    labels = torch.randint(point.vocabulary, (point.tokens,), generator=generator)
    for name, loss in LOSSES.items():
        say(name, None)
        if name == "eager" and point.tokens * point.vocabulary > EAGER_ELEMENTS:
            say(name, {"status": "not measured: its logits are too large"})
            continue

        def step(loss: Callable[[Tensor, Tensor, Tensor], Tensor] = loss) -> tuple[Tensor, Tensor]:
            value = loss(hidden, weight, labels)
            return value.detach(), torch.autograd.grad(value, hidden)[0]

        try:
            step()
            seconds = [timed(step, "cpu") for _ in range(rounds)]
            say(name, {"status": MEASURED, "median_ms": 1e3 * statistics.median(seconds)} | peak(step))
        except Exception as error:
            say(name, failed(error, "cpu"))


def peak(step: Callable[[], object]) -> Record:
    """Megabytes that resident memory rises by in one step."""
    free_memory("cpu")
    try:
        forget_peak(cuda=False)
        before = status_mb("VmRSS")
        step()
        return {"peak_mb": round(status_mb("VmHWM") - before, 1)}
    except (OSError, ValueError) as error:
        return {"peak_mb": None, "peak_note": f"not measured: {type(error).__name__}"}


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, write, plot; returns the exit code."""
    options = parse(arguments)
    if options.plot:
        plot(json.loads(options.plot.read_text(encoding="utf-8")), options.plot.with_suffix(".png"))
        return 0
    results = header(options, facts("cpu")) | {"backend": pick("auto", torch.device("cpu"))}
    worker = Worker()
    try:
        for point in points_of(options.short):
            try:
                records = worker.run(measure_point, point, options.rounds, seconds=options.limit)
            except Died as death:
                records = {name: {"status": f"failed: {death}"} for name in LOSSES}
            results["rows"].append({"point": asdict(point), "contestants": records})
            print(line_of(results["rows"][-1]), flush=True)
    finally:
        worker.stop()
    results["goals"] = goals(results["rows"])
    write_whole(options.json, json.dumps(without_paths(results), indent=2, ensure_ascii=False) + "\n")
    plot(results, options.json.with_suffix(".png"))
    print("\n".join(map(goal_line, results["goals"])))
    return 1 if any(goal["met"] is not True for goal in results["goals"]) else 0


def line_of(row: Mapping[str, Any]) -> str:
    """A shape's figures on a line."""
    point = row["point"]
    found = [
        f"{name} {record['median_ms']:.0f} ms, {record['peak_mb']} MB" if "median_ms" in record else record["status"]
        for name, record in row["contestants"].items()
    ]
    return f"N {point['tokens']}, V {point['vocabulary']}, D {point['hidden']}: " + "; ".join(found)


def line(rows: Sequence[Mapping[str, Any]], sweep: str, name: str, field: str) -> list[tuple[int, float]]:
    """(N or V, figure) of one line, where it was measured."""
    axis = {"N": "tokens", "V": "vocabulary"}[sweep]
    chosen = [row for row in rows if row["point"]["sweep"] == sweep]
    figures = [(row["point"][axis], row["contestants"].get(name, {}).get(field)) for row in chosen]
    return [(place, value) for place, value in figures if value is not None]


def goals(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Time linear in N and in V; memory bounded by what N x D takes, whatever V."""
    found = []

    def goal(name: str, value: float | None, limit: float, relation: str) -> None:
        met = None if value is None else value >= limit if relation == "≥" else value <= limit
        found.append({"goal": name, "value": value, "limit": limit, "relation": relation, "met": met})

    for sweep in ("N", "V"):
        value = slope(line(rows, sweep, "ours", "median_ms"))
        goal(f"power of {sweep} that time grows with", value, SLOPES[0], "≥")
        goal(f"power of {sweep} that time grows with", value, SLOPES[1], "≤")
    shares = []
    for row in rows:
        allowed = FIXED_MB + 3 * row["point"]["tokens"] * row["point"]["hidden"] * 4 / 1e6
        value = row["contestants"].get("ours", {}).get("peak_mb")
        shares.append(None if value is None else value / allowed)
    worst = None if not shares or None in shares else max(share for share in shares if share is not None)
    goal(f"largest peak over {FIXED_MB:.0f} MB + 3 N D", worst, 1.0, "≤")
    return found


def slope(points: Sequence[tuple[int, float]]) -> float | None:
    """Of log figure over log place, by least squares."""
    if len(points) < 2:
        return None
    places, values = ([math.log(value) for value in column] for column in zip(*points, strict=True))
    return statistics.linear_regression(places, values).slope


def plot(results: Mapping[str, Any], path: Path) -> Path | None:
    """Time and memory over N and over V, on logarithmic axes; None where matplotlib is not installed."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        return None
    figure = Figure(figsize=(9, 6.5), layout="constrained")
    canvas = FigureCanvasAgg(figure)
    grid = figure.subplots(2, 2, sharex="col", sharey="row")
    rows = results["rows"]
    for column, sweep in enumerate(("N", "V")):
        fixed = next(row["point"] for row in rows if row["point"]["sweep"] == sweep)
        other = f"V = {fixed['vocabulary']:,}" if sweep == "N" else f"N = {fixed['tokens']:,}"
        grid[0][column].set_title(f"{other}, D = {fixed['hidden']}, float32")
        for axes, field, what in ((grid[0][column], "median_ms", "ms"), (grid[1][column], "peak_mb", "extra MB")):
            for name, colour in COLOURS.items():
                points = [(place, value) for place, value in line(rows, sweep, name, field) if value > 0]
                if points:
                    axes.plot(*zip(*points, strict=True), "o-", color=colour, label=name)
            axes.set_xscale("log", base=2)
            axes.set_yscale("log")
            axes.set_ylabel(what if column == 0 else "")
            axes.grid(alpha=0.3)
        grid[1][column].set_xlabel({"N": "tokens N", "V": "vocabulary V"}[sweep])
    grid[0][0].legend(frameon=False)
    machine = results["machine"]
    figure.suptitle(
        f"Forward and backward of the mean NLL: {machine['cpu']}, {machine['torch_threads']} threads, {results['date']}"
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_name(f".{path.name}.part")
    with scratch.open("wb") as file:
        canvas.print_png(file)
    scratch.replace(path)
    return path


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The options; bad ones end with exit code 2."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.scaling", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--short", action="store_true", help="three points a line, smaller states")
    parser.add_argument("--rounds", type=whole, default=3, help="timed runs of each; default 3")
    parser.add_argument("--limit", type=float, default=300.0, help="seconds a shape may take; default 300")
    parser.add_argument("--date", type=iso_date, default=datetime.date.today().isoformat(), help="default: today")
    parser.add_argument("--json", type=Path, help="file of the results; default benchmarks/results/DATE-scaling.json")
    parser.add_argument("--plot", type=Path, help="draw a results file again, and measure nothing")
    options = parser.parse_args(arguments)
    options.json = options.json or RESULTS / f"{options.date}-scaling.json"
    options.device, options.dry, options.warmup = "cpu", False, 1  # as `header` reads them
    return options


if __name__ == "__main__":
    sys.exit(main())
