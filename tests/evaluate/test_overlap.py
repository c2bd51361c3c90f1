"""ROUGE and BLEU of hand-made texts, computed by hand."""

import doctest
import math

import pytest

from fastforget.evaluate import overlap as module
from fastforget.evaluate.overlap import bleu, overlap


def test_rouge_of_hand_made_texts():
    assert doctest.testmod(module).failed == 0
    # words in common: the, oak, tree (in order: "the ... oak tree" is a subsequence of both)
    found = overlap("the old oak tree fell", "the tall oak tree")
    assert (found.rouge_1, found.rouge_l) == (3 / 5, 3 / 5)
    assert found.rouge_l_f1 == pytest.approx(2 * (3 / 5) * (3 / 4) / (3 / 5 + 3 / 4))
    # both words are there, but not in order
    swapped = overlap("oak tree", "tree oak")
    assert (swapped.rouge_1, swapped.rouge_l) == (1.0, 0.5)


@pytest.mark.parametrize("truth, output", [("the oak", ""), ("", "the oak"), ("", ""), ("...", "?!")])
def test_rouge_of_nothing_is_zero(truth, output):
    assert overlap(truth, output) == module.Overlap(0.0, 0.0, 0.0)


def test_rouge_of_identical_texts_is_one():
    assert overlap("The oak, the tree.", "the oak the tree") == module.Overlap(1.0, 1.0, 1.0)


def test_bleu_of_hand_made_texts():
    """n-gram precisions 4/5, 3/4, 2/3, 1/2 (no brevity penalty: one word longer), written out."""
    truth, output = "the old oak tree", "the old oak tree fell"
    expected = math.exp(sum(math.log(share) for share in (4 / 5, 3 / 4, 2 / 3, 1 / 2)) / 4)
    assert bleu([truth], [output]) == pytest.approx(expected)
    # the shorter output: all n-grams are right, and the brevity penalty is exp(1 - 5/4)
    assert bleu([output], [truth]) == pytest.approx(math.exp(1 - 5 / 4))
    assert bleu([truth, truth], [truth, truth]) == pytest.approx(1.0)
    assert bleu([truth], [""]) == 0.0 and bleu([], []) is None
    with pytest.raises(ValueError, match="1 true texts and 2"):
        bleu([truth], [truth, truth])
