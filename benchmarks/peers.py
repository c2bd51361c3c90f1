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
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor

import fastforget as ff
from benchmarks.harness import Answer, NotMeasured, Step
from benchmarks.problem import IGNORE_INDEX, LOSSES, MARGIN, Inputs, Setting, distances
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


CONTESTANTS: dict[str, Contestant] = {}  # those whose first call takes longest come last, where time may have run out


def floor(problem: Inputs, kind: str, known: bool = False) -> Step:
    """Multiply what cannot be left out, and nothing else.

    kind: "unchunked"; "rows", chunks of whole rows; "tiled", the same with logits in tiles of columns; "together", all
    products of one tile, then of the next. known: the reference's embedding is, which saves the fourth product of a KL.
    """
    divergence, together, vocabulary = problem.setting.loss == "kl", kind == "together", len(problem.weight)
    kept = problem.hidden.detach()[problem.positions]
    inputs = [kept, problem.reference[problem.positions]] if divergence else [kept]
    rows, columns = len(kept), vocabulary
    if together:
        rows = even(rows, TILE_ROWS)
        columns = even(vocabulary, max(64, min(COLUMNS, TILE_BYTES // (4 * rows))))
    elif kind != "unchunked":
        rows = even(rows, max(1, CHUNK_BYTES // (4 * len(inputs) * vocabulary)))
        columns = COLUMNS if kind == "tiled" else vocabulary
    buffers = columns if together else vocabulary
    logits = [kept.new_empty(rows, buffers, dtype=torch.float32) for _ in inputs]
    mm_into(kept[:rows], problem.weight[:buffers].T, logits[0])
    written = torch.softmax(logits[0], dim=1).to(problem.dtype)
    gradients = [torch.empty_like(kept, dtype=torch.float32) for _ in range(2 if divergence and not known else 1)]
    tiles = problem.weight.split(columns)

    def step() -> None:
        for start in range(0, len(kept), rows):
            part = slice(start, min(start + rows, len(kept)))
            count = part.stop - start
            for place, tile in enumerate(tiles):
                first = 0 if together else place * columns
                for states, buffer in zip(inputs, logits, strict=True):
                    mm_into(states[part], tile.T, buffer[:count, first : first + len(tile)])
                for gradient in gradients if together else ():
                    mm_into(written[:count, : len(tile)], tile, gradient[part], add=place > 0)
            for gradient in () if together else gradients:
                mm_into(written[:count], problem.weight, gradient[part])

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


def library(name: str) -> Any:
    """Import a module of a peer; where it or something that it needs is not there, NotMeasured says so."""
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        missing = (error.name or name).partition(".")[0]
        needed = "" if missing == name.partition(".")[0] else f": {missing} is missing"
        raise NotMeasured(f"not installed{needed}") from None


def stepping(problem: Inputs, loss_of: Callable[[], Tensor]) -> Step:
    """Make a step from a function that computes the loss."""

    def step() -> Answer:
        loss = loss_of()
        (gradient,) = torch.autograd.grad(loss, problem.hidden)
        return loss.detach(), gradient

    return step


def ours(problem: Inputs, backend: str | None = None) -> Step:
    """Call `ff.token_stats` or `ff.divergence`, with the setting's backend unless one is named."""
    head, positions = ff.LMHead(problem.weight), problem.positions
    where: dict[str, Any] = {"positions": positions, "backend": backend or problem.setting.backend}
    targets: dict[str, Any] = {}
    if "distance" in problem.fields:
        targets = {"anchor": problem.reference, "centres": problem.centres, "metric": "cosine", "margin": MARGIN}

    def loss() -> Tensor:
        if problem.setting.loss == "kl":
            fields = {"kl": ff.divergence(problem.hidden, problem.reference, head, **where)[positions]}
        else:
            stats = ff.token_stats(problem.hidden, head, problem.labels, **where, **targets)
            fields = {name: getattr(stats, name)[positions] for name in problem.fields}
        return problem.formula(problem, fields)

    return stepping(problem, loss)


def ours_known(problem: Inputs) -> Step:
    """Compute the divergence with what the reference cache holds from the first epoch on, in the model's dtype."""
    head, positions, labels = ff.LMHead(problem.weight), problem.positions, problem.kept_labels
    backend = backend_of(problem.setting.backend, problem.device)
    names = ("others_embedding", "others_argmax")
    with torch.no_grad():
        found = backend.token_stats(problem.reference, labels, head, names, positions=positions)
    known = KnownReference(found["others_embedding"].to(problem.dtype), found["others_argmax"])

    def loss() -> Tensor:
        kl, _ = backend.divergence(
            problem.hidden, problem.reference, head, "forward_kl", labels=labels, positions=positions, known=known
        )
        return problem.formula(problem, {"kl": kl})

    return stepping(problem, loss)


def ours_tiled(problem: Inputs, tile: str) -> Step:
    """Call ours with tiles of another shape."""
    step = ours(problem)

    def tiled() -> Answer | None:
        with mock.patch.dict(os.environ, {TILE: tile}):
            return step()

    return tiled


def eager_loss(problem: Inputs) -> Callable[[Tensor, Tensor], Tensor]:
    """Make the loss on all logits, as transformers computes it: the head in its own dtype, then float32."""

    def cross_entropy(hidden: Tensor, weight: Tensor) -> Tensor:
        return F.cross_entropy((hidden @ weight.T).float(), problem.labels, ignore_index=IGNORE_INDEX)

    def by_fields(hidden: Tensor, weight: Tensor) -> Tensor:
        positions = problem.positions
        log_p = torch.log_softmax((hidden @ weight.T).float(), dim=1)
        fields = {"logp": log_p.gather(1, problem.labels.clamp(min=0)[:, None])[positions, 0]}
        if "kl" in problem.fields:
            with torch.no_grad():
                log_q = torch.log_softmax((problem.reference @ weight.T).float(), dim=1)
            fields["kl"] = F.kl_div(log_p, log_q, reduction="none", log_target=True).sum(dim=1)[positions]
        if "distance" in problem.fields:
            anchors = problem.reference[positions].float()
            fields |= distances(hidden[positions].float(), anchors, problem.centres.float())
        return problem.formula(problem, fields)

    return cross_entropy if problem.setting.loss == "nll" else by_fields


def eager(problem: Inputs) -> Step:
    """Hold all logits at once."""
    setting, loss = problem.setting, eager_loss(problem)
    if setting.device == "cpu" and 4 * setting.tokens * setting.vocabulary > EAGER_BYTES:
        raise NotMeasured("not measured: its logits are too large")
    return stepping(problem, lambda: loss(problem.hidden, problem.weight))


def compiled(problem: Inputs) -> Step:
    """Hand eager to `torch.compile`."""
    torch.compiler.reset()  # each setting is compiled for its own shape, as a training run's is
    loss = torch.compile(eager_loss(problem), dynamic=False)
    return stepping(problem, lambda: loss(problem.hidden, problem.weight))


def torch_linear_cross_entropy(problem: Inputs, chunked: bool) -> Step:
    """Call `F.linear_cross_entropy`, plain or with the chunks that torch picks."""
    function = getattr(F, "linear_cross_entropy", None)
    chunks = getattr(torch.nn, "LinearCrossEntropyOptions", None)
    if function is None or (chunked and chunks is None):
        raise NotMeasured(f"not in torch {torch.__version__}")
    options = {"options": chunks()} if chunked and chunks is not None else {}
    return stepping(problem, lambda: function(problem.hidden, problem.weight, problem.labels, **options))


def cut_cross_entropy(problem: Inputs, impl: str) -> Step:
    """Call Apple's. Its default filter drops tiles of small gradients; "cce_exact" does not."""
    module = library("cut_cross_entropy")
    options: dict[str, Any] = {"impl": impl, "ignore_index": IGNORE_INDEX}
    if impl == "cce_exact" and getattr(module.LinearCrossEntropyImpl, "CCE_EXACT", None) is None:
        options |= {"impl": "cce", "filter_eps": None}  # 25.1.1 has no name for it
    inputs = (problem.hidden, problem.weight, problem.labels)
    return stepping(problem, lambda: module.linear_cross_entropy(*inputs, **options))


def liger(problem: Inputs) -> Step:
    """Call LinkedIn's fused linear cross-entropy: gradients in the forward pass, in chunks of N D / V tokens."""
    loss = library("liger_kernel.transformers").LigerFusedLinearCrossEntropyLoss(ignore_index=IGNORE_INDEX)
    return stepping(problem, lambda: loss(problem.weight, problem.hidden, problem.labels))


def quack(problem: Inputs) -> Step:
    """Call QuACK's chunked linear cross-entropy, with the chunk that it defaults to."""
    function = library("quack.linear_cross_entropy").chunked_linear_cross_entropy
    inputs = (problem.hidden, problem.weight, problem.labels)
    return stepping(problem, lambda: function(*inputs, ignore_index=IGNORE_INDEX))


def trl(problem: Inputs) -> Step:
    """Call TRL's fused head as its `add_fused_lm_head` does: kept tokens with Triton, otherwise all of them."""
    function = library("trl.kernels.chunked_logprob").ChunkedLogProbFunction
    width = int(getattr(library("trl.trainer.utils"), "_CHUNKED_LOGPROB_CHUNK_SIZE", 32768))

    def loss() -> Tensor:
        kept = problem.labels != IGNORE_INDEX
        on_gpu = problem.hidden.is_cuda
        hidden = problem.hidden[kept] if on_gpu else problem.hidden
        labels = problem.labels[kept] if on_gpu else problem.labels.clamp(min=0)
        logp = function.apply(hidden, problem.weight, None, labels, 1.0, width, None, 1.0, ("log_probs",))[0]
        return -logp.mean() if on_gpu else -logp.masked_fill(~kept, 0.0).sum() / kept.sum()

    return stepping(problem, loss)


def trl_divergence(problem: Inputs) -> Step:
    """Call TRL's fused divergence as its distillation trainer does: KL(teacher || student) of the kept tokens."""
    function = library("trl.kernels.chunked_divergence").ChunkedDivergenceFunction

    def loss() -> Tensor:
        kept = problem.labels != IGNORE_INDEX
        teacher = problem.reference[kept]
        return function.apply(problem.hidden[kept], problem.weight, None, teacher, problem.weight, None, 0.0)[0].mean()

    return stepping(problem, loss)


def register(name: str, about: str, build: Callable[..., Step], *arguments: Any, **fields: Any) -> None:
    """Add a contestant whose step is `build(problem, *arguments)`."""
    CONTESTANTS[name] = Contestant(lambda problem: build(problem, *arguments), about, **fields)


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


ALL, CPU, GPU = tuple(LOSSES), ("cpu",), ("cuda",)
HOW = {
    "unchunked": "each at once",
    "rows": "in chunks of whole rows",
    "tiled": "in chunks of rows, logits in tiles of columns",
    "together": "all of a tile after each other, as ours",
}
for kind, how in HOW.items():
    where = ("cuda", "cpu") if kind == "unchunked" else CPU
    register(f"floor_{kind}", f"bare products, {how}", floor, kind, role="floor", losses=ALL, devices=where)
    register(
        f"floor_{kind}_known", f"three bare products, {how}", floor, kind, True,
        role="floor", losses=("kl",), devices=where, known=True,
    )  # fmt: skip
register("ours", "fastforget", ours, role="ours", losses=ALL)
register(
    "ours_known", "the same, the reference's embedding cached", ours_known, role="ours", losses=("kl",), known=True
)
register("ours_torch", "fastforget, backend torch", ours, "torch", role="ours", losses=ALL, devices=CPU)
register("liger", "Liger", liger, devices=GPU)
register("trl", "TRL's fused head", trl)
register("trl_divergence", "TRL's fused divergence", trl_divergence, losses=("kl",))
register("quack", "QuACK", quack, devices=GPU)
register("eager", "all logits, then float32, as transformers does", eager, losses=ALL)
register("compile", "torch.compile of eager", compiled, losses=ALL, slow_start=True)
register("torch_lce", "F.linear_cross_entropy", torch_linear_cross_entropy, False)
register("torch_lce_chunked", "F.linear_cross_entropy, chunked", torch_linear_cross_entropy, True)
register("cce", "cut-cross-entropy", cut_cross_entropy, "cce", devices=GPU)
register("cce_exact", "cut-cross-entropy, no filter", cut_cross_entropy, "cce_exact", devices=GPU)
register(
    "cce_compile", "cut-cross-entropy, torch_compile", cut_cross_entropy, "torch_compile", devices=CPU, slow_start=True
)
for tile in TILES:
    register(f"tile_{tile}", f"fastforget, {TILE}={tile}", ours_tiled, tile, role="tile", losses=ALL)
