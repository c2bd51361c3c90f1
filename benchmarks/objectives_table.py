"""What the presets' benchmark found, as Markdown tables; the rules by which a job and a step are judged."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

from benchmarks.demo_table import NOT_MEASURED, percent, plain, table, three
from benchmarks.head_measure import MEASURED
from benchmarks.objectives_measure import NOT_FINITE, StepSize
from fastforget.backends.tiling import CPU_BYTES

Record = Mapping[str, Any]

COLLAPSE_NLL = 1.0  # nats per token that the retain NLL rises by
KEPT_NLL, KEPT_LEAK = 0.1, 0.9  # the rest is kept: rise of its NLL at most; share of its leak before that is left
FORGOTTEN_LEAK = 0.5  # share of the forget leak before that may be left
ACTS_NLL = 0.1  # nats per token that the forget NLL rises by, where something is forgotten
MEMORY_LIMIT = 1.3  # times the peak of BASELINE's step
BASELINE = "grad_diff"
KNOWN_TO_COLLAPSE = ("grad_ascent",)  # nothing bounds its loss, and nothing keeps the rest
COLLAPSES = "collapses"

RULE = (
    f"The verdict: `{COLLAPSES}` where the retain NLL rises by more than {COLLAPSE_NLL:g} nats a token; else `forgets` "
    f"where at most {percent(FORGOTTEN_LEAK)} of the forget leak is left, and `keeps the rest` where the retain NLL "
    f"rises by at most {KEPT_NLL:g} and at least {percent(KEPT_LEAK)} of the retain leak is left; else `forgets in "
    f"part` where the forget NLL rises by at least {ACTS_NLL:g}; else `does not act`. Known to collapse: "
    f"{', '.join(f'`{name}`' for name in KNOWN_TO_COLLAPSE)}."
)
CONVERGENCE_COLUMNS = ("preset", "verdict", "forget NLL", "forget leak", "retain NLL", "retain leak", "degenerate")
CONVERGENCE_HEADINGS = (*CONVERGENCE_COLUMNS, "NaN", "seconds of unlearning")
MEMORY_HEADINGS = (
    "preset",
    "companions it looks at",
    "peak MB beyond the loaded model",
    "of these, in this step",
    f"× {BASELINE}",
    f"asked ≤ {MEMORY_LIMIT:g}",
)


def verdict(report: Record) -> str:
    """What a job did, in a word or two, by RULE."""
    figures = {name: value for name, value in report.items() if name.endswith(("_before", "_after"))}
    if not all(math.isfinite(value) for value in figures.values()):
        return "NaN"
    rise = {side: report[f"{side}_nll_after"] - report[f"{side}_nll_before"] for side in ("forget", "retain")}
    left = {side: leak_left(report, side) for side in ("forget", "retain")}
    if rise["retain"] > COLLAPSE_NLL:
        return COLLAPSES
    if left["forget"] <= FORGOTTEN_LEAK:
        kept = rise["retain"] <= KEPT_NLL and left["retain"] >= KEPT_LEAK
        return "forgets, keeps the rest" if kept else "forgets"
    return "forgets in part" if rise["forget"] >= ACTS_NLL else "does not act"


def leak_left(report: Record, side: str) -> float:
    """The share of a side's leak that is left; 1 where nothing leaked before."""
    before = report[f"{side}_leak_before"]
    return report[f"{side}_leak_after"] / before if before > 0 else 1.0


def ratio(rows: Mapping[str, Record], preset: str) -> float | None:
    """Peak of a preset's step over BASELINE's; None where one of them was not measured."""
    peaks = [rows.get(name, {}).get("peak_mb") for name in (preset, BASELINE)]
    return peaks[0] / peaks[1] if peaks[0] is not None and peaks[1] else None


def why(record: Record) -> str:
    """The companions that a preset's terms look at, and whether two answers go through one forward."""
    found = plain(", ".join(record["companions"]))
    return f"{found}; two answers together" if record["together"] else found


def problems_of(suite: str, rows: Mapping[str, Record]) -> list[str]:
    """What is not as it was asked for, a line each."""
    found = []
    for preset, record in rows.items():
        where = f"{suite}, {preset}"
        if record["status"] != MEASURED:
            found.append(f"{where}: {record['status']}")
        elif suite == "convergence":
            word = verdict(record["report"])
            if word == "NaN" or (preset in KNOWN_TO_COLLAPSE and word != COLLAPSES):
                found.append(f"{where}: {word}")
        else:
            value = ratio(rows, preset)
            if value is None or value > MEMORY_LIMIT:
                shown = NOT_MEASURED if value is None else f"{value:.2f}"
                reason = f" ({why(record)})" if why(record) else ""
                found.append(f"{where}: peak / {BASELINE}'s {shown}, asked ≤ {MEMORY_LIMIT:g}{reason}")
    return found


