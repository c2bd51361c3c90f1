"""Write every benchmark's results as Markdown: a row is a setting, with the records of its contestants.

A row: {"name", "contestants": {name: record}, "ours": the name that others are divided by, "goals", "notes"}. A record:
{"status", "about", "role"}, and where it was measured "median_ms", "peak_mb", errors, "flags" (what is wrong with it),
"floor" (the name that it is divided by) and "figures" ({heading: text}, columns of its own).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

Row = Mapping[str, Any]

MEASURED, NOT_MEASURED = "measured", "not measured"
DRY = "**A dry run: it shows that everything runs, and holds no figure of speed.**"


def markdown(results: Mapping[str, Any]) -> str:
    """Write a whole results file: where it was measured, and a section for each row."""
    machine = "; ".join(f"{name} {finding}" for name, finding in results["machine"].items())
    parts = [
        f"# {results['title']}, {results['date']}",
        f"{machine}; commit {results['commit'] or 'unknown'}.",
        *results["about"],
        *([DRY] if results["dry_run"] else []),
        *(section(row) for row in results["rows"]),
    ]
    return "\n\n".join(parts) + "\n"


def section(row: Row) -> str:
    """Write a row: its contestants, then its notes and goals."""
    lines = [f"* {line}" for line in (*row.get("notes", ()), *map(goal_line, row["goals"]))]
    parts = [f"## {plain(row['name'])}", "\n".join(contestants(row)), "\n".join(lines)]
    return "\n\n".join(part for part in parts if part)


def contestants(row: Row) -> list[str]:
    """Write the table of a row's contestants, without the columns in which nobody has anything."""
    records, forms = row["contestants"], {"extra MB": ("peak_mb", "{:.0f}"), "value error": ("value_error", "{:.1e}")}
    forms |= {"gradient error": ("gradient_error", "{:.1e}"), "worst row": ("worst_row", "{:.1e}")}
    lines = []
    for name, record in records.items():
        cells = {"contestant": f"`{name}`", "": record.get("about", "")}
        cells["status"] = "" if record["status"] == MEASURED else record["status"]
        cells["ms"] = figure(record.get("median_ms"), "{:.2f}")
        cells["× floor"] = figure(ratio(row, name, record.get("floor")), "{:.2f}")
        cells["× ours"] = figure(ratio(row, name, row.get("ours")), "{:.2f}")
        cells |= {heading: figure(record.get(key), form) for heading, (key, form) in forms.items()}
        cells["wrong"] = f"**{'; '.join(record['flags'])}**" if record.get("flags") else ""
        lines.append(cells | record.get("figures", {}))
    headings = dict.fromkeys(heading for cells in lines for heading in cells)
    shown = [heading for heading in headings if any(cells.get(heading) for cells in lines)]
    return table(shown, [[plain(cells.get(heading, "")) for heading in shown] for cells in lines])


def fastest(row: Row, role: str, names: Iterable[str] | None = None) -> str | None:
    """Return who of a role, or of `names` alone, has the smallest median; None where nobody was timed."""
    records = {name: record for name, record in row["contestants"].items() if names is None or name in names}
    times = {name: each["median_ms"] for name, each in records.items() if each["role"] == role and "median_ms" in each}
    return min(times, key=lambda name: times[name], default=None)


def ratio(row: Row, name: str | None, over: str | None) -> float | None:
    """Divide two medians; None where one of them was not measured."""
    upper, lower = (row["contestants"].get(each, {}).get("median_ms") for each in (name, over))
    return None if upper is None or not lower else upper / lower


def goal(name: str, value: float | None, relation: str, limit: float) -> dict[str, Any]:
    """State what was asked, "≤" or "≥" a limit, and whether it was met; None where it was not measured."""
    met = None if value is None else value <= limit if relation == "≤" else value >= limit
    return {"goal": name, "value": value, "relation": relation, "limit": limit, "met": met}


def goal_line(goal: Mapping[str, Any]) -> str:
    """Write a goal, and whether it was met."""
    value = NOT_MEASURED if goal["value"] is None else f"{goal['value']:.3f}"
    verdict = {None: "", True: ", met", False: ", **missed**"}[goal["met"]]
    return f"{goal['goal']}: {value}, asked {goal['relation']} {goal['limit']:.3f}{verdict}"


def figure(value: float | None, form: str) -> str:
    """Write a number that may be missing."""
    return "" if value is None else form.format(value)


def plain(text: str) -> str:
    """Make a text that ends no table cell."""
    return " ".join(text.replace("|", "/").split())


def table(headings: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """Write the lines of a Markdown table."""
    return [f"| {' | '.join(cells)} |" for cells in (headings, ["---"] * len(headings), *rows)]


def replace_block(text: str, begin: str, end: str, block: str) -> str:
    """Replace what stands between two marker lines.

    Raises:
        ValueError: the text does not have each marker once, in this order.
    """
    before, found, rest = text.partition(f"{begin}\n")
    _, closed, after = rest.partition(end)
    if not found or not closed or begin in rest or end in after or end in before:
        raise ValueError(f"the file needs these two lines, once, and gets the table between them: {begin} and {end}")
    return f"{before}{begin}\n{block}\n{end}{after}"
