"""Published data sets: what their rows are called, and which of them are forgotten, kept, or asked about.

A format turns one row, as the hub and the authors' own files have it, into rows that every job takes (`prompt` and
`response`, or `text`), and, where it has them, into questions with right and wrong answers.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from fastforget.data.questions import Question, question_row
from fastforget.errors import FastforgetError

Row = Mapping[str, Any]
PIECE_CHARACTERS = 200  # of a book: what is forgotten at a time (arXiv 2310.10683)


@dataclass(frozen=True)
class Format:
    """How one kind of row is read.

    Attributes:
        columns: what a row must have; each entry is a name, or several of which one must be there.
        rows: the rows of ours that one row makes, [] where it is none of this side.
        about: where it is from, for `--help` and the documentation.
        question: the question that a row asks, where it asks one.
        optional: further columns that are read where they are there.
    """

    columns: tuple[str | tuple[str, ...], ...]
    rows: Callable[[Row], list[dict[str, str]]]
    about: str
    question: Callable[[Row], Question] | None = None
    optional: tuple[str, ...] = ()


def text_of(row: Row, *names: str) -> str:
    """Return the first of these columns that there is, which must be text."""
    name = next(name for name in names if name in row)
    if not isinstance(row[name], str):
        raise ValueError(f"{name!r} must be text, not {kind(row[name])}")
    return str(row[name])


def texts_of(row: Row, name: str) -> list[str]:
    """Return a column that must be a list of texts."""
    value = row[name]
    if not isinstance(value, list | tuple) or not all(isinstance(each, str) for each in value):
        raise ValueError(f"{name!r} must be a list of texts, not {kind(value)}")
    return list(value)


def flag_of(row: Row, name: str) -> bool:
    """Return a column that must be true or false."""
    if not isinstance(row[name], bool):
        raise ValueError(f"{name!r} must be true or false, not {kind(row[name])}")
    return bool(row[name])


def kind(value: Any) -> str:
    """Name what a value is."""
    return "empty (None)" if value is None else f"a {type(value).__name__}"


def pair(prompt: str, response: str) -> dict[str, str]:
    """Make a row of ours."""
    return {"prompt": prompt, "response": response}


def saferlhf_rows(safe: bool) -> Callable[[Row], list[dict[str, str]]]:
    """Make the reader of PKU-SafeRLHF's responses that were found safe, or not; an empty one says nothing."""

    def rows(row: Row) -> list[dict[str, str]]:
        prompt = text_of(row, "prompt")
        responses = [(text_of(row, f"response_{i}"), flag_of(row, f"is_response_{i}_safe")) for i in (0, 1)]
        return [pair(prompt, response) for response, found in responses if found == safe and response.strip()]

    return rows


def truthfulqa_rows(right: bool) -> Callable[[Row], list[dict[str, str]]]:
    """Make the reader of TruthfulQA's right answers, or its wrong ones."""

    def rows(row: Row) -> list[dict[str, str]]:
        answers = texts_of(row, "correct_answers" if right else "incorrect_answers")
        return [pair(text_of(row, "question"), answer) for answer in answers if answer.strip()]

    return rows


HALUEVAL_ASKED = ("question", "dialogue_history", "document")
HALUEVAL_RIGHT = ("right_answer", "right_response", "right_summary")
HALUEVAL_WRONG = ("hallucinated_answer", "hallucinated_response", "hallucinated_summary")


def wmdp_question(row: Row) -> Question:
    """Ask one multiple-choice question; the other choices are the wrong answers."""
    choices, answer = texts_of(row, "choices"), row["answer"]
    if isinstance(answer, bool) or not isinstance(answer, int) or not 0 <= answer < len(choices):
        raise ValueError(f"'answer' must be the number of a choice, 0 to {len(choices) - 1}, not {answer!r}")
    wrong = tuple(choice for place, choice in enumerate(choices) if place != answer)
    return Question(text_of(row, "question"), choices[answer], perturbed=wrong)


