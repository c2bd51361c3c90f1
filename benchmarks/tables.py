"""Write every benchmark's results as Markdown: a row is a setting, with the records of its contestants.

A row: {"name", "contestants": {name: record}, "ours": the name that others are divided by, "goals", "notes"}. A record:
{"status", "about", "role"}, and where it was measured "median_ms", "peak_mb", errors, "flags" (what is wrong with it),
"floor" (the name that it is divided by) and "figures" ({heading: text}, columns of its own).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

Row = Mapping[str, Any]
Record = Mapping[str, Any]

MEASURED, NOT_MEASURED = "measured", "not measured"
DRY = "**A dry run: it shows that everything runs, and holds no figure of speed.**"


def markdown(results: Mapping[str, Any]) -> str:
    """Write a whole results file: where it was measured, and a section for each row."""
    machine = results["machine"]
    parts = [
        f"# {results['title']}, {results['date']}",
        f"{machine['device']}; {machine['cpu']} ({machine['instruction_sets']}), {machine['cores']} cores, "
        f"{machine['torch_threads']} torch threads; commit {results['commit'] or 'unknown'}.",
        ", ".join(f"{name} {version}" for name, version in results["versions"].items()) + ".",
        *results["about"],
        *([DRY] if results["dry_run"] else []),
        *(section(row) for row in results["rows"]),
    ]
    return "\n\n".join(parts) + "\n"


def section(row: Row, level: str = "##") -> str:
    """Write a row: its contestants, then its notes and goals."""
    lines = [f"* {line}" for line in (*row.get("notes", ()), *map(goal_line, row["goals"]))]
    return "\n\n".join(
        [f"{level} {plain(row['name'])}", "\n".join(contestants(row)), *(["\n".join(lines)] if lines else [])]
    )


def contestants(row: Row) -> list[str]:
    """Write the table of a row's contestants, without the columns in which nobody has anything."""
    records = row["contestants"]
    own = dict.fromkeys(heading for record in records.values() for heading in record.get("figures", ()))
    columns: dict[str, Callable[[str, Record], str]] = {
        "": lambda name, record: record.get("about", ""),
        "status": lambda name, record: "" if record["status"] == MEASURED else record["status"],
        "ms": lambda name, record: figure(record.get("median_ms"), "{:.2f}"),
        "× floor": lambda name, record: figure(ratio(row, name, record.get("floor")), "{:.2f}"),
        f"× {row.get('ours')}": lambda name, record: figure(ratio(row, name, row.get("ours")), "{:.2f}"),
        "extra MB": lambda name, record: figure(record.get("peak_mb"), "{:.0f}"),
        "value error": lambda name, record: figure(record.get("value_error"), "{:.1e}"),
        "gradient error": lambda name, record: figure(record.get("gradient_error"), "{:.1e}"),
        "worst row": lambda name, record: figure(record.get("worst_row"), "{:.1e}"),
        "wrong": lambda name, record: f"**{'; '.join(record['flags'])}**" if record.get("flags") else "",
    }
    columns |= {
        heading: lambda name, record, heading=heading: record.get("figures", {}).get(heading, "") for heading in own
    }
    cells = {heading: [plain(cell(*item)) for item in records.items()] for heading, cell in columns.items()}
    shown = {heading: values for heading, values in cells.items() if any(values)}
    return table(["contestant", *shown], zip([f"`{plain(name)}`" for name in records], *shown.values(), strict=True))


def fastest(row: Row, role: str, names: Iterable[str] | None = None) -> str | None:
    """Return who of a role, or of `names` alone, has the smallest median; None where nobody was timed."""
    records = row["contestants"]
    chosen = [name for name in (records if names is None else names) if records.get(name, {}).get("role") == role]
    times = {name: time for name in chosen if (time := time_of(row, name)) is not None}
    return min(times, key=lambda name: times[name], default=None)


def time_of(row: Row, name: str | None) -> float | None:
    """Return a contestant's median in ms."""
    return row["contestants"].get(name, {}).get("median_ms")


def ratio(row: Row, name: str | None, over: str | None) -> float | None:
    """Divide two medians; None where one of them was not measured."""
    upper, lower = time_of(row, name), time_of(row, over)
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


def figure(value: float | None, form: str, without: str = "") -> str:
    """Write a number that may be missing."""
    return without if value is None else form.format(value)


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
