"""What a term may ask for, as typed values: `Term.requests` lists them, and `SideStats` answers `stats[request]`."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from fastforget.backends.fields import BY_NAME, NAMES
from fastforget.errors import FastforgetError
from fastforget.stats import DIVERGENCES


@dataclass(frozen=True)
class Field:
    """A statistic of each label token (n,), by its name in `fastforget.TokenStats`.

    of: "model", or "reference" for the frozen one's, which is cached and has no gradient.

    Raises:
        FastforgetError: there is no such statistic, or neither model.
    """

    name: str
    of: Literal["model", "reference"] = "model"

    def __post_init__(self) -> None:
        if self.name not in BY_NAME:
            raise FastforgetError(f"there is no statistic {self.name!r}: choose from {', '.join(NAMES)}")
        if self.of not in ("model", "reference"):
            raise FastforgetError(f"a statistic is of 'model' or 'reference', not of {self.of!r}")


@dataclass(frozen=True)
class Divergence:
    """A divergence from the frozen reference at each label token (n,), as `fastforget.divergence` computes it.

    kind: "forward_kl", "reverse_kl" or "jsd". label_shift: nats, at most 0, added to the reference's logit of each
        label. sharpness: what the reference's states are multiplied by before the head; above 1 its distribution is
        more certain than it was.

    Raises:
        FastforgetError: an unknown kind, a shift that is positive or not finite, or a sharpness that is not positive.
    """

    kind: str
    label_shift: float = 0.0
    sharpness: float = 1.0

    def __post_init__(self) -> None:
        if self.kind not in DIVERGENCES:
            raise FastforgetError(f"unknown divergence {self.kind!r}: choose one of {', '.join(DIVERGENCES)}")
        if not (math.isfinite(self.label_shift) and self.label_shift <= 0):
            raise FastforgetError(f"label_shift must be finite and at most 0, not {self.label_shift}")
        if not (math.isfinite(self.sharpness) and self.sharpness > 0):
            raise FastforgetError(f"sharpness must be finite and positive, not {self.sharpness}")

    @property
    def embedding_helps(self) -> bool:
        """Whether the reference's cached embedding, which is of its distribution as it is, saves a product."""
        return self.kind == "forward_kl" and self.sharpness == 1.0


@dataclass(frozen=True, eq=False)
class StateRequest:
    """Distances of hidden states: from an anchor, and from the nearest of some centres.

    Requests are told apart by identity: a term returns the same object each time.

    layer: None for the states that enter the head, or a decoder layer's number (-1 the last), for what it puts out.
    anchor: "reference" (the frozen model's states of the same tokens), "label" (the head's row of each label), (D,), a
        function of the width D that returns one, the same each time, or None for no distance. centres: (K, D), or None
        for no pull. metric, margin: as in `fastforget.hidden_stats`.
    level: "token", or "sequence": of the mean state over each answer's label tokens (and the mean anchor).
    """

    layer: int | None = None
    anchor: str | Tensor | Callable[[int], Tensor] | None = None
    centres: Tensor | None = None
    metric: str = "l2"
    margin: float | None = None
    level: str = "token"

    @property
    def from_reference(self) -> bool:
        """Whether the anchor is the frozen model's states."""
        return isinstance(self.anchor, str) and self.anchor == "reference"

    @property
    def from_label(self) -> bool:
        """Whether the anchor is the head's row of each label."""
        return isinstance(self.anchor, str) and self.anchor == "label"


@dataclass(frozen=True)
class StateDistances:
    """The answer to a `StateRequest`: (n,) at token level, (b,) at sequence level; None for what was not asked."""

    distance: Tensor | None
    pull: Tensor | None


@dataclass(frozen=True)
class CentreRequest:
    """Cluster centres that a term wants to be found for it before training: k, or a number that the silhouette chooses.

    layer, metric, level: as in `StateRequest`, of the states that are clustered.
    """

    k: int | None
    layer: int | None
    metric: str
    level: str


Request = Field | Divergence | StateRequest
LOGP = Field("logp")
REFERENCE_LOGP = Field("logp", of="reference")


def described(request: Request) -> str:
    """Describe a request in a few words, for messages."""
    if request == LOGP:
        return "logp"
    return "a StateRequest" if isinstance(request, StateRequest) else repr(request)
