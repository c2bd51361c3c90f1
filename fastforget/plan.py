"""How much memory a job will need, before it runs: from a model's config alone, component by component.

A plan is of the highest moment of the first epoch, when the reference runs too, and of what tensors take. On a GPU the
driver's context and gaps between tensors come on top, on a CPU the libraries.
"""

from __future__ import annotations

import functools
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from fastforget import objectives
from fastforget.errors import FastforgetError
from fastforget.hub import hub_or_cache
from fastforget.loss_plan import ForwardPlan, named_terms, plan_loss
from fastforget.models import BITS, base_of, readable_errors
from fastforget.objectives import Field, Term
from fastforget.objectives.presets import DEFAULT_PRESET
from fastforget.reference import ARGMAX, DEFAULT_CACHE_BYTES, EMBEDDING, ReferenceRequest

if TYPE_CHECKING:
    from fastforget.footprint import PassBytes, Skeleton

UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "ki": 2**10, "mi": 2**20, "gi": 2**30}
LEFT_FREE = 0.1  # of a device: for what a plan may err, gaps between tensors, and the driver
ADAM_STATES = 2  # each as large as a parameter
DEVICES = ("cuda", "cpu")


@dataclass(frozen=True)
class Settings:
    """What decides how much memory a job takes; `micro_batch` None: the whole batch at once."""

    bits: int = 8
    checkpointing: bool = False
    micro_batch: int | None = None

    def __str__(self) -> str:
        rows = "the whole batch at once" if self.micro_batch is None else f"micro_batch {self.micro_batch}"
        return f"{self.bits} bit, {'with' if self.checkpointing else 'no'} checkpointing, {rows}"


@dataclass(frozen=True)
class Footprint:
    """Bytes by component with some settings; they add up to the peak."""

    settings: Settings
    components: dict[str, int]

    @property
    def peak(self) -> int:
        """Bytes at the highest moment."""
        return sum(self.components.values())


@dataclass(frozen=True)
class Plan:
    """What a job would take.

    Attributes:
        asked: with the settings that were asked for.
        usual: the loop that people write, with the same bits: all logits, and a second copy of the model.
        compiled_activations: an estimate of the activations of `asked` where layers are compiled.
        cache_bytes: of the reference's cache; in a GPU's host, on a CPU a component.
        budget: bytes of the device, where given. best: the settings that fit it best, None where none do.
    """

    model: str
    device: str
    asked: Footprint
    usual: Footprint
    compiled_activations: int
    cache_bytes: int
    budget: int | None = None
    best: Footprint | None = None

    def as_json(self) -> dict[str, Any]:
        """The plan as plain data, with each peak."""
        found = asdict(self)
        for name, footprint in (("asked", self.asked), ("usual", self.usual), ("best", self.best)):
            if footprint is not None:
                found[name]["peak"] = footprint.peak
        return found


def plan(
    model: str | os.PathLike[str],
    *,
    gpu: str | int | None = None,
    bits: int = 8,
    preset: str | Sequence[Term] = DEFAULT_PRESET,
    preset_options: Mapping[str, Any] | None = None,
    seq_len: int = 128,
    batch: int = 8,
    micro_batch: int | None = None,
    checkpointing: bool = False,
    lora: Mapping[str, Any] | None = None,
    labelled: float = 1.0,
    padded: bool = True,
    examples: int | None = None,
    device: str = "cuda",
) -> Plan:
    """Say how much memory a job will need. Of the model only its config is read.

    Args:
        model: a local folder or a hub name, as in `fastforget.load`.
        gpu: the device's memory ("16GB", "24GiB", or bytes). Then the settings that fit it best are proposed: the most
            bits, up to `bits`; no checkpointing, where that is possible; and the largest micro-batch.
        bits, lora: as in `fastforget.load`.
        preset, preset_options: what is computed: a preset's name, or terms.
        seq_len, batch: tokens of a sequence, and sequences of each side in a step.
        micro_batch, checkpointing: settings of the footprint that is asked for, beside `bits`.
        labelled: share of the tokens.
        padded: whether sequences of a batch differ in length, so that attention takes a mask.
        examples: of both sets, what the reference says of which is cached; default those of one step.
        device: "cuda" or "cpu".

    Raises:
        FastforgetError: a config that cannot be read, a number out of its range, or a model whose forward cannot run
            without values.
    """
    check(bits=bits, seq_len=seq_len, batch=batch, micro_batch=micro_batch, labelled=labelled, device=device)
    terms = objectives.preset(preset, **(preset_options or {})) if isinstance(preset, str) else list(preset)
    budget = None if gpu is None else parse_size(gpu)
    planner = Planner(
        config=read_config(model),
        forwards=plan_loss(named_terms(terms)).forwards,
        seq_len=seq_len,
        batch=batch,
        lora=dict(lora or {}),
        labelled=labelled,
        padded=padded,
        examples=examples,
        device=torch.device(device),
    )
    settings = Settings(bits, checkpointing, micro_batch)
    usual = planner.usual(bits)  # before the layers are fused
    asked, compiled = planner.footprint(settings), planner.passes(settings).compiled
    best = None if budget is None else planner.best(settings, budget)
    return Plan(str(model), device, asked, usual, compiled, planner.cache_bytes(bits), budget, best)


