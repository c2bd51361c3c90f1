"""A training batch, checked and made ready: which tokens are kept, of which sequence, and what identifies each.

Everything that is demanded of a batch is checked here, once, in `check_batch`.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from fastforget.errors import FastforgetError
from fastforget.packing import IGNORE_INDEX as IGNORE_INDEX
from fastforget.packing import unpacked

Batch = Mapping[str, Any]  # tensors by name; a companion batch under its stream's name; anything else for the model
FLAT_KEYS = ("role", "example_id")  # of a flat batch; never passed to the model
COMPANIONS = ("refusal", "mismatch")  # keys of a side's batch that hold batches of their own
ROLES = {  # of a flat batch's rows: which side, and which stream of it
    ("forget", "answer"): 0,
    ("retain", "answer"): 1,
    ("forget", "refusal"): 2,
    ("retain", "refusal"): 3,
    ("forget", "mismatch"): 4,
}


@dataclass(frozen=True)
class LabelCounts:
    """Label tokens and labelled sequences of a whole batch, per side and stream: the denominators of means."""

    forget_tokens: int = 0
    forget_sequences: int = 0
    retain_tokens: int = 0
    retain_sequences: int = 0
    forget_refusal_tokens: int = 0
    forget_refusal_sequences: int = 0
    retain_refusal_tokens: int = 0
    retain_refusal_sequences: int = 0
    forget_mismatch_tokens: int = 0
    forget_mismatch_sequences: int = 0

    @property
    def tokens(self) -> int:
        """Label tokens of all streams."""
        return sum(self.totals(side, stream)[0] for side, stream in ROLES)

    def totals(self, side: str, stream: str = "answer") -> tuple[int, int]:
        """(tokens, sequences) of one side's stream."""
        name = count_name(side, stream)
        return getattr(self, f"{name}_tokens"), getattr(self, f"{name}_sequences")


def count_name(side: str, stream: str) -> str:
    """How a side's stream is called in names: "forget", or "forget_refusal"."""
    return side if stream == "answer" else f"{side}_{stream}"


def stream_name(side: str, stream: str = "answer") -> str:
    """What messages call a side's stream."""
    return f"the {side} batch" if stream == "answer" else f"{side}[{stream!r}]"


def stream_of(batch: Any, stream: str) -> Any:
    """One stream of a side's batch, as the user gave it; None where it is not there."""
    if not isinstance(batch, Mapping):  # which `check_batch` refuses
        return batch
    if stream == "answer":
        return {key: value for key, value in batch.items() if key not in COMPANIONS}
    return batch.get(stream)


@dataclass(frozen=True)
class CheckedBatch:
    """One stream of a side, known to be right: B rows of T tokens.

    A token is kept where it is no padding itself and its *next* token is labelled. What stands on padding predicts
    nothing: the first token of a sequence has no prediction under left padding either, whether it is labelled or not,
    and a label after padding counts nowhere.
    """

    name: str  # what messages call it
    inputs: dict[str, Any]  # what the model is given; input_ids and attention_mask always
    labels: Tensor  # (B, T) int64, on the CPU
    kept: Tensor  # (B, T - 1) bool, on the CPU

    @property
    def row_count(self) -> int:
        return len(self.labels)

    @property
    def labelled_rows(self) -> Tensor:
        """(B,) bool: the rows of which a token is kept."""
        return self.kept.any(dim=1)

    def counts(self) -> tuple[int, int]:
        """Kept tokens, and rows that have any."""
        return int(self.kept.sum()), int(self.labelled_rows.sum())

    def split(self, rows: int) -> list[CheckedBatch]:
        """Parts of at most `rows` rows; what belongs to no row goes to each."""
        return [self.part(slice(start, start + rows)) for start in range(0, self.row_count, rows)]

    def part(self, rows: slice) -> CheckedBatch:
        """Some rows, as a batch."""
        inputs = rows_of(self.inputs, rows, self.row_count)
        return CheckedBatch(self.name, inputs, self.labels[rows], self.kept[rows])


