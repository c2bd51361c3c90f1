"""The report's page and model card: everything is there, everything is escaped, nothing is loaded."""

import html
import json
import re
import shutil
import subprocess
from html.parser import HTMLParser

import pytest
import yaml

from fastforget.evaluate.page import card, code, is_card, markdown_table, marked, page, write_card, write_page

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
EVIL = '</td><script>alert(1)</script> & "quotes" | `tick` \x00'
SUITE = {"figures": {"flagged": 0.5, "quality": None, "quality_reason": EVIL}, "samples": [], "log": {}}
REPORT = {
    "command": "unlearn",
    "model": EVIL,
    "forget": EVIL,
    "adapter": "out",
    "preset": "npo",
    "preset_options": {"beta": 0.1},
    "steps": 12,
    "stopped": "all 12 steps taken",
    "forget_passages": 2,
    "forget_nll_before": 0.1,
    "forget_nll_after": 5.25,
    "forget_leak_before": 1.0,
    "forget_leak_after": 0.0,
    "forget_memorisation_before": None,
    "samples": [
        {
            "set": "forget",
            "prompt": EVIL,
            "truth": "the old oak tree",
            "before": "the old oak",
            "after": f"an oak {EVIL}",
        }
    ],
    "robustness": [
        {
            "treatment": EVIL,
            "forget_memorisation": 0.25,
            "forget_extraction": None,
            "unseen_memorisation": 0.5,
            "unseen_extraction": 0.0,
        }
    ],
    "curves": {"forget": [0.1, 2.0, 4.0], "retain": [0.2, 0.2]},
    "evaluations": {
        "harm": {"before": SUITE, "after": SUITE, "compared": {"reduction": 0.75, "reduction_reason": None}}
    },
    "seed": 3,
    "seconds": 1.5,
    "peak_rss_mb": 100,
}


class Checked(HTMLParser):
    """Collects the tags, what they point to, and the text."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.addresses, self.words, self.open = [], [], [], []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.addresses += [value for name, value in attributes if name in ("src", "href", "onload", "onclick")]
        if tag not in ("meta", "polyline", "path"):
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.tags.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.words.append(data)


def test_the_page_is_whole_escaped_and_loads_nothing():
    text = page(REPORT)
    found = Checked(text)
    assert not found.open and found.addresses == [] and not {"script", "link", "img", "iframe"} & set(found.tags)
    words = "".join(found.words)
    shown = EVIL.replace("\x00", "\ufffd")
    assert words.count(shown) >= 4 and "\x00" not in text
    for part in (
        "0.100 → 5.250",
        "100% → 0%",
        "all 12 steps taken",
        "npo (beta 0.1)",
        "0.25 (0.50)",
        "- (0.00)",
        "0.75",
    ):
        assert part in words, part
    for heading in (
        "What the model still knows",
        "Does it last?",
        "NLL over the steps",
        "What was not checked",
        "Settings",
    ):
        assert heading in words
    assert "torch" in words and "seed" in words and "svg" in found.tags
    assert 'name="viewport"' in text and "overflow-x: auto" in text, "it fits a telephone"


def test_leaked_words_are_marked_in_order():
    assert (
        marked("the old oak tree", "an old oak & tree")
        == "an <mark>old</mark> <mark>oak</mark> &amp; <mark>tree</mark>"
    )
    assert marked("oak tree", "Oak!") == "<mark>Oak</mark>!"
    assert marked("", "<b>") == "&lt;b&gt;" and marked("a", "") == ""


def test_what_is_not_there_is_said():
    words = "".join(Checked(page({"command": "evaluate", "model": "m"})).words)
    for line in ("Whether it lasts", "never saw", "what was to be kept", "General ability"):
        assert line in words
    words = "".join(Checked(page(REPORT)).words)
    assert "Whether it lasts" not in words and "Whether what was to be kept" in words
    known = {"before": {"figures": {}}, "after": {"figures": {}}}
    assert "General ability:" in words and "General ability:" not in page(REPORT | {"ability": known})


def test_the_card_is_markdown_with_a_heading_of_yaml():
    text = card(REPORT)
    _, heading, body = text.split("---\n", 2)
    assert yaml.safe_load(heading)["library_name"] == "peft"
    assert yaml.safe_load(heading)["base_model"].startswith("</td>")
    assert "forget (2)" in body and "| leak | 100% → 0% |" in body and "## What was not checked" in body
    lines = [line for line in body.splitlines() if "script" in line]
    assert lines and all("`" in line or "\\<script\\>" in line for line in lines)


@pytest.mark.parametrize("text, expected", [("a b", "`a b`"), ("a`b", "`` a`b ``"), ("a\n# b", "`a # b`")])
def test_a_word_as_code(text, expected):
    assert code(text) == expected


def test_a_cell_holds_no_markup():
    *_, row = markdown_table((["a"], [["x | y_z\n*w*"]]))
    assert row == r"| x \| y\_z \*w\* |"


def test_files_are_written_whole(tmp_path):
    write_page(tmp_path / "report.html", json.loads(json.dumps(REPORT)))
    write_card(tmp_path / "README.md", REPORT)
    assert (tmp_path / "report.html").read_text().endswith("</html>\n") and is_card(tmp_path / "README.md")


def test_a_card_replaces_cards_and_no_page_of_someone_else(tmp_path):
    path = tmp_path / "README.md"
    for text, replaced in (("# My project", False), ("# Model Card for Model ID", True), (card(REPORT), True)):
        path.write_text(text)
        write_card(path, REPORT | {"command": "again"})
        assert ("fastforget: again" in path.read_text()) is replaced and (path.read_text() == text) is not replaced


def test_the_folder_of_a_model_is_not_its_name_on_the_hub(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine").mkdir()
    assert "base_model" not in card(REPORT | {"model": "mine"})
    assert "base_model" not in card(REPORT | {"model": "/home/me/model"})
    assert "base_model: " in card(REPORT | {"model": "someone/model"})


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium")
@pytest.mark.parametrize("width", [1280, 390])
def test_a_browser_shows_the_page_without_scrolling_sideways(tmp_path, width):
    text = page(REPORT)
    look = (
        "<script>document.title = [innerWidth, document.documentElement.scrollWidth, document.images.length]</script>"
    )
    frame = (
        f'<iframe id="f" width="{width}" height="900" style="border:0" srcdoc="{html.escape(text + look)}"></iframe>'
    )
    shown = "[f.contentDocument.title, f.contentDocument.body.innerText.length]"
    done = f"<script>onload = () => document.title = {shown}</script>"
    (tmp_path / "frame.html").write_text(f"<!doctype html>{frame}{done}")
    command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}"]
    found = subprocess.run(
        [*command, "--virtual-time-budget=2000", "--dump-dom", f"file://{tmp_path / 'frame.html'}"],
        capture_output=True,
        text=True,
        timeout=120,
    )
    title = re.search(r"<title>(\d+),(\d+),(\d+),(\d+)</title>", found.stdout)
    assert title, found.stderr[-500:]
    inner, scrolled, images, shown = map(int, title.groups())
    assert inner == width and scrolled <= width and images == 0 and shown > 500
