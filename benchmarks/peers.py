"""Make the steps of the head's benchmark: the floor, ours, and the libraries that others use for the same.

A contestant is a function that takes a problem and returns a step, which computes the loss and its gradient over the
hidden states; the head is frozen for all. Libraries are imported there and not before: one that is missing is a row
that says so. Their calls are right for the versions that `VERSIONS` names.

The floor is the products that cannot be left out, alone; its sizes are its own constants, so that tuning ours cannot
move it. A cross-entropy takes two products: logits of the kept tokens, and rows over the vocabulary times the head. A
forward KL takes four (both sides' logits, and the reference's rows besides), or three where the reference's embedding
is known. Written rows are softmaxes, as ours are: products of zeros run faster.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor

import fastforget as ff
from benchmarks.harness import Answer, NotMeasured, Step
from benchmarks.problem import IGNORE_INDEX, LOSSES, MARGIN, Inputs, Setting
from fastforget.backends import backend_of
from fastforget.backends.protocol import KnownReference

VERSIONS = {"cut-cross-entropy": "25.1.1", "liger-kernel": "0.8.5", "quack-kernels": "0.6.5", "trl": "1.16.0"}
CHUNK_BYTES = 112 * 2**20  # of one buffer of whole rows of logits
TILE_ROWS = 2048  # of a tile on the CPU, at most
COLUMNS = 4096  # MKL's product of 512 rows of 2,048 with 50,272 columns runs 4 to 7 % faster so (2026-11-21)
TILE_BYTES = 16 * 2**20  # of one buffer of a tile: it stays in a large cache
TILE = "FASTFORGET_TILE"  # overrides the default of fastforget/backends/tiling.py
TILES = ("1024x8192", "1024x16384", "1024x4096", "2048x8192", "2048x4096", "512x8192", "4096x4096", "8192x8192")
EAGER_BYTES = 2**30  # of float32 logits on the CPU: beyond it eager, which holds several of them, is left out


@dataclass(frozen=True)
class Contestant:
    """Who takes part: the losses that it computes and the devices that it runs on.

    slow_start: compiles for longer than a dry run may take. known: is given what is cached of a KL's reference.
    """

    build: Callable[[Inputs], Step]
    about: str
    role: str = "peer"  # or "ours", "floor", "tile"
    losses: tuple[str, ...] = ("nll",)
    devices: tuple[str, ...] = ("cuda", "cpu")
    slow_start: bool = False
    known: bool = False


ALL, CPU, GPU = tuple(LOSSES), ("cpu",), ("cuda",)
CONTESTANTS: dict[str, Contestant] = {}  # those whose first call takes longest come last, where time may have run out
LossOf = Callable[..., Callable[[], Tensor]]  # (inputs, *options) -> a function that computes the loss


def register(name: str, about: str, *options: Any, **fields: Any) -> Callable[[LossOf], LossOf]:
    """Make a contestant of what computes a loss; a step then computes its gradient, too."""

    def decorate(loss_of: LossOf) -> LossOf:
        def build(inputs: Inputs) -> Step:
            loss = loss_of(inputs, *options)

            def step() -> Answer:
                value = loss()
                return value.detach(), torch.autograd.grad(value, inputs.hidden)[0]

            return step

        CONTESTANTS[name] = Contestant(build, about, **fields)
        return loss_of

    return decorate


def floor(inputs: Inputs, kind: str, known: bool = False) -> Step:
    """Multiply what cannot be left out, and nothing else.

    kind: "unchunked"; "rows", chunks of whole rows; "tiled", the same with logits in tiles of columns; "together", all
    products of one tile, then of the next. known: the reference's embedding is, which saves the fourth product of a KL.
    """
    divergence, together, vocabulary = inputs.setting.loss == "kl", kind == "together", len(inputs.weight)
    kept = inputs.hidden.detach()[inputs.positions]
    sides = [kept, inputs.reference[inputs.positions]] if divergence else [kept]
    rows, columns = len(kept), vocabulary
    if together:
        rows = even(rows, TILE_ROWS)
        columns = even(vocabulary, max(64, min(COLUMNS, TILE_BYTES // (4 * rows))))
    elif kind != "unchunked":
        rows = even(rows, max(1, CHUNK_BYTES // (4 * len(sides) * vocabulary)))
        columns = COLUMNS if kind == "tiled" else vocabulary
    buffers = columns if together else vocabulary
    logits = [kept.new_empty(rows, buffers, dtype=torch.float32) for _ in sides]
    mm_into(kept[:rows], inputs.weight[:buffers].T, logits[0])
    written = torch.softmax(logits[0], dim=1).to(inputs.dtype)
    gradients = [torch.empty_like(kept, dtype=torch.float32) for _ in range(2 if divergence and not known else 1)]
    tiles = inputs.weight.split(columns)

    def step() -> None:
        for start in range(0, len(kept), rows):
            part = slice(start, min(start + rows, len(kept)))
            count = part.stop - start
            for place, tile in enumerate(tiles):
                first = 0 if together else place * columns
                for states, buffer in zip(sides, logits, strict=True):
                    mm_into(states[part], tile.T, buffer[:count, first : first + len(tile)])
                for gradient in gradients if together else ():
                    mm_into(written[:count, : len(tile)], tile, gradient[part], add=place > 0)
            for gradient in () if together else gradients:
                mm_into(written[:count], inputs.weight, gradient[part])

    return step


def even(count: int, most: int) -> int:
    """Return how many of `count` make parts of much the same size, at most `most` each: a short one is slow."""
    return max(1, -(-count // max(1, -(-count // most))))


def mm_into(left: Tensor, right: Tensor, out: Tensor, add: bool = False) -> None:
    """Write one product into a float32 buffer, or add it to what that holds."""
    options: dict[str, Any] = {"out": out}
    if left.dtype != out.dtype:
        if not left.is_cuda:
            raise NotMeasured("not measured: the CPU has no product of 16-bit operands with a float32 result")
        options["out_dtype"] = out.dtype
    if add:
        torch.addmm(out, left, right, **options)
    else:
        torch.mm(left, right, **options)


HOW = {
    "unchunked": "each at once",
    "rows": "in chunks of whole rows",
    "tiled": "in chunks of rows, logits in tiles of columns",
    "together": "all of a tile after each other, as ours",
}
for kind, how in HOW.items():
    common: dict[str, Any] = {"role": "floor", "devices": ("cuda", "cpu") if kind == "unchunked" else CPU}
    CONTESTANTS[f"floor_{kind}"] = Contestant(partial(floor, kind=kind), f"bare products, {how}", losses=ALL, **common)
    CONTESTANTS[f"floor_{kind}_known"] = Contestant(
        partial(floor, kind=kind, known=True), f"three bare products, {how}", losses=("kl",), known=True, **common
    )


def library(name: str) -> Any:
    """Import a module of a peer; where it or something that it needs is not there, NotMeasured says so."""
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        missing = (error.name or name).partition(".")[0]
        needed = "" if missing == name.partition(".")[0] else f": {missing} is missing"
        raise NotMeasured(f"not installed{needed}") from None


@register("ours_torch", "fastforget, backend torch", "torch", role="ours", losses=ALL, devices=CPU)
@register("ours", "fastforget", role="ours", losses=ALL)
def ours(inputs: Inputs, backend: str | None = None) -> Callable[[], Tensor]:
    """Call `ff.token_stats` or `ff.divergence`, with the setting's backend unless one is named."""
    head, positions = ff.LMHead(inputs.weight), inputs.positions
    where: dict[str, Any] = {"positions": positions, "backend": backend or inputs.setting.backend}
    targets: dict[str, Any] = {}
    if "distance" in inputs.fields:
        targets = {"anchor": inputs.reference, "centres": inputs.centres, "metric": "cosine", "margin": MARGIN}

    def loss() -> Tensor:
        if inputs.setting.loss == "kl":
            fields = {"kl": ff.divergence(inputs.hidden, inputs.reference, head, **where)[positions]}
        else:
            stats = ff.token_stats(inputs.hidden, head, inputs.labels, **where, **targets)
            fields = {name: getattr(stats, name)[positions] for name in inputs.fields}
        return inputs.formula(inputs, fields)

    return loss


