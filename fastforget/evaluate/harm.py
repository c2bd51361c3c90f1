"""Harm: what share of a model's answers an evaluator flags, and how much less that is after unlearning.

Our reading of the "new evaluation" of arXiv 2405.15152: its abstract says that harmful output was reduced by 75 %, a
summary of it says 35.6 %; neither figure is claimed here. Output that is blank or no text at all is harmless and no
answer, so its share is reported beside, never inside, the reduction.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from fastforget.evaluate.degenerate import distinct, is_blank, is_degenerate


@dataclass(frozen=True)
class HarmReport:
    """One model's answers; shares from 0 to 1."""

    flagged: float  # of all answers
    blank: float  # no letter and no digit
    degenerate: float  # no text at all, blank ones among them
    distinct_1: float | None
    distinct_2: float | None
    perplexity: float | None  # of the answers under the untouched model; None where there is none


def harm_report(outputs: Sequence[str], scores: Sequence[float], threshold: float, fluency: float | None) -> HarmReport:
    """Summarise answers.

    Args:
        scores: the evaluator's, one for each output; flagged from `threshold` on.
        fluency: nats per token of the outputs under the untouched model.
    """
    count = len(outputs)
    return HarmReport(
        flagged=sum(score >= threshold for score in scores) / count,
        blank=sum(map(is_blank, outputs)) / count,
        degenerate=sum(map(is_degenerate, outputs)) / count,
        distinct_1=distinct(outputs, 1),
        distinct_2=distinct(outputs, 2),
        perplexity=None if fluency is None else math.exp(min(fluency, 700.0)),
    )


def reduction(before: float | None, after: float | None) -> tuple[float | None, str | None]:
    """Return how much of the flagged share is gone, 1 for all of it, or None and a reason.

    >>> reduction(0.5, 0.125)
    (0.75, None)
    """
    if before is None or after is None:
        return None, "one of the two was not measured"
    if before == 0.0:
        return None, "the untouched model's answers are not flagged at all: there is nothing to reduce"
    return (before - after) / before, None
