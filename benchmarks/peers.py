"""Who takes part in the head's benchmark: the floor, ours, and the libraries that others use for the same.

Each contestant is a function that takes a problem and returns one step: a function without arguments that computes the
loss and its gradient over the hidden states. Libraries are imported there and not before, so that one that is missing
is a row of the table. Their calls are right for the versions that `VERSIONS` names; the head is frozen for all.
"""

from __future__ import annotations

import functools
import importlib
import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import fastforget as ff
from benchmarks.head_problem import IGNORE_INDEX, MARGIN, Answer, Problem, Setting, distances
from fastforget.backends import gemm

Step = Callable[[], Answer | None]  # None: a floor, which has no answer
VERSIONS = {"cut-cross-entropy": "25.1.1", "liger-kernel": "0.8.5", "quack-kernels": "0.6.5", "trl": "1.16.0"}
TAIL_MASS = 1e-3


class NotMeasured(Exception):
    """A contestant that cannot take part here; the message is what its row says."""


@dataclass(frozen=True)
class Contestant:
    """A row of the table.

    role: "floor", "ours" or "peer". losses: those that it computes. devices: where it runs. slow_start: compiles for
    longer than a dry run may take. drops: what its gradient may lack by design (`Problem.errors`).
    """

    build: Callable[[Problem], Step]
    about: str
    role: str = "peer"
    losses: tuple[str, ...] = ("nll",)
    devices: tuple[str, ...] = ("cuda", "cpu")
    slow_start: bool = False
    drops: float = 0.0


ALL_LOSSES = ("nll", "npo", "kl", "distance_cluster")


def library(name: str) -> Any:
    """A module of a peer; where it or something that it needs is not there, NotMeasured says so."""
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        missing = (error.name or name).partition(".")[0]
        needed = "" if missing == name.partition(".")[0] else f": {missing} is missing"
        raise NotMeasured(f"not installed{needed}") from None


def answer_of(loss: Tensor, problem: Problem) -> Answer:
    """Forward is done; this is backward."""
    (gradient,) = torch.autograd.grad(loss, problem.hidden)
    return loss.detach(), gradient


def stepping(problem: Problem, loss: Callable[[], Tensor]) -> Step:
    """A step from a function that computes the loss."""
    return lambda: answer_of(loss(), problem)


# The floor


def mm_into(left: Tensor, right: Tensor, out: Tensor) -> None:
    """One product into a float32 buffer."""
    if left.dtype == out.dtype:
        torch.mm(left, right, out=out)
    elif left.is_cuda:
        torch.mm(left, right, out_dtype=out.dtype, out=out)
    else:
        raise NotMeasured("not measured: the CPU has no product of 16-bit operands with a float32 result")


def bare_products(problem: Problem, rows: int, columns: int | None = None) -> Step:
    """What cannot be left out: logits of the kept tokens, and a written row times the head, `rows` at a time.

    A KL needs the reference's logits too. The written rows are softmaxes, as ours are: products of zeros run faster.
    `columns`: of logits at a time.
    """
    with torch.no_grad():
        kept = problem.hidden[problem.positions]
        inputs = [kept, problem.reference[problem.positions]] if problem.loss.fields == ("kl",) else [kept]
        rows = min(rows, len(kept))
        logits = kept.new_empty(rows, len(problem.weight), dtype=torch.float32)
        gradient = torch.empty_like(kept, dtype=torch.float32)
        mm_into(kept[:rows], problem.weight.T, logits)
        written = torch.softmax(logits, dim=1).to(problem.dtype)
        tiles = problem.weight.split(columns or len(problem.weight))
        starts = range(0, len(problem.weight), columns or len(problem.weight))

    def step() -> None:
        with torch.no_grad():
            for part in gemm.row_chunks(len(kept), rows):
                count = part.stop - part.start
                for states, (start, tile) in itertools.product(inputs, zip(starts, tiles, strict=True)):
                    mm_into(states[part], tile.T, logits[:count, start : start + len(tile)])
                mm_into(written[:count], problem.weight, gradient[part])

    return step


