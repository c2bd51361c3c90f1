"""The term of a task vector's first half: fine-tuning on what is to be forgotten."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar

from fastforget.errors import FastforgetError
from fastforget.objectives.terms import CE, Side, Term


@dataclass(kw_only=True)
class TaskVector(CE):
    """Cross-entropy on the forget set, which teaches the adapter the text; what was learned is then subtracted.

    The second half is no loss: after training, `fastforget.task_vector(model, alpha)` turns the adapter round. The
    jobs (`fastforget unlearn --preset task_vector`) do that themselves, with `alpha`; in a loop of your own call it at
    the end. An adapter that was trained and not turned round knows the text better than before.
    """

    name: ClassVar[str] = "task_vector"
    on: Side = "forget"
    alpha: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_strength(self.alpha)

    @property
    def subtracted(self) -> float | None:
        return self.alpha


def check_strength(alpha: float) -> None:
    """Raise for a strength that is not positive and finite."""
    if isinstance(alpha, bool) or not (math.isfinite(alpha) and alpha > 0):
        raise FastforgetError(f"task_vector: alpha must be positive and finite, not {alpha}")


def subtraction(terms: Iterable[Term]) -> float | None:
    """With what strength these terms want the trained adapter subtracted; None where they do not."""
    return next((term.subtracted for term in terms if term.subtracted is not None), None)
