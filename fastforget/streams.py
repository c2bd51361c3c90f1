"""Streams: the answers that a side of the batch holds beside its own, checked, and those that share a forward joined.

A side's batch is its "answer" stream, and may carry companions: `batch["refusal"]`, row i the prompt of row i with a
refusal or an alternative answer, and `batch["mismatch"]`, prompts with other prompts' answers, any number of rows. A
term says which streams it looks at (`Term.streams`); `loss_plan.py` tells which of them go through the model together.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastforget.batch import (
    ROLES,
    Batch,
    CheckedBatch,
    LabelCounts,
    PreparedSide,
    check_batch,
    is_by_row,
    move,
    positions_without_padding,
    stream_name,
    stream_of,
    unbroken,
)
from fastforget.errors import FastforgetError
from fastforget.loss_plan import SIDES, ForwardPlan, LossPlan
from fastforget.objectives import SideStats, Term

BY_ROW = ("answer", "refusal")  # row i of one belongs to row i of the other
CONTENTS = {
    "refusal": "the same prompts, row by row, with a refusal or an alternative answer (fastforget.with_refusals)",
    "mismatch": "prompts with other prompts' answers (fastforget.mismatched)",
}


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
    """Return every stream that a term takes something from."""
    return term.streams if term.baseline_stream is None else (*term.streams, term.baseline_stream)


def check_sides(
    plan: LossPlan,
    sides: Mapping[str, Batch | None],
    counts: LabelCounts | None,
    call_counts: LabelCounts | None,
    vocabulary: int,
) -> dict[tuple[str, str], CheckedBatch]:
    """Check the streams that a plan's forwards need; return them by side and stream.

    Args:
        counts: of the larger batch that this one is a part of, or None. Of a larger batch's streams a part may hold
            none; not so where a term takes a constant from one in each call.
        call_counts: of one call over several processes, of which this one's part may hold none of those.

    Raises:
        FastforgetError: a side or a stream is missing, or not what `check_batch` demands; streams that are compared row
            by row differ in their rows, or a row of them has no label.
    """
    checked: dict[tuple[str, str], CheckedBatch] = {}
    for side in SIDES:
        forwards, batch = plan.on(side), sides[side]
        if not forwards:
            continue
        if batch is None:
            streams = [stream for forward in forwards for stream in forward.streams]
            if counts is not None and all(counts.totals(side, stream)[0] for stream in streams):
                continue  # this part of a larger batch has none of that side
            names = ", ".join(dict.fromkeys(name for forward in forwards for name in forward.terms))
            raise FastforgetError(f"these terms need a {side} batch, and there is none: {names}")
        for forward in forwards:
            streams_of = check_forward(forward, batch, counts if forward.learns else call_counts, vocabulary)
            checked |= {(side, stream): part for stream, part in streams_of.items()}
    return checked


def check_forward(
    forward: ForwardPlan, batch: Batch, counts: LabelCounts | None, vocabulary: int
) -> dict[str, CheckedBatch]:
    """Check the streams of one forward; none where this part of a larger batch has none of them."""
    side = forward.side
    given = {stream: stream_of(batch, stream) for stream in forward.streams}
    missing = [stream for stream, part in given.items() if part is None]
    if len(missing) == len(given) and counts is not None and all(counts.totals(side, each)[0] for each in given):
        return {}
    if missing:
        raise FastforgetError(
            f"these terms need {side}[{missing[0]!r}], and the {side} batch has none: {forward.names}. It is a dict of "
            f"input_ids, attention_mask and labels that holds {CONTENTS[missing[0]]}"
        )
    parts = {stream: check_batch(part, stream_name(side, stream), vocabulary) for stream, part in given.items()}
    if len(parts) > 1:
        check_rows(parts["answer"], parts["refusal"], forward)
    if not forward.learns:
        for stream, part in parts.items():
            if not (part.counts() if counts is None else counts.totals(side, stream))[0]:
                raise FastforgetError(
                    f"{part.name} has no label, and {forward.names} takes a mean over it in each call"
                )
    return parts


def check_rows(answer: CheckedBatch, refusal: CheckedBatch, forward: ForwardPlan) -> None:
    """Raise where streams that terms compare row by row do not fit."""
    if answer.row_count != refusal.row_count:
        raise FastforgetError(
            f"{refusal.name} has {refusal.row_count} rows, {answer.name} {answer.row_count}, and row i of one belongs "
            f"to row i of the other ({forward.names})"
        )
    if answer.inputs.keys() != refusal.inputs.keys():
        raise unjoinable(min(answer.inputs.keys() ^ refusal.inputs.keys()))
    for part in (answer, refusal):
        unlabelled = ~part.labelled_rows
        if bool(unlabelled.any()):
            raise FastforgetError(
                f"row {int(unlabelled.nonzero()[0])} of {part.name} has no label, and {forward.names} compares it with "
                "the same row of the other stream"
            )


def check_labelled(plan: LossPlan, side: str, counts: LabelCounts) -> None:
    """Raise where a stream that a side's terms look at has no label in the whole batch."""
    for stream in (stream for forward in plan.on(side) for stream in forward.streams):
        if counts.totals(side, stream)[0] == 0:
            raise FastforgetError(
                f"{stream_name(side, stream)} has no label: every token is -100 (or stands first in its sequence, "
                "where it is never predicted), so there is nothing to compute a loss on"
            )


