"""Questions, read from any source of a known format."""

from __future__ import annotations

from dataclasses import replace

from fastforget.data.formats import formatted_question
from fastforget.data.questions import Question
from fastforget.data.sources import Source, check_source, describe, row_opener
from fastforget.errors import FastforgetError


def read_questions(source: Source) -> list[Question]:
    """Read the questions of a source that has a format.

    Raises:
        FastforgetError: as `read_source`, or a format that asks nothing.
    """
    check_source(source)
    if source.format is None:
        raise FastforgetError(f"{describe(source)}: questions are read from rows of a known format: name it")
    found = []
    for label, row in row_opener(source)():
        found.append(replace(formatted_question(source.format, row, label), source=label))
    if not found:
        raise FastforgetError(f"{describe(source)} holds no questions")
    return found