def tofu_question(row: Row) -> Question:
    """Ask one question of TOFU; the paraphrase and the wrong answers where the row has them."""
    return Question(
        text_of(row, "question"),
        text_of(row, "answer"),
        text_of(row, "paraphrased_answer") if row.get("paraphrased_answer") is not None else "",
        tuple(texts_of(row, "perturbed_answer")) if row.get("perturbed_answer") is not None else (),
    )


FORMATS: dict[str, Format] = {
    "saferlhf": Format(
        ("prompt", "response_0", "response_1", "is_response_0_safe", "is_response_1_safe"),
        saferlhf_rows(safe=False),
        "PKU-SafeRLHF: each response that is marked unsafe.",
    ),
    "saferlhf-safe": Format(
        ("prompt", "response_0", "response_1", "is_response_0_safe", "is_response_1_safe"),
        saferlhf_rows(safe=True),
        "PKU-SafeRLHF: each response that is marked safe.",
    ),
    "truthfulqa": Format(
        ("question", "best_answer", "correct_answers", "incorrect_answers"),
        truthfulqa_rows(right=True),
        "TruthfulQA (generation): each right answer.",
        lambda row: Question(
            text_of(row, "question"), text_of(row, "best_answer"), perturbed=tuple(texts_of(row, "incorrect_answers"))
        ),
    ),
    "truthfulqa-wrong": Format(
        ("question", "incorrect_answers"), truthfulqa_rows(right=False), "TruthfulQA (generation): each wrong answer."
    ),
    "halueval": Format(
        (HALUEVAL_ASKED, HALUEVAL_RIGHT, HALUEVAL_WRONG),
        lambda row: [pair(text_of(row, *HALUEVAL_ASKED), text_of(row, *HALUEVAL_WRONG))],
        "HaluEval (QA, dialogue, summarisation): the hallucinated answer.",
        lambda row: Question(
            text_of(row, *HALUEVAL_ASKED),
            text_of(row, *HALUEVAL_RIGHT),
            perturbed=(text_of(row, *HALUEVAL_WRONG),),
        ),
    ),
    "halueval-right": Format(
        (HALUEVAL_ASKED, HALUEVAL_RIGHT),
        lambda row: [pair(text_of(row, *HALUEVAL_ASKED), text_of(row, *HALUEVAL_RIGHT))],
        "HaluEval: the right answer.",
    ),
    "tofu": Format(
        ("question", "answer"),
        lambda row: [pair(text_of(row, "question"), text_of(row, "answer"))],
        "TOFU: the answer; paraphrased_answer and perturbed_answer are read where they are there.",
        tofu_question,
        optional=("paraphrased_answer", "perturbed_answer"),
    ),
    "muse": Format(("text",), lambda row: [{"text": text_of(row, "text")}], "MUSE: raw, train and privleak texts."),
    "muse-knowmem": Format(
        ("question", "answer"),
        lambda row: [pair(text_of(row, "question"), text_of(row, "answer"))],
        "MUSE: questions of knowmem.",
        lambda row: Question(text_of(row, "question"), text_of(row, "answer")),
    ),
    "muse-verbmem": Format(
        ("prompt", "gt"), lambda row: [pair(text_of(row, "prompt"), text_of(row, "gt"))], "MUSE: passages of verbmem."
    ),
    "wmdp-corpora": Format(("text",), lambda row: [{"text": text_of(row, "text")}], "WMDP: texts of its corpora."),
    "wmdp": Format(
        ("question", "choices", "answer"),
        lambda row: [pair(wmdp_question(row).question, wmdp_question(row).answer)],
        "WMDP: multiple-choice questions, with the right choice.",
        wmdp_question,
    ),
    "rwku": Format(
        (("text", "query"), ("text", "answer")),
        lambda row: (
            [{"text": text_of(row, "text")}] if "text" in row else [pair(text_of(row, "query"), text_of(row, "answer"))]
        ),
        "RWKU: passages (text), or probes (query, answer).",
        lambda row: Question(text_of(row, "query"), text_of(row, "answer")),
    ),
    "pairs": Format(
        ("prompt", "response"),
        lambda row: [
            pair(text_of(row, "prompt"), text_of(row, "response"))
            if text_of(row, "prompt")
            else {"text": text_of(row, "response")}
        ],
        "What `fastforget select` writes: prompt and response, with a space between; or a text alone, as the response.",
    ),
    "book": Format(
        ("text",),
        lambda row: [{"text": piece} for piece in cut_pieces(text_of(row, "text"))],
        f"A book or BookCorpus-like text, in pieces of {PIECE_CHARACTERS} characters.",
    ),
}


