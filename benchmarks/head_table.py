"""The head's benchmark as Markdown tables, from its JSON, and what of the goals was reached."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.demo_table import NOT_MEASURED, plain, table
from benchmarks.peers import CONTESTANTS

Row = Mapping[str, Any]  # a setting, and its contestants' records

COLUMNS = ("contestant", "", "ms", "× floor", "× ours", "extra MB", "value error", "gradient error", "worst row")
WITHIN_MEMORY = ("floor", "floor_tiled", "floor_together")
DRY = "**A dry run: it shows that everything runs, and holds no figure of speed.**"


def markdown(results: Mapping[str, Any]) -> str:
    """All tables of a results file."""
    machine, versions = results["machine"], results["versions"]
    about = [
        f"# The head, {results['date']}",
        f"{machine['device']}; {machine['cpu']}, {machine['torch_threads']} threads; commit {results['commit']}.",
        ", ".join(f"{name} {version}" for name, version in versions.items()) + ".",
        "Forward and backward with respect to the hidden states, frozen head; medians of runs in turn. Extra MB: peak "
        "memory beyond the inputs. Errors are against float64: of the loss, of the gradient of a sample of rows "
        "(‖error‖ / ‖gradient‖), and of the worst of them. **Bold**: too far from float64.",
    ]
    if results["dry_run"]:
        about.insert(1, DRY)
    parts = ["\n\n".join(about)]
    parts += [] if results["dry_run"] else [overview(results["rows"])]
    for row in results["rows"]:
        lines = table(COLUMNS, [cells(name, row) for name in row["contestants"]])
        parts += [f"## {plain(row['name'])}", "\n".join(lines)]
        reached = [f"* {goal_line(goal)}" for goal in row["goals"]]
        parts += ["\n".join(reached)] if reached else []
    return "\n\n".join(parts) + "\n"


def overview(rows: Sequence[Row]) -> str:
    """A table with a line for each setting."""
    lines = []
    for row in rows:
        peer = fastest(row, "peer")
        lines.append(
            [
                plain(row["name"]),
                figure(time_of(row, "ours"), "{:.2f}"),
                figure(ratio(row, "ours", fastest(row, "floor")), "{:.2f}"),
                peer or NOT_MEASURED,
                figure(ratio(row, peer, "ours"), "{:.2f}"),
            ]
        )
    return "\n".join(table(("", "ours, ms", "× floor", "fastest peer", "× ours"), lines))


def cells(name: str, row: Row) -> list[str]:
    """A contestant's line of a setting's table."""
    record = row["contestants"][name]
    about = CONTESTANTS[name].about if name in CONTESTANTS else ""
    first = [f"`{name}`", plain(about)]
    flags = record.get("flags")
    if "median_ms" not in record and flags is None:
        return [*first, plain(record["status"]), *[""] * (len(COLUMNS) - 3)]
    errors = [figure(record.get(key), "{:.1e}", "") for key in ("value_error", "gradient_error", "worst_row")]
    if flags:  # a floor has none: it has no answer
        errors[0] = f"**{errors[0]}**" if "value" in flags else errors[0]
        others = [flag for flag in flags if flag not in ("value", "gradient")]
        errors[1] = f"**{'; '.join([errors[1], *others])}**" if flags != ["value"] else errors[1]
    known = name in CONTESTANTS and CONTESTANTS[name].known
    return [
        *first,
        figure(record.get("median_ms"), "{:.2f}", plain(record["status"])),
        figure(ratio(row, name, fastest(row, "floor", known)), "{:.2f}", ""),
        figure(ratio(row, name, "ours"), "{:.2f}", ""),
        figure(record.get("peak_mb"), "{:.0f}"),
        *errors,
    ]


def time_of(row: Row, name: str | None) -> float | None:
    """A contestant's median."""
    return row["contestants"].get(name, {}).get("median_ms")


def ratio(row: Row, name: str | None, over: str | None) -> float | None:
    """Of two medians."""
    upper, lower = time_of(row, name), time_of(row, over)
    return None if upper is None or not lower else upper / lower


def fastest(row: Row, role: str, known: bool = False) -> str | None:
    """Who of a role has the smallest median, of those that are or are not given what is known of a KL's reference."""
    times = {
        name: time
        for name in row["contestants"]
        if (who := CONTESTANTS.get(name)) is not None and (who.role, who.known) == (role, known)
        if (time := time_of(row, name)) is not None
    }
    return min(times, key=lambda name: times[name]) if times else None


def figure(value: float | None, form: str, without: str = NOT_MEASURED) -> str:
    """A number as it is printed."""
    return without if value is None else form.format(value)


def goals(row: Row) -> list[dict[str, Any]]:
    """What was asked of ours: near the floor, as fast as every peer or faster, in little memory."""
    found: list[dict[str, Any]] = []

    def goal(name: str, value: float | None, limit: float) -> None:
        found.append({"goal": name, "value": value, "limit": limit, "met": None if value is None else value <= limit})

    setting = row["setting"]
    gpu, divergence = setting["device"] == "cuda", setting["loss"] == "kl"
    floor, peer = fastest(row, "floor"), fastest(row, "peer")
    near = 1.05
    if gpu:
        near = 1.15 if divergence else 1.10 if setting["hidden"] >= 3584 else 1.20
    if setting["loss"] in ("nll", "kl"):
        goal(f"ours / the fastest floor ({floor})", ratio(row, "ours", floor), near)
    if divergence:
        three = fastest(row, "floor", known=True)
        goal(f"ours, embedding cached / the fastest floor of three ({three})", ratio(row, "ours_known", three), near)
    if setting["loss"] == "nll" and not gpu:
        within = {name: time for name in WITHIN_MEMORY if (time := time_of(row, name)) is not None}
        small = min(within, key=lambda name: within[name], default=None)
        goal(f"ours / the fastest floor within our memory ({small})", ratio(row, "ours", small), near)
        goal("ours / eager", ratio(row, "ours", "eager"), 0.5 if setting["ignored"] == 0.5 else 1.0)
    goal(f"ours / the fastest peer ({peer})", ratio(row, "ours", peer), 1.0 if gpu else 1 / 0.97)
    states = 3 * setting["tokens"] * setting["hidden"] * {"bfloat16": 2, "float32": 4}[setting["dtype"]] / 1e6
    most = states + (256.0 if gpu else 14.0 if divergence else 128.0)
    for name in ("ours", "ours_known") if divergence else ("ours",):
        goal(f"extra MB of {name}", row["contestants"].get(name, {}).get("peak_mb"), most)
    return found


def goal_line(goal: Mapping[str, Any]) -> str:
    """A goal, and whether it was met."""
    if goal["met"] is None:
        return f"{goal['goal']}: {NOT_MEASURED}, asked ≤ {goal['limit']:.2f}"
    verdict = "met" if goal["met"] else "**missed**"
    return f"{goal['goal']}: {goal['value']:.2f}, asked ≤ {goal['limit']:.2f}, {verdict}"
