"""The frozen reference: the same model with its adapter off, and a cache of what it said.

There is never a second copy of the weights. States and log-probs of the reference are computed once per example and
kept on the CPU up to a byte limit, so from the second epoch on there is no reference forward at all.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fastforget.backbone import Backbone
from fastforget.backends import backend_of
from fastforget.batch import PreparedSide
from fastforget.collectives import any_process
from fastforget.objectives import Field
from fastforget.reference_modes import check_reference, frozen_mode, reference_mode

if TYPE_CHECKING:
    from fastforget.reference_folder import ReferenceFolder

DEFAULT_CACHE_BYTES = 2 * 10**9


@dataclass(frozen=True)
class LayerStates:
    """The states (n, D) that a layer puts out; None: those that enter the head."""

    layer: int | None


ReferenceRequest = Field | LayerStates  # what can be asked of the reference, and is cached under this key
EMBEDDING = Field("others_embedding", of="reference")
ARGMAX = Field("others_argmax", of="reference")
Entry = dict[ReferenceRequest, Tensor]


class Reference:
    """What the frozen reference says of the kept tokens of a batch.

    Args:
        backbone: of the model that carries the adapter, or of a model that is the reference itself.
        cache_bytes: the cache's limit; least recently used examples go first, and a miss is recomputed. 0: no cache.
        folder: where entries lie on a disk too, for other runs; only beside a cache.
        is_model: the backbone is of the reference itself.
    """

    def __init__(
        self,
        backbone: Backbone,
        cache_bytes: int = DEFAULT_CACHE_BYTES,
        folder: ReferenceFolder | None = None,
        *,
        is_model: bool = False,
    ) -> None:
        if not is_model:
            check_reference(backbone.model)
        self.backbone = backbone
        self.mode = frozen_mode if is_model else reference_mode
        self.folder = folder if cache_bytes > 0 else None
        self.cache_bytes = cache_bytes
        self.bytes_used = 0
        # to compute the reference's embedding costs what it saves in one epoch: without a cache, or where it does not
        # fit beside the states, nobody asks for it
        self.keeps_embeddings = cache_bytes > 0
        self.forwards = 0  # reference forwards so far
        self._cache: OrderedDict[bytes, Entry] = OrderedDict()
        self._changed: set[bytes] = set()  # since `saved`
        self._backbone_changes = 0  # with which the cache was computed

    def answers(self, side: PreparedSide, wanted: frozenset[ReferenceRequest], backend: str = "auto") -> Entry:
        """What the reference says of a side's kept tokens, on the model's device; (n, D) in the model's dtype."""
        if self.backbone.changes != self._backbone_changes:  # the user's own hooks: no digest knows what they compute
            self._changed_around_head()
        keyed = zip(side.keys or [], side.lengths, strict=bool(side.keys))
        cached = [self._cached(key, wanted, length) for key, length in keyed] or [None] * side.sequence_count
        missing = [index for index, entry in enumerate(cached) if entry is None]
        self.fill_in(wanted, computes=bool(missing))
        entries = {index: entry for index, entry in enumerate(cached) if entry is not None}
        if missing:
            for index, entry in zip(missing, self._compute(side, missing, wanted, backend), strict=True):
                entries[index] = entry
                if side.keys:
                    self._keep(side.keys[index], entry)
                    if self.folder is not None:
                        self.folder.write(self._folder_key(side.keys[index]), entry)
        device, order = side.labels.device, range(side.sequence_count)
        return {each: torch.cat([entries[i][each].to(device, non_blocking=True) for i in order]) for each in wanted}

    def _compute(
        self, side: PreparedSide, missing: list[int], wanted: frozenset[ReferenceRequest], backend: str
    ) -> list[Entry]:
        """One reference forward over the sequences that are not cached."""
        inputs, positions, labels = side.inputs, side.positions, side.labels
        if len(missing) < len(inputs["input_ids"]) and side.keys:
            inputs, positions, labels = subset(side, missing)
        fields = [request for request in wanted if isinstance(request, Field)]
        layers = layers_for(wanted)
        with self.mode(self.backbone.model), self.backbone.whole_head(None in layers):
            states = self.backbone.states(inputs, positions, layers)
            values: Entry = {LayerStates(layer): state for layer, state in states.items()}
            if fields:
                names = sorted(field.name for field in fields)
                stats = backend_of(backend, labels.device).token_stats(states[None], labels, self.backbone.head, names)
                values |= {field: stats[field.name] for field in fields}
                if EMBEDDING in values:  # as it is cached, from the first epoch on
                    values[EMBEDDING] = values[EMBEDDING].to(states[None].dtype)
        self.forwards += 1
        lengths = [side.lengths[index] for index in missing]
        parts = {request: values[request].detach().split(lengths) for request in wanted}
        return [{request: parts[request][index] for request in wanted} for index in range(len(missing))]

    def _changed_around_head(self) -> None:
        """Forget all, and the folder, whose entries are of weights alone."""
        self._backbone_changes, self.folder = self.backbone.changes, None
        self.clear()

    def fill_in(self, wanted: frozenset[ReferenceRequest], computes: bool = False) -> None:
        """Let a process whose cache has all take part in what another one computes; only where FSDP2 shards the model.

        Args:
            computes: this process is about to compute it.
        """
        if self.backbone.sharded and any_process(computes, self.backbone.device) and not computes:
            layers = layers_for(wanted)
            with self.mode(self.backbone.model), self.backbone.whole_head(None in layers):
                self.backbone.fill_in(layers)

    def _cached(self, key: bytes, wanted: frozenset[ReferenceRequest], length: int) -> Entry | None:
        """The entry, unless it lacks something or is not of so many tokens."""

        def serves(entry: Entry | None) -> bool:
            return entry is not None and wanted <= entry.keys() and all(len(entry[each]) == length for each in wanted)

        entry = self._cache.get(key)
        if not serves(entry) and self.folder is not None:
            entry = self.folder.read(self._folder_key(key))
            if entry is not None and serves(entry):
                entry = {each: entry[each] for each in wanted}
                self._keep(key, entry)
        if entry is None or not serves(entry):
            return None
        if key in self._cache:
            self._cache.move_to_end(key)
        return dict(entry)  # the cache's own may lose its embedding while the rest of the batch is kept

    def _folder_key(self, key: bytes) -> bytes:
        """The key of an entry on a disk, where other runs may have kept logits in the place of states."""
        return key + b"logits" if self.backbone.head.is_identity else key

    def _keep(self, key: bytes, entry: Entry) -> None:
        """Cache an entry, within the limit."""
        size = entry_bytes(entry)
        if size > self.cache_bytes:
            self._full()
            return
        replaced = self._cache.pop(key, None)
        if replaced is not None:
            self.bytes_used -= entry_bytes(replaced)
            entry = replaced | entry
            size = entry_bytes(entry)
        on_gpu = self.backbone.device.type == "cuda"
        self._cache[key] = {request: copy_on_cpu(value, on_gpu) for request, value in entry.items()}
        self._changed.add(key)
        self.bytes_used += size
        if self.bytes_used > self.cache_bytes and self.keeps_embeddings:
            self.keeps_embeddings = False
            for each in self._cache.values():
                dropped = each.pop(EMBEDDING, None)
                self.bytes_used -= 0 if dropped is None else dropped.numel() * dropped.element_size()
        while self.bytes_used > self.cache_bytes:
            self._full()
            key, oldest = self._cache.popitem(last=False)
            self._changed.discard(key)
            self.bytes_used -= entry_bytes(oldest)

    def _full(self) -> None:
        """Before an entry leaves the cache, or is not taken into it, for want of room."""

    def clear(self) -> None:
        """Forget everything cached (after the frozen weights were changed on purpose)."""
        self._cache.clear()
        self._changed.clear()
        self.bytes_used = 0

    def order(self) -> list[bytes]:
        """The keys of the cache, the least recently used first."""
        return list(self._cache)

    def changes(self) -> dict[bytes, Entry]:
        """The entries that came, or grew, since `saved`."""
        return {key: entry for key, entry in self._cache.items() if key in self._changed}

    def saved(self) -> None:
        """Take all entries for known to those who asked for `changes`."""
        self._changed.clear()

    def fill(self, entries: Mapping[bytes, Entry], keeps_embeddings: bool) -> None:
        """Make the cache one of these entries, in their order, the least recently used first."""
        self.clear()
        self.keeps_embeddings = keeps_embeddings
        dropped = set() if keeps_embeddings else {EMBEDDING}
        on_gpu = self.backbone.device.type == "cuda"
        for key, entry in entries.items():
            kept = {request: value for request, value in entry.items() if request not in dropped}
            self._cache[key] = {request: copy_on_cpu(value, on_gpu) for request, value in kept.items()}
            self.bytes_used += entry_bytes(self._cache[key])


