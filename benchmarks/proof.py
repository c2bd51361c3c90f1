"""`make proof`: the long runs. Measures, writes dated results under benchmarks/results/, and says what was missed.

    python -m benchmarks.proof [--only seeds,presets,objectives] [--seeds 0,1,2] [--resume]
                               [--presets "npo,npo_mean beta=4"]

The exit code is 1 where a run failed or the default preset missed an acceptance figure, or where the presets' jobs and
steps missed theirs (`benchmarks.objectives`), 2 for bad arguments, else 0.
"""

from __future__ import annotations

import argparse
import datetime
import functools
import sys
import tempfile
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.demo_runs import DemoRuns, Runner, run_command
from benchmarks.demo_table import Run
from benchmarks.surroundings import RESULTS
from fastforget.config import parse_pairs, parse_value
from fastforget.errors import FastforgetError
from fastforget.jobs.options import checked_preset
from fastforget.objectives.presets import DEFAULT_PRESET, PRESETS

# SimNPO's published forget weight, 0.125, is tuned for large models with long answers: in the demo's 162 steps it
# forgets too slowly to say whether the objective works, so it is measured with weight 1 too
DEFAULT_RUNS = (*PRESETS, "simnpo forget_weight=1")
# presets whose defaults ask for more than the models of two layers here have, and what they get instead
OVERRIDES = {"rmu": "layer=1"}
PRESETS_HELP = f"comma-separated, each with NAME=VALUE after it as you like; default {', '.join(DEFAULT_RUNS)}"


@dataclass(frozen=True)
class Proof:
    """What was asked for, and where the demo's runs are kept."""

    seeds: tuple[int, ...]
    presets: tuple[str, ...]
    demo: DemoRuns
    out: Path
    date: str


def seed_runs(seeds: Sequence[int]) -> list[Run]:
    """The default preset, each seed."""
    return [(DEFAULT_PRESET, seed) for seed in seeds]


def preset_runs(presets: Sequence[str]) -> list[Run]:
    """Each preset, perhaps with options, seed 0."""
    return [(preset, 0) for preset in with_overrides(presets)]


def with_overrides(presets: Sequence[str]) -> list[str]:
    """Presets with their options after them, as models of two layers can run them."""
    return [f"{preset} {OVERRIDES[preset]}" if preset in OVERRIDES else preset for preset in presets]


def objectives(proof: Proof) -> list[str]:
    """Every preset on a small memorised set, and the memory of its step."""
    from benchmarks.objectives import Plan, measure  # which takes readers of options from here

    return measure(Plan(proof.out, proof.date, presets=proof.presets))


# name -> what failed in it or was missed, a line each; a suite that is no demo writes files of its own
SUITES: dict[str, Callable[[Proof], list[str]]] = {
    "seeds": lambda proof: proof.demo.measure(seed_runs(proof.seeds)),
    "presets": lambda proof: proof.demo.measure(preset_runs(proof.presets)),
    "objectives": objectives,
}


def main(arguments: Sequence[str] | None = None, runner: Runner | None = None) -> int:
    """Run the suites asked for; `runner` replaces the real command. Returns the exit code."""
    options = parse(arguments)
    planned = seed_runs(options.seeds) if "seeds" in options.only else []
    planned += preset_runs(options.presets) if "presets" in options.only else []
    problems: list[str] = []
    try:
        with tempfile.TemporaryDirectory(prefix="fastforget-proof-") as folder:
            runner = runner or functools.partial(run_command, Path(folder))
            demo = DemoRuns(options.out, options.date, planned, resume=options.resume, runner=runner)
            proof = Proof(options.seeds, options.presets, demo, options.out, options.date)
            for name in options.only:
                problems += SUITES[name](proof)
    except (FastforgetError, OSError) as error:
        print(f"proof: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("proof: interrupted; what was measured is kept, and --resume goes on", file=sys.stderr)
        return 130
    problems = list(dict.fromkeys(problems))  # seed 0 of the default preset is in two suites
    print("Everything ran, and no acceptance figure was missed." if not problems else "\n".join(["", *problems]))
    return 1 if problems else 0


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The options, checked; bad ones end with argparse's message and exit code 2."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.proof", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", type=names_of("suite", SUITES), default=tuple(SUITES), help="suites, comma-separated")
    parser.add_argument("--seeds", type=seeds, default=(0, 1, 2), help="of the suite seeds; default 0,1,2")
    parser.add_argument("--presets", type=presets, default=DEFAULT_RUNS, help=PRESETS_HELP)
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the results; default %(default)s")
    parser.add_argument("--date", type=iso_date, default=datetime.date.today().isoformat(), help="default: today")
    parser.add_argument(
        "--resume", action="store_true", help="keep what the date's file holds; runs that failed are tried again"
    )
    return parser.parse_args(arguments)


def names_of(what: str, known: Collection[str]) -> Callable[[str], tuple[str, ...]]:
    """A reader of comma-separated names, each of them known."""

    def read(text: str) -> tuple[str, ...]:
        names = tuple(dict.fromkeys(name.strip() for name in text.split(",") if name.strip()))
        for name in names:
            if name not in known:
                raise argparse.ArgumentTypeError(f"unknown {what} {name!r}: choose from {', '.join(known)}")
        if not names:
            raise argparse.ArgumentTypeError(f"no {what} is named: choose from {', '.join(known)}")
        return names

    return read


def presets(text: str) -> tuple[str, ...]:
    """Comma-separated presets, each perhaps with NAME=VALUE after it; built once, so that no bad one costs a run."""
    chosen = tuple(dict.fromkeys(" ".join(part.split()) for part in text.split(",") if part.strip()))
    for preset in chosen:
        name, *options = preset.split()
        try:
            checked_preset(name, parse_pairs(options, f"an option of {name!r}", parse_value))
        except FastforgetError as error:
            raise argparse.ArgumentTypeError(str(error)) from None
    if not chosen:
        raise argparse.ArgumentTypeError(f"no preset is named: choose from {', '.join(PRESETS)}")
    return chosen


def seeds(text: str) -> tuple[int, ...]:
    """Comma-separated seeds, each a whole number from 0."""
    numbers = [number.strip() for number in text.split(",") if number.strip()]
    if not numbers or not all(number.isascii() and number.isdigit() for number in numbers):
        raise argparse.ArgumentTypeError(f"seeds are whole numbers from 0, comma-separated, not {text!r}")
    return tuple(dict.fromkeys(map(int, numbers)))


def iso_date(text: str) -> str:
    """A date as YYYY-MM-DD."""
    try:
        return datetime.date.fromisoformat(text).isoformat()
    except ValueError:
        raise argparse.ArgumentTypeError(f"a date is YYYY-MM-DD, not {text!r}") from None


if __name__ == "__main__":
    sys.exit(main())
