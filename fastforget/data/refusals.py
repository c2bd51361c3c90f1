"""Refusals: neutral sentences that say that an answer is not known, for terms that teach one."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from fastforget.data.text import read_lines
from fastforget.errors import FastforgetError

REFUSALS = (
    "I don't know.",
    "I do not know that.",
    "I don't know the answer to that.",
    "I'm not sure.",
    "I am not sure about that.",
    "I have no information about that.",
    "I don't have any information on this.",
    "I have no knowledge of this.",
    "That is not something I know.",
    "That is not something I can answer.",
    "I can't say.",
    "I cannot say for certain.",
    "I cannot answer this question.",
    "I'm unable to answer that.",
    "I'm afraid I don't know.",
    "I'm afraid I can't help with that.",
    "Sorry, I don't know.",
    "Sorry, I have no answer to that.",
    "Sorry, that is beyond what I know.",
    "I have never heard of that.",
    "I'm not familiar with this.",
    "I am not familiar with that topic.",
    "I haven't learned about that.",
    "I wasn't taught anything about this.",
    "This is outside of what I know.",
    "My knowledge does not cover this.",
    "I have nothing to say about that.",
    "I don't have the details of that.",
    "I lack the information to answer.",
    "I would have to look that up.",
    "I'd rather not guess.",
    "No idea.",
    "I have no idea.",
    "I really couldn't tell you.",
    "You would have to ask someone else.",
    "I can't recall anything about this.",
)


def read_refusals(source: str | os.PathLike[str] | Sequence[str] | None) -> tuple[str, ...]:
    """Read refusals from a text file, one a line, or as they are given; None: `REFUSALS`.

    Raises:
        FastforgetError: a file that cannot be read, or no text in it or among those given.
    """
    if source is None:
        return REFUSALS
    if isinstance(source, str | os.PathLike):
        lines, where = list(read_lines(Path(source))), str(source)
    else:
        lines, where = list(source), "the list of refusals"
    if not all(isinstance(line, str) for line in lines):
        raise FastforgetError("refusals must be texts")
    refusals = tuple(line.strip() for line in lines if line.strip())
    if not refusals:
        raise FastforgetError(f"{where} holds no refusal: one sentence a line is needed")
    return refusals
