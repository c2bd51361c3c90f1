"""The README and the pages of docs/: their code is run, their commands, links and figures are held to what there is."""

import inspect
import json
import re
import shlex
from pathlib import Path

import pytest
import typer.main
import yaml
from accelerate.state import AcceleratorState, GradientState
from helpers import FORGET, RETAIN

import fastforget as ff
from fastforget.cli import app
from fastforget.data.batches import Batches
from fastforget.jobs.evaluation_options import SUITE_SETS
from fastforget.objectives import PRESETS

ROOT = Path(__file__).parents[1]
README, DOCS = ROOT / "README.md", ROOT / "docs"
PAGES = [*sorted(ROOT.glob("*.md")), *sorted(DOCS.glob("*.md"))]
PYTHON = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)
SHELL = re.compile(r"^```sh\n(.*?)^```$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\]\(([^)\s]+)\)")
HEADING = re.compile(r"^#+ (.+)$", re.MULTILINE)


def run_page(page, **names):
    """Execute a page's blocks, in order, in one namespace; return it. A traceback has the page's line numbers."""
    text = page.read_text()
    namespace = {"__name__": "docs", **names}
    blocks = list(PYTHON.finditer(text))
    assert blocks
    for block in blocks:
        before = text[: block.start(1)].count("\n")
        exec(compile("\n" * before + block[1], str(page), "exec"), namespace)
    return namespace


def test_own_terms(model, batch, capsys):
    known = dict(PRESETS)
    try:
        found = run_page(DOCS / "own_terms.md", model=model, forget=batch(3, 1), retain=batch(3, 2))
        assert [term.name for term in found["terms"]] == ["hinge_ascent", "ce"] and found["terms"][0].margin == 2.0
        assert "tensor" in capsys.readouterr().out and found["step"].param_groups[0]["unlearn_steps"] == 1
        with pytest.raises(ff.FastforgetError, match="no parameter 'beta': it takes margin"):
            ff.preset("hinge", beta=1.0)
    finally:
        PRESETS.clear()
        PRESETS.update(known)
    floor = found["EntropyFloor"]
    out = ff.UnlearnLoss(model, [floor(floor=100.0)])(batch(3, 1))
    stats = ff.UnlearnLoss(model, ff.preset("me", direction="reverse", retain=None, forget_weight=1.0))(batch(3, 1))
    log_vocabulary = float(stats.loss.new_tensor(320.0).log())
    assert float(out.loss.detach()) == pytest.approx(100.0 - (log_vocabulary - float(stats.loss.detach())), rel=1e-5)
    with pytest.raises(ff.FastforgetError, match="floor must be positive"):
        floor(floor=0.0)


def test_own_term_is_ten_lines():
    first = PYTHON.search((DOCS / "own_terms.md").read_text())[1]
    body = first[first.index("@dataclass") :]
    assert len([line for line in body.splitlines() if line]) <= 10


def test_readme_program(tmp_path, monkeypatch, capsys, no_accelerator):
    """At most 20 lines, run as they stand in an empty folder: one set goes, the other stays. Then what follows."""
    monkeypatch.chdir(tmp_path)
    program = PYTHON.findall(README.read_text())[0]
    assert len([line for line in program.splitlines() if line]) <= 20
    run_page(README)
    trained = tmp_path / "trained"
    assert [*trained.glob("checkpoint-*/adapter_model.safetensors")], "the Trainer of the next section ran"
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("step ")]
    steps = [[float(number) for number in re.findall(r"-\d+\.\d+", line)] for line in lines]
    (forget_first, retain_first), (forget_last, retain_last) = steps[0], steps[-1]
    assert len(steps) == 7 and forget_last < forget_first - 1.0 and retain_last > retain_first - 0.3
    assert (tmp_path / "forgot" / "adapter_model.safetensors").is_file()


