"""The report to show to someone else: one self-contained HTML page, and a Markdown model card.

Both are written from report.json alone. Whatever a model, a user or a data set wrote is escaped: the page runs no
script and loads nothing.
"""

from __future__ import annotations

import difflib
import html
import importlib.metadata
import platform
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from fastforget.evaluate.leakage import LeakageReport
from fastforget.evaluate.report import MEASURES
from fastforget.files import written_whole

TAGS, UNFILLED = "tags: [unlearning, fastforget]", "# Model Card for Model ID"
PAGE, CARD = "report.html", "README.md"
SAMPLES_OF_A_SET = 3
PACKAGES = ("fastforget", "torch", "transformers", "peft", "bitsandbytes")
NOT_SETTINGS = "samples robustness before after compared curves models forget_truth_ratio ability".split()
Table = tuple[list[str], list[list[str]]]  # headings, rows

STYLE = """
:root { color-scheme: light dark; }
body { font: 16px/1.5 system-ui, sans-serif; margin: 0 auto; max-width: 70rem; padding: 1rem; }
h1 { font-size: 1.6rem; line-height: 1.2; } h2 { font-size: 1.2rem; margin-top: 2rem; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-size: .9rem; }
th, td { border-bottom: 1px solid #8886; padding: .3rem .7rem; text-align: right; white-space: nowrap; }
th:first-child, td:first-child { text-align: left; }
.pair { display: grid; gap: .8rem; grid-template-columns: repeat(auto-fit, minmax(17rem, 1fr)); margin: .4rem 0 1rem; }
.pair > div { border: 1px solid #8886; border-radius: .4rem; min-width: 0; padding: .6rem; }
.pair p, .prompt { margin: 0; overflow-wrap: anywhere; white-space: pre-wrap; }
.pair h3 { font-size: .8rem; margin: 0 0 .3rem; opacity: .75; }
.prompt { font-size: .85rem; opacity: .8; }
mark { background: #ffd54f; color: #000; }
svg { height: auto; max-width: 100%; }
""".strip()


def write_page(path: Path, report: Mapping[str, Any]) -> None:
    """Write the HTML page of a report, whole or not at all."""
    with written_whole(path) as scratch:
        scratch.write_text(page(report), encoding="utf-8")


def write_card(path: Path, report: Mapping[str, Any]) -> None:
    """Write the Markdown model card of a report, whole or not at all; a README.md of someone else's is left alone."""
    if path.exists() and not is_card(path):
        return
    with written_whole(path) as scratch:
        scratch.write_text(card(report), encoding="utf-8")


def is_card(path: Path) -> bool:
    """Tell whether a file is a model card of ours, or PEFT's that nobody has filled in."""
    try:
        text = path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return False
    return TAGS in text or UNFILLED in text


def page(report: Mapping[str, Any]) -> str:
    """Return the HTML page."""
    parts = [f"<h1>{escaped(title_of(report))}</h1>", *(f"<p>{escaped(line)}</p>" for line in about(report))]
    for heading, table in tables_of(report):
        parts += [f"<h2>{escaped(heading)}</h2>", html_table(table)]
    curves = report.get("curves")
    if curves:
        parts += ["<h2>NLL over the steps</h2>", svg_curves(curves)]
    samples = samples_from(report)
    if samples:
        parts.append("<h2>What the models write</h2>")
        parts.append("<p>Words of the true text that stand in the output in its order are marked.</p>")
        parts += [html_sample(each) for each in samples]
    parts.append("<h2>What was not checked</h2>")
    parts.append("<ul>" + "".join(f"<li>{escaped(line)}</li>" for line in not_checked(report)) + "</ul>")
    parts += ["<h2>Settings</h2>", html_table(settings_of(report))]
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f"<title>{escaped(title_of(report))}</title>\n"
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<style>\n{STYLE}\n</style>\n</head>\n<body>\n" + "\n".join(parts) + "\n</body>\n</html>\n"
    )


