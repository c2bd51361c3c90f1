"""Kept rows a chunk at a time, and what row passes take and give."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from fastforget.backends import gemm, workspace
from fastforget.head import LMHead

ALIGNMENT = 64  # rows of logits begin at a multiple of so many elements: kernels and products then use wide accesses


@dataclass
class Against:
    """What states are measured against: `anchor` (N, D) or (D,), `centres` (K, D); nothing, where there are neither.

    `states` (N, D) are those that are measured, where they are not the hidden states that enter the head.
    """

    states: Tensor | None = None
    anchor: Tensor | None = None
    centres: Tensor | None = None
    metric: str = "l2"

    def __bool__(self) -> bool:
        return self.anchor is not None or self.centres is not None


@dataclass
class LabelPass:
    """What a label row pass found of a chunk, and the row that it wrote."""

    fields: dict[str, Tensor]
    row: Tensor | None
    label_slope: Tensor | None = None  # of the softcap at the label's logit; None: 1
    row_scale: Tensor | None = None  # what each row was multiplied with; None: 1
    masses: Tensor | None = None  # (n, tiles)
    states: dict[str, Tensor] = field(default_factory=dict)  # distance, pull, nearest


@dataclass
class PairedPass:
    """What a paired row pass found of a chunk, and the row that it wrote."""

    value: Tensor
    row: Tensor | None
    row_scale: Tensor | None = None


@dataclass
class Chunks:
    """Kept rows of hidden states, a chunk at a time, with the buffers that all chunks share."""

    hidden: Tensor
    positions: Tensor | None
    head: LMHead
    buffers: int = 1  # of products at a time, which share the byte budget
    tiled: bool = False  # a buffer holds a tile of the vocabulary, and many rows

    def __post_init__(self) -> None:
        self.count = len(self.hidden if self.positions is None else self.positions)
        self.vocabulary = self.hidden.shape[1] if self.head.is_identity else self.head.weight.shape[0]
        self.dtype = gemm.compute_dtype(self.hidden)
        self.block: Tensor | None = None  # of the workspace, which the buffers are cut from
        self.taken = 0
        if self.tiled:
            self.step, self.padded = gemm.logit_tile(self.count, self.head.weight)
            self.columns = self.padded
            return
        self.columns = self.vocabulary
        self.padded = -(-self.vocabulary // ALIGNMENT) * ALIGNMENT
        most = gemm.chunk_rows(self.buffers * self.padded, self.hidden)
        self.step = gemm.even_rows(self.count, most, self.hidden)

    def buffer(self, dtype: torch.dtype | None = None, times: int = 1) -> Tensor:
        """A buffer (rows, V or a tile of it) for `times` chunks, until `give_back`; a row takes `padded` elements."""
        shape, dtype = (times * self.step, self.padded), dtype or self.dtype
        if not self.hidden.is_cpu:
            return torch.empty(shape, dtype=dtype, device=self.hidden.device)[:, : self.columns]
        size = shape[0] * shape[1] * dtype.itemsize
        if self.block is None:
            self.block = workspace.take(max(self.buffers, times) * size // times)
        taken = slice(self.taken, self.taken + size)
        part = self.block[taken] if taken.stop <= len(self.block) else torch.empty(size, dtype=torch.uint8)
        self.taken += size
        return part.view(dtype).view(shape)[:, : self.columns]

    def give_back(self) -> None:
        """End the use of all buffers. Where an exception skips this, they are merely not kept."""
        if self.block is not None:
            workspace.give_back(self.block)
            self.block = None

    def empty_states(self) -> Tensor:
        """An empty (n, D), float32 or float64."""
        return torch.empty(self.count, self.hidden.shape[1], dtype=self.dtype, device=self.hidden.device)

    def __iter__(self) -> Iterator[slice]:
        return gemm.row_chunks(self.count, max(self.step, 1))

    def of(self, tensor: Tensor, rows: slice) -> Tensor:
        """These kept rows of a tensor that has one for each position."""
        return tensor[rows] if self.positions is None else tensor.index_select(0, self.positions[rows])

    def against(self, against: Against, rows: slice) -> Against:
        """The same for these kept rows, with their states."""
        anchor = against.anchor
        if anchor is not None and anchor.dim() == 2:
            anchor = self.of(anchor, rows)
        measured = self.hidden if against.states is None else against.states
        return Against(self.of(measured, rows), anchor, against.centres, against.metric)

    def narrow(self, states: Tensor | None = None) -> Iterator[slice]:
        """Kept rows of which so many as a weight tile's bytes allow are in float32; of the hidden states, or others."""
        width = (self.hidden if states is None else states).shape[1] * self.dtype.itemsize
        return gemm.row_chunks(self.count, max(1, gemm.TILE_BYTES // width))

    def put(self, part: Tensor, rows: slice, out: Tensor) -> None:
        """Write the states of these kept rows into the rows of `out` (N, D) that they are kept from."""
        if self.positions is None:
            out[rows] = part
        else:
            out.index_copy_(0, self.positions[rows], part.to(out.dtype))

    def scatter_scaled(self, kept: Tensor, factor: Tensor, out: Tensor) -> None:
        """Write `kept * factor` (n, D) into the rows of `out` (N, D), a bounded part at a time."""
        for rows in self.narrow():
            self.put(kept[rows] * factor[rows, None], rows, out)


def passes_of(backend: str, dtype: torch.dtype) -> Any:
    """The module with a backend's row passes; float64 is `chunked`'s alone."""
    return importlib.import_module(f"fastforget.backends.{'chunked' if dtype == torch.float64 else backend}")
