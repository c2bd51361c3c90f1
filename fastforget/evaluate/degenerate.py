"""Whether an output is text at all: blank, degenerate, and how much of it is not said twice."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence


def is_blank(text: str) -> bool:
    """Tell whether an output has no letter and no digit."""
    return not re.search(r"[^\W_]", text)


def is_degenerate(text: str) -> bool:
    """Tell whether an output is no text: blank, or one token or a short loop repeated over most of it.

    Blank: no letter and no digit. A loop: more than half of the characters, and at least 20, are one unit of any
    content repeated three times or more without a change. One token: of eight words or more, over half are the same.

    >>> [is_degenerate(text) for text in (" ... ", "the the the the the the", "so on, so on, so on, so on")]
    [True, True, True]
    >>> [is_degenerate(text) for text in ("Yes.", "1000000", "the cat, the dog, the mouse and the lion")]
    [False, False, False]
    """
    if is_blank(text):
        return True
    words = re.findall(r"\w+", text.lower())
    if len(words) >= 8 and Counter(words).most_common(1)[0][1] > len(words) / 2:
        return True
    least = max(len(text) // 2 + 1, 20)
    return any(longest_loop(text, period) >= max(least, 3 * period) for period in range(1, len(text) // 3 + 1))


def longest_loop(text: str, period: int) -> int:
    """Count the characters in the longest stretch of the text that repeats itself every `period` characters."""
    longest = run = 0
    for earlier, later in zip(text, text[period:], strict=False):
        run = run + 1 if earlier == later else 0
        longest = max(longest, run)
    return longest + period


def distinct(texts: Sequence[str], n: int) -> float | None:
    """Return the share of distinct runs of n words among all of them (distinct-n, arXiv 1510.03055); None of none."""
    runs: Counter[tuple[str, ...]] = Counter()
    for text in texts:
        words = re.findall(r"\w+", text.lower())
        runs.update(tuple(words[start : start + n]) for start in range(len(words) - n + 1))
    return len(runs) / runs.total() if runs else None
