"""A reference that is only known from its cache: what the untouched model said of all examples, before the first step.

Where everything trains, or an adapter cannot be switched off, nothing that is left in memory is the model to be
compared with. A copy of it would be (`reference=copy`), and costs its weights; its states and log-probs of the
examples, which are all that a loss asks for, cost less where these are few. Nothing may then leave the cache, and what
is not in it is an error.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from torch import nn

from fastforget.backbone import Backbone
from fastforget.batch import Batch, LabelCounts, PreparedSide, sides_of
from fastforget.collectives import agreed, any_process
from fastforget.errors import FastforgetError
from fastforget.processes import without_buffer_broadcast
from fastforget.reference import Entry, Reference, ReferenceRequest
from fastforget.reference_folder import ReferenceFolder
from fastforget.reference_modes import check_separate
from fastforget.shards import fill_up, reshard

CACHE = "cache"  # as `reference`
# of a batch that may lack any stream, as a part of a larger one may
ANY_PART = LabelCounts(**{field.name: 1 for field in fields(LabelCounts)})
Batches = Iterable[Batch | tuple[Batch | None, Batch | None]]


class CompleteReference(Reference):
    """What the model said of examples before it trained; raises FastforgetError for any other example.

    Args:
        backbone: of the model that is about to train.
        cache_bytes: more is refused; with a folder, entries that were not used for the longest time are in it alone.
        folder: where all entries lie.
    """

    def __init__(self, backbone: Backbone, cache_bytes: int, folder: ReferenceFolder | None = None) -> None:
        super().__init__(backbone, cache_bytes, folder, is_model=True)
        self.folder = folder  # beside no cache too: it has all
        self.learns = False
        self.known: set[bytes] = set()
        self._versions: list[int] | None = None  # of the weights, when the first example was learned

    def learn(self, side: PreparedSide, wanted: frozenset[ReferenceRequest], backend: str) -> None:
        """Let the model, as it is, say what is wanted of a side's sequences."""
        versions = [parameter._version for parameter in self.backbone.model.parameters()]
        if self._versions is None:
            self._versions = versions
        elif versions != self._versions:
            raise FastforgetError(
                "cache_reference: the model has changed since the first examples were cached, so it is no longer what "
                "they are compared with; give all batches before the first step"
            )
        if side.keys is None:
            raise FastforgetError(
                f"{side.batch.name} has inputs that belong to no row, so what the model says of a row cannot be known "
                "by its content: reference='cache' cannot serve, give a frozen copy as reference="
            )
        self.learns = True
        try:
            self.answers(side, wanted, backend)
        finally:
            self.learns = False
        if self.folder is not None and self.folder.failed:
            raise FastforgetError(
                f"cache_reference: {self.folder.folder} cannot hold what the reference said: give a folder with more "
                "room, or none"
            )
        self.known.update(side.keys)

    def take_over(self, other: CompleteReference) -> None:
        """Know what another one knows, of the same weights."""
        self._cache, self.bytes_used, self.folder = other._cache, other.bytes_used, other.folder
        self.known, self._versions, self.keeps_embeddings = other.known, other._versions, other.keeps_embeddings

    def _compute(
        self, side: PreparedSide, missing: list[int], wanted: frozenset[ReferenceRequest], backend: str
    ) -> list[Entry]:
        if self.learns:
            return super()._compute(side, missing, wanted, backend)
        raise FastforgetError(
            f"reference='cache': row {side.rows[missing[0]]} of {side.batch.name} is not in the cache, which knows "
            f"{len(self.known)} examples by their ids, mask and labels: before the first step give cache_reference "
            "every batch that training will see, each side on its own side, with its companions"
        )

    def _changed_around_head(self) -> None:
        raise FastforgetError(
            "reference='cache': a hook or another forward was put on the head since the reference was cached: put it "
            "there before"
        )

    def _full(self) -> None:
        if self.folder is None:
            raise FastforgetError(
                f"cache_reference: what the reference says takes more than reference_cache_bytes={self.cache_bytes}: "
                "give more, or reference_cache_folder, or a frozen copy of the model as reference="
            )


