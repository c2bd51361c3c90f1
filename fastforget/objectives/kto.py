"""KTO's forget side: answers that are undesirable, against a KL estimate over the batch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from fastforget.objectives.preference import sequence_log_ratio
from fastforget.objectives.refusal import check_draws
from fastforget.objectives.requests import LOGP, REFERENCE_LOGP, Request
from fastforget.objectives.terms import SideStats, Term, check_positive, present


@dataclass(kw_only=True)
class KTO(Term):
    """Kahneman-Tversky optimisation of undesirable answers (arXiv 2402.01306): mean_B [1 - sigmoid(beta (z - r))].

    r = L_ref - L is the log ratio of a forget answer, and z = max(0, mean log p / p_ref over mismatched pairs), the
    paper's estimate of KL(p || p_ref) from prompts with other prompts' answers (`forget["mismatch"]`): a constant, no
    gradient passes through it. The paper's weight of undesirable answers is `weight`. Its desirable answers are left
    out: a retain term stands for them.

    z is the mean over all mismatched rows of one call, also where `micro_batch` splits it or several processes have
    parts of it; in calls that accumulate each has its own. `k` is how many answers a prompt gets at each step where
    `fastforget.unlearn` draws them.
    """

    name: ClassVar[str] = "kto"
    baseline_stream: ClassVar[str | None] = "mismatch"
    beta: float = 0.1
    k: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive(self, beta=self.beta)
        check_draws(self, self.k)

    @property
    def requests(self) -> tuple[Request, ...]:
        return LOGP, REFERENCE_LOGP

    @property
    def mismatched_answers(self) -> int:
        return self.k

    def constant(self, stats: SideStats) -> Tensor:
        return stats.sequence_mean(sequence_log_ratio(stats))

    def value(self, stats: SideStats) -> Tensor:
        divergence = present(stats.baseline, "a baseline").clamp(min=0)
        # 1 - sigmoid(x) = sigmoid(-x)
        return stats.sequence_mean(torch.sigmoid(self.beta * (sequence_log_ratio(stats) - divergence)))
