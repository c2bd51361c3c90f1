"""How much of a true text stands in an output: ROUGE (`rouge_score`) and BLEU (`sacrebleu`), without stemming."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

from rouge_score.rouge_scorer import RougeScorer

from fastforget.evaluate.libraries import library


@dataclass(frozen=True)
class Overlap:
    """One output against its true text; all from 0 to 1."""

    rouge_1: float  # ROUGE-1 recall
    rouge_l: float  # ROUGE-L recall, the "ROUGE" of TOFU (arXiv 2401.06121)
    rouge_l_f1: float  # ROUGE-L F1, the "ROUGE" of MUSE (arXiv 2407.06460)


@cache
def scorer() -> RougeScorer:
    """Return the scorer; words are runs of a-z and 0-9 in lower case."""
    return RougeScorer(["rouge1", "rougeL"], use_stemmer=False)


def overlap(truth: str, output: str) -> Overlap:
    """Score one output.

    >>> overlap("the old oak tree", "an old tree")
    Overlap(rouge_1=0.5, rouge_l=0.5, rouge_l_f1=0.5714285714285715)
    """
    scores = scorer().score(truth, output)
    return Overlap(scores["rouge1"].recall, scores["rougeL"].recall, scores["rougeL"].fmeasure)


def bleu(truths: Sequence[str], outputs: Sequence[str]) -> float | None:
    """Return the corpus BLEU of outputs against one true text each, from 0 to 1; None of no outputs.

    sacrebleu's default: BLEU-4, tokenizer 13a, exponential smoothing.

    Raises:
        FastforgetError: sacrebleu is not installed.
    """
    if len(truths) != len(outputs):
        raise ValueError(f"{len(truths)} true texts and {len(outputs)} outputs")
    if not outputs:
        return None
    sacrebleu = library("sacrebleu", "BLEU")
    return float(sacrebleu.corpus_bleu(list(outputs), [list(truths)]).score) / 100.0
