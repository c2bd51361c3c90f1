"""Packed batches: documents one behind the other in a row, told apart by `position_ids` that begin anew."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

IGNORE_INDEX = -100  # a label that does not count
OF_PACKING = ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k", "seq_idx")  # say the same once more


def is_packed(batch: Mapping[str, Any]) -> bool:
    """Whether rows hold several documents, as transformers' `DataCollatorWithFlattening` makes them (no mask)."""
    positions, ids = batch.get("position_ids"), batch.get("input_ids")
    return (
        batch.get("attention_mask") is None
        and isinstance(positions, Tensor)
        and isinstance(ids, Tensor)
        and positions.dim() == 2
        and positions.shape == ids.shape
        and bool((positions[:, 1:] == 0).any())
    )


def unpacked(batch: Mapping[str, Any]) -> Mapping[str, Any]:
    """Give each document of a packed batch a row of its own, padded on the right; any other batch as it is.

    No document then sees another, whatever attention the model runs, each is a sequence to the terms, and the reference
    is cached document by document. `labels` (B, T) stay unshifted: a document's first token is never predicted.

    Returns:
        The batch with `input_ids`, `labels` and other (B, T) tensors by document, an `attention_mask`, and without
        `position_ids` and what only describes the packing.
    """
    if not is_packed(batch):
        return batch
    positions = batch["position_ids"].cpu()
    begins = positions == 0
    begins[:, 0] = True
    lengths = torch.diff(begins.flatten().nonzero()[:, 0], append=torch.tensor([begins.numel()])).tolist()
    rows: dict[str, Any] = {}
    for key, value in batch.items():
        if key == "position_ids" or key in OF_PACKING or value is None:
            continue
        if isinstance(value, Tensor) and value.shape[:2] == positions.shape:
            documents = value.flatten(0, 1).split(lengths)
            value = pad_sequence(
                list(documents), batch_first=True, padding_value=IGNORE_INDEX if key == "labels" else 0
            )
        rows[key] = value
    present = [torch.ones(length, dtype=torch.int64, device=batch["input_ids"].device) for length in lengths]
    return {**rows, "attention_mask": pad_sequence(present, batch_first=True)}
