"""Terms that weigh each token by how well it is known (WGA, TNPO, SatImp), and bounded ones (unlikelihood, CE-U, ME).

Notation: l = -logp the NLL of a label token, p = exp(-l), p_ref the frozen reference's, sg stop-gradient. "mean" is
over all label tokens of the batch, or with `reduction="sequence"` over each answer's and then over the answers.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from fastforget.errors import FastforgetError
from fastforget.objectives.requests import LOGP, REFERENCE_LOGP, Field, Request
from fastforget.objectives.schedules import Weight
from fastforget.objectives.terms import SideStats, TokenTerm

LOG_NOT_LABEL, OTHERS_ENTROPY = Field("log_not_label"), Field("others_entropy")
ENTROPY, LSE, LOGIT_MEAN = Field("entropy"), Field("lse"), Field("logit_mean")


@dataclass(kw_only=True)
class WGA(TokenTerm):
    """Weighted gradient ascent (arXiv 2502.19301): -mean[sg(p^beta) l]. Ascent that fades as a token is forgotten."""

    name: ClassVar[str] = "wga"
    beta: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_not_negative(beta=self.beta)

    def per_token(self, stats: SideStats) -> Tensor:
        return (self.beta * stats.logp.detach()).exp() * stats.logp


@dataclass(kw_only=True)
class TNPO(TokenTerm):
    """Token-wise NPO (arXiv 2502.19301): -mean[sg(2 p^beta / (p^beta + p_ref^beta)) l].

    The published code adds 1e-5 to the denominator, so that a token that both hardly know gets a weight near 0.
    """

    name: ClassVar[str] = "tnpo"
    beta: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_not_negative(beta=self.beta)

    @property
    def requests(self) -> tuple[Request, ...]:
        return LOGP, REFERENCE_LOGP

    def per_token(self, stats: SideStats) -> Tensor:
        log_ratio = stats.logp.detach() - stats[REFERENCE_LOGP]
        return 2.0 * torch.sigmoid(self.beta * log_ratio) * stats.logp


@dataclass(kw_only=True)
class SatImp(TokenTerm):
    """Saturation and importance (arXiv 2505.11953): -mean[sg(p^beta1 (1 - p)^beta2) l].

    `beta1` weighs tokens that are still known, `beta2` those that are not certain yet. The published code takes 1 - p
    from a rounded p; here it keeps its digits up to p = 1.
    """

    name: ClassVar[str] = "satimp"
    beta1: float = 5.0
    beta2: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_not_negative(beta1=self.beta1, beta2=self.beta2)

    @property
    def requests(self) -> tuple[Request, ...]:
        return LOGP, LOG_NOT_LABEL

    def per_token(self, stats: SideStats) -> Tensor:
        log_not = stats[LOG_NOT_LABEL].detach()
        return (self.beta1 * stats.logp.detach() + self.beta2 * log_not).exp() * stats.logp


@dataclass(kw_only=True)
class Unlikelihood(TokenTerm):
    """Unlikelihood, a bounded cross-entropy (as in MOLLM, arXiv 2412.20412): -mean log(1 - p), stable up to p = 1."""

    name: ClassVar[str] = "unlikelihood"

    @property
    def requests(self) -> tuple[Request, ...]:
        return (LOG_NOT_LABEL,)

    def per_token(self, stats: SideStats) -> Tensor:
        return -stats[LOG_NOT_LABEL]


@dataclass(kw_only=True)
class CEU(TokenTerm):
    """CE-U (arXiv 2503.01224): CE(sg q, p), q = softmax of the logits with the label's at minus infinity.

    Equal to -log(1 - p) + sg H(q): the gradient is that of `Unlikelihood`, and the value is 0 only where p = 0 and one
    other token is certain. The published code leaves out the first token of each answer unless told otherwise; here
    all label tokens count.
    """

    name: ClassVar[str] = "ceu"

    @property
    def requests(self) -> tuple[Request, ...]:
        return LOG_NOT_LABEL, OTHERS_ENTROPY

    def per_token(self, stats: SideStats) -> Tensor:
        return stats[OTHERS_ENTROPY] - stats[LOG_NOT_LABEL]


@dataclass(kw_only=True)
class MaxEntropy(TokenTerm):
    """Maximum entropy (arXiv 2410.08109, ME): KL(U || p), U uniform over the vocabulary, as its code has it.

    `direction="reverse"` is KL(p || U) = log V - H(p), as its paper writes it. The published code adds 1e-12 to p
    before the logarithm, and so lets go of tokens that are less likely; here none are.
    """

    name: ClassVar[str] = "me"
    weight: Weight = 0.1
    direction: str = "forward"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.direction not in ("forward", "reverse"):
            raise FastforgetError(f"me: direction must be forward or reverse, not {self.direction!r}")

    @property
    def requests(self) -> tuple[Request, ...]:
        return (LSE, LOGIT_MEAN) if self.direction == "forward" else (ENTROPY,)

    def per_token(self, stats: SideStats) -> Tensor:
        log_vocabulary = math.log(stats.vocabulary)
        if self.direction == "forward":
            return stats[LSE] - stats[LOGIT_MEAN] - log_vocabulary
        return log_vocabulary - stats[ENTROPY]
