"""ROUGE-L recall, as the `rouge-score` package has it without stemming."""

from __future__ import annotations

import re
from collections.abc import Sequence

WORD = re.compile("[a-z0-9]+")


def rouge_l_recall(truth: str, output: str) -> float:
    """Return how much of the truth stands in the output, in its order: their longest common subsequence of words.

    A word is a run of a-z and 0-9 after lower-casing.

    >>> rouge_l_recall("Water boils at a hundred degrees.", "It boils at hundred")
    0.5

    Returns:
        The subsequence's share of the truth's words, 0 to 1; 0 where either has no word.
    """
    words = WORD.findall(truth.lower())
    return common_length(words, WORD.findall(output.lower())) / max(len(words), 1)


def common_length(words: Sequence[str], others: Sequence[str]) -> int:
    """Count the words of the longest common subsequence, row by row of the usual table."""
    row = [0] * (len(others) + 1)
    for word in words:
        above = row
        row = [0]
        for place, other in enumerate(others):
            row.append(above[place] + 1 if word == other else max(above[place + 1], row[place]))
    return row[-1]
