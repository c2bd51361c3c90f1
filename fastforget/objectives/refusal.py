"""Terms that teach another answer: refusals (IDK, JensUn), and answers of other prompts (random mismatch)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from fastforget.errors import FastforgetError
from fastforget.objectives.terms import SideStats, Term, TokenTerm


def check_draws(term: Term, k: int) -> None:
    """Raise unless k is a whole number from 1 on."""
    if isinstance(k, bool) or not isinstance(k, int) or k < 1:
        raise FastforgetError(f"{term.name}: k must be a whole number from 1 on, not {k!r}")


@dataclass(kw_only=True)
class RefusalCE(TokenTerm):
    """Cross-entropy on refusals ("I don't know", arXiv 2401.06121): the mean NLL of `forget["refusal"]`'s labels."""

    name: ClassVar[str] = "idk"
    streams: ClassVar[tuple[str, ...]] = ("refusal",)

    def per_token(self, stats: SideStats) -> Tensor:
        return -stats.logp


@dataclass(kw_only=True)
class RandomMismatch(TokenTerm):
    """Random mismatch (arXiv 2310.10683, eq. 4): cross-entropy on other prompts' answers, in `forget["mismatch"]`.

    Only the answers carry labels: the published loop takes `len` of a dict for the prompt's length, and so trains on
    the prompts too. `k` is how many answers a prompt gets at each step where `fastforget.unlearn` draws them (the paper
    has 5); of a batch of your own (`fastforget.mismatched`) every row counts. `reduction="sequence"`, the mean over
    each answer and then over the answers, is that of the published loop.
    """

    name: ClassVar[str] = "random_mismatch"
    streams: ClassVar[tuple[str, ...]] = ("mismatch",)
    k: int = 5

    def __post_init__(self) -> None:
        super().__post_init__()
        check_draws(self, self.k)

    @property
    def mismatched_answers(self) -> int:
        return self.k

    def per_token(self, stats: SideStats) -> Tensor:
        return -stats.logp


@dataclass(kw_only=True)
class JensUn(TokenTerm):
    """JensUn's forget side (arXiv 2509.02820): the mean of JSD(p || e) over the refusal's tokens, e one-hot there.

    With p the probability of the refusal's token, and m = (p + e) / 2, all other tokens add up to
        1/2 KL(p || m) + 1/2 KL(e || m) = 1/2 [p log p - (1 + p) log((1 + p) / 2) + (1 - p) log 2],
    which is between 0 and log 2 (nats), and is written so that it keeps its digits where p -> 0 and where p -> 1.

    The published code takes the states of the forget answer, averages over prompt and padding, and sets every token of
    the refusal to 1 at every position, which is no distribution; here the refusal in `forget["refusal"]` is predicted
    token by token, each from the prompt and the refusal's tokens before it.
    """

    name: ClassVar[str] = "jensun"
    streams: ClassVar[tuple[str, ...]] = ("refusal",)

    def per_token(self, stats: SideStats) -> Tensor:
        logp = stats.logp.detach()
        p, rest = logp.exp(), -torch.expm1(logp)
        value = 0.5 * (p * logp - (1 + p) * torch.log1p(-rest / 2) + rest * math.log(2))
        slope = 0.5 * p * (logp - torch.log1p(p))  # d value / d log p; autograd would cancel p against p
        return value + slope * (stats.logp - logp)