def check(*, bits: int, seq_len: int, batch: int, micro_batch: int | None, labelled: float, device: str) -> None:
    """Raise FastforgetError for a number that is out of its range."""
    if bits not in BITS:
        raise FastforgetError(f"bits must be one of {', '.join(map(str, BITS))}, not {bits}")
    if device not in DEVICES:
        raise FastforgetError(f"device must be one of {', '.join(DEVICES)}, not {device!r}")
    for name, value, least in (("seq_len", seq_len, 2), ("batch", batch, 1), ("micro_batch", micro_batch, 1)):
        if value is not None and value < least:
            raise FastforgetError(f"{name} must be at least {least}, not {value}")
    if not 0 < labelled <= 1:
        raise FastforgetError(f"labelled must be a share above 0, at most 1, not {labelled}")


def parse_size(given: str | int) -> int:
    """Read bytes: "16GB", "24GiB", "80 G", "500MB", or a number.

    Raises:
        FastforgetError: it is none of these, or not positive.
    """
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*(k|m|g|ki|mi|gi|)b?\s*", str(given).lower())
    size = int(float(found[1]) * UNITS[found[2]]) if found else 0
    if size < 1:
        raise FastforgetError(f"{given!r} is no amount of memory: give it as 16GB, 24GiB, or in bytes")
    return size


def read_config(model: str | os.PathLike[str]) -> Any:
    """Read the config of a model, or of an adapter's base; raise FastforgetError where there is none."""
    import transformers

    with readable_errors(f"the config of {model}"):
        base = base_of(model)
        with hub_or_cache(base):
            return transformers.AutoConfig.from_pretrained(base)


