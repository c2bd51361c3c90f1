"""Membership scores of hand-made tokens, written out; AUC by counting pairs."""

import doctest
import math
import zlib

import pytest

from fastforget.errors import FastforgetError
from fastforget.evaluate import membership
from fastforget.evaluate.label_tokens import LabelTokens
from fastforget.evaluate.membership import auc, mean_of_lowest, membership_aucs, membership_scores, privleak

LOGP = (-1.0, -5.0, -0.5, -2.0, -3.5)
TOKENS = LabelTokens(LOGP, (-2.0, -4.0, -1.0, -2.5, -3.0), (1.0, 4.0, 0.25, 1e-12, 2.25))


def test_scores_of_hand_made_tokens():
    assert doctest.testmod(membership).failed == 0
    text = "the old oak tree " * 10
    found = membership_scores(TOKENS, text, reference=LabelTokens((-4.0,) * 5), k=0.4)
    assert found.loss == pytest.approx(-12.0 / 5)
    assert found.zlib == pytest.approx(-12.0 / 5 / len(zlib.compress(text.encode())))
    assert found.min_k == pytest.approx((-5.0 - 3.5) / 2)
    # 1/1, -1/2, 0.5/0.5, 0.5/sqrt(1e-6), -0.5/1.5: the two lowest
    assert found.min_k_plus_plus == pytest.approx((-0.5 - 0.5 / 1.5) / 2)
    assert found.reference == pytest.approx(-12.0 / 5 + 4.0)
    bare = membership_scores(LabelTokens(LOGP), text)
    assert bare.min_k == -5.0 and bare.min_k_plus_plus is None and bare.reference is None


def test_the_lowest_are_at_least_one():
    assert mean_of_lowest([-3.0], 0.2) == -3.0 and mean_of_lowest([-1.0, -2.0], 1.0) == -1.5
    for share in (0.0, 1.5, math.nan):
        with pytest.raises(FastforgetError, match="share of tokens"):
            mean_of_lowest([-1.0], share)


def counted(members, others):
    """Share of pairs in which the member scores higher; a tie is a half."""
    pairs = [(member > other) + 0.5 * (member == other) for member in members for other in others]
    return sum(pairs) / len(pairs)


@pytest.mark.parametrize(
    "members, others",
    [([0.9, 0.4, 0.7], [0.5, 0.1]), ([1.0], [0.0]), ([0.0], [1.0]), ([0.5, 0.5], [0.5]), ([1, 2, 3, 3], [3, 0, 1])],
)
def test_auc_counts_pairs(members, others):
    assert auc(members, others) == pytest.approx(counted(members, others))


def test_no_auc_without_both_sides_or_with_nan():
    assert auc([], [1.0]) is auc([1.0], []) is auc([math.nan], [1.0]) is None


def test_aucs_by_attack():
    sides = [[membership_scores(LabelTokens((logp,)), "text") for logp in part] for part in ((-1.0, -3.0), (-2.0,))]
    aucs = membership_aucs(*sides)
    assert aucs == {"loss": 0.5, "zlib": 0.5, "min_k": 0.5, "min_k_plus_plus": None, "reference": None}


def test_privleak_is_muses():
    """MUSE's AUC is of the other side: 0.4 unlearned and 0.5 retrained are 100 (0.4 - 0.5) / 0.5."""
    assert privleak(1 - 0.4, 1 - 0.5)[0] == pytest.approx(100 * (0.4 - 0.5) / 0.5)
    assert privleak(0.25, 0.5) == (pytest.approx(50.0), None)
    assert privleak(0.5, 0.5) == (0.0, None)
    for unlearned, retained, words in ((None, 0.5, "holdout"), (0.5, None, "no log"), (0.5, 1.0, "AUC of 1")):
        value, reason = privleak(unlearned, retained)
        assert value is None and words in reason
