"""ROUGE-L recall against the definition, and against what the `rouge-score` package gave."""

from itertools import combinations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastforget.evaluate.rouge import common_length, rouge_l_recall

WORDS = st.lists(st.sampled_from("abc"), max_size=7)


@given(WORDS, WORDS)
def test_length_is_that_of_the_longest_common_subsequence(words, others):
    def subsequences(of, length):
        return set(combinations(of, length))

    longest = max(n for n in range(len(words) + 1) if n == 0 or subsequences(words, n) & subsequences(others, n))
    assert common_length(words, others) == longest


@pytest.mark.parametrize(
    ("truth", "output", "recall"),  # of rouge_score 0.1.2, RougeScorer(["rougeL"], use_stemmer=False)
    [
        ("Water boils at a hundred degrees.", "It boils at hundred", 0.5),
        ("The Plan's under STONE-4 by the river", "the plan s by stone 4: river", 2 / 3),
        ("x", "", 0.0),
        ("...", "...", 0.0),
        ("", "anything", 0.0),
        ("Straße naïve İstanbul", "strasse na ve i stanbul", 2 / 3),
    ],
)
def test_recall_is_that_of_the_package(truth, output, recall):
    assert rouge_l_recall(truth, output) == pytest.approx(recall)
