"""The demo's acceptance figures, and its results as Markdown tables."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fastforget.objectives.presets import DEFAULT_PRESET

Report = Mapping[str, Any]  # report.json of a demo
Run = tuple[str, int]  # preset, perhaps with options ("simnpo forget_weight=1"); seed
RELATIONS: dict[str, Callable[[float, float], bool]] = {"≥": operator.ge, "≤": operator.le, "<": operator.lt}
NOT_MEASURED = "not measured"
PRESETS_NOTE = (
    "Asked of `distance_cluster` and `simnpo`: at least 80 % of what the default forgets, and a retain leak of at "
    "least 90 %. What follows a preset's name are options, as `--preset-option` takes them."
)


@dataclass(frozen=True)
class Criterion:
    """One figure of a report, and what it must be."""

    name: str
    figure: Callable[[Report], float]
    relation: str
    limit: float
    show: Callable[[float], str]

    def value(self, report: Report) -> float:
        """The figure; NaN where the report does not hold it."""
        try:
            return float(self.figure(report))
        except (KeyError, TypeError, ValueError):
            return math.nan

    def met(self, report: Report) -> bool:
        """Whether the figure was measured and is as it must be."""
        return RELATIONS[self.relation](self.value(report), self.limit)

    def shown(self, report: Report) -> str:
        """The figure as it is printed."""
        value = self.value(report)
        return NOT_MEASURED if math.isnan(value) else self.show(value)

    def bound(self) -> str:
        """E.g. "≤ 5 %"."""
        return f"{self.relation} {self.show(self.limit)}"


def percent(share: float) -> str:
    return f"{100 * share:.1f} %"


def three(value: float) -> str:
    return f"{value:.3f}"


ACCEPTANCE = (
    Criterion("forget leak before", lambda report: report["forget_leak_before"], "≥", 0.95, percent),
    Criterion("retain leak before", lambda report: report["retain_leak_before"], "≥", 0.95, percent),
    Criterion("forget leak after", lambda report: report["forget_leak_after"], "≤", 0.05, percent),
    Criterion(
        "forget ROUGE-L recall, distance from unseen",
        lambda report: abs(report["forget_rouge_after"] - report["unseen_rouge"]),
        "≤",
        0.10,
        three,
    ),
    Criterion("retain leak after", lambda report: report["retain_leak_after"], "≥", 0.95, percent),
    Criterion(
        "retain NLL rise, nats per token",
        lambda report: report["retain_nll_after"] - report["retain_nll_before"],
        "≤",
        0.05,
        three,
    ),
    Criterion("degenerate output", lambda report: report["degenerate_share"], "≤", 0.10, percent),
    Criterion("peak memory, MB", lambda report: report["peak_rss_mb"], "<", 3000, "{:.0f}".format),
    Criterion("seconds", lambda report: report["seconds"], "≤", 360, "{:.0f}".format),
)

PRESET_COLUMNS: dict[str, Callable[[Report, Report], str]] = {  # (this preset's report, the default's) -> cell
    "forget leak": lambda report, _: percent(report["forget_leak_after"]),
    "forgotten, of the default's": lambda report, default: of_the_defaults(report, default),
    "forget ROUGE-L": lambda report, _: three(report["forget_rouge_after"]),
    "unseen ROUGE-L": lambda report, _: three(report["unseen_rouge"]),
    "retain leak": lambda report, _: percent(report["retain_leak_after"]),
    "retain NLL": lambda report, _: f"{report['retain_nll_before']:.3f} → {report['retain_nll_after']:.3f}",
    "degenerate": lambda report, _: percent(report["degenerate_share"]),
    "seconds": lambda report, _: f"{report['seconds']:.0f}",
    "of these, the base": lambda report, _: f"{report['base_trained_seconds']:.0f}",
}


def of_the_defaults(report: Report, default: Report) -> str:
    """How much of what the default preset forgets this one forgets."""
    forgotten, by_default = (1 - each["forget_leak_after"] for each in (report, default))
    return percent(forgotten / by_default) if by_default > 0 else "the default forgot nothing"


def missed(report: Report) -> list[str]:
    """The acceptance figures that this report misses, one line each."""
    return [
        f"{criterion.name}: {criterion.shown(report)}, must be {criterion.bound()}"
        for criterion in ACCEPTANCE
        if not criterion.met(report)
    ]


def markdown(results: Mapping[str, Any], planned: Iterable[Run]) -> str:
    """Both tables; a planned run without a record says that it was not measured, a failed one its error."""
    records = {(record["preset"], record["seed"]): record for record in results["runs"]}
    runs = list(dict.fromkeys([*planned, *records]))
    seeds = sorted(seed for preset, seed in runs if preset == DEFAULT_PRESET)
    first_seed = [preset for preset, seed in runs if seed == 0]
    machine, versions = results["machine"], results["versions"]
    commits = sorted({record["commit"] or "no git" for record in records.values()})
    lines = [
        f"# `fastforget demo`, measured {results['date']}",
        "",
        f"{machine['cpu']}, {machine['cores']} cores, torch threads {machine['torch_threads']}, "
        f"device {machine['device']}; "
        + ", ".join(f"{name} {version}" for name, version in versions.items())
        + f"; commit {', '.join(commits) or 'none yet'}.",
        "Written by `python -m benchmarks.proof`; every figure is in the JSON file of the same name.",
        "",
        f"## The default preset, {DEFAULT_PRESET}",
        "",
        *table(["figure", "must be", *(f"seed {seed}" for seed in seeds)], seed_rows(records, seeds)),
        "",
        "## The presets, seed 0, after unlearning",
        "",
        PRESETS_NOTE,
        "",
        *table(["preset", *PRESET_COLUMNS], preset_rows(records, first_seed)),
    ]
    return "\n".join(lines) + "\n"


def seed_rows(records: Mapping[Run, Mapping[str, Any]], seeds: Sequence[int]) -> list[list[str]]:
    """A row for each acceptance figure, a cell for each seed; what was missed is bold."""

    def cell(criterion: Criterion, seed: int) -> str:
        record = records.get((DEFAULT_PRESET, seed))
        if record is None:
            return NOT_MEASURED
        if record["report"] is None:
            return "failed"
        value = criterion.shown(record["report"])
        return f"{value}, met" if criterion.met(record["report"]) else f"**{value}, missed**"

    rows = [[criterion.name, criterion.bound(), *(cell(criterion, seed) for seed in seeds)] for criterion in ACCEPTANCE]
    failures = {seed: (records.get((DEFAULT_PRESET, seed)) or {}).get("error") for seed in seeds}
    if any(failures.values()):
        rows.append(["error", "none", *(plain(failures[seed] or "none") for seed in seeds)])
    return rows


def preset_rows(records: Mapping[Run, Mapping[str, Any]], presets: Sequence[str]) -> list[list[str]]:
    """A row for each preset; a run that failed has its error line in place of figures."""
    rows = []
    default = (records.get((DEFAULT_PRESET, 0)) or {}).get("report") or {}
    for preset in presets:
        record = records.get((preset, 0))
        if record is None:
            cells = [NOT_MEASURED] * len(PRESET_COLUMNS)
        elif record["report"] is None:
            cells = [plain(f"failed: {record['error']}"), *[""] * (len(PRESET_COLUMNS) - 1)]
        else:
            cells = [shown(column, record["report"], default) for column in PRESET_COLUMNS.values()]
        rows.append([f"`{plain(preset)}`", *cells])
    return rows


def shown(column: Callable[[Report, Report], str], report: Report, default: Report) -> str:
    """The cell; "not measured" where a report lacks the figure."""
    try:
        return column(report, default)
    except (KeyError, TypeError, ValueError):
        return NOT_MEASURED


def plain(text: str) -> str:
    """Text that ends no table cell."""
    return " ".join(text.replace("|", "/").split())


def table(headings: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """The lines of a Markdown table."""
    return [f"| {' | '.join(cells)} |" for cells in (headings, ["---"] * len(headings), *rows)]
