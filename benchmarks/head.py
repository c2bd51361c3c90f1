"""The output head against its peers: time, peak memory, and error against float64, of forward and backward.

    python -m benchmarks.head [PART] --device cuda --json FILE
    python -m benchmarks.head [PART] --tiny [--interpret]          a dry run: no figure of speed

parts: nll      the mean NLL, of every label and of half of them, flat and memorised (p -> 1); the default
       losses   NPO, KL, and the NLL with distances from the reference and from cluster centres
       kl       forward KL with and without the reference's embedding, beside its three and four bare products
       tiles    the NLL with eight shapes of the tiles (FASTFORGET_TILE), beside the two products
       scaling  time and memory over N and over V; asked: time linear in both, memory that V does not move

Measured is a loss of the kept tokens and its gradient over the hidden states; the head is frozen. Settings take turns
in the order of the rows, and share --limit. Results are written after each row. The exit code is 1 where ours failed,
is wrong or missed a goal, else 0; peers that are missing or fail are rows.
"""

from __future__ import annotations

import argparse
import itertools
import math
import os
import statistics
import sys
from collections.abc import Mapping, Sequence
from io import BytesIO
from typing import Any

import torch

from benchmarks import harness
from benchmarks.peers import CONTESTANTS, TILES, taking_part
from benchmarks.problem import LOSSES, P, Setting
from benchmarks.tables import fastest, goal, ratio
from fastforget.backends import BACKENDS

GPU_SHAPES = ((2048, 50272), (4096, 128256), (3584, 152064), (2304, 256000))  # OPT, Llama 3, Qwen 2.5, Gemma 2
CPU_SHAPES = ((2048, 50272),)
TINY_SHAPES = ((32, 300),)
PLAIN: dict[str, tuple[Any, ...]] = {"losses": ("nll",), "ignored": (0.0,), "p": ("flat",), "contestants": ()}
PARTS = {  # part -> defaults of options
    "nll": PLAIN | {"ignored": (0.0, 0.5), "p": P},
    "losses": PLAIN | {"losses": ("npo", "kl", "distance_cluster"), "ignored": (0.5,)},
    "kl": PLAIN | {"losses": ("kl",), "ignored": (0.0, 0.5)},
    "tiles": PLAIN | {"contestants": ("floor_unchunked", "ours", *(f"tile_{tile}" for tile in TILES))},
    "scaling": PLAIN | {"contestants": ("ours", "eager")},
}
WITHIN_MEMORY = ("floor_rows", "floor_tiled", "floor_together")
SLOPES, FLAT_MB = (0.9, 1.1), 128.0  # of log time over log N V; memory beyond three of N x D
ABOUT = (
    "Forward and backward with respect to the hidden states, frozen head; medians of runs in turn. Extra MB: peak "
    "memory beyond the inputs. Errors are against float64: of the loss, of the gradient of a sample of rows "
    "(‖error‖ / ‖gradient‖), and of the worst of them.",
)


def finish(row: dict[str, Any]) -> None:
    """Say of each contestant which floor is its own, and what was asked of ours."""
    row["ours"] = "ours"
    for name, record in row["contestants"].items():
        record["floor"] = floor_of(row, CONTESTANTS[name].known)
    if "ours" in row["contestants"] and not row["setting"]["sweep"]:
        row["goals"] = goals(row)


def floor_of(row: Mapping[str, Any], known: bool, names: Sequence[str] = tuple(CONTESTANTS)) -> str | None:
    """Name the fastest floor, of three products or of all that a loss takes."""
    return fastest(row, "floor", [name for name in names if CONTESTANTS[name].known == known])


