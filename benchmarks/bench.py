"""`make bench`: a short form of every benchmark on the CPU, dated tables and a plot, and docs/benchmarks.md from them.

    python -m benchmarks.bench [--only head,losses,step,scaling,rows] [--full]
    python -m benchmarks.bench --readme       write the tables of docs/benchmarks.md from head, losses and step

Writes benchmarks/results/DATE-PART.json, .md and .png, DATE-PART-full with `--full`, which takes the sizes of the
acceptance figures and minutes a part. The exit code is 1 where a part failed to run; missed goals are in the tables.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks import harness
from benchmarks.tables import figure, plain, ratio, replace_block, table

PAGE = harness.ROOT / "docs" / "benchmarks.md"
BEGIN, END = "<!-- bench: begin, written by python -m benchmarks.bench --readme -->", "<!-- bench: end -->"
HEAD, STEP = "-m benchmarks.head --device cpu", "-m benchmarks.step --device cpu"
QUICK = "--rounds 2 --contestants floor_rows,floor_tiled,floor_together,floor_together_known,ours,ours_known,eager"
ROWS = "-m pytest benchmarks/rows.py --benchmark-only -q -p no:cacheprovider"
PARTS = {  # the command in short, in full, and seconds that the short form may take
    "head": (
        f"{HEAD} nll --p flat --ignored 0.5 {QUICK},ours_torch,torch_lce,torch_lce_chunked,trl",
        f"{HEAD} nll",
        300,
    ),
    "losses": (f"{HEAD} losses {QUICK}", f"{HEAD} losses", 240),
    "step": (f"{STEP} --methods grad_diff --batches 1 --warmup 0 --rounds 3", f"{STEP} --bits 32,8", 300),
    "scaling": (f"{HEAD} scaling --short --rounds 2", f"{HEAD} scaling --rounds 3", 180),
    "rows": (ROWS, ROWS, 240),
}
FULL_LIMIT = 3600


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the parts asked for, each as a command of its own; returns the exit code."""
    parser = harness.parser_of("bench", __doc__)
    parser.add_argument("--only", type=harness.names_of("part", PARTS), default=tuple(PARTS), help=", ".join(PARTS))
    parser.add_argument("--full", action="store_true", help="the sizes of the acceptance figures: many minutes")
    parser.add_argument("--readme", action="store_true", help="write the tables of docs/benchmarks.md, measure nothing")
    options = parser.parse_args(arguments)
    if options.readme:
        return write_page(options.out, PAGE)
    failed = []
    options.out.mkdir(parents=True, exist_ok=True)
    for name in options.only:
        short, full, seconds = PARTS[name]
        limit, file = FULL_LIMIT if options.full else seconds, f"{options.date}-{name}{'-full' if options.full else ''}"
        target = (
            f"--benchmark-json {options.out / file}.json" if name == "rows" else f"--json {options.out / file}.json"
        )
        words = f"{full if options.full else short} {target}".split()
        words += [] if name == "rows" else ["--limit", str(limit), *(["--tiny"] if options.tiny else [])]
        try:  # the modules of ours end with 1 where a goal was missed, which is no failure
            code = subprocess.run([sys.executable, *words], cwd=harness.ROOT, timeout=2 * limit).returncode
        except subprocess.TimeoutExpired:
            code = -9
        failed += [name] if code not in (0, 1) or not (options.out / f"{file}.json").is_file() else []
    print(*(f"{name}: failed to run" for name in failed), sep="\n")
    return 1 if failed else 0


def write_page(folder: Path, page: Path) -> int:
    """Put ours and peers of the head and of training steps between the page's markers, and where the rest is."""
    lines = []
    for part in ("head", "losses", "step"):
        short, full = (sorted(folder.glob(f"????-??-??-{name}.json")) for name in (part, f"{part}-full"))
        newest = (short + full)[-1] if short or full else None
        results = json.loads(newest.read_text(encoding="utf-8")) if newest else {}
        if newest is None or results.get("form") != harness.FORM:
            print(
                f"bench: there are no results of {part} in today's form: run python -m benchmarks.bench",
                file=sys.stderr,
            )
            return 2
        found, machine = [], results["machine"]
        for row in results["rows"]:
            timed = {name: record for name, record in row["contestants"].items() if "median_ms" in record}
            for name, record in timed.items():
                first = plain(row["name"]) if name == next(iter(timed)) else ""
                times, peak = figure(ratio(row, name, row["ours"]), "{:.2f}"), figure(record.get("peak_mb"), "{:.0f}")
                found.append([first, record["about"], f"{record['median_ms']:.0f}", times, peak])
        file = f"../benchmarks/results/{newest.stem}"
        lines += ["", *table((part, "", "ms", "× ours", "extra MB"), found)]
        lines += ["", f"{results['date']}, {machine['cpu']}, {machine['torch threads']} torch threads, commit "]
        lines[-1] += f"{results['commit']}: [tables]({file}.md), [every figure]({file}.json)."
    try:
        text = replace_block(page.read_text(encoding="utf-8"), BEGIN, END, "\n".join(lines[1:]))
    except ValueError as error:
        print(f"bench: {error}", file=sys.stderr)
        return 2
    harness.write_whole(page, text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
