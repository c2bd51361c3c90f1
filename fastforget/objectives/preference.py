"""Terms that compare two answers to the same prompt: DPO and its kin, and answer preservation.

Notation: L is the NLL of a whole answer, L_ref the frozen reference's; "win" is the refusal or alternative answer in
the `refusal` companion, "lose" the batch's own answer; mean_B is over the sequences of the batch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch.nn.functional as F
from torch import Tensor

from fastforget.objectives.requests import LOGP, REFERENCE_LOGP, Request
from fastforget.objectives.terms import Side, SideStats, Term, check_positive


def sequence_log_ratio(stats: SideStats) -> Tensor:
    """(b,) log p / p_ref of each whole answer: L_ref - L."""
    return stats.sequence_sum(stats.logp - stats[REFERENCE_LOGP])


@dataclass(kw_only=True)
class DPO(Term):
    """Direct preference optimisation: -(2/beta) mean_B log sigmoid(beta [(L_ref - L)_win - (L_ref - L)_lose]).

    arXiv 2305.18290, eq. 7, times 2/beta, the scale of NPO (arXiv 2404.05868), so that weights compare. With refusals
    it is IdkDPO (the preference optimisation of TOFU, arXiv 2401.06121, as arXiv 2404.05868 writes it), with plausible
    alternative answers AltPO (arXiv 2409.13474). The batch needs `forget["refusal"]`, row by row.
    """

    name: ClassVar[str] = "dpo"
    streams: ClassVar[tuple[str, ...]] = ("refusal", "answer")
    beta: float = 0.1

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive(self, beta=self.beta)

    @property
    def requests(self) -> tuple[Request, ...]:
        return LOGP, REFERENCE_LOGP

    def value(self, stats: SideStats) -> Tensor:
        preferred = sequence_log_ratio(stats) - sequence_log_ratio(stats.others["answer"])
        return stats.sequence_mean(F.logsigmoid(self.beta * preferred)) * (-2.0 / self.beta)


@dataclass(kw_only=True)
class AltPO(DPO):
    """AltPO (arXiv 2409.13474): DPO of a plausible alternative answer, in `forget["refusal"]`, over the answer."""

    job_note: ClassVar[str | None] = (
        "altpo: without a column of alternative answers (--forget-column alternative=NAME) refusals stand for them."
    )


@dataclass(kw_only=True)
class AnswerPreservation(Term):
    """Answer preservation (arXiv 2410.08109, AP): -(1/beta) mean_B log sigmoid(beta (L_idk - L)), on the retain set.

    L is the NLL of the true answer, L_idk that of a refusal of the same prompt, in `retain["refusal"]`: a model that is
    taught to refuse keeps preferring its answers here. Needs no reference.
    """

    name: ClassVar[str] = "answer_preservation"
    streams: ClassVar[tuple[str, ...]] = ("answer", "refusal")
    on: Side = "retain"
    beta: float = 0.1

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive(self, beta=self.beta)

    def value(self, stats: SideStats) -> Tensor:
        refusal = stats.others["refusal"]
        preferred = stats.sequence_sum(stats.logp) - refusal.sequence_sum(refusal.logp)
        return stats.sequence_mean(F.logsigmoid(self.beta * preferred)) * (-1.0 / self.beta)
