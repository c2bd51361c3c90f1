"""Presets: names for lists of terms, with the published weights."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable
from dataclasses import fields
from functools import partial
from typing import Any

from torch import Tensor

from fastforget.errors import FastforgetError
from fastforget.objectives.flat import FLAT
from fastforget.objectives.kto import KTO
from fastforget.objectives.layers import RMU, HiddenMSE
from fastforget.objectives.other_tokens import OtherTokens
from fastforget.objectives.pdu import DualCE, LogitMargin
from fastforget.objectives.preference import DPO, AltPO, AnswerPreservation
from fastforget.objectives.refusal import JensUn, RandomMismatch, RefusalCE
from fastforget.objectives.schedules import Weight
from fastforget.objectives.states import ClusterPull, EmbeddingDistance
from fastforget.objectives.task_vector import TaskVector
from fastforget.objectives.terms import CE, KL, NPO, NegatedCE, SimNPO, Term
from fastforget.objectives.undial import UNDIAL
from fastforget.objectives.weighted import CEU, TNPO, WGA, MaxEntropy, SatImp, Unlikelihood

RETAIN_TERMS: dict[str, tuple[Callable[..., Term], ...]] = {
    "ce": (CE,),
    "kl": (KL,),
    "ce+kl": (CE, KL),
    "jsd": (partial(KL, direction="jsd"),),
    "ap": (AnswerPreservation,),
    "hidden_mse": (HiddenMSE,),
}


def retain_terms(retain: str | None, weight: float) -> list[Term]:
    """Return the terms that keep the rest, or none.

    "ce", "kl", "ce+kl", "jsd" (from the reference), "ap", "hidden_mse" (of the states that enter the head), or None.
    """
    if retain is None:
        return []
    if retain not in RETAIN_TERMS:
        raise FastforgetError(f"retain must be one of {', '.join(RETAIN_TERMS)} or None, not {retain!r}")
    return [term(weight=weight) for term in RETAIN_TERMS[retain]]


def grad_ascent(*, reduction: str = "token", forget_weight: float = 1.0) -> list[Term]:
    """Gradient ascent on the forget set alone. Needs no retain data; destroys the model if not stopped early."""
    return [NegatedCE(reduction=reduction, weight=forget_weight)]


def grad_diff(
    *,
    reduction: str = "token",
    forget_weight: float = 1.0,
    retain: str | None = "ce",
    retain_weight: float = 1.0,
) -> list[Term]:
    """Gradient difference (arXiv 2203.12817): ascent on the forget set, descent on the retain set."""
    return [NegatedCE(reduction=reduction, weight=forget_weight), *retain_terms(retain, retain_weight)]


def npo(
    *, beta: float = 0.1, forget_weight: float = 1.0, retain: str | None = "ce", retain_weight: float = 1.0
) -> list[Term]:
    """NPO as published (arXiv 2404.05868), on the NLL of whole answers."""
    return [NPO(beta=beta, weight=forget_weight), *retain_terms(retain, retain_weight)]


def npo_mean(
    *, beta: float = 2.5, forget_weight: float = 1.0, retain: str | None = "ce+kl", retain_weight: float = 1.0
) -> list[Term]:
    """Length-normalised NPO, on the mean NLL of an answer's tokens: for answers of any length.

    Its beta was chosen on the demo, over seeds 0 and 1, with an adapter on query and key projections: at beta = 2 the
    model forgets more and writes more loops, at beta = 4 it still recites some passages.
    """
    return [NPO(beta=beta, level="mean", weight=forget_weight), *retain_terms(retain, retain_weight)]


def npo_token(
    *, beta: float = 2.0, forget_weight: float = 1.0, retain: str | None = "ce+kl", retain_weight: float = 1.0
) -> list[Term]:
    """NPO on each token's NLL: a token that is forgotten is left alone while others are still known."""
    return [NPO(beta=beta, level="token", weight=forget_weight), *retain_terms(retain, retain_weight)]