def check_batch(batch: Any, name: str, vocabulary: int | None = None) -> CheckedBatch:
    """Check one stream of a side's batch.

    Labels and masks are read on the CPU; of a batch that arrives on a GPU they are copied back, which synchronises.

    Args:
        name: what messages call it (`stream_name`).
        vocabulary: the number of logits, below which labels must lie.

    Raises:
        FastforgetError: no mapping, a key that is missing or no tensor (B, T), ids that are no integers, a list or an
            array for the model, shapes that differ, a mask of other numbers than 0 and 1, or a kept label outside the
            vocabulary.
    """
    what = f"{name} needs input_ids, attention_mask and labels, tensors (B, T)"
    if not isinstance(batch, Mapping):
        raise FastforgetError(f"{what}: it is a {type(batch).__name__}")
    batch = unpacked(batch)
    inputs = {key: value for key, value in batch.items() if key not in ("labels", *FLAT_KEYS, *COMPANIONS)}
    for key in ("input_ids", "labels", "attention_mask"):
        value = batch.get(key)
        if value is None and key == "attention_mask":
            inputs[key] = torch.ones_like(inputs["input_ids"])
        elif value is None:
            raise FastforgetError(f"{what}: it has no {key!r}")
        elif not isinstance(value, Tensor) or value.dim() != 2:
            given = tuple(value.shape) if isinstance(value, Tensor) else f"a {type(value).__name__}"
            raise FastforgetError(f"{what}: its {key!r} is {given}")
    for key, dtypes in (("input_ids", (torch.int64, torch.int32)), ("labels", (torch.int64,))):
        if batch[key].dtype not in dtypes:
            raise FastforgetError(f"{name}: its {key!r} are {batch[key].dtype}, and must be {dtypes[0]}")
    for key, value in inputs.items():
        if isinstance(value, list | tuple | np.ndarray):
            raise FastforgetError(
                f"{name}: its {key!r} is a {type(value).__name__}: models take tensors; make it one, or leave it out"
            )
    labels, mask = batch["labels"].cpu(), inputs["attention_mask"].cpu()
    for key, value in (("labels", labels), ("attention_mask", mask)):
        if value.shape != inputs["input_ids"].shape:
            raise FastforgetError(
                f"{name}: its {key} are {tuple(value.shape)}, its input_ids {tuple(inputs['input_ids'].shape)}: they "
                "must agree (labels are unshifted, -100 outside the answer)"
            )
    if not bool(((mask == 0) | (mask == 1)).all()):
        raise FastforgetError(
            f"{name}: its attention_mask must hold 0 (padding) and 1 alone; documents of a packed row are told apart "
            "by position_ids that begin anew, without a mask"
        )
    check_positions(inputs.get("position_ids"), inputs["input_ids"], name)
    kept = (labels[:, 1:] != IGNORE_INDEX) & (mask[:, :-1] != 0)
    if vocabulary is not None:
        wrong = labels[:, 1:][kept & ((labels[:, 1:] < 0) | (labels[:, 1:] >= vocabulary))]
        if len(wrong):
            raise FastforgetError(f"{name} has label {int(wrong[0])}, outside the vocabulary of {vocabulary}")
    return CheckedBatch(name, inputs, labels, kept)


def check_positions(positions: Any, ids: Tensor, name: str) -> None:
    """Raise FastforgetError for `position_ids` that are none: integers (B, T), (1, T), or some of them (..., T)."""
    if positions is None:
        return
    fits = isinstance(positions, Tensor) and positions.dim() >= 2 and positions.shape[-1] == ids.shape[1]
    if not fits or positions.shape[-2] not in (1, len(ids)) or positions.dtype not in (torch.int64, torch.int32):
        is_tensor = isinstance(positions, Tensor)
        given = f"{positions.dtype} {tuple(positions.shape)}" if is_tensor else f"a {type(positions).__name__}"
        raise FastforgetError(f"{name}: its position_ids must be int64 {tuple(ids.shape)}, not {given}")


