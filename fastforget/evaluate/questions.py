"""Questions with a right answer, its paraphrase and wrong ones: what a model makes of each.

TOFU (arXiv 2401.06121), as its authors' code computes it. With P(a|q)^(1/|a|) the geometric mean probability of an
answer's tokens:

- probability: of the right answer; and *normalised*, over the sum of those of the right and all wrong answers;
- truth ratio: that of the wrong answers (their geometric mean) over that of the paraphrased right one. Near 0 the model
  knows, near 1 it does not, above 1 it prefers what is wrong;
- ROUGE: ROUGE-L recall of the right answer in the greedy output.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from fastforget.data.chat import RowReader
from fastforget.data.examples import Example
from fastforget.data.questions import Question, question_row
from fastforget.errors import FastforgetError
from fastforget.evaluate.generation import CONTINUATION_CHARACTERS, Progress, continue_greedily
from fastforget.evaluate.label_tokens import LabelTokens, label_tokens
from fastforget.evaluate.overlap import overlap
from fastforget.head import context_length


@dataclass(frozen=True)
class Answered:
    """What a model makes of one question; all but the truth ratio from 0 to 1, None without wrong answers."""

    probability: float
    normalised: float | None
    paraphrased_probability: float
    truth_ratio: float | None
    rouge: float  # ROUGE-L recall
    rouge_f1: float
    output: str


def ask(
    model: Any,
    tokenizer: Any,
    questions: Sequence[Question],
    *,
    chat_template: bool | None = None,
    characters: int = CONTINUATION_CHARACTERS,
    batch_size: int = 16,
    progress: Progress | None = None,
) -> list[Answered]:
    """Ask a model each question, and measure every answer to it, in the questions' order.

    Args:
        chat_template: put question and answer into the tokenizer's chat template; default where it has one.
        characters: of the greedy output, at most.
        progress: called with (done, of how many) after each batch of the two passes.

    Raises:
        FastforgetError: an empty answer, or one that does not fit into the model's context with its question.
    """
    context = context_length(model) or 2**20
    reader = RowReader(tokenizer, context, chat_template=chat_template)
    examples: list[Example] = []
    for each in questions:
        for answer in answers_of(each):
            examples.append(whole_example(reader, each, answer))
    report = progress or (lambda done, total: None)
    total = len(examples) + len(questions)
    measured = label_tokens(model, examples, batch_size=batch_size, progress=lambda done, _: report(done, total))
    firsts, prompts, place = [], [], 0
    for each in questions:
        firsts.append(place)
        prompts.append(examples[place].input_ids[: examples[place].prompt_length])
        place += len(answers_of(each))
    outputs = continue_greedily(
        model,
        tokenizer,
        prompts,
        characters=characters,
        batch_size=batch_size,
        progress=lambda done, _: report(len(examples) + done, total),
    )
    return [
        answered(each, measured[first : first + len(answers_of(each))], output)
        for each, first, output in zip(questions, firsts, outputs, strict=True)
    ]


def answers_of(question: Question) -> list[str]:
    """List the right answer, its paraphrase, and the wrong ones."""
    return [question.answer, question.paraphrased or question.answer, *question.perturbed]


def whole_example(reader: RowReader, question: Question, answer: str) -> Example:
    """Make the example of one answer, which must be whole to be compared with another."""
    row = question_row(question.question, answer, chat=reader.use_template)
    examples = reader.examples(row, question.source or question.question)
    if len(examples) != 1:
        raise FastforgetError(
            f"{question.source or question.question!r}: question and answer are longer than the model's context of "
            f"{reader.max_length} tokens"
        )
    return examples[0]


def answered(question: Question, tokens: Sequence[LabelTokens | None], output: str) -> Answered:
    """Put one question's measures together; `tokens` are those of `answers_of(question)`."""
    nlls = [math.nan if each is None else each.nll for each in tokens]
    answer, paraphrased, *perturbed = nlls
    found = overlap(question.answer, output)
    return Answered(
        probability=math.exp(-answer),
        normalised=normalised_probability(answer, perturbed) if perturbed else None,
        paraphrased_probability=math.exp(-paraphrased),
        truth_ratio=truth_ratio(paraphrased, perturbed) if perturbed else None,
        rouge=found.rouge_l,
        rouge_f1=found.rouge_l_f1,
        output=output,
    )


def truth_ratio(paraphrased: float, perturbed: Sequence[float]) -> float:
    """Return wrong over right from mean NLLs (nats per token); the wrong ones' geometric mean.

    >>> round(truth_ratio(0.0, [1.0, 3.0]), 4) == round(math.exp(-2.0), 4)
    True
    """
    return math.exp(min(paraphrased - sum(perturbed) / len(perturbed), 700.0))  # beyond, a float ends


def normalised_probability(answer: float, perturbed: Sequence[float]) -> float:
    """Return the right answer's share of the probability of all answers, from mean NLLs (nats per token)."""
    return 1.0 / sum(math.exp(min(answer - nll, 700.0)) for nll in (answer, *perturbed))
