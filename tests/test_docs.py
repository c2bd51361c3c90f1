"""The guides' code is run: every python block of a page, in order, in one namespace."""

import re
from pathlib import Path

import pytest

import fastforget as ff
from fastforget.objectives import PRESETS

DOCS = Path(__file__).parents[1] / "docs"
PYTHON = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def run_page(page, **names):
    """Execute a page's blocks; returns the namespace. Line numbers in a traceback are those of the page."""
    text = (DOCS / page).read_text()
    namespace = {"__name__": "docs", **names}
    blocks = list(PYTHON.finditer(text))
    assert blocks
    for block in blocks:
        before = text[: block.start(1)].count("\n")
        exec(compile("\n" * before + block[1], str(DOCS / page), "exec"), namespace)
    return namespace


def test_own_terms(model, batch, capsys):
    known = dict(PRESETS)
    try:
        found = run_page("own_terms.md", model=model, forget=batch(3, 1), retain=batch(3, 2))
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


def test_the_term_is_ten_lines_and_pages_are_linked():
    first = PYTHON.search((DOCS / "own_terms.md").read_text())[1]
    body = first[first.index("@dataclass") :]
    assert len([line for line in body.splitlines() if line]) <= 10
    readme = (DOCS.parent / "README.md").read_text()
    assert all(f"docs/{page.name}" in readme for page in DOCS.glob("*.md"))
