"""The table of what lasts says why a figure is missing; the figures are tested in `jobs/test_evaluate.py`."""

import io

import pytest
from rich.console import Console

from fastforget.evaluate.robustness import RobustnessRow, print_robustness

WHOLE, UNSEEN = RobustnessRow("merged", 0.1, 0.0, 0.08, 0.0), "(-): without --unseen"


@pytest.mark.parametrize(
    ("rows", "notes"),
    [
        ([WHOLE], []),
        ([RobustnessRow("merged", 0.1, 0.0, None, None)], [UNSEEN]),
        ([WHOLE, RobustnessRow("half learned again", None, None, 0.1, 0.0)], ["-: too few passages"]),
        ([RobustnessRow("half learned again", None, None, None, None)], [UNSEEN, "-: too few passages"]),
    ],
)
def test_a_dash_is_explained_below_the_table(rows, notes):
    console = Console(file=io.StringIO(), width=120)
    print_robustness(console, rows)
    below = console.file.getvalue().partition("└")[2].splitlines()[1:]
    assert len(below) == len(notes) and all(line.startswith(note) for line, note in zip(below, notes, strict=True))
