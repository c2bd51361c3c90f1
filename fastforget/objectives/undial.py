"""UNDIAL: distillation from the frozen model with the label's logit turned down."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch.nn.functional as F
from torch import Tensor

from fastforget.objectives.requests import REFERENCE_LOGP, Divergence, Field, Request
from fastforget.objectives.terms import SideStats, TokenTerm

REFERENCE_LOG_NOT_LABEL = Field("log_not_label", of="reference")
REFERENCE_OTHERS_ENTROPY = Field("others_entropy", of="reference")


@dataclass(kw_only=True)
class UNDIAL(TokenTerm):
    """UNDIAL (arXiv 2402.10052): CE(t, p), t = softmax(z_ref - beta onehot(y)); mean over the label tokens.

    Computed as KL(t || p) + H(t). The divergence is one pass over both rows of logits, and stays exact where the
    reference is certain of its label; the entropy of t is a constant, from what the reference says of each token:

        H(t) = H_2(t_y) + (1 - t_y) H(q),   logit t_y = log p_ref,y - log(1 - p_ref,y) - beta,

    H_2 that of two outcomes and q the reference's softmax over the other tokens. `beta` is in nats.

    The code in open-unlearning averages over prompt and padding too, where its targets are the frozen model's with the
    token of index -100 turned down; here only label tokens count.
    """

    name: ClassVar[str] = "undial"
    beta: float = 10.0

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_not_negative(beta=self.beta)

    @property
    def divergence(self) -> Divergence:
        """KL(t || p)."""
        return Divergence("forward_kl", label_shift=-self.beta)

    @property
    def requests(self) -> tuple[Request, ...]:
        return self.divergence, REFERENCE_LOGP, REFERENCE_LOG_NOT_LABEL, REFERENCE_OTHERS_ENTROPY

    def per_token(self, stats: SideStats) -> Tensor:
        logit = stats[REFERENCE_LOGP] - stats[REFERENCE_LOG_NOT_LABEL] - self.beta
        log_label, log_others = F.logsigmoid(logit), F.logsigmoid(-logit)  # log t_y, log(1 - t_y)
        others_entropy = stats[REFERENCE_OTHERS_ENTROPY]
        entropy = log_others.exp() * (others_entropy - log_others) - log_label.exp() * log_label
        return stats[self.divergence] + entropy