def simnpo(
    *,
    beta: float = 4.5,
    delta: float = 0.0,
    forget_weight: float = 0.125,
    retain: str | None = "ce",
    retain_weight: float = 1.0,
) -> list[Term]:
    """SimNPO (arXiv 2410.07163): NPO on the mean NLL of an answer's tokens, without a reference."""
    return [SimNPO(beta=beta, delta=delta, weight=forget_weight), *retain_terms(retain, retain_weight)]


def weighted(
    term: type[Term], default_weight: float = 1.0, default_retain: str | None = "ce", doc: str | None = None
) -> Callable[..., list[Term]]:
    """Make a preset of one term on the forget set, whose own parameters it takes, and retain terms.

    `doc`: what it says of itself, where it is not what the term says.
    """
    own = [each for each in fields(term) if each.name not in ("weight", "on")]

    def terms(
        *,
        forget_weight: float = default_weight,
        retain: str | None = default_retain,
        retain_weight: float = 1.0,
        **parameters: Any,
    ) -> list[Term]:
        return [term(weight=forget_weight, **parameters), *retain_terms(retain, retain_weight)]

    terms.__name__, terms.__doc__ = term.name, doc or term.__doc__
    common = [each for each in inspect.signature(terms).parameters.values() if each.kind is each.KEYWORD_ONLY]
    given = [inspect.Parameter(each.name, inspect.Parameter.KEYWORD_ONLY, default=each.default) for each in own]
    terms.__signature__ = inspect.Signature([*given, *common])  # type: ignore[attr-defined]
    return terms


def pdu(
    *,
    epsilon: float = 0.3,
    dual_rate: float = 5.0,
    dual: float = 100.0,
    reduction: str = "token",
    forget_weight: float = 1.0,
) -> list[Term]:
    """Primal-dual unlearning (arXiv 2506.05314), with the values that its authors' script has for TOFU.

    `epsilon` must lie above the retain NLL that the model starts from.
    """
    return [
        LogitMargin(reduction=reduction, weight=forget_weight),
        DualCE(epsilon=epsilon, dual_rate=dual_rate, dual=dual),
    ]


def ap(
    *, beta: float = 0.1, reduction: str = "token", forget_weight: float = 1.0, retain_weight: float = 1.0
) -> list[Term]:
    """IDK + AP (arXiv 2410.08109): cross-entropy on refusals, and on the retain set answers preferred to refusals."""
    return [RefusalCE(reduction=reduction, weight=forget_weight), AnswerPreservation(beta=beta, weight=retain_weight)]


def yao2023(
    *,
    k: int = 5,
    forget_weight: float = 0.5,
    mismatch_weight: float = 1.0,
    retain: str | None = "kl",
    retain_weight: float = 1.0,
) -> list[Term]:
    """The loss of arXiv 2310.10683: gradient ascent, random mismatch, and KL to the reference on the retain set.

    Its eq. 1 with the weights eps1, eps2 and eps3 = 0.5, 1 and 1 of its code. Means are over label tokens, where that
    code averages the first two over each answer and then over the answers, and the KL over prompt and padding too.
    """
    return [
        NegatedCE(weight=forget_weight),
        RandomMismatch(k=k, weight=mismatch_weight),
        *retain_terms(retain, retain_weight),
    ]


def distance_cluster(
    *,
    margin: float | None = 1.0,
    metric: str = "cosine",
    layer: int | None = None,
    level: str = "sequence",
    k: int | None = None,
    centres: Tensor | None = None,
    forget_weight: float = 1.0,
    pull_weight: float = 1.0,
    retain: str | None = "kl",
    retain_weight: float = 1.0,
) -> list[Term]:
    """Bounded distance from the frozen model's states, and pull to cluster means of expected outputs.

    Our reading of arXiv 2404.16841. On the demo "sequence" forgets as much as "token", and writes text where "token"
    ends in loops (10 of 24 continuations at seed 0).
    """
    where: dict[str, Any] = {"layer": layer, "metric": metric, "level": level}
    return [
        EmbeddingDistance(anchor="reference", margin=margin, weight=forget_weight, **where),
        ClusterPull(centres, k=k, weight=pull_weight, **where),
        *retain_terms(retain, retain_weight),
    ]


