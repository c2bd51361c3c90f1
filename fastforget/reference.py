"""The frozen reference: the same model with its adapter off, and a cache of what it said.

There is never a second copy of the weights. States and log-probs of the reference are computed once per example and
kept on the CPU up to a byte limit, so from the second epoch on there is no reference forward at all.
"""

from __future__ import annotations

import contextlib
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fastforget.adapters import ADDED_TO_THE_BASE
from fastforget.backbone import Backbone, every_module, without_dropout
from fastforget.backends import backend_of
from fastforget.batch import PreparedSide
from fastforget.collectives import any_process
from fastforget.errors import FastforgetError
from fastforget.objectives import Field

if TYPE_CHECKING:
    from fastforget.reference_folder import ReferenceFolder

DEFAULT_CACHE_BYTES = 2 * 10**9
SWITCHED_WITH_THE_ADAPTER = ("modules_to_save", "trainable_tokens_delta")  # in names of weights, beside its own


@dataclass(frozen=True)
class LayerStates:
    """The states (n, D) that a layer puts out; None: those that enter the head."""

    layer: int | None


ReferenceRequest = Field | LayerStates  # what can be asked of the reference, and is cached under this key
EMBEDDING = Field("others_embedding", of="reference")
ARGMAX = Field("others_argmax", of="reference")
Entry = dict[ReferenceRequest, Tensor]


def check_reference(model: Any) -> None:
    """Raise where switching the adapter off would not give the frozen model.

    Raises:
        FastforgetError: no PEFT adapter, one with a trained bias or whose initialisation rewrote the base, or trainable
            weights outside the adapter.
    """
    configs = getattr(model, "peft_config", None)
    if not configs:
        raise FastforgetError(
            "a term compares with the frozen model, which is the model with its adapter off, and this model has no "
            "PEFT adapter: load it with fastforget.load(...), give a frozen copy as reference=, or use terms without a "
            "reference (grad_ascent, grad_diff)"
        )
    from peft.mapping import PEFT_TYPE_TO_PREFIX_MAPPING

    for name, config in configs.items():
        bias = getattr(config, "bias", "none")
        if bias != "none":
            raise FastforgetError(
                f"adapter {name!r} trains biases (bias={bias!r}): they stay changed when the adapter is off, so the "
                "reference would be wrong; use bias='none'"
            )
        initial = getattr(config, "init_lora_weights", True)
        if initial not in ADDED_TO_THE_BASE:
            raise FastforgetError(
                f"adapter {name!r} was made with init_lora_weights={initial!r}, which takes its start out of the base: "
                "with the adapter off the model is not the one to be compared with. Use init_lora_weights=True or "
                "'gaussian', or give a frozen copy of the original as reference="
            )
    prefixes = {PEFT_TYPE_TO_PREFIX_MAPPING[config.peft_type] for config in configs.values()}
    for name, parameter in model.named_parameters():
        own = any(prefix in name for prefix in prefixes) or any(part in name for part in SWITCHED_WITH_THE_ADAPTER)
        if parameter.requires_grad and not own:
            raise FastforgetError(
                f"{name} trains but belongs to no adapter: training would change the reference; freeze it, or give a "
                "frozen copy as reference="
            )


@contextlib.contextmanager
def reference_mode(model: Any) -> Iterator[None]:
    """The model as its own frozen reference: our adapter off, dropout off, no gradients; all of it restored.

    Adapters that are active but frozen belong to the model to be unlearned and stay on (stacked); those that train are
    ours and go off. PEFT turns `requires_grad` on again for adapter weights that the user froze: flags are put back.
    """
    modules = every_module(model)
    flags = [
        (parameter, parameter.requires_grad)
        for module in modules
        for parameter in module._parameters.values()
        if parameter is not None
    ]
    active = active_adapters(model, modules)
    frozen = [name for name in active if not adapter_trains(model, name)] if len(active) > 1 else []
    try:
        with torch.no_grad(), without_dropout(model):
            if frozen and len(frozen) < len(active):
                set_adapters(model, modules, frozen)
                try:
                    yield
                finally:
                    set_adapters(model, modules, active)
            else:
                with adapters_off(modules):
                    yield
    finally:
        for parameter, requires_grad in flags:
            if parameter.requires_grad is not requires_grad:
                parameter.requires_grad_(requires_grad)


def active_adapters(model: Any, modules: Iterable[Any]) -> list[str]:
    """The names of the adapters that are on: in a PeftModel, or in a model that has them without one."""
    if hasattr(model, "get_base_model"):
        return list(model.active_adapters)
    return list(dict.fromkeys(name for layer in tuner_layers(modules) for name in layer.active_adapters))


def set_adapters(model: Any, modules: Iterable[Any], names: list[str]) -> None:
    """Switch these adapters on, and others off; PEFT changes what trains."""
    if hasattr(model, "get_base_model"):
        model.base_model.set_adapter(names)
        return
    for layer in tuner_layers(modules):
        layer.set_adapter(names)


def tuner_layers(modules: Iterable[Any]) -> list[Any]:
    """The layers among the modules that PEFT put an adapter in."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    return [module for module in modules if isinstance(module, BaseTunerLayer)]


@contextlib.contextmanager
def frozen_mode(model: Any) -> Iterator[None]:
    """Another model as the reference: dropout off, no gradients."""
    with torch.no_grad(), without_dropout(model):
        yield


@contextlib.contextmanager
def adapters_off(modules: Iterable[Any]) -> Iterator[None]:
    """Switch off those PEFT layers among the modules that are on, as `disable_adapter()` does.

    That one surveys every weight first, 20 ms of host time for 64 layers with LoRA. Of PEFT's usual layers only the
    flag is set: without gradients it does not matter which weights require one.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer

    usual: list[Any] = []
    others: list[Any] = []
    for module in modules:
        switch = getattr(type(module), "enable_adapters", None)
        # transformers' own models have methods of these names
        if switch is not None and getattr(module, "disable_adapters", None) is False:
            (usual if switch is BaseTunerLayer.enable_adapters else others).append(module)
    try:
        for layer in usual:
            layer._disable_adapters = True
        for layer in others:
            layer.enable_adapters(False)
        yield
    finally:
        for layer in usual:
            layer._disable_adapters = False
        for layer in others:
            layer.enable_adapters(True)


def adapter_trains(model: Any, adapter: str) -> bool:
    """Whether any weight of this adapter wants a gradient."""
    return any(parameter.requires_grad for name, parameter in model.named_parameters() if f".{adapter}." in f"{name}.")


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
            self._backbone_changes, self.folder = self.backbone.changes, None
            self.clear()
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
            key, oldest = self._cache.popitem(last=False)
            self._changed.discard(key)
            self.bytes_used -= entry_bytes(oldest)

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