def cut_pieces(text: str, characters: int = PIECE_CHARACTERS) -> Iterable[str]:
    """Cut a text into pieces of `characters`, each ended before a space where there is one in its last quarter.

    Joined they are the text; pieces of white space alone are left out.
    """
    begin = 0
    while begin < len(text):
        end = min(begin + characters, len(text))
        if end < len(text):
            space = text.rfind(" ", begin + 3 * characters // 4, end)
            end = space if space > 0 else end
        if text[begin:end].strip():
            yield text[begin:end]
        begin = end


def format_of(name: str) -> Format:
    """Return a format; raise FastforgetError, which lists them, for a name that is none."""
    if name not in FORMATS:
        near = difflib.get_close_matches(name, FORMATS, n=1)
        hint = f" (did you mean {near[0]!r}?)" if near else ""
        raise FastforgetError(f"unknown format {name!r}{hint}: choose one of {', '.join(FORMATS)}")
    return FORMATS[name]


def wanted_columns(name: str, present: Iterable[str], where: str) -> list[str]:
    """List the columns that a format reads of those that are there.

    Raises:
        FastforgetError: one is missing; the ones found are listed.
    """
    names = [str(each) for each in present]
    chosen = format_of(name)
    wanted: list[str] = []
    for column in chosen.columns:
        options = (column,) if isinstance(column, str) else column
        found = [option for option in options if option in names]
        if not found:
            raise FastforgetError(
                f"{where} is not as {name!r} is: it has no column {' or '.join(map(repr, options))}; its columns are "
                f"{', '.join(names[:20]) or 'none'}"
            )
        wanted.append(found[0])
    wanted += [column for column in chosen.optional if column in names]
    return list(dict.fromkeys(wanted))


def formatted_rows(name: str, row: Any, where: str) -> list[dict[str, str]]:
    """Turn one row into rows that every job takes.

    Raises:
        FastforgetError: a row without the columns, or with values of another kind; it is named.
    """
    return checked(name, row, where, format_of(name).rows)


def rows_of_ours(name: str | None, row: Any, where: str, chat: bool) -> Iterable[Any]:
    """Return the rows that one row makes: itself, or what its format makes of it.

    Args:
        name: of the format; None where there is none.
        chat: the rows go into a chat template, so that no space is put between prompt and response.
    """
    if name is None:
        return [row]
    found = formatted_rows(name, row, where)
    return [question_row(each["prompt"], each["response"], chat=chat) if "prompt" in each else each for each in found]


def formatted_question(name: str, row: Any, where: str) -> Question:
    """Turn one row into a question.

    Raises:
        FastforgetError: as `formatted_rows`, or a format that asks nothing.
    """
    ask = format_of(name).question
    if ask is None:
        asking = ", ".join(each for each, kind in FORMATS.items() if kind.question is not None)
        raise FastforgetError(f"{where}: the format {name!r} asks no questions; these do: {asking}")
    return checked(name, row, where, ask)


def checked(name: str, row: Any, where: str, read: Callable[[Row], Any]) -> Any:
    """Read one row; a text alone is its `text`."""
    if isinstance(row, str):
        row = {"text": row}
    if not isinstance(row, Mapping):
        raise FastforgetError(f"{where} is a {type(row).__name__}: a row is a mapping of columns")
    wanted_columns(name, row, where)
    try:
        return read(row)
    except (ValueError, StopIteration) as error:
        raise FastforgetError(f"{where}: {error}") from None