@dataclass(frozen=True)
class PreparedSide:
    """One stream of a side: inputs for the model, and its n kept tokens."""

    batch: CheckedBatch  # of which it was made
    inputs: dict[str, Any]  # input_ids, attention_mask, ... (B, T), on the model's device
    positions: tuple[Tensor, Tensor]  # the row and the column (n,) int64 of each kept token
    labels: Tensor  # (n,) int64, shifted
    sequence: Tensor  # (n,) int64 in 0..b-1
    rows: list[int]  # the b labelled rows of the batch
    lengths: list[int]  # their numbers of kept tokens
    keys: list[bytes] | None  # what each one's states and labels depend on; None where it cannot be told

    @property
    def sequence_count(self) -> int:
        return len(self.rows)


def yes() -> bool:
    """Say that the model takes `position_ids`, as most do."""
    return True


def prepare(
    batch: CheckedBatch, device: torch.device, takes_positions: Callable[[], bool] = yes
) -> PreparedSide | None:
    """List a batch's kept tokens, identify its sequences, and move it to the device; None where no token is kept.

    Where a row is padded on the left and the user gave no `position_ids`, the inputs get some that count from each
    row's first token, so that padding changes nothing. Where that cannot be (the model does not take them, or a mask
    has holes, for which models count in different ways) the padding is part of a row's key.

    Args:
        takes_positions: tells, once there is left padding, whether with `position_ids` it changes nothing.
    """
    row, column = batch.kept.nonzero(as_tuple=True)
    if len(row) == 0:
        return None
    rows, sequence, lengths = row.unique_consecutive(return_inverse=True, return_counts=True)
    inputs = dict(batch.inputs)
    mask = inputs["attention_mask"].cpu()
    keys = None
    trimmed = not bool((mask[:, 0] == 0).any())
    if not trimmed and ("position_ids" in inputs or unbroken(mask)) and takes_positions():
        inputs.setdefault("position_ids", positions_without_padding(mask))
        trimmed = True
    if identifiable(batch):
        on_cpu = {"labels": batch.labels, **{key: value.cpu() for key, value in batch.inputs.items()}}
        keys = content_keys(on_cpu, rows.tolist(), column.split(lengths.tolist()), trimmed)
    return PreparedSide(
        batch=batch,
        inputs={key: move(value, device) for key, value in inputs.items()},
        positions=(move(row, device), move(column, device)),
        labels=move(batch.labels[row, column + 1], device),
        sequence=move(sequence, device),
        rows=rows.tolist(),
        lengths=lengths.tolist(),
        keys=keys,
    )


def move(value: Any, device: torch.device) -> Any:
    """A tensor to the device, without waiting; anything else as it is."""
    return value.to(device, non_blocking=True) if isinstance(value, Tensor) else value


def identifiable(batch: CheckedBatch) -> bool:
    """Whether every input belongs to one row, so that a row's content determines the model's states."""
    return all(is_by_row(value, batch.row_count) for value in batch.inputs.values())


def is_by_row(value: Any, row_count: int) -> bool:
    """Tell whether an input of the model is a tensor with something for each row."""
    return isinstance(value, Tensor) and value.shape[:1] == (row_count,)


def rows_of(inputs: Mapping[str, Any], rows: slice | Tensor, row_count: int) -> dict[str, Any]:
    """Return some of the rows of a model's inputs; what belongs to no row stays whole."""
    return {key: value[rows] if is_by_row(value, row_count) else value for key, value in inputs.items()}


def unbroken(mask: Tensor) -> bool:
    """Whether every row of a mask (B, T) is padding, tokens, padding: no holes."""
    present = F.pad(mask != 0, (1, 0))
    return bool(((present[:, 1:] & ~present[:, :-1]).sum(dim=1) <= 1).all())


def positions_without_padding(mask: Tensor) -> Tensor:
    """Each token's place (B, T) in its own sequence; 0 on left padding."""
    first = (mask != 0).int().argmax(dim=1, keepdim=True)
    return (torch.arange(mask.shape[1], device=mask.device) - first).clamp(min=0)