def card(report: Mapping[str, Any]) -> str:
    """Return the Markdown model card."""
    lines = ["---", "library_name: peft"]
    name = str(report.get("model") or "")
    if name and not Path(name).is_absolute() and not Path(name).exists():  # of a folder the hub has no page
        lines.append(f"base_model: {quoted(name)}")
    lines += [TAGS, "---", "", f"# {code(title_of(report))}", ""]
    lines += [line + "\n" for line in about(report, code)]
    for heading, table in tables_of(report):
        lines += [f"## {heading}", "", *markdown_table(table), ""]
    lines += ["## What was not checked", "", *(f"- {line}" for line in not_checked(report)), ""]
    lines += ["## Settings", "", *markdown_table(settings_of(report)), ""]
    return "\n".join(lines)


def title_of(report: Mapping[str, Any]) -> str:
    """Name the report."""
    what = report.get("recipe") or report.get("suite") or report.get("command") or "report"
    return f"fastforget: {what}"


def about(report: Mapping[str, Any], name: Any = str) -> list[str]:
    """Say in sentences what was done; `name` writes what is a user's own word."""
    lines = []
    if report.get("model"):
        adapter = f", with and without the adapter {name(str(report['adapter']))}" if report.get("adapter") else ""
        lines.append(f"The model is {name(str(report['model']))}{adapter}.")
    if report.get("forget"):
        lines.append(f"It was to forget {name(str(report['forget']))}.")
    if report.get("preset"):
        options = ", ".join(f"{key} {value}" for key, value in (report.get("preset_options") or {}).items())
        how = f"{name(str(report['preset']))}{f' ({name(options)})' if options else ''}, {report.get('steps')} steps"
        lines.append(f"Unlearned with {how}; {report.get('stopped') or 'it ended'}.")
    lines += [str(line) for line in report.get("sources") or []]
    lines.append(
        "Unlearning in an adapter can be undone by switching it off: the base still holds the text. To ship a model "
        "that forgot, merge the adapter."
    )
    return lines


def tables_of(report: Mapping[str, Any]) -> list[tuple[str, Table]]:
    """List the tables of a report: what both models know, a suite's figures, and what lasts."""
    tables = []
    names = [name for name in ("forget", "retain", "unseen") if f"{name}_nll_before" in report]
    if names:
        rows = [
            [measure]
            + [
                " → ".join(shown(report.get(f"{name}_{figure}_{when}"), style) for when in ("before", "after"))
                for name in names
            ]
            for measure, (figure, style) in MEASURES.items()
        ]
        headings = ["measure", *(f"{name} ({report.get(f'{name}_passages', '-')})" for name in names)]
        tables.append(("What the model still knows, before → after", (headings, rows)))
    tables += [(f"Suite {suite}", suite_table(found)) for suite, found in suites_of(report).items()]
    if report.get("ability"):
        tables.append(("General ability (lm-eval)", suite_table(report["ability"])))
    models = report.get("models")
    if models:
        rows = [
            [name, *(shown(each.get(figure), ".3g") for figure in ("forget_quality", "utility", "utility_share"))]
            for name, each in models.items()
        ]
        headings = ["model", "forget quality (p)", "utility", "× retain-only"]
        tables.append(("Beside a model that never learned the forget set", (headings, rows)))
    for name, part in robust_of(report).items():
        rows = [
            [
                str(row["treatment"]),
                *(
                    f"{shown(row[f'forget_{figure}'], '.2f')} ({shown(row[f'unseen_{figure}'], '.2f')})"
                    for figure in ("memorisation", "extraction")
                ),
            ]
            for row in part
        ]
        headings = ["treatment", "exact memorisation (never-trained)", "extraction strength (never-trained)"]
        tables.append((f"Does it last?{f' ({name})' if name else ''}", (headings, rows)))
    return tables