def prepared_parts(
    batches: Mapping[str, CheckedBatch],
    micro_batch: int | None,
    prepare: Callable[[CheckedBatch], PreparedSide | None],
    whole: bool = False,
) -> Iterator[dict[str, PreparedSide]]:
    """Prepare a forward's streams in parts of at most `micro_batch` rows; rows that belong together stay so.

    Without `micro_batch` streams that share a forward come in about as many parts as they are, so that none of these
    forwards needs the memory of more sequences than one stream has (one more, where their number is odd); or, `whole`,
    in one. Nothing comes of a part without a label: there is none in this part of a larger batch.
    """
    rows = None
    if micro_batch:
        rows = max(1, micro_batch // len(batches))
    elif len(batches) > 1 and not whole:
        rows = -(-max(batch.row_count for batch in batches.values()) // len(batches)) or None
    for parts in zip(*(batch.split(rows) if rows else [batch] for batch in batches.values()), strict=True):
        prepared = {stream: prepare(part) for stream, part in zip(batches, parts, strict=True)}
        ready = {stream: part for stream, part in prepared.items() if part is not None}
        if ready:
            yield ready


def seen_by(term: Term, streams: Mapping[str, SideStats], baseline: Tensor | None = None) -> SideStats:
    """Return what a term gets: the answers to its own requests, of its first stream, with the others inside."""
    own = {
        stream: replace(
            streams[stream],
            tensors={
                request: tensor for request, tensor in streams[stream].tensors.items() if request in term.requests
            },
        )
        for stream in term.streams
    }
    first, *others = term.streams
    return replace(own[first], others={stream: own[stream] for stream in others}, baseline=baseline)


def join(parts: Sequence[PreparedSide]) -> tuple[dict[str, Any], tuple[Tensor, Tensor]]:
    """Inputs and kept positions (row, column) of several streams as one batch, rows one after the other.

    Narrower ones get more padding on the right, whichever side theirs is on: what stands on the right of a token
    changes nothing for it, and so no token moves to another column.

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
    rows, first = [], 0
    for part in parts:
        rows.append(part.positions[0] + first)
        first += part.inputs["input_ids"].shape[0]
    return inputs, (torch.cat(rows), torch.cat([part.positions[1] for part in parts]))


def pack(parts: Sequence[PreparedSide]) -> tuple[dict[str, Any], tuple[Tensor, Tensor]] | None:
    """Labelled rows of several streams one behind the other in one row, without padding, for `Backbone.packs`.

    Returns:
        `input_ids` and `position_ids` (1, N), which begin anew at each document, and the positions (row, column) (n,)
        of the kept tokens; None where rows cannot stand so: holes in a mask, positions or other inputs of the user's.
    """
    ids, places, kept, begin = [], [], [], 0
    for part in parts:
        mask = part.batch.inputs["attention_mask"].cpu()[part.rows] != 0
        if part.batch.inputs.keys() > {"input_ids", "attention_mask"} or not unbroken(mask):
            return None
        device = part.labels.device
        row, column = mask.nonzero(as_tuple=True)
        first, lengths = mask.int().argmax(dim=1), mask.sum(dim=1)
        shift = begin + lengths.cumsum(0) - lengths - first  # from a token's column to its place
        kept_row, kept_column = part.batch.kept[part.rows].nonzero(as_tuple=True)
        kept.append(move(shift[kept_row] + kept_column, device))
        places.append(move(column - first[row], device))
        ids.append(part.inputs["input_ids"][move(torch.tensor(part.rows)[row], device), move(column, device)])
        begin += len(row)
    inputs = {"input_ids": torch.cat(ids)[None], "position_ids": torch.cat(places)[None]}
    kept_places = torch.cat(kept)
    return inputs, (torch.zeros_like(kept_places), kept_places)


def with_positions(inputs: dict[str, Any]) -> dict[str, Any]:
    """Inputs with `position_ids`: the given ones, or those that count from each row's first token."""
    return {"position_ids": positions_without_padding(inputs["attention_mask"])} | inputs


def join_input(name: str, parts: Sequence[PreparedSide], width: int) -> Any:
    """Join one input of the model for all streams; FastforgetError where it cannot be one."""
    values = [part.inputs.get(name) for part in parts]
    shapes = [part.inputs["input_ids"].shape for part in parts]
    if all(is_by_row(value, shape[0]) for value, shape in zip(values, shapes, strict=True)):
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
    """Return what to raise for an input that streams which share a forward do not have alike."""
    return FastforgetError(
        "what a term compares row by row, and both sides with passes='joint', go through the model as one batch, and "
        f"their {name!r} do not fit together: give it in all, one row a sequence, or in none"
    )
