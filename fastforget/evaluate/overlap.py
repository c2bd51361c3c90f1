"""How much of a true text stands in an output: ROUGE, without stemming, and BLEU (`sacrebleu`)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from fastforget.evaluate.libraries import library
from fastforget.evaluate.rouge import WORD, common_length


@dataclass(frozen=True)
class Overlap:
    """One output against its true text; all from 0 to 1."""

    rouge_1: float  # ROUGE-1 recall
    rouge_l: float  # ROUGE-L recall, the "ROUGE" of TOFU (arXiv 2401.06121)
    rouge_l_f1: float  # ROUGE-L F1, the "ROUGE" of MUSE (arXiv 2407.06460)


def overlap(truth: str, output: str) -> Overlap:
    """Score one output.

    >>> overlap("the old oak tree", "an old tree")
    Overlap(rouge_1=0.5, rouge_l=0.5, rouge_l_f1=0.5714285714285714)
    """
    words, others = WORD.findall(truth.lower()), WORD.findall(output.lower())
    if not words or not others:
        return Overlap(0.0, 0.0, 0.0)
    in_order = common_length(words, others)
    return Overlap(
        rouge_1=(Counter(words) & Counter(others)).total() / len(words),
        rouge_l=in_order / len(words),
        rouge_l_f1=2.0 * in_order / (len(words) + len(others)),
    )


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
