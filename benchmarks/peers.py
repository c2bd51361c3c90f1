"""Who takes part in the head's benchmark: the floor (`floors`), ours, and the libraries that others use for the same.

Each contestant is a function that takes a problem and returns one step: a function without arguments that computes the
loss and its gradient over the hidden states. Libraries are imported there and not before, so that one that is missing
is a row of the table. Their calls are right for the versions that `VERSIONS` names; the head is frozen for all.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import fastforget as ff
from benchmarks.floors import NotMeasured, Step, floor, floor_tiled, floor_together, floor_unchunked
from benchmarks.head_problem import IGNORE_INDEX, MARGIN, Answer, Problem, Setting, distances
from fastforget.backends import backend_of
from fastforget.backends.protocol import KnownReference

VERSIONS = {"cut-cross-entropy": "25.1.1", "liger-kernel": "0.8.5", "quack-kernels": "0.6.5", "trl": "1.16.0"}


@dataclass(frozen=True)
class Contestant:
    """A row of the table.

    role: "floor", "ours" or "peer". losses: those that it computes. devices: where it runs. slow_start: compiles for
    longer than a dry run may take. known: is given what is cached of a KL's reference.
    """

    build: Callable[[Problem], Step]
    about: str
    role: str = "peer"
    losses: tuple[str, ...] = ("nll",)
    devices: tuple[str, ...] = ("cuda", "cpu")
    slow_start: bool = False
    known: bool = False


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


# Ours


def ours(problem: Problem, backend: str | None = None) -> Step:
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
            stats = ff.token_stats(problem.hidden, head, problem.labels, **where, **against)
            fields = {name: getattr(stats, name)[positions] for name in names}
        return problem.loss.formula(problem, fields)

    return stepping(problem, loss)


def ours_known(problem: Problem) -> Step:
    """The divergence with what the reference cache holds from the first epoch on, in the model's dtype."""
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
        return problem.loss.formula(problem, {"kl": kl})

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


FLOORS = {
    "floor": (floor, "in chunks of whole rows", ("cpu",)),
    "floor_tiled": (floor_tiled, "in chunks of rows, logits in tiles of columns", ("cpu",)),
    "floor_together": (floor_together, "all of a tile after each other, as ours", ("cpu",)),
    "floor_unchunked": (floor_unchunked, "each at once", ("cuda", "cpu")),
}
CONTESTANTS = {
    name: Contestant(build, f"bare products on the kept tokens, {how}", "floor", ALL_LOSSES, devices)
    for name, (build, how, devices) in FLOORS.items()
}
CONTESTANTS |= {
    f"{name}_known": Contestant(
        functools.partial(build, known=True),
        f"three bare products, {how}",
        role="floor",
        losses=("kl",),
        devices=devices,
        known=True,
    )
    for name, (build, how, devices) in FLOORS.items()
}
# in this order: those whose first call takes longest come last, where time may have run out
CONTESTANTS |= {
    "ours": Contestant(ours, "fastforget", role="ours", losses=ALL_LOSSES),
    "ours_known": Contestant(
        ours_known, "fastforget, the reference's embedding cached", role="ours", losses=("kl",), known=True
    ),
    "ours_torch": Contestant(
        functools.partial(ours, backend="torch"), "fastforget, backend torch", "ours", ALL_LOSSES, devices=("cpu",)
    ),
    "liger": Contestant(liger, "Liger", devices=("cuda",)),
    "trl": Contestant(trl, "TRL's fused head"),
    "trl_divergence": Contestant(trl_divergence, "TRL's fused divergence", losses=("kl",)),
    "quack": Contestant(quack, "QuACK", devices=("cuda",)),
    "eager": Contestant(eager, "all logits, then float32, as transformers does", losses=ALL_LOSSES),
    "compile": Contestant(compiled, "torch.compile of eager", losses=ALL_LOSSES, slow_start=True),
    "torch_lce": Contestant(torch_linear_cross_entropy(chunked=False), "F.linear_cross_entropy"),
    "torch_lce_chunked": Contestant(torch_linear_cross_entropy(chunked=True), "F.linear_cross_entropy, chunked"),
    "cce": Contestant(cut_cross_entropy("cce"), "cut-cross-entropy", devices=("cuda",)),
    "cce_exact": Contestant(cut_cross_entropy("cce_exact"), "cut-cross-entropy, no filter", devices=("cuda",)),
    "cce_compile": Contestant(
        cut_cross_entropy("torch_compile"), "cut-cross-entropy, torch_compile", devices=("cpu",), slow_start=True
    ),
}


def taking_part(setting: Setting) -> list[str]:
    """Who is measured unless somebody is named: those that run on the device and compute the loss."""
    backend = setting.backend
    if backend == "auto":
        backend = "triton" if setting.device == "cuda" else "native"
    idle = {"torch": {"ours_torch"}, "eager": {"ours_known"}}.get(backend, set())  # the same as "ours"
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
