"""Leakage of several sets of passages under one progress bar."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from fastforget.data.examples import Example
from fastforget.evaluate.leakage import LeakageReport, leakage
from fastforget.jobs.progress import progress_bar


def measure(model: Any, tokenizer: Any, sets: Mapping[str, Sequence[Example]], label: str) -> dict[str, LeakageReport]:
    """What the model recites of each set."""
    total = 2 * sum(len(examples) for examples in sets.values())
    reports, done_before = {}, 0
    with progress_bar(label) as update:

        def advance(done: int, _: int) -> None:
            update(done_before + done, total)

        for name, examples in sets.items():
            reports[name] = leakage(model, tokenizer, examples, progress=advance)
            done_before += 2 * len(examples)
    return reports
