"""The before/after report: a table and side-by-side continuations for people, a JSON file for programs."""

from __future__ import annotations

import json
import math
import resource
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from fastforget.errors import NonFiniteLossError
from fastforget.evaluate.leakage import LeakageReport
from fastforget.files import written_whole

Reports = Mapping[str, LeakageReport]  # set name ("forget", "retain", "unseen") -> report


def figures(before: Reports, after: Reports) -> dict[str, Any]:
    """Collect the figures of report.json: shares and ROUGE-L from 0 to 1, NLL and fluency in nats per token."""
    values: dict[str, Any] = {}
    for name in before:
        values[f"{name}_passages"] = len(before[name].continuations)
        for when, reports in (("before", before), ("after", after)):
            values |= {f"{name}_{figure}_{when}": value for figure, value in set_figures(reports[name]).items()}
    values["degenerate_share"] = after["forget"].degenerate_share
    if "unseen" in after:
        values["unseen_rouge"] = after["unseen"].rouge
        values["unseen_memorisation"] = after["unseen"].memorised.exact
        values["unseen_extraction"] = after["unseen"].memorised.extraction
    return values


def set_figures(report: LeakageReport) -> dict[str, Any]:
    """Return the figures of one set by the names that report.json and the tables give them."""
    memorised = report.memorised
    return {
        "leak": report.leak,
        "rouge": report.rouge,
        "nll": report.nll,
        "memorisation": memorised.exact,
        "extraction": memorised.extraction,
        "probability": memorised.probability,
        "lens": memorised.lens,
        "degenerate": report.degenerate_share,
        "blank": report.blank_share,
        "distinct_2": report.distinct_2,
        "fluency": report.fluency,
    }


def peak_rss_mb() -> float:
    """Return the peak resident memory of this process so far, in MB (10^6 bytes)."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak * (1 if sys.platform == "darwin" else 1024) / 1e6


def write_json(path: Path, values: Mapping[str, Any]) -> dict[str, Any]:
    """Write the report as strict JSON, whole or not at all. Returns what it holds: None for what is not a number."""
    report: dict[str, Any] = strict(values)
    with written_whole(path) as scratch:
        scratch.write_text(json.dumps(report, indent=2, allow_nan=False) + "\n", encoding="utf-8")
    return report


def strict(value: Any) -> Any:
    """Return the value with None for NaN and infinities, which JSON does not have."""
    if isinstance(value, Mapping):
        return {name: strict(part) for name, part in value.items()}
    if isinstance(value, list | tuple):
        return [strict(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def check_measured(reports: Reports, what_to_do: str) -> None:
    """Raise where a measured NLL is no finite number: a broken model recites nothing, and that is no success.

    Raises:
        NonFiniteLossError: it names the set, and says `what_to_do`.
    """
    for name, report in reports.items():
        if not math.isfinite(report.nll):
            raise NonFiniteLossError(f"the model's NLL on the {name} passages is {report.nll}: {what_to_do}")


MEASURES = {  # that both models have, as tables call them: the figure in report.json, and its format
    "leak": ("leak", ".0%"),
    "ROUGE-L": ("rouge", ".2f"),
    "exact memorisation": ("memorisation", ".2f"),
    "extraction strength": ("extraction", ".2f"),
    "probability": ("probability", ".3g"),
    "NLL (nats/token)": ("nll", ".3f"),
    "degenerate": ("degenerate", ".0%"),
    "fluency (nats/token)": ("fluency", ".2f"),
}


def print_table(console: Console, before: Reports, after: Reports) -> None:
    """Print what is still known of each set, and how its continuations read, before and after, in 80 columns."""
    table = Table(title="What the model still knows", title_justify="left")
    table.add_column("measure", no_wrap=True)
    for name, first in before.items():
        table.add_column(f"{name} ({len(first.continuations)})", justify="right", no_wrap=True)
    pairs = [(set_figures(first), set_figures(after[name])) for name, first in before.items()]
    for measure, (figure, style) in MEASURES.items():
        cells = (
            " → ".join("-" if each[figure] is None else format(each[figure], style) for each in pair) for pair in pairs
        )
        table.add_row(measure, *cells)
    console.print(table)


def print_continuations(console: Console, before: Reports, after: Reports, each: Mapping[str, int]) -> None:
    """Print continuations side by side: the true text, the model before, the model after."""
    table = Table(title="Continuations of the same prompts", title_justify="left", show_lines=True)
    for heading in ("set", "prompt ends", "before", "after"):
        table.add_column(heading, overflow="fold")
    for name, count in each.items():
        pairs = zip(before[name].continuations, after[name].continuations, strict=True)
        for first, last in list(pairs)[:count]:
            cells = (first.prompt[-60:], first.output, last.output)
            table.add_row(name, *(Text(" ".join(cell.split())) for cell in cells))
    console.print(table)


def print_figures(console: Console, title: str, before: Mapping[str, Any], after: Mapping[str, Any]) -> None:
    """Print a suite's figures of the untouched and the unlearned model, and why one is missing."""
    table = Table(title=title, title_justify="left")
    for heading in ("figure", "untouched", "unlearned"):
        table.add_column(heading, justify="left" if heading == "figure" else "right", overflow="fold")
    for name, value in after.items():
        if not name.endswith("_reason"):
            reasons = (str(each.get(f"{name}_reason") or "-") for each in (before, after))
            pair = (before.get(name), value)
            cells = (reason if each is None else f"{each:.3g}" for each, reason in zip(pair, reasons, strict=True))
            table.add_row(name.replace("_", " "), *(Text(cell) for cell in cells))
    console.print(table)
