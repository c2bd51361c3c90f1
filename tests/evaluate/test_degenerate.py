"""Degenerate text: blank, loops, one token; distinct-n."""

import doctest

import pytest

from fastforget.data import topics
from fastforget.evaluate import degenerate


@pytest.fixture(scope="module")
def tokenizer(corpus):
    return corpus.tokenizer


def test_degenerate_examples_of_the_docstring():
    result = doctest.testmod(degenerate)
    assert result.attempted > 0 and result.failed == 0


@pytest.mark.parametrize(
    "text",
    [
        "",
        " \n\t ",
        "?! ... --- ***",
        "_" * 200,
        "a" * 200,
        "the-" * 50,
        "and so it is\n" * 16,
        "The function returns " + "the value of " * 14,
        "Some text that makes sense before it sticks." + "\n" * 156,
        "x the y the z the w the the the the",
    ],
)
def test_degenerate(text):
    assert degenerate.is_degenerate(text)


@pytest.mark.parametrize(
    "text",
    [
        "42",
        "No, no.",
        "Я не знаю этого.",
        "=" * 60 + "\nThe following table lists the operators, from the tightest binding to the loosest one.",
        "1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17, 18, 19, 20, 21, 22, 23, 24, 25",
    ],
)
def test_not_degenerate(text):
    assert not degenerate.is_degenerate(text)


def test_real_text_is_hardly_ever_degenerate(tokenizer):
    """Every piece of the whole reference, tables and underlines too."""
    pieces = [
        text[start : start + 200]
        for text in topics.python_topics().values()
        for start in range(0, len(text) - 199, 1000)
    ]
    assert len(pieces) > 200
    assert sum(map(degenerate.is_degenerate, pieces)) < 0.01 * len(pieces)


def test_distinct_counts_runs_of_words_over_all_texts():
    assert degenerate.distinct(["a b a b", "A b"], 2) == 2 / 4
    assert degenerate.distinct(["one two three"], 1) == 1.0
    assert degenerate.distinct(["one", ""], 2) is None


def test_blank_is_without_a_letter_or_a_digit():
    assert all(map(degenerate.is_blank, ("", " \n", "?!_-")))
    assert not any(map(degenerate.is_blank, ("a", "7", "я")))
