"""Other tokens: distillation from what the frozen model held likeliest beside the label."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from fastforget.objectives.requests import Divergence, Request
from fastforget.objectives.terms import SideStats, TokenTerm, check_positive


@dataclass(kw_only=True)
class OtherTokens(TokenTerm):
    """Mean KL(t || p), t = softmax(s z_ref - beta onehot(y)): the frozen model's other tokens, sharpened by s.

    UNDIAL's target (arXiv 2402.10052) with a larger `beta` (nats), so that next to nothing is left of the label, and
    with a `sharpness` s > 1 (an inverse temperature). Where a model knows its label by heart, what it holds of the
    other tokens is nearly flat: distilled as it is (s = 1), the label soon has 2 % and is still the likeliest token.
    At s = 1.5 the next likeliest tokens take its place, and the continuation reads like the frozen model's own
    (measured on the demo; docs/demo.md).

    s z_ref stands for the head's logits of s times the frozen model's states. Raises FastforgetError for a `beta` that
    is negative, or a `sharpness` that is not positive.
    """

    name: ClassVar[str] = "other_tokens"
    beta: float = 30.0
    sharpness: float = 1.5

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_not_negative(beta=self.beta)
        check_positive(self, sharpness=self.sharpness)

    @property
    def requests(self) -> tuple[Request, ...]:
        return (Divergence("forward_kl", label_shift=-self.beta, sharpness=self.sharpness),)

    def per_token(self, stats: SideStats) -> Tensor:
        return stats[Divergence("forward_kl", label_shift=-self.beta, sharpness=self.sharpness)]