@dataclass
class Planner:
    """Footprints of one job with different settings; arguments as in `plan`."""

    config: Any
    forwards: Sequence[ForwardPlan]
    seq_len: int
    batch: int
    lora: dict[str, Any]
    labelled: float
    padded: bool
    examples: int | None
    device: torch.device
    _skeletons: dict[torch.dtype, Skeleton] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.passes_of = functools.cache(self._passes_of)

    def dtype(self, bits: int) -> torch.dtype:
        """The dtype of activations, as `fastforget.load` chooses it."""
        on_cpu = self.device.type == "cpu"
        return torch.float32 if bits == 32 or (on_cpu and bits != 16) else torch.bfloat16

    def skeleton(self, bits: int) -> Skeleton:
        """The model without weights that runs in the dtype of so many bits."""
        from fastforget.footprint import Skeleton

        dtype = self.dtype(bits)
        if dtype not in self._skeletons:
            self._skeletons[dtype] = Skeleton(self.config, dtype, self.lora, self.device)
        return self._skeletons[dtype]

    def usual(self, bits: int) -> Footprint:
        """The usual loop's footprint, of the whole batch at once."""
        from fastforget.footprint import at_depth

        skeleton, batch = self.skeleton(bits), self.batch_size(self.batch)
        activations, logits, working = at_depth(skeleton, lambda each: each.usual_bytes(batch, bits))
        base = skeleton.base_bytes(bits)
        found = {"base": base, "second copy": base + skeleton.adapter_bytes, **self.trained(skeleton)}
        found |= {"activations": activations, "logits": logits, "working memory": working}
        return Footprint(Settings(bits), found)

    def footprint(self, settings: Settings) -> Footprint:
        """Our footprint."""
        skeleton, passes = self.skeleton(settings.bits), self.passes(settings)
        found = {"base": skeleton.base_bytes(settings.bits), **self.trained(skeleton)}
        found["last good adapter"] = skeleton.adapter_bytes
        found |= {"activations": passes.activations, "head": passes.head, "working memory": passes.working}
        found["cast buffer"] = skeleton.cast_bytes(settings.bits)
        if self.device.type == "cpu":
            found["reference cache"] = self.cache_bytes(settings.bits)
        return Footprint(settings, found)

    def trained(self, skeleton: Skeleton) -> dict[str, int]:
        """Bytes of what trains, of its gradients, and of AdamW's state."""
        size = skeleton.adapter_bytes
        return {"adapter": size, "gradients": size, "optimizer": ADAM_STATES * size}

    def passes(self, settings: Settings) -> PassBytes:
        """The highest of the step's passes: sides go one after the other."""
        rows = settings.micro_batch or self.batch
        return self.passes_of(self.dtype(settings.bits), min(rows, self.batch), settings.checkpointing)

    def _passes_of(self, dtype: torch.dtype, rows: int, checkpointing: bool) -> PassBytes:
        from fastforget.footprint import PassBytes, Skeleton, at_depth

        skeleton, found = self._skeletons[dtype], []
        for forward in self.heaviest_forwards():
            streams = len(forward.streams)
            together = max(1, rows // streams) if rows < self.batch or streams == 1 else -(-rows // streams)
            batch = self.batch_size(together * streams)
            count = functools.partial(Skeleton.pass_bytes, forward=forward, batch=batch, checkpointing=checkpointing)
            to_head = forward.layers == {None}  # else it ends at a layer, of which shallow models may have none
            found.append(PassBytes(*(at_depth(skeleton, count) if to_head else count(skeleton))))
        return max(found, key=lambda each: each.peak)

    def heaviest_forwards(self) -> list[ForwardPlan]:
        """Of forwards that go through the model alike, the one whose sweeps take most."""
        alike: dict[Any, ForwardPlan] = {}
        for forward in sorted(self.forwards, key=sweeps):
            alike[forward.layers, len(forward.streams)] = forward
        return list(alike.values())

    def batch_size(self, rows: int) -> Any:
        """What goes through the model at once, of so many rows."""
        from fastforget.footprint import BatchSize

        labelled = max(1, round(self.labelled * (self.seq_len - 1)))
        return BatchSize(rows, self.seq_len, rows * labelled, self.padded)

    def cache_bytes(self, bits: int) -> int:
        """Bytes of what is cached of the reference, within the cache's limit."""
        state = self.config.get_text_config().hidden_size * self.dtype(bits).itemsize
        labelled = max(1, round(self.labelled * (self.seq_len - 1)))
        each_side = (self.examples or 2 * self.batch) / 2
        streams = [stream for forward in self.forwards for stream in forward.streams.values()]
        of_a_token = sum(
            said_bytes(each, state) for stream in streams for each in stream.reference_requests(known=True)
        )
        return min(round(each_side * labelled * of_a_token), DEFAULT_CACHE_BYTES)

    def best(self, most: Settings, budget: int) -> Footprint | None:
        """The settings that leave some of a budget free: the most bits, then no checkpointing, then most rows."""
        allowed = budget * (1 - LEFT_FREE)
        for bits in sorted((each for each in BITS if each <= most.bits), reverse=True):
            for checkpointing in (False, True):
                for rows in halved(most.micro_batch or self.batch):
                    settings = Settings(bits, checkpointing, None if rows >= self.batch else rows)
                    found = self.footprint(settings)
                    if found.peak <= allowed:
                        return found
        return None


def said_bytes(request: ReferenceRequest, state: int) -> int:
    """Bytes of what the reference says of one token; `state`: of a state."""
    if isinstance(request, Field) and request != EMBEDDING:
        return (torch.int64 if request == ARGMAX else torch.float32).itemsize
    return state


def sweeps(forward: ForwardPlan) -> tuple[int, int]:
    """Order forwards by how much their sweeps hold."""
    streams = forward.streams.values()
    return sum(len(stream.divergences) for stream in streams), sum(len(stream.reference) for stream in streams)


def halved(rows: int) -> Iterator[int]:
    """So many rows, half of them, and so on to 1."""
    while rows > 1:
        yield rows
        rows //= 2
    yield 1
