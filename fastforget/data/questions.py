"""Questions with a right answer, its paraphrase, and wrong ones."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Question:
    """One question and its answers."""

    question: str
    answer: str
    paraphrased: str = ""  # another wording of the answer; "" stands for the answer itself
    perturbed: tuple[str, ...] = ()  # wrong answers, worded as the paraphrase
    source: str = ""  # where it came from, for messages


def question_row(prompt: str, response: str, *, chat: bool) -> dict[str, str]:
    """Make a row of ours; without a chat template a space stands between the two, where neither has one there.

    >>> question_row("Who?", "Orla.", chat=False)["response"]
    ' Orla.'
    """
    apart = chat or prompt[-1:].isspace() or response[:1].isspace() or not response
    return {"prompt": prompt, "response": response if apart else f" {response}"}