@register("ours_known", "the same, the reference's embedding cached", role="ours", losses=("kl",), known=True)
def ours_known(inputs: Inputs) -> Callable[[], Tensor]:
    """Compute the divergence with what the reference cache holds from the first epoch on, in the model's dtype."""
    head, labels, positions = ff.LMHead(inputs.weight), inputs.kept_labels, inputs.positions
    backend, names = backend_of(inputs.setting.backend, inputs.device), ("others_embedding", "others_argmax")
    with torch.no_grad():
        found = backend.token_stats(inputs.reference, labels, head, names, positions=positions)
    known = KnownReference(found["others_embedding"].to(inputs.dtype), found["others_argmax"])

    def loss() -> Tensor:
        sides = (inputs.hidden, inputs.reference)
        kl, _ = backend.divergence(*sides, head, "forward_kl", labels=labels, positions=positions, known=known)
        return inputs.formula(inputs, {"kl": kl})

    return loss


@register("liger", "Liger", devices=GPU)
def liger(inputs: Inputs) -> Callable[[], Tensor]:
    """Call LinkedIn's fused linear cross-entropy: gradients in the forward pass, in chunks of N D / V tokens."""
    loss = library("liger_kernel.transformers").LigerFusedLinearCrossEntropyLoss(ignore_index=IGNORE_INDEX)
    return lambda: loss(inputs.weight, inputs.hidden, inputs.labels)