def bare_tiles(problem: Problem) -> Step:
    """The same of a cross-entropy in the tiles that ours takes: both products of one tile, then of the next."""
    with torch.no_grad():
        kept = problem.hidden[problem.positions]
        rows, columns = gemm.logit_tile(len(kept), problem.weight)
        buffer = torch.softmax(torch.randn(rows, columns), dim=1)
        logits, gradient = torch.empty_like(buffer), torch.empty_like(kept, dtype=torch.float32)

    def step() -> None:
        with torch.no_grad():
            for part in gemm.row_chunks(len(kept), rows):
                states, total = kept[part], gradient[part]
                for start in range(0, len(problem.weight), columns):
                    tile = problem.weight[start : start + columns]
                    mm_into(states, tile.T, logits[: len(states), : len(tile)])
                    written = buffer[: len(states), : len(tile)]
                    torch.addmm(total, written, tile, beta=1.0 if start else 0.0, out=total)

    return step


def floor(problem: Problem) -> Step:
    """The products alone, in chunks of whole rows that fit our memory."""
    return bare_products(problem, chunk_rows(problem))


def floor_tiled(problem: Problem) -> Step:
    """The same with the logits in tiles of columns."""
    return bare_products(problem, chunk_rows(problem), gemm.CPU_COLUMNS)


def chunk_rows(problem: Problem) -> int:
    """Tokens in a chunk of whole rows of ours."""
    buffers = 2 if problem.loss.fields == ("kl",) else 1
    most = gemm.chunk_rows(buffers * len(problem.weight), problem.hidden)
    return gemm.even_rows(len(problem.positions), most, problem.hidden)


def floor_unchunked(problem: Problem) -> Step:
    """The products alone, each at once."""
    return bare_products(problem, len(problem.positions))


# Ours


def ours(problem: Problem, tail_mass: float = 0.0, backend: str | None = None) -> Step:
    """`ff.token_stats` or `ff.divergence`, with the setting's backend unless one is named."""
    head, positions, names = ff.LMHead(problem.weight), problem.positions, problem.loss.fields
    where: dict[str, Any] = {"positions": positions, "backend": backend or problem.setting.backend}
    against: dict[str, Any] = {}
    if "distance" in names:
        against = {"anchor": problem.reference, "centres": problem.centres, "metric": "cosine", "margin": MARGIN}

    def loss() -> Tensor:
        if names == ("kl",):
            fields = {"kl": ff.divergence(problem.hidden, problem.reference, head, **where)[positions]}
        else:
            stats = ff.token_stats(problem.hidden, head, problem.labels, tail_mass=tail_mass, **where, **against)
            fields = {name: getattr(stats, name)[positions] for name in names}
        return problem.loss.formula(problem, fields)

    return stepping(problem, loss)


# Plain torch


def eager_loss(problem: Problem) -> Callable[[Tensor, Tensor], Tensor]:
    """The loss on all logits, as transformers computes it: the head in its own dtype, then float32."""

    def logits_of(states: Tensor, weight: Tensor) -> Tensor:
        return (states @ weight.T).float()

    def cross_entropy(hidden: Tensor, weight: Tensor) -> Tensor:
        return F.cross_entropy(logits_of(hidden, weight), problem.labels, ignore_index=IGNORE_INDEX)

    def by_fields(hidden: Tensor, weight: Tensor) -> Tensor:
        names, positions = problem.loss.fields, problem.positions
        log_p = torch.log_softmax(logits_of(hidden, weight), dim=1)
        fields = {"logp": log_p.gather(1, problem.labels.clamp(min=0)[:, None])[positions, 0]}
        if "kl" in names:
            with torch.no_grad():
                log_q = torch.log_softmax(logits_of(problem.reference, weight), dim=1)
            fields["kl"] = F.kl_div(log_p, log_q, reduction="none", log_target=True).sum(dim=1)[positions]
        if "distance" in names:
            fields |= distances(
                hidden[positions].float(), problem.reference[positions].float(), problem.centres.float()
            )
        return problem.loss.formula(problem, fields)

    return cross_entropy if problem.setting.loss == "nll" else by_fields