def layers_for(wanted: Iterable[ReferenceRequest]) -> set[int | None]:
    """The layers whose states a reference forward must give for these requests."""
    return {request.layer if isinstance(request, LayerStates) else None for request in wanted}


def copy_on_cpu(value: Tensor, pinned: bool) -> Tensor:
    """Copy a tensor (a slice would keep the whole batch alive), for a GPU into pinned memory, which it can read."""
    if pinned:
        return torch.empty(value.shape, dtype=value.dtype, pin_memory=True).copy_(value)
    return value.to("cpu", copy=True)


def entry_bytes(entry: Entry) -> int:
    """Bytes of one cached example."""
    return sum(value.numel() * value.element_size() for value in entry.values())


def subset(side: PreparedSide, chosen: list[int]) -> tuple[dict[str, Any], tuple[Tensor, Tensor], Tensor]:
    """Inputs, positions and labels of some labelled sequences only, built from counts that the CPU knows."""
    device = side.labels.device
    starts = [0]
    for length in side.lengths:
        starts.append(starts[-1] + length)
    tokens = torch.tensor([token for index in chosen for token in range(starts[index], starts[index + 1])])
    row = torch.tensor([place for place, index in enumerate(chosen) for _ in range(side.lengths[index])])
    rows = torch.tensor([side.rows[index] for index in chosen])
    tokens, row, rows = (each.to(device, non_blocking=True) for each in (tokens, row, rows))
    inputs = {key: value[rows] for key, value in side.inputs.items()}
    return inputs, (row, side.positions[1][tokens]), side.labels[tokens]