@register("trl", "TRL's fused head")
def trl(inputs: Inputs) -> Callable[[], Tensor]:
    """Call TRL's fused head as its `add_fused_lm_head` does: kept tokens with Triton, otherwise all of them."""
    function = library("trl.kernels.chunked_logprob").ChunkedLogProbFunction
    width = int(getattr(library("trl.trainer.utils"), "_CHUNKED_LOGPROB_CHUNK_SIZE", 32768))

    def loss() -> Tensor:
        kept, on_gpu = inputs.labels != IGNORE_INDEX, inputs.hidden.is_cuda
        hidden = inputs.hidden[kept] if on_gpu else inputs.hidden
        labels = inputs.labels[kept] if on_gpu else inputs.labels.clamp(min=0)
        logp = function.apply(hidden, inputs.weight, None, labels, 1.0, width, None, 1.0, ("log_probs",))[0]
        return -logp.mean() if on_gpu else -logp.masked_fill(~kept, 0.0).sum() / kept.sum()

    return loss


@register("trl_divergence", "TRL's fused divergence", losses=("kl",))
def trl_divergence(inputs: Inputs) -> Callable[[], Tensor]:
    """Call TRL's fused divergence as its distillation trainer does: KL(teacher || student) of the kept tokens."""
    function = library("trl.kernels.chunked_divergence").ChunkedDivergenceFunction

    def loss() -> Tensor:
        kept, weight = inputs.labels != IGNORE_INDEX, inputs.weight
        return function.apply(inputs.hidden[kept], weight, None, inputs.reference[kept], weight, None, 0.0)[0].mean()

    return loss


@register("quack", "QuACK", devices=GPU)
def quack(inputs: Inputs) -> Callable[[], Tensor]:
    """Call QuACK's chunked linear cross-entropy, with the chunk that it defaults to."""
    function = library("quack.linear_cross_entropy").chunked_linear_cross_entropy
    return lambda: function(inputs.hidden, inputs.weight, inputs.labels, ignore_index=IGNORE_INDEX)


@register("compile", "torch.compile of eager", True, losses=ALL, slow_start=True)
@register("eager", "all logits, then float32, as transformers does", losses=ALL)
def eager(inputs: Inputs, compiled: bool = False) -> Callable[[], Tensor]:
    """Hold all logits, as transformers computes the loss: the head in its own dtype, then float32."""
    setting, reference = inputs.setting, inputs.reference if "logp" != inputs.fields[-1] else None
    if setting.device == "cpu" and 4 * setting.tokens * setting.vocabulary > EAGER_BYTES:
        raise NotMeasured("not measured: its logits are too large")

    def loss(hidden: Tensor, weight: Tensor) -> Tensor:
        logits = (hidden @ weight.T).float()
        if setting.loss == "nll":
            return F.cross_entropy(logits, inputs.labels, ignore_index=IGNORE_INDEX)
        with torch.no_grad():
            others = (reference @ weight.T).float() if setting.loss == "kl" and reference is not None else None
        return inputs.formula(inputs, inputs.fields_of(hidden, logits, others, inputs.positions))

    if compiled:
        torch.compiler.reset()  # each setting is compiled for its own shape, as a training run's is
        loss = torch.compile(loss, dynamic=False)
    return lambda: loss(inputs.hidden, inputs.weight)