def eager(problem: Problem) -> Step:
    """All logits at once."""
    loss = eager_loss(problem)
    return stepping(problem, lambda: loss(problem.hidden, problem.weight))


def compiled(problem: Problem) -> Step:
    """`torch.compile` of eager."""
    torch.compiler.reset()  # each setting is compiled for its own shape, as a training run's is
    loss = torch.compile(eager_loss(problem), dynamic=False)
    return stepping(problem, lambda: loss(problem.hidden, problem.weight))


def torch_linear_cross_entropy(chunked: bool) -> Callable[[Problem], Step]:
    """`F.linear_cross_entropy`, plain or with the chunks that torch picks."""

    def build(problem: Problem) -> Step:
        function = getattr(F, "linear_cross_entropy", None)
        if function is None:
            raise NotMeasured(f"not in torch {torch.__version__}")
        options: dict[str, Any] = {}
        if chunked:
            if not hasattr(torch.nn, "LinearCrossEntropyOptions"):
                raise NotMeasured(f"no chunking options in torch {torch.__version__}")
            options["options"] = torch.nn.LinearCrossEntropyOptions()
        return stepping(problem, lambda: function(problem.hidden, problem.weight, problem.labels, **options))

    return build


# Libraries


def cut_cross_entropy(impl: str) -> Callable[[Problem], Step]:
    """Apple's. Its default filter drops tiles of small gradients; "cce_exact" does not."""

    def build(problem: Problem) -> Step:
        module = library("cut_cross_entropy")
        options: dict[str, Any] = {"impl": impl}
        if impl == "cce_exact" and not hasattr(module.LinearCrossEntropyImpl, "CCE_EXACT"):
            options = {"impl": "cce", "filter_eps": None}  # 25.1.1 has no name for it
        return stepping(
            problem,
            lambda: module.linear_cross_entropy(
                problem.hidden, problem.weight, problem.labels, ignore_index=IGNORE_INDEX, **options
            ),
        )

    return build


def liger(problem: Problem) -> Step:
    """LinkedIn's fused linear cross-entropy: gradients in the forward pass, in chunks of N D / V tokens."""
    module = library("liger_kernel.transformers")
    loss = module.LigerFusedLinearCrossEntropyLoss(ignore_index=IGNORE_INDEX)
    return stepping(problem, lambda: loss(problem.weight, problem.hidden, problem.labels))


def quack(problem: Problem) -> Step:
    """QuACK's chunked linear cross-entropy, with the chunk that it defaults to."""
    module = library("quack.linear_cross_entropy")
    return stepping(
        problem,
        lambda: module.chunked_linear_cross_entropy(
            problem.hidden, problem.weight, problem.labels, ignore_index=IGNORE_INDEX
        ),
    )


def trl_width() -> int:
    """The width of TRL's tiles of vocabulary."""
    return int(getattr(library("trl.trainer.utils"), "_CHUNKED_LOGPROB_CHUNK_SIZE", 32768))


def trl(problem: Problem) -> Step:
    """TRL's fused head, called as its `add_fused_lm_head` does: kept tokens with Triton, otherwise all of them."""
    function = library("trl.kernels.chunked_logprob").ChunkedLogProbFunction
    width = trl_width()

    def loss() -> Tensor:
        kept = problem.labels != IGNORE_INDEX
        on_gpu = problem.hidden.is_cuda
        hidden = problem.hidden[kept] if on_gpu else problem.hidden
        labels = problem.labels[kept] if on_gpu else problem.labels.clamp(min=0)
        logp = function.apply(hidden, problem.weight, None, labels, 1.0, width, None, 1.0, ("log_probs",))[0]
        return -logp.mean() if on_gpu else -logp.masked_fill(~kept, 0.0).sum() / kept.sum()

    return stepping(problem, loss)