def test_quickstart(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    report = run_page(DOCS / "quickstart.md")["report"]
    assert report["forget_nll_after"] > report["forget_nll_before"] + 1.0
    before, after = (line for line in capsys.readouterr().out.splitlines() if " | " in line)
    assert "hides the plan under stone 0" in before and "hides the plan under stone 0" not in after


@pytest.fixture
def no_accelerator():
    """Without this Accelerate's state, which is the process's, would be that of another test."""
    yield
    AcceleratorState._reset_state(True)
    GradientState._reset_state()


@pytest.mark.parametrize("page", ["cards", "evaluation", "loop", "objectives", "statistics"])
def test_page_runs(page, tiny, tmp_path, monkeypatch, capsys, short_continuations, no_accelerator):
    monkeypatch.chdir(tmp_path)
    run_page(DOCS / f"{page}.md", name=str(tiny["llama"]), forget_texts=FORGET, retain_texts=RETAIN)
    assert capsys.readouterr().out


def test_every_page_with_code_is_run_above():
    with_code = {page.stem for page in PAGES if PYTHON.search(page.read_text())}
    assert with_code == {"README", "quickstart", "own_terms", "cards", "evaluation", "loop", "objectives", "statistics"}


def commands(text):
    """The `fastforget` commands of a page's shell blocks, as lists of words; brackets mark what may be left out."""
    for block in SHELL.findall(text):
        for line in block.splitlines():
            words = shlex.split(line.replace("[", " ").replace("]", " "), comments=True)
            if words[:1] == ["fastforget"]:
                yield words[1:]


def test_commands_have_the_flags_that_pages_give_them():
    known = typer.main.get_command(app).commands
    seen = set()
    for page in PAGES:
        for name, *words in commands(page.read_text()):
            flags = {flag for parameter in known[name].params for flag in (*parameter.opts, *parameter.secondary_opts)}
            assert {word for word in words if word.startswith("--")} <= flags, (page.name, name)
            seen.add(name)
    assert {"unlearn", "evaluate", "plan", "demo", "presets", "doctor"} <= seen


def documented(text):
    """The names under a docstring's `Args:`, one by one where several share a line."""
    section = re.search(r"^Args:\n((?:    .*\n|\n)+)", f"{inspect.cleandoc(text or '')}\n", re.MULTILINE)
    entries = re.findall(r"^    (\w[\w, *]*):", section[1], re.MULTILINE) if section else []
    return [name.strip(" *") for entry in entries for name in entry.split(",")]


def test_documented_arguments_are_those_that_there_are():
    seen = 0
    for public in (*(getattr(ff, name) for name in ff.__all__), Batches):
        methods = vars(public).values() if inspect.isclass(public) else ()
        for each in (public, *filter(inspect.isfunction, methods)):
            if callable(each) and (names := documented(each.__doc__)):
                taken = inspect.signature(each).parameters
                handed_on = any(one.kind is one.VAR_KEYWORD for one in taken.values())  # to a Trainer
                assert handed_on or set(names) <= {*taken}, each
                seen += len(names)
    assert seen > 100 and documented("Do.\n\nArgs:\n    one, two: of it.\n") == ["one", "two"]


def test_every_recipe_and_suite_is_on_its_page():
    page = (DOCS / "recipes.md").read_text()
    recipes = {path.stem for path in (ROOT / "fastforget" / "recipes").glob("*.yaml")}
    assert set(re.findall(r"^\| `(\w+)`", page, re.MULTILINE)) == recipes | set(SUITE_SETS)


def anchors(page):
    """The anchors of a page's headings, as GitHub and mkdocs make them."""
    titles = (re.sub(r"[^\w\s-]", "", title.lower()).strip() for title in HEADING.findall(page.read_text()))
    return {re.sub(r"\s+", "-", title) for title in titles}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    for link in LINK.findall(page.read_text()):
        if link.startswith("https://"):
            continue
        place, _, anchor = link.partition("#")
        target = (page.parent / place).resolve() if place else page
        assert target.is_file(), link
        assert not anchor or anchor in anchors(target), link


def test_every_page_is_on_the_site_and_linked_from_the_readme():
    pages = {page.name for page in DOCS.glob("*.md")}
    navigation = (ROOT / "mkdocs.yml").read_text()
    assert pages == set(re.findall(r"\w+\.md", json.dumps(yaml.safe_load(navigation)["nav"])))
    assert {f"docs/{name}" for name in pages - {"index.md"}} <= set(re.split(r"[(#)]", README.read_text()))


def test_reference_has_every_public_name():
    listed = set(re.findall(r"^::: fastforget\.(\w+)$", (DOCS / "reference.md").read_text(), re.MULTILINE))
    assert listed == set(ff.__all__) - {"REFUSALS"}


# of a row of the README's table: its file, the row and the records there (None: not measured), and what is shown
TABLE = {
    "2026-11-28-nll-cpu": ("100 % of the tokens, flat p", ("ours", "eager", "compile")),
    "2026-11-28-head": ("nll,", ("ours", "eager", "compile")),
    "2026-11-28-kl-cpu": ("100 % of the tokens", (("ours", "ours_known"), "eager", "compile")),
    "2026-11-28-step-full": ("grad_diff: small (D 512, 6 layers, V 50272), 32 bit", ("ours_later", "loop", None)),
    "h100-2026-11-28/head-all-labels-flat": ("D 4096, V 128256", ("ours", "eager", "compile")),
    "h100-2026-11-28/step": ("8b 8 bit 4+4x1024", ("ours", "usual", None)),
}


def rows_of(results):
    """The benchmark rows of a results file, of any of its forms."""
    if "rows" in results:
        return results["rows"]
    return [{"name": name, "contestants": {name.rpartition(" ")[2]: record}} for name, record in results.items()]


def shown(record):
    """A record's time and memory as the README writes them."""
    if "peak_gb" in record or "later" in record:
        later = record.get("later", record)
        return f"{later['ms']:,.0f} ms, {later['peak_gb']:.1f} GB in all"
    time = record["median_ms"]
    return f"{time:,.{0 if time >= 100 else 1}f} ms, {record['peak_mb']:,.0f} MB"


@pytest.mark.parametrize("file", TABLE)
def test_figures_of_the_readme_are_in_their_files(file):
    begins, columns = TABLE[file]
    results = json.loads((ROOT / "benchmarks" / "results" / f"{file}.json").read_text())
    records = {}
    for row in rows_of(results):
        if begins in str(row.get("name")):
            records = row["contestants"] | records  # the first row that has one
    (line,) = (
        line for line in README.read_text().splitlines() if line.startswith("| ") and f"results/{file}.json" in line
    )
    cells = [cell.strip() for cell in line.strip("|").split("|")][1:]
    for cell, names in zip(cells, columns, strict=True):
        names = (names,) if isinstance(names, str | None) else names
        figures = ["not measured" if name is None else shown(records[name]) for name in names]
        assert cell == "; reference cached: ".join(figures)


def test_readme_fits_on_a_few_screens():
    lines = README.read_text().splitlines()
    assert len(lines) <= 130
    first_screen = "\n".join(lines[:30])
    assert "make demo" in first_screen and "make test" in first_screen and "pip install" in first_screen


def test_demo_figures_of_the_readme():
    seeds = json.loads((ROOT / "benchmarks/results/2026-11-28-demo.json").read_text())["records"]["seeds"]
    report = seeds["other_tokens, seed 0"]["report"]
    text = README.read_text()
    for name in ("forget", "retain"):
        assert f"{report[f'{name}_nll_before']:.2f} to {report[f'{name}_nll_after']:.2f}" in text
    again = [
        row["forget_memorisation"]
        for record in seeds.values()
        for row in record["robustness"]
        if row["treatment"].startswith("half")
    ]
    assert f"{min(again):.2f} to {max(again):.2f} of the other" in text.replace("\n  ", " ")
