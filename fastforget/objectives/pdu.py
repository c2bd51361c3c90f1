"""PDU, primal-dual unlearning (arXiv 2506.05314): flat logits on the forget set, the retain loss kept below a bound.

    minimise  mean (max z - mean z)^2 on the forget set   subject to   L_r <= epsilon, L_r the retain set's mean NLL

by descent on forget + alpha L_r, and after each optimizer step the ascent alpha <- max(0, alpha + eta (L_r - epsilon)).

In the published code (open-unlearning, pdu.py) the forget loss is a mean over prompt and padding too, alpha moves at
each forward pass of a micro-batch and not at all in the first epochs, and a checkpoint forgets it. Here the mean is
over label tokens, alpha moves once a step by the L_r of the whole batch, from the first step on, and the step's
`state_dict` carries it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from fastforget.objectives.requests import Field, Request
from fastforget.objectives.terms import CE, SideStats, TokenTerm, check_positive

MAX_LOGIT, LOGIT_MEAN = Field("max_logit"), Field("logit_mean")


@dataclass(kw_only=True)
class LogitMargin(TokenTerm):
    """PDU's forget term, the logit margin: mean (max z - mean z)^2, both over the vocabulary; 0 where p is uniform."""

    name: ClassVar[str] = "logit_margin"

    @property
    def requests(self) -> tuple[Request, ...]:
        return MAX_LOGIT, LOGIT_MEAN

    def per_token(self, stats: SideStats) -> Tensor:
        return (stats[MAX_LOGIT] - stats[LOGIT_MEAN]).square()


@dataclass(kw_only=True)
class DualCE(CE):
    """Cross-entropy under a bound: its weight is `weight` times a dual variable that `UnlearnStep` updates.

    `dual`: alpha before the first step. `dual_rate`: eta, by which alpha moves for each nat that the mean NLL lies
    above `epsilon` (or below, down to 0), once a step. Choose epsilon above the NLL that the model starts from, or
    alpha only grows. In `UnlearnLoss` by itself there is no step: alpha stays `dual`.
    """

    name: ClassVar[str] = "dual_ce"
    epsilon: float = 0.3
    dual_rate: float = 5.0
    dual: float = 100.0

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_not_negative(epsilon=self.epsilon, dual=self.dual)
        check_positive(self, dual_rate=self.dual_rate)

    @property
    def initial_state(self) -> dict[str, float]:
        return {"dual": self.dual}

    def factor(self, state: Mapping[str, Tensor]) -> Tensor | float:
        return state["dual"]

    def next_state(self, state: Mapping[str, Tensor], value: Tensor) -> dict[str, Tensor]:
        return {"dual": (state["dual"] + self.dual_rate * (value - self.epsilon)).clamp(min=0.0)}