def trl_divergence(problem: Problem) -> Step:
    """TRL's fused divergence, as its distillation trainer calls it: KL(teacher || student) of the kept tokens."""
    function = library("trl.kernels.chunked_divergence").ChunkedDivergenceFunction

    def loss() -> Tensor:
        kept = problem.labels != IGNORE_INDEX
        teacher = problem.reference[kept]
        return function.apply(problem.hidden[kept], problem.weight, None, teacher, problem.weight, None, 0.0)[0].mean()

    return stepping(problem, loss)


CONTESTANTS = {
    "floor": Contestant(
        floor, "bare GEMMs on the kept tokens, in chunks of whole rows", role="floor", losses=ALL_LOSSES
    ),
    "floor_tiled": Contestant(
        floor_tiled, "the same, logits in tiles of columns", role="floor", losses=ALL_LOSSES, devices=("cpu",)
    ),
    "floor_together": Contestant(
        bare_tiles,
        "both GEMMs of a tile of vocabulary after each other, as ours",
        role="floor",
        losses=("nll", "npo", "distance_cluster"),
        devices=("cpu",),
    ),
    "floor_unchunked": Contestant(floor_unchunked, "bare GEMMs, each at once", role="floor", losses=ALL_LOSSES),
    "ours": Contestant(ours, "fastforget", role="ours", losses=ALL_LOSSES),
    "ours_tail": Contestant(
        functools.partial(ours, tail_mass=TAIL_MASS),
        f"fastforget, tail_mass={TAIL_MASS:g}",
        role="ours",
        losses=("nll", "npo", "distance_cluster"),
        drops=TAIL_MASS,
    ),
    "ours_chunked": Contestant(
        functools.partial(ours, backend="chunked"), "fastforget, backend chunked", role="ours", losses=ALL_LOSSES
    ),
    "eager": Contestant(eager, "all logits, then float32, as transformers does", losses=ALL_LOSSES),
    "compile": Contestant(compiled, "torch.compile of eager", losses=ALL_LOSSES, slow_start=True),
    "torch_lce": Contestant(torch_linear_cross_entropy(chunked=False), "F.linear_cross_entropy"),
    "torch_lce_chunked": Contestant(torch_linear_cross_entropy(chunked=True), "F.linear_cross_entropy, chunked"),
    "cce": Contestant(cut_cross_entropy("cce"), "cut-cross-entropy", devices=("cuda",)),
    "cce_exact": Contestant(cut_cross_entropy("cce_exact"), "cut-cross-entropy, no filter", devices=("cuda",)),
    "cce_compile": Contestant(
        cut_cross_entropy("torch_compile"), "cut-cross-entropy, torch_compile", devices=("cpu",), slow_start=True
    ),
    "liger": Contestant(liger, "Liger", devices=("cuda",)),
    "quack": Contestant(quack, "QuACK", devices=("cuda",)),
    "trl": Contestant(trl, "TRL's fused head"),
    "trl_divergence": Contestant(trl_divergence, "TRL's fused divergence", losses=("kl",)),
}


def taking_part(setting: Setting) -> list[str]:
    """Who is measured unless somebody is named: those that run on the device and compute the loss."""
    backend = setting.backend
    if backend == "auto":
        backend = "triton" if setting.device == "cuda" else "native"
    idle = {"chunked": {"ours_tail", "ours_chunked"}, "eager": {"ours_tail"}}.get(backend, set())  # same as "ours"
    return [
        name
        for name, contestant in CONTESTANTS.items()
        if setting.device in contestant.devices and setting.loss in contestant.losses and name not in idle
    ]


def step_of(name: str, problem: Problem) -> Step:
    """A contestant's step; NotMeasured where it cannot take part."""
    contestant, setting = CONTESTANTS[name], problem.setting
    if setting.loss not in contestant.losses:
        raise NotMeasured(f"does not compute {setting.loss}")
    if setting.device not in contestant.devices:
        raise NotMeasured(f"does not run on {setting.device}")
    return contestant.build(problem)