def task_vector(*, alpha: float = 1.0) -> list[Term]:
    """Task vector (arXiv 2212.04089): an adapter learns the forget set, and is then subtracted with strength `alpha`.

    The terms are those of the fine-tuning; the jobs subtract at the end, a loop of your own calls
    `fastforget.task_vector(model, alpha)`. Needs no retain data.
    """
    return [TaskVector(alpha=alpha)]


def rmu(
    *,
    layer: int = 7,
    c: float = 6.5,
    seed: int = 0,
    reduction: str = "token",
    forget_weight: Weight = 1.0,
    alpha: Weight | None = 1200.0,
) -> list[Term]:
    """RMU (arXiv 2403.03218): a layer's states go to one random vector, and stay as they were on the retain set.

    `alpha` is the retain term's weight; None leaves it out. Both forwards end at `layer`, so no NLL is reported.
    """
    common: dict[str, Any] = {"layer": layer, "reduction": reduction}
    forget = RMU(c=c, seed=seed, weight=forget_weight, **common)
    return [forget] if alpha is None else [forget, HiddenMSE(weight=alpha, **common)]


IDKDPO = """DPO of a refusal over the answer (arXiv 2404.05868, 2401.06121): `forget["refusal"]` holds refusals."""

PRESETS: dict[str, Callable[..., list[Term]]] = {
    "grad_ascent": grad_ascent,
    "grad_diff": grad_diff,
    "npo": npo,
    "npo_mean": npo_mean,
    "npo_token": npo_token,
    "simnpo": simnpo,
    "wga": weighted(WGA),
    "tnpo": weighted(TNPO),
    "satimp": weighted(SatImp),
    "unlikelihood": weighted(Unlikelihood),
    "ceu": weighted(CEU, default_retain=None),  # as published, and so is UNDIAL
    "undial": weighted(UNDIAL, default_retain=None),
    "other_tokens": weighted(OtherTokens, default_retain="ce+kl"),
    "pdu": pdu,
    "me": weighted(MaxEntropy, default_weight=0.1),
    "dpo": weighted(DPO),
    "idkdpo": weighted(DPO, doc=IDKDPO),
    "altpo": weighted(AltPO),
    "idk": weighted(RefusalCE),
    "ap": ap,
    "jensun": weighted(JensUn, default_retain="jsd"),
    "flat": weighted(FLAT, default_retain=None),
    "kto": weighted(KTO),
    "random_mismatch": weighted(RandomMismatch),
    "yao2023": yao2023,
    "distance_cluster": distance_cluster,
    "rmu": rmu,
    "task_vector": task_vector,
}


DEFAULT_PRESET = "other_tokens"


def preset(name: str, **overrides: Any) -> list[Term]:
    """Return the terms of a named preset, e.g. `preset("npo", beta=0.1)`.

    Raises:
        FastforgetError: an unknown name or parameter (the valid ones are listed), or a value out of range.
    """
    if name not in PRESETS:
        near = difflib.get_close_matches(name, PRESETS, n=1)
        hint = f" (did you mean {near[0]!r}?)" if near else ""
        raise FastforgetError(f"unknown preset {name!r}{hint}: choose one of {', '.join(PRESETS)}")
    parameters = inspect.signature(PRESETS[name]).parameters
    unknown = [key for key in overrides if key not in parameters]
    if unknown:
        raise FastforgetError(f"preset {name!r} has no parameter {unknown[0]!r}: it takes {', '.join(parameters)}")
    return PRESETS[name](**overrides)