def goals(row: Mapping[str, Any]) -> list[dict[str, Any]]:
    """State what was asked of ours: near the floor, as fast as every peer or faster, in little memory."""
    setting, records, found = row["setting"], row["contestants"], []
    gpu, divergence, nll = setting["device"] == "cuda", setting["loss"] == "kl", setting["loss"] == "nll"
    near = (1.15 if divergence else 1.10 if setting["hidden"] >= 3584 else 1.20) if gpu else 1.05

    def compare(who: str, what: str, other: str | None, limit: float) -> None:
        found.append(goal(f"{who} / {what} ({other})", ratio(row, who, other), "≤", limit))

    if nll or divergence:
        compare("ours", "the fastest floor", floor_of(row, False), near)
    if divergence:
        compare("ours_known", "the fastest floor of three products", floor_of(row, True), near)
    if nll and not gpu:
        compare("ours", "the fastest floor within our memory", fastest(row, "floor", WITHIN_MEMORY), near)
        compare("ours", "all logits", "eager", 0.5 if setting["ignored"] == 0.5 else 1.0)
    compare("ours", "the fastest peer", fastest(row, "peer"), 1.0 if gpu else 1 / 0.97)
    states = 3 * setting["tokens"] * setting["hidden"] * getattr(torch, setting["dtype"]).itemsize / 1e6
    most = states + (256.0 if gpu else 14.0 if divergence else FLAT_MB)
    for name in ("ours", "ours_known") if divergence else ("ours",):
        found.append(goal(f"extra MB of {name}", records.get(name, {}).get("peak_mb"), "≤", most))
    return found


def scaling_points(options: argparse.Namespace) -> list[tuple[str, int, int, int]]:
    """List (sweep, N, V, D) of a line over N, 256 to 8192, and one over V, 8k to 256k; in short 3 points of each."""
    if options.tiny:
        return [("N", 4, 300, 32), ("N", 8, 300, 32), ("V", 4, 300, 32), ("V", 4, 600, 32)]
    hidden, fixed, every = (256, 512, 4) if options.short else (512, 1024, 2)
    powers = [every**power for power in range(3 if options.short else 6)]
    over_tokens = [("N", 256 * power, 32768, hidden) for power in powers]
    return over_tokens + [("V", fixed, 8192 * power, hidden) for power in powers]


def line(rows: Sequence[Mapping[str, Any]], sweep: str, name: str, field: str) -> list[tuple[int, float]]:
    """List (N or V, figure) of one line, where it was measured."""
    axis, chosen = {"N": "tokens", "V": "vocabulary"}[sweep], [row for row in rows if row["setting"]["sweep"] == sweep]
    figures = [(row["setting"][axis], row["contestants"].get(name, {}).get(field)) for row in chosen]
    return [(place, value) for place, value in figures if value is not None]


