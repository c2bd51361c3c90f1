"""Forget and retain rows as one data set, and the flat batches that a Trainer hands around."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import Dataset

from fastforget.batch import COMPANIONS, IGNORE_INDEX, ROLES
from fastforget.data.examples import Example
from fastforget.errors import FastforgetError

Row = Mapping[str, Any]  # input_ids and labels of one length, unshifted; attention_mask, example_id, companions


class PairedRows(Dataset[dict[str, Any]]):
    """Pairs {"forget": row, "retain": row}, one for each forget row.

    Retain rows are dealt from a shuffled cycle that goes on from epoch to epoch, so that all of a larger retain set are
    seen, whatever order a sampler asks in. The epoch must be told (`set_epoch`), as UnlearnTrainer and Accelerate do.

    Args:
        forget, retain: indexable; rows, or examples of `fastforget.data`.
        seed: of the retain set's shuffling.
    """

    def __init__(self, forget: Sequence[Any], retain: Sequence[Any] | None = None, seed: int = 0) -> None:
        for name, rows in (("forget", forget), ("retain", retain)):
            if rows is not None and not len(rows):
                raise FastforgetError(f"the {name} set has no rows")
        self.forget, self.retain, self.seed = forget, retain, seed
        # a DataLoader's workers may have been started in an earlier epoch, with a copy of all that is not shared
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()
        self._orders: dict[int, list[int]] = {}

    @property
    def epoch(self) -> int:
        """Which epoch's retain rows are dealt."""
        return int(self._epoch)

    def set_epoch(self, epoch: int) -> None:
        """Deal the retain rows of this epoch."""
        self._epoch.fill_(epoch)

    def __len__(self) -> int:
        return len(self.forget)

    def __getitem__(self, index: int) -> dict[str, Any]:
        pair = {"forget": self.forget[index]}
        if self.retain is not None:
            before = self.epoch * len(self.forget)
            cycle, place = divmod(before + index, len(self.retain))
            if cycle not in self._orders:
                first = before // len(self.retain)
                self._orders = {number: order for number, order in self._orders.items() if number >= first}
                generator = torch.Generator().manual_seed(self.seed + cycle)
                self._orders[cycle] = torch.randperm(len(self.retain), generator=generator).tolist()
            pair["retain"] = self.retain[self._orders[cycle][place]]
        return pair


def flat_rows(forget: Sequence[Any], retain: Sequence[Any] | None) -> list[dict[str, Any]]:
    """Each row once, with its `role`; for evaluation."""
    sides = [("forget", forget)] if retain is None else [("forget", forget), ("retain", retain)]
    return [{**as_row(item), "role": ROLES[side, "answer"]} for side, rows in sides for item in rows]


def as_row(item: Any) -> Row:
    """An example of `fastforget.data` as a row; a row as it is."""
    if not isinstance(item, Example):
        return item
    ids = list(item.input_ids)
    return {"input_ids": ids, "labels": [IGNORE_INDEX] * item.prompt_length + ids[item.prompt_length :]}


def row_collator(pad_token_id: int = 0) -> Callable[[Sequence[Row]], dict[str, Tensor]]:
    """A Trainer's `data_collator`: pairs, or rows with `role`, as one flat batch (`fastforget.UnlearnLoss`).

    Rows are padded on the right: `input_ids` with `pad_token_id`, `labels` with -100, anything else with 0; an
    `attention_mask` is made where there is none. Numbers (`role`, `example_id`) become tensors (B,). A row's companions
    ("refusal", "mismatch") become rows of their own.

    Raises:
        FastforgetError: rows that lack `input_ids` or `labels`, or a key that others have.
    """

    def collate(items: Sequence[Row]) -> dict[str, Tensor]:
        rows: list[dict[str, Any]] = []
        for item in items:
            if "role" in item:
                rows.append(dict(item))
                continue
            for side in ("forget", "retain"):
                if item.get(side) is None:
                    continue
                row = dict(as_row(item[side]))
                parts = {"answer": row} | {name: row.pop(name) for name in COMPANIONS if row.get(name) is not None}
                rows += [{**as_row(part), "role": ROLES[side, stream]} for stream, part in parts.items()]
        for row in rows:
            row.setdefault("attention_mask", [1] * len(row.get("input_ids", ())))
            if not {"input_ids", "labels"} <= row.keys() or row.keys() != rows[0].keys():
                raise FastforgetError(
                    f"a row has the keys {', '.join(row)}, the first one {', '.join(rows[0])}: each needs input_ids "
                    "and labels, and what one gives the model all must give"
                )
        padding = {"input_ids": pad_token_id, "labels": IGNORE_INDEX}
        return {key: joined([row[key] for row in rows], padding.get(key, 0)) for key in rows[0]}

    return collate


def joined(values: Sequence[Any], padding: int) -> Tensor:
    """Numbers as (B,), sequences as (B, T) with padding on the right."""
    tensors = [torch.as_tensor(value) for value in values]
    return pad_sequence(tensors, batch_first=True, padding_value=padding) if tensors[0].dim() else torch.stack(tensors)