def make_reference(
    backbone: Backbone,
    reference: nn.Module | str | None,
    *,
    compared: bool,
    backend: str,
    cache_bytes: int,
    folder: str | os.PathLike[str] | None,
    folder_bytes: int,
) -> Reference:
    """The reference of a loss over a backbone's model; see `UnlearnLoss` for what is given.

    Raises:
        FastforgetError: one that would be wrong, or a folder where processes hold parts of the weights.
    """
    if isinstance(reference, str) and reference != CACHE:
        raise FastforgetError(f"reference must be a model, {CACHE!r} or None, not {reference!r}")
    complete = reference == CACHE
    frozen = Backbone(reference) if isinstance(reference, nn.Module) else backbone
    if reference is not None:
        check_separate(backbone, frozen, compared)
    entries = None
    if folder is not None:
        if frozen.sharded or frozen.head.shard is not None:
            raise FastforgetError(
                "reference_cache_folder: its entries are named by a digest of the frozen weights, of which each "
                "process here holds a part: leave it out, the cache in memory works"
            )
        limit = math.inf if complete else folder_bytes
        entries = ReferenceFolder(Path(folder), limit, frozen.model, backend, untouched=complete)
    if complete:
        return CompleteReference(frozen, cache_bytes, entries)
    return Reference(frozen, cache_bytes, entries, is_model=reference is not None)


def cache_reference(loss: Any, batches: Batches, micro_batch: int | None = None) -> int:
    """Let a loss's `CompleteReference` learn batches; see `UnlearnLoss.cache_reference`."""
    reference, backbone = loss.reference, loss.backbone
    if reference is None:
        return 0
    if not isinstance(reference, CompleteReference):
        raise FastforgetError("cache_reference: make the step or loss with reference='cache'")
    plans = (*loss.plan.baselines, *loss.plan.forwards)
    with without_buffer_broadcast(backbone.outer):  # a process may have no batch
        for forget, retain in in_step(batches, backbone):
            for plan, parts in zip(plans, parts_for(loss, forget, retain, micro_batch), strict=True):
                asked = {stream: loss.wanted(each, True) for stream, each in plan.streams.items()}
                for part in parts:
                    for stream, wanted in asked.items():
                        if wanted and stream in part:
                            reference.learn(part[stream], wanted, loss.backend)
                        elif wanted:
                            reference.fill_in(wanted)
    return len(reference.known)


def parts_for(loss: Any, forget: Batch | None, retain: Batch | None, micro_batch: int | None) -> list[list[Any]]:
    """A batch that may lack anything, prepared for the plan's forwards; under FSDP2 in as many parts as any has."""
    backbone = loss.backbone

    def prepare() -> list[list[Any]]:
        return loss.prepared(forget, retain, ANY_PART, ANY_PART, micro_batch)[1]

    if not backbone.sharded:
        return prepare()
    reshard(backbone.model)
    backbone.takes_positions()  # two forwards, the first time
    return fill_up(agreed(prepare, backbone.device), {}, backbone.device)


def in_step(batches: Batches, backbone: Backbone) -> Iterator[tuple[Batch | None, Batch | None]]:
    """Yield the sides of batches; where FSDP2 shards the model, as often as the process with the most has some."""
    given = iter(batches)
    while True:
        item = next(given, None)
        there = item is not None
        if not (any_process(there, backbone.device) if backbone.sharded else there):
            return
        if item is None:
            yield None, None
        elif isinstance(item, tuple | list):
            yield item[0], item[1]
        elif isinstance(item, Mapping) and "role" not in item:
            raise FastforgetError(
                "cache_reference: give pairs (forget, retain), of which one may be None, or flat batches with a role"
            )
        else:
            yield sides_of(item, None)