def scaling_goals(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """State what was asked of the lines: time linear in N and in V; memory bounded by what N x D takes, whatever V."""
    found = []
    for sweep in ("N", "V"):
        points = line(rows, sweep, "ours", "median_ms")
        places, values = ([math.log(point[axis]) for point in points] for axis in (0, 1))
        slope, name = None, f"power of {sweep} that time grows with"
        if len(points) > 1:
            slope = statistics.linear_regression(places, values).slope
        found += [goal(name, slope, "≥", SLOPES[0]), goal(name, slope, "≤", SLOPES[1])]
    peaks = [row["contestants"].get("ours", {}).get("peak_mb") for row in rows]
    sizes = [FLAT_MB + 12 * row["setting"]["tokens"] * row["setting"]["hidden"] / 1e6 for row in rows]
    worst = None if None in peaks else max(peak / size for peak, size in zip(peaks, sizes, strict=True))
    return [*found, goal(f"largest peak over {FLAT_MB:.0f} MB + 3 N D", worst, "≤", 1.0)]


def plot(results: Mapping[str, Any]) -> bytes | None:
    """Draw the scaling's lines on logarithmic axes, as a PNG; None where matplotlib is not installed."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return None
    figure = Figure(figsize=(9, 6.5), layout="constrained")
    grid = figure.subplots(2, 2, sharex="col", sharey="row")
    for column, (sweep, axis) in enumerate({"N": "tokens N", "V": "vocabulary V"}.items()):
        for axes, field, what in ((grid[0][column], "median_ms", "ms"), (grid[1][column], "peak_mb", "extra MB")):
            for name, colour in {"ours": "#0072b2", "eager": "#d55e00"}.items():
                points = [point for point in line(results["rows"], sweep, name, field) if point[1] > 0]
                axes.plot(
                    [place for place, _ in points], [value for _, value in points], "o-", color=colour, label=name
                )
            axes.set(xscale="log", yscale="log", xlabel=axis, ylabel=what)
            axes.grid(alpha=0.3)
    grid[0][0].legend(frameon=False)
    where = results["machine"]
    figure.suptitle(f"Forward and backward of the mean NLL: {where['cpu'].partition(';')[0]}, {results['date']}")
    figure.savefig(picture := BytesIO(), format="png")
    return picture.getvalue()


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, write, print; returns the exit code."""
    options = parse(arguments)
    if options.interpret:
        os.environ["TRITON_INTERPRET"] = "1"  # read when triton is imported: by the worker, which inherits it

    about = {name: (contestant.about, contestant.role) for name, contestant in CONTESTANTS.items()}
    results = harness.header(f"The head: {options.part}", ABOUT, options)
    settings = {
        setting: [
            name for name in options.contestants or taking_part(setting) if setting.loss in CONTESTANTS[name].losses
        ]
        for setting in settings_of(options)
    }
    harness.measure_rows(results, "benchmarks.peers", settings, about, finish, options)
    if options.part == "scaling" and not options.dry:
        results["rows"][-1]["goals"] = scaling_goals(results["rows"])
        harness.publish(results, options.json)
        if options.json and (picture := plot(results)):
            harness.write_whole(options.json.with_suffix(".png"), picture)
    return harness.conclude(results)


def settings_of(options: argparse.Namespace) -> list[Setting]:
    """List all rows: the plain ones of each shape first, so that a limit that ends early has seen each shape."""
    common = {name: getattr(options, name) for name in ("dtype", "device", "backend", "seed")}
    if options.part == "scaling":
        points = scaling_points(options)
        return [Setting("nll", count, width, size, sweep=sweep, **common) for sweep, count, size, width in points]
    rows = itertools.product(options.losses, options.ignored, options.p, options.shapes)
    count = options.tokens
    return [Setting(loss, count, width, size, ignored, p, **common) for loss, ignored, p, (width, size) in rows]


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Read the options, and fill in what follows from others; bad ones end with exit code 2."""
    parser = harness.parser_of("head", __doc__)
    parser.add_argument("part", nargs="?", choices=PARTS, default="nll")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), help="default: bfloat16 on a GPU, else float32")
    parser.add_argument("--tokens", type=int, help="N; default 8192 on a GPU, else 1024")
    parser.add_argument("--hidden", type=int, help="D, with --vocab, in place of the default shapes")
    parser.add_argument("--vocab", type=int, help="V")
    parser.add_argument("--ignored", type=shares, help="shares of the tokens, e.g. 0,0.5")
    parser.add_argument("--p", type=harness.names_of("p", P), help=f"of {', '.join(P)}")
    parser.add_argument("--losses", type=harness.names_of("loss", LOSSES), help=f"of {', '.join(LOSSES)}")
    parser.add_argument("--contestants", type=harness.names_of("contestant", CONTESTANTS), help=", ".join(CONTESTANTS))
    parser.add_argument("--backend", choices=("auto", *BACKENDS), help="of ours; default auto, or triton to interpret")
    parser.add_argument("--interpret", action="store_true", help="run the Triton kernels in Triton's interpreter")
    parser.add_argument("--short", action="store_true", help="scaling: three points a line, smaller states")
    options = parser.parse_args(arguments)
    if (options.hidden is None) != (options.vocab is None):
        parser.error("--hidden and --vocab go together")
    gpu = options.device == "cuda"
    options.dry = options.tiny or options.interpret
    options.shapes = TINY_SHAPES if options.tiny else GPU_SHAPES if gpu else CPU_SHAPES
    if options.hidden is not None:
        options.shapes = ((options.hidden, options.vocab),)
    defaults = {
        "dtype": "bfloat16" if gpu else "float32",
        "tokens": 8 if options.tiny else 8192 if gpu else 1024,
        "backend": "triton" if options.interpret else "auto",
        "rounds": 20 if gpu else 7,
        "warmup": 3 if gpu else 1,
    } | PARTS[options.part]
    for name, value in defaults.items():
        if getattr(options, name) is None:
            setattr(options, name, value)
    return options


def shares(text: str) -> tuple[float, ...]:
    """Read comma-separated shares, from 0 to less than 1."""
    found = tuple(float(part) for part in text.split(","))
    if not all(0.0 <= share < 1.0 for share in found):
        raise ValueError(text)
    return found


if __name__ == "__main__":
    sys.exit(main())
