"""One side of a training batch, made ready: which tokens are kept, of which sequence, and what identifies each."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastforget.checks import IGNORE_INDEX
from fastforget.errors import FastforgetError

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

    def of(self, side: str, stream: str = "answer") -> tuple[int, int]:
        """(tokens, sequences) of one side's stream."""
        name = count_name(side, stream)
        return getattr(self, f"{name}_tokens"), getattr(self, f"{name}_sequences")


def count_name(side: str, stream: str) -> str:
    """How a side's stream is called in names: "forget", or "forget_refusal"."""
    return side if stream == "answer" else f"{side}_{stream}"


@dataclass(frozen=True)
class PreparedSide:
    """One side of a batch: inputs for the model, and its n kept tokens (`kept_tokens`)."""

    inputs: dict[str, Tensor]  # input_ids, attention_mask, ... (B, T), on the model's device
    positions: Tensor  # (n,) int64, rows of the flattened (B * T) states
    labels: Tensor  # (n,) int64, shifted
    sequence: Tensor  # (n,) int64 in 0..b-1
    rows: list[int]  # the b labelled rows of the batch
    lengths: list[int]  # their numbers of kept tokens
    keys: list[bytes] | None  # what each one's states and labels depend on; None where it cannot be told

    @property
    def sequence_count(self) -> int:
        return len(self.rows)


def kept_tokens(batch: Batch, name: str) -> Tensor:
    """(B, T - 1) bool: the tokens that are no padding themselves and whose *next* token is labelled.

    What stands on padding predicts nothing: the first token of a sequence has no prediction under left padding either,
    whether it is labelled or not, and a label after padding counts nowhere.

    Args:
        name: of the batch, for messages.

    Raises:
        FastforgetError: shapes that differ.
    """
    for key in ("labels", "attention_mask"):
        if key in batch and batch[key].shape != batch["input_ids"].shape:
            raise FastforgetError(
                f"the {name} batch's {key} are {tuple(batch[key].shape)}, its input_ids "
                f"{tuple(batch['input_ids'].shape)}: they must agree (labels are unshifted, -100 outside the answer)"
            )
    kept = batch["labels"][:, 1:] != IGNORE_INDEX
    return kept & (batch["attention_mask"][:, :-1] != 0) if "attention_mask" in batch else kept


def yes() -> bool:
    """Say that the model takes `position_ids`, as most do."""
    return True


def prepare(
    batch: Batch,
    side: str,
    device: torch.device,
    vocabulary: int | None = None,
    takes_positions: Callable[[], bool] = yes,
) -> PreparedSide | None:
    """Check one side of a batch, find its kept tokens, and move it to the device.

    All of it is read on the CPU; a batch that arrives on a GPU is copied back first, which synchronises once.
    Where a row is padded on the left and the user gave no `position_ids`, the inputs get some that count from each
    row's first token, so that padding changes nothing. Where that cannot be (the model does not take them, or a mask
    has holes, for which models count in different ways) the padding is part of a row's key.

    Args:
        takes_positions: tells, once there is left padding, whether with `position_ids` it changes nothing.

    Returns:
        None where no token is labelled.

    Raises:
        FastforgetError: a missing key, shapes that differ, or a label outside the vocabulary.
    """
    batch = {key: value for key, value in batch.items() if key not in (*FLAT_KEYS, *COMPANIONS)}
    for key in ("input_ids", "labels"):
        if key not in batch:
            raise FastforgetError(f"the {side} batch has no {key!r}: it needs input_ids, attention_mask and labels")
    batch.setdefault("attention_mask", torch.ones_like(batch["input_ids"]))
    on_cpu = {key: value.cpu() for key, value in batch.items() if isinstance(value, Tensor)}
    row, column = kept_tokens(on_cpu, side).nonzero(as_tuple=True)
    if len(row) == 0:
        return None
    labels = on_cpu["labels"][row, column + 1]
    if vocabulary is not None and not (0 <= int(labels.min()) and int(labels.max()) < vocabulary):
        wrong = labels[(labels < 0) | (labels >= vocabulary)][0]
        raise FastforgetError(f"the {side} batch has label {int(wrong)}, outside the vocabulary of {vocabulary}")
    rows, sequence, lengths = row.unique_consecutive(return_inverse=True, return_counts=True)
    inputs = {key: value for key, value in batch.items() if key != "labels"}
    trimmed = not bool((on_cpu["attention_mask"][:, 0] == 0).any())
    if not trimmed and ("position_ids" in inputs or unbroken(on_cpu["attention_mask"])) and takes_positions():
        inputs.setdefault("position_ids", positions_without_padding(on_cpu["attention_mask"]))
        trimmed = True
    return PreparedSide(
        inputs={key: move(value, device) for key, value in inputs.items()},
        positions=move(row * on_cpu["labels"].shape[1] + column, device),
        labels=move(labels, device),
        sequence=move(sequence, device),
        rows=rows.tolist(),
        lengths=lengths.tolist(),
        keys=content_keys(on_cpu, rows.tolist(), column.split(lengths.tolist()), trimmed)
        if identifiable(batch)
        else None,
    )


def move(value: Any, device: torch.device) -> Any:
    """A tensor to the device, without waiting; anything else as it is."""
    return value.to(device, non_blocking=True) if isinstance(value, Tensor) else value


def identifiable(batch: Batch) -> bool:
    """Whether every input belongs to one row, so that a row's content determines the model's states."""
    size = batch["input_ids"].shape[0]
    return all(isinstance(value, Tensor) and value.shape[:1] == (size,) for value in batch.values())


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
        chosen = roles == ROLES[side, stream]
        return {
            key: value[chosen] if isinstance(value, Tensor) and value.shape[:1] == (size,) else value
            for key, value in batch.items()
            if key not in FLAT_KEYS
        }

    sides = {side: part(side, "answer") for side in ("forget", "retain")}
    for side, stream in ROLES:
        companion = {} if stream == "answer" else part(side, stream)
        if companion and len(companion["input_ids"]):
            sides[side][stream] = companion
    retain = sides["retain"]
    has_retain = len(retain["input_ids"]) or any(stream in retain for stream in COMPANIONS)
    return sides["forget"], retain if has_retain else None


def split_rows(batch: Batch, rows: int) -> list[Batch]:
    """Micro-batches of at most `rows` sequences."""
    size = len(batch["input_ids"])
    return [
        {
            key: value[start : start + rows] if isinstance(value, Tensor) and value.shape[:1] == (size,) else value
            for key, value in batch.items()
        }
        for start in range(0, size, rows)
    ]


def count_labels(micro_batches: Iterable[Batch | tuple[Batch | None, Batch | None]]) -> LabelCounts:
    """Denominators of a batch that is accumulated over several calls; pass them to each as `counts=`.

    Args:
        micro_batches: (forget, retain) pairs, as they go to `UnlearnStep.backward`, or flat batches with `role`.
    """
    totals: Counter[str] = Counter()
    for item in micro_batches:
        forget, retain = item if isinstance(item, tuple | list) else split_roles(item)
        for side, stream in ROLES:
            whole = forget if side == "forget" else retain
            batch = whole if whole is None or stream == "answer" else whole.get(stream)
            if batch is None:
                continue
            name = count_name(side, stream)
            labelled = kept_tokens(batch, name.replace("_", " ")).sum(dim=1)
            totals[f"{name}_tokens"] += int(labelled.sum())
            totals[f"{name}_sequences"] += int((labelled > 0).sum())
    return LabelCounts(**totals)