def convergence_cells(preset: str, record: Record | None) -> list[str]:
    """A job's line."""
    rest = len(CONVERGENCE_HEADINGS) - 2
    if record is None:
        return [f"`{plain(preset)}`", NOT_MEASURED, *[""] * rest]
    if record["status"] != MEASURED:
        cells = [""] * rest
        cells[-2] = "yes" if record["status"].startswith(NOT_FINITE) else ""
        return [f"`{plain(preset)}`", plain(record["status"]), *cells]
    report = record["report"]
    word = verdict(report)
    moves = [
        f"{show(report[f'{side}_{figure}_before'])} → {show(report[f'{side}_{figure}_after'])}"
        for side in ("forget", "retain")
        for figure, show in (("nll", three), ("leak", percent))
    ]
    nan = "yes" if word == "NaN" else "no"
    seconds = f"{report['unlearn_seconds']:.0f}"
    return [f"`{plain(preset)}`", word, *moves, percent(report["degenerate_share"]), nan, seconds]


def memory_cells(preset: str, rows: Mapping[str, Record]) -> list[str]:
    """A step's line."""
    record = rows.get(preset)
    status = NOT_MEASURED if record is None else record["status"]
    if record is None or status != MEASURED:
        return [f"`{plain(preset)}`", plain(status), *[""] * (len(MEMORY_HEADINGS) - 2)]
    value = ratio(rows, preset)
    met = NOT_MEASURED if value is None else "met" if value <= MEMORY_LIMIT else "**missed**"
    figures = [f"{record['peak_mb']:.0f}", f"{record['rise_mb']:.0f}", "" if value is None else f"{value:.2f}", met]
    return [f"`{plain(preset)}`", why(record), *figures]


def markdown(results: Record, planned: Mapping[str, Iterable[str]], notes: Iterable[str] = ()) -> str:
    """Both tables; a planned row without a record says that it was not measured.

    Args:
        planned: the presets of each suite, in the order of the rows.
        notes: sentences on presets that ran with other options than their defaults.
    """
    machine, rows = results["machine"], {suite: rows_of(results, suite) for suite in ("convergence", "memory")}
    order = {suite: list(dict.fromkeys([*planned.get(suite, ()), *rows[suite]])) for suite in rows}
    commits = sorted({row["commit"] or "no git" for row in results["rows"]})
    size, sets = StepSize(**results["step"]) if results["step"] else None, results["sets"]
    lines = [
        f"# Every preset, measured {results['date']}",
        "",
        f"{machine['cpu']}, {machine['cores']} cores, torch threads {machine['torch_threads']}, device "
        f"{machine['device']}; {', '.join(f'{name} {version}' for name, version in results['versions'].items())}; "
        f"commit {', '.join(commits) or 'none yet'}.",
        "Written by `python -m benchmarks.objectives`; every figure is in the JSON file of the same name.",
        *notes,
    ]
    if order["convergence"]:
        lines += ["", "## What a job does to a small memorised set", "", *about_sets(sets), RULE, ""]
        cells = [convergence_cells(preset, rows["convergence"].get(preset)) for preset in order["convergence"]]
        lines += table(CONVERGENCE_HEADINGS, cells)
    if order["memory"]:
        lines += ["", "## Peak memory of a step", "", *about_step(size), ""]
        lines += table(MEMORY_HEADINGS, [memory_cells(preset, rows["memory"]) for preset in order["memory"]])
    return "\n".join(lines) + "\n"


def rows_of(results: Record, suite: str) -> dict[str, Record]:
    """A suite's rows by preset."""
    return {row["preset"]: row for row in results["rows"] if row["suite"] == suite}


def about_sets(sets: Record | None) -> list[str]:
    """What the jobs unlearned from which model."""
    if not sets:
        return []
    return [
        f"`fastforget.unlearn` with its defaults, {sets['steps']} steps, seed 0, on one thread: an OPT of "
        f"{sets['parameters'] / 1e6:.1f} M parameters has learned the answers of {sets['forget_rows']} prompts to "
        f"forget and {sets['retain_rows']} to keep by heart, and forgets the first. NLL in nats per label token, "
        f"before → after; of {sets['unseen_rows']} answers that it never saw it is {sets['unseen_nll']:.2f}.",
    ]


def about_step(size: StepSize | None) -> list[str]:
    """Which step was measured."""
    if size is None:
        return []
    return [
        f"A Llama of {size.layers} layers, D {size.hidden_size}, V {size.vocabulary:,}, float32; N = "
        f"{size.label_tokens:,} label tokens on each side and in each companion. The second step, with the reference "
        "cached, in a process of its own. Logits of one side alone would be "
        f"{4 * size.label_tokens * size.vocabulary / 1e6:,.0f} MB. Answers that a term compares share one graph, so "
        "their rows go through the model together, half of them at a time. "
        f"Tiles of logits take {CPU_BYTES / 1e6:.0f} MB.",
    ]