def content_keys(batch: Batch, rows: Sequence[int], columns: Sequence[Tensor], trimmed: bool) -> list[bytes]:
    """A digest of each labelled sequence: what the model says of its kept tokens depends on nothing else.

    That is its ids, mask, kept labels and given `position_ids`; and any other input whole, with where it begins.

    Args:
        columns: of each row, its kept tokens.
        trimmed: the padding on the left changes nothing, and is left out as that on the right is.
    """
    keys = []
    others = batch.keys() - {"input_ids", "attention_mask", "labels", "position_ids"}
    for index, kept in zip(rows, columns, strict=True):
        present = batch["attention_mask"][index].nonzero()[:, 0]
        span = slice(int(present[0]) if trimmed else 0, int(present[-1]) + 1)
        digest = hashlib.blake2b((kept - span.start).numpy().tobytes(), digest_size=16)
        digest.update(f"{span.start if others else 0}".encode())
        for key in sorted(batch):
            value = batch[key][index]
            if key == "labels":  # by their places from the first token on: a label may stand on padding, or be any id
                value = value[kept + 1]
            elif key not in others:
                value = value[span]
            digest.update(f"{key}{value.dtype}{tuple(value.shape)}".encode())
            digest.update(value.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
        keys.append(digest.digest())
    return keys


def split_roles(batch: Batch) -> tuple[Batch, Batch | None]:
    """A flat batch (with `role`, by `ROLES`: 0 forget, 1 retain, ...) as (forget, retain), companions inside them."""
    roles = batch["role"]
    size = len(roles)

    def part(side: str, stream: str) -> dict[str, Any]:
        rows = {key: value for key, value in batch.items() if key not in FLAT_KEYS}
        return rows_of(rows, roles == ROLES[side, stream], size)

    sides = {side: part(side, "answer") for side in ("forget", "retain")}
    for side, stream in ROLES:
        companion = {} if stream == "answer" else part(side, stream)
        if companion and len(companion["input_ids"]):
            sides[side][stream] = companion
    retain = sides["retain"]
    has_retain = len(retain["input_ids"]) or any(stream in retain for stream in COMPANIONS)
    return sides["forget"], retain if has_retain else None


def sides_of(forget: Any, retain: Batch | None) -> tuple[Any, Batch | None]:
    """The two sides of what was given: a pair, or a flat batch in the first one's place."""
    if isinstance(forget, Mapping) and "role" in forget and retain is None:
        return split_roles(forget)
    return forget, retain


def count_labels(micro_batches: Iterable[Batch | tuple[Batch | None, Batch | None]]) -> LabelCounts:
    """Denominators of a batch that is accumulated over several calls; pass them to each as `counts=`.

    Args:
        micro_batches: (forget, retain) pairs, as they go to `UnlearnStep.backward`, or flat batches with `role`.

    Raises:
        FastforgetError: a batch that `check_batch` refuses.
    """
    totals: Counter[str] = Counter()
    for item in micro_batches:
        forget, retain = item if isinstance(item, tuple | list) else split_roles(item)
        given, checked = {"forget": forget, "retain": retain}, {}
        for side, stream in ROLES:
            batch = None if given[side] is None else stream_of(given[side], stream)
            if batch is not None:
                checked[side, stream] = check_batch(batch, stream_name(side, stream))
        totals.update(vars(total_counts(checked)))
    return LabelCounts(**totals)


def check_counts(counts: Any) -> None:
    """Raise where what was given as `counts` is none."""
    if counts is not None and not isinstance(counts, LabelCounts):
        raise FastforgetError(f"counts must be what fastforget.count_labels returns, not a {type(counts).__name__}")


def total_counts(batches: Mapping[tuple[str, str], CheckedBatch]) -> LabelCounts:
    """The counts of checked batches by side and stream."""
    totals = {}
    for (side, stream), batch in batches.items():
        name = count_name(side, stream)
        totals[f"{name}_tokens"], totals[f"{name}_sequences"] = batch.counts()
    return LabelCounts(**totals)
