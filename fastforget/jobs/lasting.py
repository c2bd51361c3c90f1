"""What lasts of the demo's unlearning: of the forgetting, and of what else its model can do.

After merging, rounding alone changes what a model says, so a merged model is compared with its base as this is at the
same precision.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.console import Console

from fastforget.evaluate.leakage import leakage
from fastforget.evaluate.robustness import RobustnessRow, merged_name
from fastforget.jobs.evaluate import robust_rows
from fastforget.jobs.running import say
from fastforget.jobs.subjects import Subject
from fastforget.models import load

DEMO_BITS = 8  # that the demo's base is loaded in


def measure_lasting(
    subject: Subject, adapter: Path, tokenizer: Any, before: dict[str, Any], seed: int
) -> tuple[list[RobustnessRow], list[dict[str, Any]]]:
    """Measure what lasts of an adapter: the rows of `robustness`, and figures of each merged model beside its base.

    Args:
        before: the figures of the base in DEMO_BITS.

    Returns:
        (rows, one dict a precision: "treatment", and "base" and "merged" with their figures; none of a subject that
        has no figures of its own).
    """
    compared: list[dict[str, Any]] = []

    def compare(bits: int, merged: Any) -> None:
        base = load(subject.base, bits=bits, device="cpu")
        untouched = before if bits == DEMO_BITS else own_figures(subject, base, tokenizer, base)
        found = own_figures(subject, merged, tokenizer, base)
        compared.append({"treatment": merged_name(bits), "base": untouched, "merged": found})

    rows = robust_rows(
        subject.base,
        adapter,
        tokenizer,
        subject.sets,
        bits=DEMO_BITS,
        device="cpu",
        seed=seed,
        merged=None if subject.ability is None else compare,
    )
    return rows, compared


def own_figures(subject: Subject, model: Any, tokenizer: Any, untouched: Any) -> dict[str, Any]:
    """Measure a subject's own figures of a model."""
    sets = subject.sets.items()
    reports = {name: leakage(model, tokenizer, examples, untouched=untouched) for name, examples in sets}
    return subject.figures(model, tokenizer, reports)


def print_lasting(console: Console, subject: Subject, compared: list[dict[str, Any]]) -> None:
    """Say in lines what is left of each merged model's figures, after those of its base."""
    for each in compared:
        for line in subject.told(each["base"], each["merged"]):
            say(console, f"{each['treatment']}: {line}")
