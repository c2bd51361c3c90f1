"""Streams: the answers that a side of the batch holds beside its own, and which of them share a forward.

A side's batch is its "answer" stream, and may carry companions: `batch["refusal"]`, row i the prompt of row i with a
refusal or an alternative answer, and `batch["mismatch"]`, prompts with other prompts' answers, any number of rows. A
term says which streams it looks at (`Term.streams`). A stream that no term looks at costs nothing; streams that one
term compares share one graph, so their rows go through the model together, in parts; others go one after the other,
which needs less memory.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastforget.batch import (
    COMPANIONS,
    FLAT_KEYS,
    ROLES,
    Batch,
    LabelCounts,
    PreparedSide,
    kept_tokens,
    positions_without_padding,
    prepare,
    split_rows,
    yes,
)
from fastforget.errors import FastforgetError
from fastforget.objectives import SideStats, Term

STREAMS = ("answer", *COMPANIONS)
NOT_OF_THE_MODEL = ("labels", "attention_mask", *FLAT_KEYS)  # or made where it is missing
BY_ROW = ("answer", "refusal")  # row i of one belongs to row i of the other
WHAT_IT_HOLDS = {
    "refusal": "the same prompts, row by row, with a refusal or an alternative answer (fastforget.with_refusals)",
    "mismatch": "prompts with other prompts' answers (fastforget.mismatched)",
}


@dataclass(frozen=True)
class StreamGroup:
    """Streams that go through the model together, and the terms that look at them."""

    streams: tuple[str, ...]
    terms: list[tuple[str, Term]]


def check_streams(term: Term) -> None:
    """Raise where a term looks at streams that its side does not have, or that cannot be compared row by row."""
    for stream in used_streams(term):
        if (term.on, stream) not in ROLES:
            known = ", ".join(name for side, name in ROLES if side == term.on)
            raise FastforgetError(f"{term.name}: the {term.on} batch has no stream {stream!r}: it has {known}")
    if not term.streams:
        raise FastforgetError(f"{term.name}: streams is empty: name the one that `value` gets first")
    if len(term.streams) > 1 and not set(term.streams) <= set(BY_ROW):
        raise FastforgetError(
            f"{term.name}: 'mismatch' belongs to no row of another stream, so a term looks at it alone, or takes a "
            "constant from it (`baseline_stream`)"
        )


def used_streams(term: Term) -> tuple[str, ...]:
    """Every stream that a term takes something from."""
    return term.streams if term.baseline_stream is None else (*term.streams, term.baseline_stream)


def stream_groups(terms: list[tuple[str, Term]]) -> list[StreamGroup]:
    """The streams that these terms look at, in groups that terms couple, and each group's terms."""
    groups: list[set[str]] = []
    for _, term in terms:
        touched = [group for group in groups if group & set(term.streams)]
        groups = [group for group in groups if group not in touched] + [set(term.streams).union(*touched)]
    groups.sort(key=lambda group: min(map(STREAMS.index, group)))
    return [
        StreamGroup(
            tuple(stream for stream in STREAMS if stream in group),
            [(name, term) for name, term in terms if group & set(term.streams)],
        )
        for group in groups
    ]


def stream_of(batch: Batch, stream: str) -> Batch | None:
    """One stream of a side's batch; None where it is not there."""
    if stream == "answer":
        return {key: value for key, value in batch.items() if key not in COMPANIONS}
    return batch.get(stream)


def stream_work(
    side: str, batch: Batch, terms: list[tuple[str, Term]], counts: LabelCounts | None
) -> list[StreamGroup]:
    """The groups of streams that a side's batch holds, once it is known to hold what the terms on it need.

    Args:
        counts: of the larger batch that this one is a part of, or None. Of a larger batch's streams a part may hold
            none; not so where a term takes a constant from one.

    Raises:
        FastforgetError: a stream is missing, or lacks a key; streams that are compared row by row differ in their
            rows, or a row of them has no label.
    """
    for name, term in terms:
        if term.baseline_stream is not None:
            check_group(side, batch, StreamGroup((term.baseline_stream,), [(name, term)]), None)
            if not bool(kept_tokens(batch[term.baseline_stream], f"{side} {term.baseline_stream}").any()):
                raise FastforgetError(
                    f"{where(side, term.baseline_stream)} has no label, and {name} takes a mean over it in each call"
                )
    return [group for group in stream_groups(terms) if check_group(side, batch, group, counts)]


def check_group(side: str, batch: Batch, group: StreamGroup, counts: LabelCounts | None) -> bool:
    """Whether a side's batch holds a group's streams: False where this part of a larger batch has none of them."""
    found = {stream: stream_of(batch, stream) for stream in group.streams}
    missing = [stream for stream, part in found.items() if part is None]
    names = ", ".join(name for name, _ in group.terms)
    if len(missing) == len(found) and counts is not None and all(counts.of(side, stream)[0] for stream in found):
        return False
    if missing:
        raise FastforgetError(
            f"these terms need {side}[{missing[0]!r}], and the {side} batch has none: {names}. It is a dict of "
            f"input_ids, attention_mask and labels that holds {WHAT_IT_HOLDS[missing[0]]}"
        )
    parts = {stream: part for stream, part in found.items() if part is not None}
    for stream, part in parts.items():
        if not isinstance(part, Mapping) or "labels" not in part or "input_ids" not in part:
            raise FastforgetError(f"{where(side, stream)} needs input_ids, attention_mask and labels")
    if len(parts) > 1:
        check_rows(side, parts, names)
    return True