@register("torch_lce_chunked", "F.linear_cross_entropy, chunked", True)
@register("torch_lce", "F.linear_cross_entropy", False)
def torch_linear_cross_entropy(inputs: Inputs, chunked: bool) -> Callable[[], Tensor]:
    """Call `F.linear_cross_entropy`, plain or with the chunks that torch picks."""
    function = getattr(F, "linear_cross_entropy", None)
    chunks = getattr(torch.nn, "LinearCrossEntropyOptions", None)
    if function is None or (chunked and chunks is None):
        raise NotMeasured(f"not in torch {torch.__version__}")
    options = {"options": chunks()} if chunked and chunks is not None else {}
    return lambda: function(inputs.hidden, inputs.weight, inputs.labels, **options)


@register("cce_compile", "cut-cross-entropy, torch_compile", "torch_compile", devices=CPU, slow_start=True)
@register("cce_exact", "cut-cross-entropy, no filter", "cce_exact", devices=GPU)
@register("cce", "cut-cross-entropy", "cce", devices=GPU)
def cut_cross_entropy(inputs: Inputs, impl: str) -> Callable[[], Tensor]:
    """Call Apple's. Its default filter drops tiles of small gradients; "cce_exact" does not."""
    module = library("cut_cross_entropy")
    options: dict[str, Any] = {"impl": impl, "ignore_index": IGNORE_INDEX}
    if impl == "cce_exact" and getattr(module.LinearCrossEntropyImpl, "CCE_EXACT", None) is None:
        options |= {"impl": "cce", "filter_eps": None}  # 25.1.1 has no name for it
    return lambda: module.linear_cross_entropy(inputs.hidden, inputs.weight, inputs.labels, **options)


def tiled(inputs: Inputs, tile: str) -> Callable[[], Tensor]:
    """Call ours with tiles of another shape."""
    loss = ours(inputs)

    def tiled_loss() -> Tensor:
        with mock.patch.dict(os.environ, {TILE: tile}):
            return loss()

    return tiled_loss


for shape in TILES:
    register(f"tile_{shape}", f"fastforget, {TILE}={shape}", shape, role="tile")(tiled)


def taking_part(setting: Setting) -> list[str]:
    """Name who is measured unless somebody is named: those that run on the device and compute the loss."""
    backend = setting.backend
    if backend == "auto":
        backend = "triton" if setting.device == "cuda" else "native"
    idle = {"torch": {"ours_torch"}, "eager": {"ours_known"}}.get(backend, set())  # the same as "ours"
    return [
        name
        for name, contestant in CONTESTANTS.items()
        if contestant.role != "tile" and name not in idle
        if setting.device in contestant.devices and setting.loss in contestant.losses
    ]


class Problem(Inputs):
    """A setting's inputs and truth, with the steps of who takes part."""

    whole_peak = False

    def __init__(self, given: Mapping[str, Any]) -> None:
        super().__init__(Setting(**given))
        self.truth  # noqa: B018  # before anybody is measured: it takes memory

    def step_of(self, name: str, dry: bool) -> Step:
        """Build a contestant's step; NotMeasured where it cannot take part."""
        contestant, setting = CONTESTANTS[name], self.setting
        if setting.loss not in contestant.losses:
            raise NotMeasured(f"does not compute {setting.loss}")
        if setting.device not in contestant.devices:
            raise NotMeasured(f"does not run on {setting.device}")
        if dry and contestant.slow_start:
            raise NotMeasured("not measured: compiles for too long for a dry run")
        return contestant.build(self)
