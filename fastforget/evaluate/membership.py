"""Was a text in the training data? Membership inference from the likelihood of its tokens.

For each text, over its label tokens, a score that is higher the more it looks like a member:

- LOSS: mean log p (Yeom et al., arXiv 1709.01604);
- zlib: mean log p over the bytes that zlib compresses the text to (Carlini et al., arXiv 2012.07805);
- Min-K: mean of the k lowest share of the log p (Shi et al., arXiv 2310.16789);
- Min-K++: the same of (log p_y - E_p[log p]) / sd_p[log p] (Zhang et al., arXiv 2404.02936);
- reference: mean log p less that of a model that did not see the text (Carlini et al., arXiv 2012.07805).

AUC is the probability that a member scores higher than a non-member: 0.5 says nothing, 1 gives every member away.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass

from fastforget.errors import FastforgetError
from fastforget.evaluate.label_tokens import LabelTokens
from fastforget.evaluate.libraries import library

K = 0.2  # of Min-K and Min-K++, as published; MUSE takes 0.4
MUSE_K = 0.4
LEAST_VARIANCE = 1e-6  # of log p over the vocabulary, below which a distribution counts as this sharp


@dataclass(frozen=True)
class MembershipScores:
    """One text; the higher, the more it looks like a member."""

    loss: float
    zlib: float
    min_k: float
    min_k_plus_plus: float | None  # None where the moments were not measured
    reference: float | None  # None without a reference


def membership_scores(
    tokens: LabelTokens, text: str, reference: LabelTokens | None = None, k: float = K
) -> MembershipScores:
    """Score one text.

    Args:
        tokens: its label tokens, with moments where Min-K++ is wanted.
        text: what zlib compresses.
        reference: the same tokens under a model that never saw the text.
        k: share of the tokens that Min-K and Min-K++ look at, at least one token.
    """
    return MembershipScores(
        loss=-tokens.nll,
        zlib=-tokens.nll / len(zlib.compress(text.encode())),
        min_k=mean_of_lowest(tokens.logp, k),
        min_k_plus_plus=mean_of_lowest(standardised(tokens), k) if tokens.logp_mean else None,
        reference=None if reference is None else reference.nll - tokens.nll,
    )


def standardised(tokens: LabelTokens) -> list[float]:
    """Return (log p_y - E_p[log p]) / sd_p[log p] of each token."""
    triples = zip(tokens.logp, tokens.logp_mean, tokens.logp_var, strict=True)
    return [(logp - mean) / math.sqrt(max(variance, LEAST_VARIANCE)) for logp, mean, variance in triples]


def mean_of_lowest(values: Sequence[float], share: float) -> float:
    """Average the lowest `share` of the values, at least one of them.

    >>> mean_of_lowest([-1.0, -4.0, -2.0, -3.0, 0.0], 0.4)
    -3.5
    """
    if not 0.0 < share <= 1.0:
        raise FastforgetError(f"the share of tokens must be above 0 and at most 1, not {share}")
    count = max(1, int(len(values) * share))
    return sum(sorted(values)[:count]) / count


def auc(members: Sequence[float], others: Sequence[float]) -> float | None:
    """Return the area under the ROC curve of telling members from others; None where either is missing or NaN.

    Raises:
        FastforgetError: scikit-learn is not installed.
    """
    scores = [*members, *others]
    if not members or not others or any(math.isnan(score) for score in scores):
        return None
    metrics = library("sklearn.metrics", "the AUC of membership inference")
    return float(metrics.roc_auc_score([1] * len(members) + [0] * len(others), scores))


def membership_aucs(members: Sequence[MembershipScores], others: Sequence[MembershipScores]) -> dict[str, float | None]:
    """Return the AUC of each attack by name; None where an attack was not measured for every text."""
    aucs: dict[str, float | None] = {}
    for name in MembershipScores.__dataclass_fields__:
        columns = [[asdict(each)[name] for each in side] for side in (members, others)]
        measured = all(value is not None for column in columns for value in column)
        aucs[name] = auc(*columns) if measured else None
    return aucs


def privleak(unlearned: float | None, retained: float | None) -> tuple[float | None, str | None]:
    """Return MUSE's PrivLeak in percent, and a reason where there is none (arXiv 2407.06460).

    Both are AUCs of Min-K (k = 0.4) for forget against holdout texts, of the unlearned model and of one that was
    trained without the forget set. MUSE counts its AUC from the other side (1 - AUC), so that -100 is a model that
    still gives every member away, 0 is the retrained model, and above 0 the texts are less likely than if they had
    never been seen.

    >>> privleak(1.0, 0.5)
    (-100.0, None)
    >>> privleak(0.5, None)
    (None, 'no log of a model that was trained without the forget set')
    """
    if retained is None:
        return None, "no log of a model that was trained without the forget set"
    if unlearned is None:
        return None, "no AUC of the unlearned model: it needs forget and holdout texts"
    if retained >= 1.0:
        return (
            None,
            "even the model trained without the forget set has an AUC of 1: nothing to compare with",
        )
    return 100.0 * ((1.0 - unlearned) - (1.0 - retained)) / (1.0 - retained), None
