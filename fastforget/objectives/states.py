"""Terms on hidden states: away from an anchor, and towards the cluster means of expected outputs.

Our reading of arXiv 2404.16841, whose abstract alone could be read: its "distance loss" and its positive loss. Layer,
metric, margin, level and weights are therefore all the user's to choose.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from fastforget.arguments import check_metric
from fastforget.errors import FastforgetError
from fastforget.objectives.requests import CentreRequest, Request, StateDistances, StateRequest
from fastforget.objectives.terms import SideStats, Term, present

ANCHORS = ("reference", "label")
LEVELS = ("token", "sequence")


def check_layer(name: str, layer: object) -> None:
    """Raise for a layer that is neither None nor a whole number."""
    if layer is not None and (isinstance(layer, bool) or not isinstance(layer, int)):
        raise FastforgetError(f"{name}: layer must be a whole number or None, not {layer!r}")


@dataclass(kw_only=True, eq=False)
class StateTerm(Term):
    """Base of terms on hidden states.

    `layer`: None for the states that enter the head, or a decoder layer's number (-1 the last), for what it puts out.
    `level`: "token" takes each label token's state, "sequence" the mean state over each answer's label tokens.
    """

    layer: int | None = None
    metric: str = "l2"
    level: str = "token"
    _request: StateRequest | None = field(default=None, init=False, repr=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_metric(self.metric, None)
        if self.level not in LEVELS:
            raise FastforgetError(f"{self.name}: level must be token or sequence, not {self.level!r}")
        check_layer(self.name, self.layer)

    @property
    def requests(self) -> tuple[Request, ...]:
        return () if self._request is None else (self._request,)

    def distances(self, stats: SideStats) -> StateDistances:
        """Return the answer to this term's request."""
        self.check_ready()
        assert self._request is not None
        return stats[self._request]

    def mean(self, stats: SideStats, values: Tensor) -> Tensor:
        """Mean of the level's values over the whole batch."""
        return stats.token_mean(values) if self.level == "token" else stats.sequence_mean(values)


@dataclass(kw_only=True, eq=False)
class EmbeddingDistance(StateTerm):
    """Pushes hidden states away from an anchor: mean max(0, margin - distance), or without a margin -mean distance.

    `anchor`: "reference" (the frozen model's states of the same tokens), "label" (the head's row of the label, the
    undesired token's own embedding), or a tensor (D,). `metric`: "l2" or "cosine" (1 - cos, at most 2). `margin`: in
    units of the metric; without it the l2 distance has no bound.

    At the start of a run states lie on their reference, where the distance has no direction and the gradient is 0: with
    that anchor another term must make the first move (`ClusterPull`).
    """

    name: ClassVar[str] = "embedding_distance"
    anchor: str | Tensor = "reference"
    margin: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_metric(self.metric, self.margin)
        if isinstance(self.anchor, str) and self.anchor not in ANCHORS:
            raise FastforgetError(f"{self.name}: anchor must be 'reference', 'label' or a tensor, not {self.anchor!r}")
        if not isinstance(self.anchor, str) and (not isinstance(self.anchor, Tensor) or self.anchor.dim() != 1):
            raise FastforgetError(f"{self.name}: an anchor that is given must be one vector (D,), as a tensor")
        self._request = StateRequest(
            layer=self.layer, anchor=self.anchor, metric=self.metric, margin=self.margin, level=self.level
        )

    def value(self, stats: SideStats) -> Tensor:
        distance = present(self.distances(stats).distance, "a distance")
        return self.mean(stats, -distance if self.margin is None else self.margin - distance)


@dataclass(kw_only=True, eq=False)
class ClusterPull(StateTerm):
    """Pulls each hidden state to the nearest of K centres: the mean distance from it.

    `centres`: (K, D), as `fastforget.cluster_centres` finds them over the states of expected outputs. Where
    none are given `fastforget.unlearn` finds them before it trains: `k` of them, or a number that the silhouette
    chooses, of the frozen model's states over the retain set. A loop of your own gives them.
    """

    name: ClassVar[str] = "cluster_pull"
    centres: Tensor | None = field(default=None, kw_only=False)
    k: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.k is not None and (isinstance(self.k, bool) or not float(self.k).is_integer() or self.k < 1):
            raise FastforgetError(f"{self.name}: k must be a whole number from 1 on, or None, not {self.k}")
        if self.centres is not None:
            self.fit(self.centres)

    @property
    def centre_request(self) -> CentreRequest | None:
        if self.centres is not None:
            return None
        return CentreRequest(None if self.k is None else int(self.k), self.layer, self.metric, self.level)

    def fit(self, centres: Tensor) -> None:
        """Set the centres (K, D)."""
        if not isinstance(centres, Tensor) or centres.dim() != 2 or len(centres) == 0:
            raise FastforgetError(f"{self.name}: centres must be a tensor (K, D)")
        if not torch.isfinite(centres).all():
            raise FastforgetError(f"{self.name}: the centres are not all finite")
        self.centres = centres.detach()
        self._request = StateRequest(layer=self.layer, centres=self.centres, metric=self.metric, level=self.level)

    def check_ready(self) -> None:
        if self.centres is None:
            raise FastforgetError(
                f"{self.name} has no centres yet: ClusterPull(fastforget.cluster_centres(model, batches)), or "
                "preset('distance_cluster', centres=...)"
            )

    def value(self, stats: SideStats) -> Tensor:
        if self._request is not None and self._request not in stats.states:
            raise FastforgetError(
                f"{self.name} has other centres than when the loss was made: make the UnlearnLoss or UnlearnStep anew"
            )
        return self.mean(stats, present(self.distances(stats).pull, "a pull"))