def suite_table(found: Mapping[str, Any]) -> Table:
    """Return the figures of both models, and why one is missing."""
    before, after = found["before"]["figures"], {**found["after"]["figures"], **found.get("compared", {})}
    rows = []
    for name, value in after.items():
        if not name.endswith("_reason"):
            missing = str(after.get(f"{name}_reason") or "-")
            unlearned = missing if value is None else shown(value, ".3g")
            rows.append([name.replace("_", " "), shown(before.get(name), ".3g"), unlearned])
    return ["figure", "untouched", "unlearned"], rows


def suites_of(report: Mapping[str, Any]) -> dict[str, Any]:
    """Return what suites found, by suite: of an evaluation its own, of a recipe those that it ran."""
    if isinstance(report.get("before"), Mapping):
        return {str(report.get("suite")): report}
    return {
        name: each
        for name, each in (report.get("evaluations") or {}).items()
        if isinstance(each.get("before"), Mapping)
    }


def robust_of(report: Mapping[str, Any]) -> dict[str, Sequence[Mapping[str, Any]]]:
    """Return the robustness rows by preset, or under ""."""
    found = report.get("robustness") or {}
    return dict(found) if isinstance(found, Mapping) else {"": found}


def not_checked(report: Mapping[str, Any]) -> list[str]:
    """List what this report does not say, so that nobody takes it for said."""
    lines = []
    if not robust_of(report):
        lines.append("Whether it lasts: after merging, quantising, or training on part of what was forgotten.")
    if not report.get("ability"):
        lines.append("General ability: what else the model can still do, by public benchmarks such as lm-eval's.")
    if "unseen_nll_before" not in report and not report.get("models"):
        lines.append("How the forget set compares with text that the model never saw (give an unseen set).")
    if "retain_nll_before" not in report and not report.get("models"):
        lines.append("Whether what was to be kept is kept (give a retain set).")
    lines.append("Attacks other than those in the tables: other languages, jailbreaks, probing of the weights.")
    return lines


def settings_of(report: Mapping[str, Any]) -> Table:
    """List the report's plain values, and the versions it was made with."""
    rows = []
    for name, value in report.items():
        if name in NOT_SETTINGS or isinstance(value, list | Mapping) or name.endswith(("_before", "_after")):
            continue
        rows.append([name.replace("_", " "), "-" if value is None else str(value)])
    for package in PACKAGES:
        try:
            rows.append([package, importlib.metadata.version(package)])
        except importlib.metadata.PackageNotFoundError:
            rows.append([package, "not installed"])
    rows += [["python", platform.python_version()], ["machine", f"{platform.system()} {platform.machine()}"]]
    return ["setting", "value"], rows


def samples_of(before: Mapping[str, LeakageReport], after: Mapping[str, LeakageReport]) -> list[dict[str, str]]:
    """Return continuations of both models on the same prompts: what the page shows side by side."""
    samples = []
    for name in before:
        pairs = list(zip(before[name].continuations, after[name].continuations, strict=True))
        for first, last in pairs[:SAMPLES_OF_A_SET]:
            texts = {"prompt": first.prompt, "truth": first.truth, "before": first.output, "after": last.output}
            samples.append({"set": name, **texts})
    return samples


def samples_from(report: Mapping[str, Any]) -> list[dict[str, str]]:
    """Return the samples of a report, those of its suites too."""
    samples = [dict(each) for each in report.get("samples") or []]
    for found in suites_of(report).values():
        pairs = zip(found["before"]["samples"], found["after"]["samples"], strict=True)
        samples += [{**first, "before": first["output"], "after": last["output"]} for first, last in pairs]
    return samples


def shown(value: Any, style: str) -> str:
    """Write a number, or a dash where there is none."""
    return format(value, style) if isinstance(value, int | float) and not isinstance(value, bool) else "-"


def escaped(text: str) -> str:
    """Escape text for HTML."""
    return html.escape(readable(text))


def readable(text: str) -> str:
    """Return the text with the replacement character for what neither a browser nor YAML takes."""
    return re.sub(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x84\x86-\x9f\ud800-\udfff]", "\ufffd", text)


