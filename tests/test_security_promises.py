"""SECURITY.md and docs/guarantees.md name tests that exist."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize("page", ["SECURITY.md", "docs/guarantees.md"])
def test_every_test_that_is_named_exists(page):
    named = set(re.findall(r"`(test_\w+)`", (ROOT / page).read_text()))
    defined = {
        name for path in (ROOT / "tests").rglob("*.py") for name in re.findall(r"def (test_\w+)", path.read_text())
    }
    assert len(named) > 15 and named <= defined, named - defined
