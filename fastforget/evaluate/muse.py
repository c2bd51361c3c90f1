"""MUSE (arXiv 2407.06460): verbatim memorisation, knowledge, and privacy leakage, each over its own texts.

- VerbMem: mean ROUGE-L F1 of the greedy continuation of a passage's beginning with what stands there;
- KnowMem: mean ROUGE-L F1 of greedy answers with the right ones;
- PrivLeak: `membership.privleak`, from Min-K with k = 0.4 over forget and holdout texts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from fastforget.data.chat import RowReader
from fastforget.data.examples import Example
from fastforget.data.questions import Question, question_row
from fastforget.data.text import begin_tokens, encode
from fastforget.errors import FastforgetError
from fastforget.evaluate.generation import Progress, continue_greedily
from fastforget.evaluate.label_tokens import label_tokens
from fastforget.evaluate.membership import MUSE_K, auc, mean_of_lowest, privleak
from fastforget.evaluate.overlap import overlap
from fastforget.evaluate.tofu import mean, read_log

VERBMEM_CHARACTERS = 512  # of a continuation; the benchmark takes 128 tokens, of about four characters
ANSWER_CHARACTERS = 128  # of an answer; the benchmark takes 32 tokens


@dataclass(frozen=True)
class MuseReport:
    """One model; all but PrivLeak (percent) from 0 to 1, None with a reason where one cannot be had."""

    forget_verbmem: float | None
    forget_knowmem: float | None
    retain_knowmem: float | None
    auc: float | None  # of Min-K, forget against holdout texts
    privleak: float | None
    privleak_reason: str | None


def verbmem(
    model: Any,
    tokenizer: Any,
    pairs: Sequence[tuple[str, str]],
    *,
    characters: int = VERBMEM_CHARACTERS,
    batch_size: int = 16,
    progress: Progress | None = None,
) -> float | None:
    """Return the mean ROUGE-L F1 over (beginning, what stands there); None of no pairs.

    Outputs are cut to the length of what stands there, as that is cut to `characters`.
    """
    start = begin_tokens(tokenizer)
    prompts = [[*start, *encode(tokenizer, begin, "a beginning")] for begin, _ in pairs]
    outputs = continue_greedily(
        model, tokenizer, prompts, characters=characters, batch_size=batch_size, progress=progress
    )
    truths = [truth[:characters] for _, truth in pairs]
    return mean(
        [overlap(truth, output[: len(truth)]).rouge_l_f1 for truth, output in zip(truths, outputs, strict=True)]
    )


def knowmem(
    model: Any,
    tokenizer: Any,
    questions: Sequence[Question],
    *,
    characters: int = ANSWER_CHARACTERS,
    chat_template: bool | None = None,
    batch_size: int = 16,
    progress: Progress | None = None,
) -> float | None:
    """Return the mean ROUGE-L F1 of greedy answers; None of no questions. Only an answer's first line counts."""
    reader = RowReader(tokenizer, 2**20, chat_template=chat_template)
    prompts = []
    for each in questions:
        row = question_row(each.question, each.answer, chat=reader.use_template)
        example = reader.examples(row, each.source or each.question)[0]
        prompts.append(example.input_ids[: example.prompt_length])
    outputs = continue_greedily(
        model, tokenizer, prompts, characters=characters, batch_size=batch_size, progress=progress
    )
    return mean(
        [
            overlap(each.answer, output.strip().partition("\n")[0]).rouge_l_f1
            for each, output in zip(questions, outputs, strict=True)
        ]
    )


def min_k_auc(
    model: Any,
    forget: Sequence[Example],
    holdout: Sequence[Example],
    *,
    batch_size: int = 16,
    progress: Progress | None = None,
) -> float | None:
    """Return the AUC of Min-K (k = 0.4) for forget against holdout texts; None where there are none of one."""
    found = label_tokens(model, [*forget, *holdout], batch_size=batch_size, progress=progress)
    scores = [None if each is None else mean_of_lowest(each.logp, MUSE_K) for each in found]
    sides = scores[: len(forget)], scores[len(forget) :]
    return auc(*([score for score in side if score is not None] for side in sides))


def muse_report(
    verbatim: float | None,
    known: tuple[float | None, float | None],
    unlearned_auc: float | None,
    retained_auc: float | None,
) -> MuseReport:
    """Put the figures together; `known` is KnowMem of forget and retain questions."""
    leak, reason = privleak(unlearned_auc, retained_auc)
    return MuseReport(verbatim, *known, unlearned_auc, leak, reason)


def read_retain_auc(path: str) -> float:
    """Read the AUC of Min-K from a retain model's log: our log.json, or open-unlearning's MUSE_EVAL.json.

    Raises:
        FastforgetError: a file of another form.
    """
    log = read_log(path)
    value = log.get("auc", log.get("mia_min_k"))
    if isinstance(value, dict):
        value = value.get("agg_value", value.get("auc"))
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise FastforgetError(
            f"{path} holds no AUC of Min-K: give log.json of `fastforget evaluate --suite muse`, or open-unlearning's "
            f"MUSE_EVAL.json; its keys are {', '.join(list(log)[:20])}"
        )
    return float(value)