def html_table(table: Table) -> str:
    """Return a table, which scrolls by itself where it is wider than the page."""
    headings, rows = table
    head = "".join(f"<th>{escaped(each)}</th>" for each in headings)
    body = "".join("<tr>" + "".join(f"<td>{escaped(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return f'<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def html_sample(sample: Mapping[str, str]) -> str:
    """Return one prompt, what stands there, and what both models wrote, with leaked words marked."""
    truth = sample.get("truth", "")
    cells = [("true text", escaped(truth))] if truth else []
    cells += [(when, marked(truth, sample.get(when, ""))) for when in ("before", "after")]
    boxes = "".join(f"<div><h3>{heading}</h3><p>{text}</p></div>" for heading, text in cells)
    prompt = f'<p class="prompt">{escaped(sample["set"])}: … {escaped(sample["prompt"][-120:])}</p>'
    return f'{prompt}<div class="pair">{boxes}</div>'


def marked(truth: str, output: str) -> str:
    """Escape an output, with the words that it shares with the truth, in order, marked."""
    words = re.findall(r"\w+|\W+", output)
    places = [place for place, word in enumerate(words) if re.match(r"\w", word)]
    matcher = difflib.SequenceMatcher(
        None, re.findall(r"\w+", truth.lower()), [words[place].lower() for place in places], autojunk=False
    )
    leaked = {places[block.b + i] for block in matcher.get_matching_blocks() for i in range(block.size)}
    return "".join(f"<mark>{escaped(w)}</mark>" if place in leaked else escaped(w) for place, w in enumerate(words))


def svg_curves(curves: Mapping[str, Sequence[float]]) -> str:
    """Draw curves as a picture that is part of the page."""
    width, height = 700, 240
    longest = max(map(len, curves.values()))
    highest = max((value for values in curves.values() for value in values), default=0.0) or 1.0
    colours = {"forget": "#d55e00", "retain": "#0072b2"}
    lines = []
    for name, values in curves.items():
        points = " ".join(
            f"{40 + (width - 50) * place / max(longest - 1, 1):.1f},{height - 20 - (height - 40) * value / highest:.1f}"
            for place, value in enumerate(values)
        )
        colour = colours.get(name, "#666")
        lines.append(f'<polyline points="{points}" fill="none" stroke="{colour}" stroke-width="1.5"/>')
    names = "".join(
        f'<text x="{50 + 90 * place}" y="14" fill="{colours.get(name, "#666")}">{escaped(name)}</text>'
        for place, name in enumerate(curves)
    )
    axes = (
        f'<path d="M40 15V{height - 20}H{width - 10}" fill="none" stroke="#888"/>'
        f'<text x="2" y="24" fill="#888">{highest:.2g}</text><text x="2" y="{height - 18}" fill="#888">0</text>'
        f'<text x="{width - 60}" y="{height - 4}" fill="#888">{longest} steps</text>'
    )
    size = f'viewBox="0 0 {width} {height}" width="{width}"'
    return f'<svg {size} role="img" font-size="12">{axes}{names}{"".join(lines)}</svg>'


def markdown_table(table: Table) -> Iterable[str]:
    """Yield the lines of a Markdown table."""
    headings, rows = table
    yield "| " + " | ".join(headings) + " |"
    yield "| " + " | ".join("---" for _ in headings) + " |"
    for row in rows:
        yield "| " + " | ".join(cell_text(cell) for cell in row) + " |"


def cell_text(cell: str) -> str:
    """Write a cell so that nothing in it is markup."""
    return re.sub(r"([\\`*_\[\]<>|#~])", r"\\\1", " ".join(readable(cell).split()))


def code(text: str) -> str:
    """Write a user's own word as code, whatever backticks it holds."""
    text = " ".join(readable(text).split())
    fence = "`" * (max((len(run) for run in re.findall("`+", text)), default=0) + 1)
    return f"{fence} {text} {fence}" if "`" in text else f"`{text}`"


def quoted(text: str) -> str:
    """Write a YAML string in single quotes, on one line."""
    return "'" + " ".join(readable(text).split()).replace("'", "''") + "'"