def check_rows(side: str, parts: Mapping[str, Batch], names: str) -> None:
    """Raise where streams that terms (`names`) compare row by row do not fit."""
    rows = {stream: len(part["labels"]) for stream, part in parts.items()}
    if len(set(rows.values())) > 1:
        raise FastforgetError(
            f"{side}['refusal'] has {rows['refusal']} rows, the {side} batch {rows['answer']}, and row i of one "
            f"belongs to row i of the other ({names})"
        )
    inputs = [{name for name in part if name not in (*NOT_OF_THE_MODEL, *COMPANIONS)} for part in parts.values()]
    if inputs[0] != inputs[1]:
        raise unjoinable(min(inputs[0] ^ inputs[1]))
    for stream, part in parts.items():
        unlabelled = ~kept_tokens(part, side if stream == "answer" else f"{side} {stream}").any(dim=1)
        if bool(unlabelled.any()):
            raise FastforgetError(
                f"row {int(unlabelled.nonzero()[0])} of {where(side, stream)} has no label, and {names} compares it "
                "with the same row of the other stream"
            )


def check_labelled(side: str, terms: list[tuple[str, Term]], counts: LabelCounts) -> None:
    """Raise where a stream that a term looks at has no label in the whole batch."""
    for stream in {stream: None for _, term in terms for stream in used_streams(term)}:
        if counts.of(side, stream)[0] == 0:
            raise FastforgetError(
                f"{where(side, stream)} has no label: every token is -100 (or stands first in its sequence, where it "
                "is never predicted), so there is nothing to compute a loss on"
            )


def where(side: str, stream: str) -> str:
    """How messages call a stream."""
    return f"the {side} batch" if stream == "answer" else f"{side}[{stream!r}]"


def prepared_parts(
    side: str,
    batch: Batch,
    streams: tuple[str, ...],
    micro_batch: int | None,
    device: torch.device,
    vocabulary: int | None = None,
    takes_positions: Callable[[], bool] = yes,
) -> Iterator[dict[str, PreparedSide]]:
    """A group's streams, made ready, in parts of at most `micro_batch` sequences; rows that belong together stay so.

    Without `micro_batch` streams that share a forward come in about as many parts as they are, so that none of these
    forwards needs the memory of more sequences than one stream has (one more, where their number is odd).
    Nothing comes of a part without a label: there is none in this part of a larger batch.
    """
    chosen = [stream_of(batch, stream) or {} for stream in streams]
    rows = None
    if micro_batch:
        rows = max(1, micro_batch // len(streams))
    elif len(streams) > 1:
        rows = -(-len(chosen[0]["labels"]) // len(streams))
    for parts in zip(*(split_rows(part, rows) if rows else [part] for part in chosen), strict=True):
        prepared = {
            stream: prepare(
                part, side if stream == "answer" else f"{side} {stream}", device, vocabulary, takes_positions
            )
            for stream, part in zip(streams, parts, strict=True)
        }
        ready = {stream: part for stream, part in prepared.items() if part is not None}
        if ready:
            yield ready


def seen_by(term: Term, parts: Mapping[str, SideStats], baseline: Tensor | None) -> SideStats:
    """What a term gets: the statistics of its first stream, the others inside."""
    first, *others = term.streams
    return replace(parts[first], others={stream: parts[stream] for stream in others}, baseline=baseline)


def join(parts: list[PreparedSide]) -> tuple[dict[str, Any], Tensor]:
    """Inputs and kept positions of several streams as one batch, rows one after the other.

    Narrower ones get more padding on the right, whichever side theirs is on: what stands on the right of a token
    changes nothing for it, and so no token moves to another position.

    Raises:
        FastforgetError: streams that give the model different inputs.
    """
    if len(parts) == 1:
        return parts[0].inputs, parts[0].positions
    width = max(part.inputs["input_ids"].shape[1] for part in parts)
    names = {name for part in parts for name in part.inputs}
    if "position_ids" in names:  # of those without left padding there are none yet
        parts = [replace(part, inputs=with_positions(part.inputs)) for part in parts]
    inputs = {name: join_input(name, parts, width) for name in sorted(names)}
    positions, first = [], 0
    for part in parts:
        rows, own = part.inputs["input_ids"].shape
        row = torch.div(part.positions, own, rounding_mode="floor")
        positions.append((row + first) * width + part.positions % own)
        first += rows
    return inputs, torch.cat(positions)


def with_positions(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """Inputs with `position_ids`: the given ones, or those that count from each row's first token."""
    return {"position_ids": positions_without_padding(inputs["attention_mask"])} | inputs


def join_input(name: str, parts: list[PreparedSide], width: int) -> Any:
    """One input of the model for all streams; FastforgetError where it cannot be one."""
    values = [part.inputs.get(name) for part in parts]
    shapes = [part.inputs["input_ids"].shape for part in parts]
    by_row = [
        isinstance(value, Tensor) and value.shape[:1] == shape[:1] for value, shape in zip(values, shapes, strict=True)
    ]
    if all(by_row):
        padded = [
            F.pad(value, (0, 0) * (value.dim() - 2) + (0, width - shape[1])) if value.shape[1:2] == shape[1:] else value
            for value, shape in zip(values, shapes, strict=True)
            if isinstance(value, Tensor)
        ]
        if len({value.shape[1:] for value in padded}) == 1:
            return torch.cat(padded)
    elif not any(isinstance(value, Tensor) for value in values) and all(value == values[0] for value in values):
        return values[0]
    raise unjoinable(name)


def unjoinable(name: str) -> FastforgetError:
    """What to raise for an input that streams which share a forward do not have alike."""
    return FastforgetError(
        "a term compares the batch with its companion row by row, so both go through the model as one batch, and their "
        f"{name!r} do not fit together: give it in both, one row a sequence, or in neither"
    )
