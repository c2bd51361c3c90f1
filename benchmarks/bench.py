"""`make bench`: a short form of every benchmark on the CPU, a dated table and a plot, and the README's table from them.

    python -m benchmarks.bench [--only head,losses,step,scaling,rows] [--full]
    python -m benchmarks.bench --readme [FILE]        write the README's table from a results file; default the newest

Writes benchmarks/results/DATE-bench.json, .md and .png after each part, DATE-bench-full with `--full`. Each part is a
command of its own, with a limit, so that one that fails or hangs costs nobody else its figures. `--full` takes the
sizes of the acceptance figures, which need minutes a part. The exit code is 1 where a part failed to run; goals that
were missed are in the tables.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.bench_table import markdown, readme_block, with_block
from benchmarks.proof import iso_date, names_of
from benchmarks.surroundings import RESULTS, ROOT, commit, machine, versions, without_paths, write_whole

README = ROOT / "README.md"
Runner = Callable[[Sequence[str], float], tuple[int, str]]  # (command, seconds) -> (exit code, the end of its output)


@dataclass(frozen=True)
class Part:
    """One benchmark: its command in both forms, before the option that names its results file; and seconds it may take.

    good: the exit codes of a run that measured; the modules of ours end with 1 where a goal was missed.
    """

    short: str
    full: str
    limit: float
    option: str = "--json"
    good: tuple[int, ...] = (0, 1)


HEAD = "-m benchmarks.head --device cpu --tokens 1024 --hidden 2048 --vocab 50272"
# without those that are compiled, which takes too long
QUICK_PEERS = "floor,floor_tiled,floor_together,ours,ours_torch,eager,torch_lce,torch_lce_chunked,trl"
QUICK_STEP = "--methods grad_diff --loops loop_selected,ours_first,ours_later,floor --batches 1 --warmup 0 --rounds 3"
STEP = "-m benchmarks.step --device cpu"
ROWS = "-m pytest benchmarks/test_rows.py --benchmark-only -q -p no:cacheprovider"
LOSSES = f"{HEAD} --p flat --ignored 0.5 --losses npo,kl,distance_cluster"
PARTS = {
    "head": Part(f"{HEAD} --p flat --ignored 0.5 --rounds 2 --contestants {QUICK_PEERS}", f"{HEAD} --p flat", 300),
    "losses": Part(
        f"{LOSSES} --rounds 2 --contestants floor_together,floor_together_known,ours,ours_known,eager", LOSSES, 240
    ),
    "step": Part(f"{STEP} {QUICK_STEP}", f"{STEP} --bits 32,8", 300),
    "scaling": Part("-m benchmarks.scaling --short --rounds 2", "-m benchmarks.scaling", 180),
    "rows": Part(ROWS, ROWS, 240, option="--benchmark-json", good=(0,)),
}
FULL_LIMIT = 3600.0


def main(arguments: Sequence[str] | None = None, runner: Runner | None = None) -> int:
    """Run the parts asked for; `runner` replaces the real commands. Returns the exit code."""
    options = parse(arguments)
    if options.readme is not None:
        return write_readme(options.readme or newest())
    target: Path = options.out / f"{options.date}-bench{'-full' if options.full else ''}.json"
    results = header(options)
    failed = []
    with tempfile.TemporaryDirectory(prefix="fastforget-bench-") as folder:
        for name in options.only:
            began = time.monotonic()
            print(f"{name} ...", flush=True)
            part = run_part(name, Path(folder), options.full, runner or run_command)
            part["seconds"] = round(time.monotonic() - began, 1)
            results["parts"][name] = part
            print(f"{name}: {part['status']}, {part['seconds']:.0f} s", flush=True)
            failed += [] if part["status"] == "measured" else [name]
            write_whole(target, json.dumps(without_paths(results), indent=2, ensure_ascii=False) + "\n")
            write_whole(target.with_suffix(".md"), markdown(results))
            picture = Path(folder) / "scaling.png"
            if picture.is_file():
                shutil.copyfile(picture, target.with_suffix(".png"))
    print("\n" + markdown(results))
    return 1 if failed else 0


def header(options: argparse.Namespace) -> dict[str, Any]:
    """What was measured, where, when and with what."""
    return {
        "date": options.date,
        "measured": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "commit": os.environ.get("FASTFORGET_COMMIT") or commit(),
        "full": options.full,
        "machine": machine("cpu"),
        "versions": versions(),
        "parts": {},
    }


def run_part(name: str, folder: Path, full: bool, runner: Runner) -> dict[str, Any]:
    """A part's results, as its module wrote them; or what it said last."""
    part, file = PARTS[name], folder / f"{name}.json"
    words = (part.full if full else part.short).split()
    code, said = runner([sys.executable, *words, part.option, str(file)], FULL_LIMIT if full else part.limit)
    if not file.is_file() or not file.stat().st_size:
        return {"status": f"failed: exit code {code}", "said": said}
    results = json.loads(file.read_text(encoding="utf-8"))
    if name == "rows":  # of everything else that pytest-benchmark keeps, machine and commit are in our header
        results = {"benchmarks": [row_of(benchmark) for benchmark in results["benchmarks"]]}
    status = "measured" if code in part.good else f"failed: exit code {code}; what came before is kept"
    return {"status": status, "results": results}


def row_of(benchmark: Mapping[str, Any]) -> dict[str, Any]:
    """What is kept of one of pytest-benchmark's."""
    return {
        "name": benchmark["name"],
        "median_ms": 1e3 * benchmark["stats"]["median"],
        "rounds": benchmark["stats"]["rounds"],
        **benchmark["extra_info"],
    }


def run_command(command: Sequence[str], seconds: float) -> tuple[int, str]:
    """Run a command in the repository's root; what it started ends with it."""
    process = subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )
    try:
        said, _ = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, 9)  # its workers too: they are in its session
        said, _ = process.communicate()
        return 124, f"{said[-2000:]}\nhad not ended after {seconds:.0f} s"
    return process.returncode, said[-2000:]


def newest() -> Path:
    """The newest results file: of full runs, if there are any."""
    for pattern in ("????-??-??-bench-full.json", "????-??-??-bench.json"):
        found = sorted(RESULTS.glob(pattern))
        if found:
            return found[-1]
    raise SystemExit("bench: there are no results yet: run python -m benchmarks.bench")


def write_readme(source: Path, readme: Path = README) -> int:
    """Put the table of a results file between the README's markers."""
    results = json.loads(source.read_text(encoding="utf-8"))
    try:
        text = with_block(readme.read_text(encoding="utf-8"), readme_block(results, source.stem))
    except ValueError as error:
        print(f"bench: {error}", file=sys.stderr)
        return 2
    write_whole(readme, text)
    return 0


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The options; bad ones end with exit code 2."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.bench", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", type=names_of("part", PARTS), default=tuple(PARTS), help=f"of {', '.join(PARTS)}")
    parser.add_argument("--full", action="store_true", help="the sizes of the acceptance figures: many minutes")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the results; default %(default)s")
    parser.add_argument("--date", type=iso_date, default=datetime.date.today().isoformat(), help="default: today")
    parser.add_argument(
        "--readme", type=Path, nargs="?", const=False, help="write the README's table, and measure nothing"
    )
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
