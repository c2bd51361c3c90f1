"""What a sweep goes through: blocks of kept rows, tiles of the vocabulary, and the buffers that all tiles share."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from fastforget.backends import tiling
from fastforget.backends.products import compute_dtype, operand_dtype, rows_contiguous
from fastforget.backends.protocol import LogitMap, StateBlock, StateTargets, Targets, Tile, TilePasses
from fastforget.backends.torch_passes import unit_vectors
from fastforget.head import LMHead


@dataclass(frozen=True)
class KeptRows:
    """The n rows of (N, D) tensors that are worked on: those at `positions`, or all."""

    positions: Tensor | None
    count: int

    @classmethod
    def of(cls, hidden: Tensor, positions: Tensor | None) -> KeptRows:
        """Those of hidden (N, D)."""
        return cls(positions, len(hidden if positions is None else positions))

    def take(self, tensor: Tensor, rows: slice) -> Tensor:
        """Some of the kept rows of a tensor (N, D); a view where all are kept."""
        return tensor[rows] if self.positions is None else tensor.index_select(0, self.positions[rows])

    def put(self, part: Tensor, rows: slice, out: Tensor) -> None:
        """Write some of the kept rows where they belong in `out` (N, D)."""
        if self.positions is None:
            out[rows] = part
        else:
            out.index_copy_(0, self.positions[rows], part.to(out.dtype))

    def add(self, part: Tensor, rows: slice, out: Tensor) -> None:
        """Add some of the kept rows where they belong in `out` (N, D)."""
        if self.positions is None:
            out[rows] += part.to(out.dtype)
        else:
            out.index_add_(0, self.positions[rows], part.to(out.dtype))


@dataclass(frozen=True)
class SweepInput:
    """What every sweep goes over: a backend's passes, hidden states, and which rows of them are kept."""

    passes: TilePasses
    hidden: Tensor  # (N, D), detached
    labels: Tensor  # (n,) int64 of the kept rows; negative: none, where a sweep allows it
    positions: Tensor | None  # (n,) int64 of the kept rows; None: all
    head: LMHead

    @property
    def kept(self) -> KeptRows:
        """The kept rows."""
        return KeptRows.of(self.hidden, self.positions)

    def written_dtype(self) -> torch.dtype:
        """The dtype of rows for product 2; of logits those rows are the gradient itself."""
        if self.head.is_identity:
            return compute_dtype(self.hidden)
        dtype = self.passes.row_dtype(torch.promote_types(self.hidden.dtype, self.head.weight.dtype))
        return compute_dtype(self.hidden) if dtype == torch.float64 else dtype


class TileViews(NamedTuple):
    """One tile of a block: where it lies, and its parts of the buffers."""

    tile: Tile
    columns: slice
    products: tuple[Tensor | None, ...]  # of each buffer, (r, c); None where logits are there already
    rows: tuple[Tensor, ...]  # for product 2, in the same memory


