"""`fastforget select`: an evaluator says which dialogues of a data set are to be forgotten (arXiv 2404.16841).

Everything is kept as it goes: scores are written batch by batch, and the same command run again takes them up. What is
left out, and why, is written too.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from fastforget.data.chat import RowReader, check_messages, choose_columns
from fastforget.data.formats import rows_of_ours
from fastforget.data.sources import Source, row_opener
from fastforget.errors import FastforgetError
from fastforget.evaluate.evaluators import Dialogue, Evaluator, check_score, load_evaluator, name_of
from fastforget.evaluate.generation import continue_greedily
from fastforget.evaluate.plot import plot_scores
from fastforget.files import written_whole
from fastforget.jobs.evaluation_options import SelectOptions
from fastforget.jobs.options import called_with, console_of
from fastforget.jobs.running import progress_bar, say, surroundings
from fastforget.models import load_base, load_tokenizer, usable_device

PROMPT_TOKENS = 512  # of a prompt that the model under test answers
Row = dict[str, Any]  # of what is written: prompt, response, score, source


@called_with(SelectOptions)
def select(options: SelectOptions) -> dict[str, Any]:
    """Score dialogues, and write those that are to be forgotten: `fastforget select` in Python.

    Beside `out` (prompt, response, score, source of each) lie the scores of all dialogues, what was left out, and a
    histogram. An interrupted run goes on where it was when the same is run again.

    Args:
        evaluator: as on the command line, or a function that takes a list of (prompt, response) and returns as many
            scores from 0 to 1.

    Returns:
        Counts and places: "chosen", "left_out", "unscored", "out", ...

    Raises:
        FastforgetError: bad input, before anything is scored; a bad row or score, nothing chosen, or a full disk, with
            the scores so far kept.
    """
    with surroundings(0, options.quiet):
        try:
            return run_select(options)
        except OSError as error:
            raise FastforgetError(f"{options.out} cannot be written ({error.strerror}): give another --out") from None


def run_select(options: SelectOptions) -> dict[str, Any]:
    """Read, answer where asked to, score, write."""
    console = console_of(options.quiet, options.console)
    rows = list(itertools.islice(dialogues_of(options.source), options.limit))
    if not rows:
        raise FastforgetError("there is nothing to choose from: the data holds no dialogue")
    scores = ScoreFile(options.file("scores.jsonl.part"), options)
    known = scores.take_up(rows)
    if known:
        console.print(f"{known} of {len(rows)} dialogues are scored already.")
    if known < len(rows):
        evaluator = load_evaluator(
            options.evaluator,
            labels=options.label_names,
            judge_prompt=options.judge_prompt,
            bits=options.bits,
            device=options.device,
        )
        answer = Answerer(options) if options.generate else None
        with progress_bar("Scoring", console) as update:
            for start in range(known, len(rows), options.batch_size):
                part = rows[start : start + options.batch_size]
                scores.append(score(part, evaluator, answer))
                update(start + len(part), len(rows))
    found = write_selection(scores.rows, options)
    scores.finish(options.file("scores.jsonl"))
    say(
        console,
        f"{found['chosen']} of {len(rows)} dialogues score at least {options.threshold:g} and are in {options.out}; "
        f"{found['left_out']} do not ({options.file('left-out.jsonl')}).",
    )
    return found


def dialogues_of(source: Source) -> Iterator[Row]:
    """Yield {prompt, response, source} of each dialogue; a text alone has an empty prompt.

    Raises:
        FastforgetError: a row without the columns, or with values that are no text; it is named.
    """
    for label, row in row_opener(source)():
        for part in rows_of_ours(source.format, row, label, chat=True):
            yield {**dialogue_of(part, source.columns, label), "source": label}


def dialogue_of(row: Any, columns: Mapping[str, str], label: str) -> dict[str, str]:
    """Return the prompt and the response of a row."""
    if isinstance(row, str):
        return {"prompt": "", "response": row}
    if not isinstance(row, Mapping):
        raise FastforgetError(f"{label} is a row of type {type(row).__name__}: rows are texts, or dicts of columns")
    chosen = choose_columns(columns, row, label)
    if "messages" in chosen:
        *before, last = check_messages(row[chosen["messages"]], label)
        return {"prompt": "\n".join(each["content"] for each in before), "response": last["content"]}
    for column in chosen.values():
        if not isinstance(row[column], str):
            kind = "empty (None)" if row[column] is None else f"of type {type(row[column]).__name__}"
            raise FastforgetError(f"{label} has a {column!r} that is {kind}: it must be text")
    if "text" in chosen:
        return {"prompt": "", "response": row[chosen["text"]]}
    return {"prompt": row[chosen["prompt"]], "response": row[chosen["response"]]}


class Answerer:
    """The model under test, which answers prompts itself."""

    def __init__(self, options: SelectOptions) -> None:
        assert options.model is not None
        self.tokenizer = load_tokenizer(options.model)
        self.model = load_base(os.fspath(options.model), options.bits, usable_device(options.device))
        self.reader = RowReader(self.tokenizer, PROMPT_TOKENS, chat_template=options.chat_template)

    def __call__(self, rows: Sequence[Row]) -> list[str]:
        """Answer each prompt greedily."""
        prompts = []
        for row in rows:
            if not row["prompt"].strip():
                raise FastforgetError(f"{row['source']} has no prompt to answer: --generate needs prompts")
            example = self.reader.examples({"prompt": row["prompt"], "response": "."}, row["source"])[0]
            prompts.append(example.input_ids[: example.prompt_length])
        return continue_greedily(self.model, self.tokenizer, prompts)


def score(rows: Sequence[Row], evaluator: Evaluator, answer: Callable[[Sequence[Row]], list[str]] | None) -> list[Row]:
    """Score a batch.

    Raises:
        FastforgetError: a score that is not from 0 to 1; the dialogue is named.
    """
    if answer is not None:
        rows = [{**row, "response": response} for row, response in zip(rows, answer(rows), strict=True)]
    found = evaluator([Dialogue(row["prompt"], row["response"]) for row in rows])
    for row, value in zip(rows, found, strict=True):
        check_score(value, row["source"])
    return [{**row, "score": value} for row, value in zip(rows, found, strict=True)]


class ScoreFile:
    """The scores so far, on disk after each batch.

    Its first line says what they depend on, and each row which dialogue it is of: other data, another evaluator or
    another question begins anew.
    """

    def __init__(self, path: Path, options: SelectOptions) -> None:
        self.path = path
        self.rows: list[Row] = []
        evaluator = options.evaluator
        asked = {
            "evaluator": name_of(evaluator) if callable(evaluator) else os.fspath(evaluator),
            "labels": options.label_names,
            "judge_prompt": options.judge_prompt,
            "model": os.fspath(options.model) if options.generate and options.model is not None else None,
            "chat_template": options.chat_template if options.generate else None,
            "bits": options.bits,
        }
        self.heading = {"settings": hashlib.blake2b(json.dumps(asked).encode(), digest_size=16).hexdigest()}

    def take_up(self, rows: Sequence[Row]) -> int:
        """Take the scores of the first dialogues that are known; return how many those are."""
        stored = stored_lines(self.path)
        if stored[:1] == [self.heading]:
            for row, line in zip(rows, stored[1:], strict=False):
                if line.get("of") != key_of(row):
                    break
                self.rows.append({name: value for name, value in line.items() if name != "of"})
        self.keys = [key_of(row) for row in rows]
        with written_whole(self.path) as scratch:  # a line that was half written goes
            lines = [self.heading, *({**row, "of": key} for row, key in zip(self.rows, self.keys, strict=False))]
            scratch.write_text(json_lines(lines), encoding="utf-8")
        return len(self.rows)

    def append(self, rows: Sequence[Row]) -> None:
        """Add the next scores."""
        keys = self.keys[len(self.rows) : len(self.rows) + len(rows)]
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(json_lines({**row, "of": key} for row, key in zip(rows, keys, strict=True)))
        self.rows += rows

    def finish(self, path: Path) -> None:
        """Write the scores where they stay."""
        with written_whole(path) as scratch:
            scratch.write_text(json_lines(self.rows), encoding="utf-8")
        self.path.unlink()


def stored_lines(path: Path) -> list[dict[str, Any]]:
    """Read the lines of an earlier run that are whole."""
    lines: list[dict[str, Any]] = []
    try:
        for line in path.read_text(encoding="utf-8").split("\n"):
            lines.append(dict(json.loads(line)))
    except (OSError, ValueError, TypeError):
        pass
    return lines


def key_of(row: Row) -> str:
    """Hash a dialogue as it was read."""
    return hashlib.blake2b(json.dumps([row["prompt"], row["response"]]).encode(), digest_size=8).hexdigest()


def json_lines(rows: Iterable[Mapping[str, Any]]) -> str:
    """Write rows as JSON, one a line."""
    return "".join(json.dumps(row, ensure_ascii=True) + "\n" for row in rows)


def write_selection(rows: Sequence[Row], options: SelectOptions) -> dict[str, Any]:
    """Write what is chosen and what is left out, and draw the scores.

    Raises:
        FastforgetError: nothing is chosen; the scores are kept.
    """
    chosen = [row for row in rows if row["score"] >= options.threshold]
    left = [row for row in rows if row["score"] < options.threshold]
    written = [row for row in chosen if row["response"].strip()]  # an empty answer has nothing to forget
    left += [row for row in chosen if not row["response"].strip()]
    if not written:
        highest = max(row["score"] for row in rows)
        raise FastforgetError(
            f"nothing is chosen: none of {len(rows)} dialogues scores at least {options.threshold:g} (the highest is "
            f"{highest:.3g}); the scores are kept in {options.file('scores.jsonl.part')}, give a lower --threshold"
        )
    for path, part in ((Path(options.out), written), (options.file("left-out.jsonl"), left)):
        with written_whole(path) as scratch:
            scratch.write_text(json_lines(part), encoding="utf-8")
    histogram = options.file("png")
    drawn = plot_scores(histogram, [row["score"] for row in rows], options.threshold)
    return {
        "chosen": len(written),
        "left_out": len(left),
        "out": str(options.out),
        "histogram": None if drawn is None else str(histogram),
    }
