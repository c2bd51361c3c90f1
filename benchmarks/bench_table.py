"""`make bench`'s results as Markdown: the dated table, and the README's, which goes between two markers."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.demo_table import NOT_MEASURED, plain, table
from benchmarks.head_table import figure, ratio
from benchmarks.head_table import goal_line as head_goal_line
from benchmarks.peers import CONTESTANTS
from benchmarks.step_loops import LOOPS
from benchmarks.step_table import check_line, goal_line, title

BEGIN, END = "<!-- bench: begin, written by python -m benchmarks.bench --readme -->", "<!-- bench: end -->"
TIMED = ("", "", "ms", "× ours", "extra MB")


def markdown(results: Mapping[str, Any]) -> str:
    """All of it."""
    machine = results["machine"]
    form = "" if results["full"] else ", short form"
    about = [
        f"# Benchmarks on the CPU{form}, {results['date']}",
        f"{machine['cpu']}, {machine['cores']} cores, {machine['torch_threads']} torch threads; commit "
        f"{results['commit'] or 'unknown'}.",
        ", ".join(f"{name} {version}" for name, version in results["versions"].items()) + ".",
        "Written by `python -m benchmarks.bench`; every figure is in the JSON file of the same name.",
    ]
    parts = ["\n\n".join(about)]
    for name, part in results["parts"].items():
        parts.append(f"## {TITLES[name]}")
        if part["status"] != "measured":
            parts.append(plain(part["status"]))
        if "results" in part:
            parts.append(SECTIONS[name](part["results"]))
    return "\n\n".join(parts) + "\n"


def head_section(results: Mapping[str, Any]) -> str:
    """A table for each setting."""
    found = []
    for row in results["rows"]:
        about = {name: CONTESTANTS[name].about for name in row["contestants"] if name in CONTESTANTS}
        found += [f"{plain(row['name'])}:", timed_table(row, about, "ours")]
        found += ["\n".join(f"* {head_goal_line(goal)}" for goal in row["goals"])] if row["goals"] else []
    return "\n\n".join(found)


def step_section(results: Mapping[str, Any]) -> str:
    """A table for each method, and what of the goals was reached."""
    found = []
    for row in results["rows"]:
        about = {name: LOOPS[name].about for name in row["contestants"] if name in LOOPS}
        lines = [check_line(row["check"]), *map(goal_line, row["goals"])]
        found += [f"{title(row)}:", timed_table(row, about, "ours_later")]
        found.append("\n".join(f"* {line}" for line in lines))
    return "\n\n".join(found)


def timed_table(row: Mapping[str, Any], about: Mapping[str, str], ours: str) -> str:
    """Contestants with their medians and peaks."""
    rows = []
    for name, record in row["contestants"].items():
        time = figure(record.get("median_ms"), "{:.0f}", plain(record["status"]))
        times = figure(ratio(row, name, ours), "{:.2f}", "")
        rows.append([f"`{name}`", about.get(name, ""), time, times, figure(record.get("peak_mb"), "{:.0f}", "")])
    return "\n".join(table(TIMED, rows))


def scaling_section(results: Mapping[str, Any]) -> str:
    """A line for each shape."""
    rows = []
    for row in results["rows"]:
        point, records = row["point"], row["contestants"]
        cells = [str(point[name]) for name in ("tokens", "vocabulary", "hidden")]
        for name in ("ours", "eager"):
            record = records.get(name, {})
            cells += [figure(record.get("median_ms"), "{:.0f}"), figure(record.get("peak_mb"), "{:.0f}")]
        rows.append(cells)
    headings = ("N", "V", "D", "ours, ms", "ours, extra MB", "eager, ms", "eager, extra MB")
    lines = [f"* {goal_line(goal)}" for goal in results["goals"]]
    return "\n".join(table(headings, rows)) + "\n\n" + "\n".join(lines)


def rows_section(results: Mapping[str, Any]) -> str:
    """A line for each tile pass."""
    rows = [
        [
            f"`{plain(row['name'].removeprefix('test_'))}`",
            f"{row['median_ms']:.1f}",
            figure(row.get("nanoseconds_per_element"), "{:.3f}"),
            figure(row.get("gigabytes_per_second"), "{:.1f}"),
            figure(None if row.get("share_of_copy") is None else 100 * row["share_of_copy"], "{:.0f} %"),
        ]
        for row in results["benchmarks"]
    ]
    return "\n".join(table(("pass", "ms", "ns an element", "GB/s", "of a copy's GB/s"), rows))


TITLES = {
    "head": "The head",
    "losses": "Other losses over the head",
    "step": "Training steps",
    "scaling": "Scaling",
    "rows": "Tile passes",
}
SECTIONS = {
    "head": head_section,
    "losses": head_section,
    "step": step_section,
    "scaling": scaling_section,
    "rows": rows_section,
}


def readme_block(results: Mapping[str, Any], stem: str) -> str:
    """The README's table: ours and peers of the head and of training steps, and where the rest is."""
    machine = results["machine"]
    lines = [
        f"{results['date']}, {machine['cpu']}, {machine['torch_threads']} torch threads, commit "
        f"{results['commit'] or 'unknown'}: [tables](benchmarks/results/{stem}.md), "
        f"[every figure](benchmarks/results/{stem}.json), [plot](benchmarks/results/{stem}.png).",
    ]
    for name, ours in (("head", "ours"), ("losses", "ours"), ("step", "ours_later")):
        rows = measured_rows(results, name)
        if rows:
            lines += ["", *table((TITLES[name].lower(), "", "ms", "× ours", "extra MB"), readme_rows(rows, ours))]
    return "\n".join(lines)


def measured_rows(results: Mapping[str, Any], name: str) -> Sequence[Mapping[str, Any]]:
    """A part's rows; none where it failed."""
    rows: Sequence[Mapping[str, Any]] = results["parts"].get(name, {}).get("results", {}).get("rows", [])
    return rows


def readme_rows(rows: Sequence[Mapping[str, Any]], ours: str) -> list[list[str]]:
    """Those that have a figure, each under its setting."""
    found = []
    for row in rows:
        setting = plain(row["name"])
        for name, record in row["contestants"].items():
            if "median_ms" not in record:
                continue
            kind: Any = CONTESTANTS.get(name) or LOOPS.get(name)
            cells = [figure(record["median_ms"], "{:.0f}"), figure(ratio(row, name, ours), "{:.2f}", NOT_MEASURED)]
            about = f"`{name}`" if kind is None else kind.about
            found.append([setting, about, *cells, figure(record.get("peak_mb"), "{:.0f}", "")])
            setting = ""
    return found


def with_block(text: str, block: str) -> str:
    """A text with what stands between the markers replaced.

    Raises:
        ValueError: the text does not have both markers, once and in order.
    """
    pattern = re.compile(rf"{re.escape(BEGIN)}\n.*?{re.escape(END)}", re.DOTALL)
    if len(pattern.findall(text)) != 1:
        raise ValueError(f"the README needs these two lines, once, and gets the table between them: {BEGIN} and {END}")
    return pattern.sub(lambda _: f"{BEGIN}\n{block}\n{END}", text)