@dataclass
class Tiling:
    """Blocks of rows, tiles of the vocabulary, and the buffers that all tiles share.

    Logits that are there already (an identity head) are one tile of whole rows, and need buffers only for what is
    written. `row_dtype`: of written rows, None where none are.
    """

    given: SweepInput
    buffers: int = 1
    row_dtype: torch.dtype | None = None
    _views: dict[int, list[TileViews]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.hidden, self.kept, self.head = self.given.hidden, self.given.kept, self.given.head
        self.dtype = compute_dtype(self.hidden)
        self.logit_map = LogitMap.of(self.head, self.dtype)
        itemsize, device = self.buffers * self.dtype.itemsize, self.hidden.device
        self.weight: Tensor | None = None
        self.memory: list[Tensor] = []
        if self.head.is_identity:
            self.vocabulary, self.operands, self.casts = self.hidden.shape[1], self.hidden.dtype, False
            self.shape = tiling.whole_rows(self.kept.count, self.vocabulary, device, itemsize)
            if self.row_dtype is None:
                return
        else:
            self.weight = rows_contiguous(self.head.weight.detach())
            self.vocabulary, width = self.weight.shape
            self.operands = operand_dtype(self.hidden, self.head)
            self.casts = self.weight.dtype != self.operands
            cast_width = width if self.casts else 0
            self.shape = tiling.tile_shape(self.kept.count, self.vocabulary, device, itemsize, cast_width)
        size = self.shape.rows, tiling.aligned(self.shape.columns)
        self.memory = [self.hidden.new_empty(size, dtype=self.dtype) for _ in range(self.buffers)]

    def blocks(self) -> Iterator[slice]:
        """Slices of the kept rows."""
        return tiling.row_blocks(self.kept.count, self.shape.rows)

    def states(self, hidden: Tensor, rows: slice) -> Tensor:
        """A block of hidden states as product 1 takes them, or of logits as passes do."""
        return rows_contiguous(self.kept.take(hidden, rows).to(self.operands))

    def tiles(self, count: int) -> Iterator[tuple[TileViews, Tensor | None]]:
        """The tiles of a block of `count` rows, each with the head's rows as both products take them (None: no head).

        Views are made once, as making them costs as much as a small pass.
        """
        if count not in self._views:
            self._views[count] = [self.view(count, first) for first in range(0, self.vocabulary, self.shape.columns)]
        for views in self._views[count]:
            weight = None if self.weight is None else self.weight[views.columns]
            yield views, weight.to(self.operands) if weight is not None and self.casts else weight

    def view(self, count: int, first: int) -> TileViews:
        """One tile of a block of `count` rows."""
        columns = min(self.shape.columns, self.vocabulary - first)
        whole = self.weight is None
        # of a shard one token more, which no tile has: the label that another process holds
        vocabulary = self.vocabulary + (self.head.shard is not None)
        tile = Tile(first, columns, vocabulary, columns if whole else tiling.aligned(columns), self.logit_map)
        parts = tuple(buffer[:count, :columns] for buffer in self.memory)
        rows = tuple(buffer.view(self.row_dtype or self.dtype)[:count, :columns] for buffer in self.memory)
        return TileViews(tile, slice(first, first + columns), (None,) * self.buffers if whole else parts, rows)

    def empty_states(self, count: int | None = None) -> Tensor:
        """An empty (n, D), float32 or float64."""
        size = self.kept.count if count is None else count, self.hidden.shape[1]
        return self.hidden.new_empty(size, dtype=self.dtype)

    def empty_accumulators(self, count: int) -> Tensor:
        """An empty (count, n) of the backend's dtype."""
        dtype = self.given.passes.accumulator_dtype(self.dtype)
        return self.hidden.new_empty((count, self.kept.count), dtype=dtype)


def prepared(targets: Targets, dtype: torch.dtype) -> StateTargets:
    """Targets as passes read them."""
    cosine = targets.metric == "cosine"
    anchor = None if targets.anchor is None else targets.anchor.detach().to(dtype)
    if anchor is not None and anchor.stride(-1) != 1:
        anchor = anchor.contiguous()
    centres = None if targets.centres is None else targets.centres.detach().to(dtype).contiguous()
    if cosine and centres is not None:
        centres = unit_vectors(centres)[0]
    return StateTargets(anchor, centres, cosine)


@dataclass(frozen=True)
class StateMeasures:
    """Distances of n states from the anchor and from the nearest centre, and which centre that is."""

    values: Tensor  # (2, n)
    nearest: Tensor  # (n,) int64


class StateRows:
    """The kept rows' states, a block at a time, and their measures, which the passes fill in."""

    def __init__(self, hidden: Tensor, kept: KeptRows, targets: Targets) -> None:
        self.states = (hidden if targets.states is None else targets.states).detach()
        self.kept = kept
        dtype = compute_dtype(self.states)
        self.targets = prepared(targets, dtype)
        self.measures = StateMeasures(
            self.states.new_empty((2, kept.count), dtype=dtype),
            torch.empty(kept.count, dtype=torch.int64, device=self.states.device),
        )

    def block(self, rows: slice) -> StateBlock:
        """What a pass needs of some kept rows."""
        anchor = self.targets.anchor
        if anchor is not None and anchor.dim() == 2:
            anchor = self.kept.take(anchor, rows)
        targets = StateTargets(anchor, self.targets.centres, self.targets.cosine)
        states = rows_contiguous(self.kept.take(self.states, rows))
        return StateBlock(states, targets, self.measures.values[:, rows], self.measures.nearest[rows])


def measure_states(passes: TilePasses, hidden: Tensor, targets: Targets) -> StateMeasures:
    """The measures of all rows of hidden (n, D) by themselves, for states of any layer."""
    rows_of = StateRows(hidden, KeptRows.of(hidden, None), targets)
    passes.state_pass(rows_of.block(slice(0, len(hidden))))
    return rows_of.measures
