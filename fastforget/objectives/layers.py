"""Terms on the squared distance of a layer's states: RMU, and staying at the frozen model's states.

Both are sums over the width of the state, as the formulas have them. Published code (`mse_loss`) takes the mean over
the width instead, which divides forget and retain term alike by D: the same direction, and the same steps of AdamW.
It also averages over every position, padding included; here only the states that predict label tokens count.

Where a side has no other terms its forward ends at their deepest layer (`reaches_head`): no later layer, no head, and
no NLL to report.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from fastforget.errors import FastforgetError
from fastforget.objectives.requests import Request, StateRequest
from fastforget.objectives.states import check_layer
from fastforget.objectives.terms import Side, SideStats, TokenTerm, present


@dataclass(kw_only=True, eq=False)
class SquaredDistance(TokenTerm):
    """Base of terms that are mean |h - a|^2 over states h of a layer, each with its own anchor a or all with one.

    `layer`: None for the states that enter the head, or a decoder layer's number (-1 the last), for what it puts out.
    Per token it is the square of the l2 distance: its gradient 2 (h - a) is right also where the distance is 0.
    """

    layer: int | None = None
    _request: StateRequest | None = field(default=None, init=False, repr=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_layer(self.name, self.layer)

    @property
    def requests(self) -> tuple[Request, ...]:
        assert self._request is not None
        return (self._request,)

    def per_token(self, stats: SideStats) -> Tensor:
        assert self._request is not None
        return present(stats[self._request].distance, "a distance").square()


@dataclass(kw_only=True, eq=False)
class RMU(SquaredDistance):
    """Representation misdirection (arXiv 2403.03218, forget loss): mean |h - c u|^2 at a layer.

    u is one random vector of length 1 for the whole run, its entries drawn uniformly from [0, 1) before it is scaled,
    as published. It follows from `seed` and the width of the states alone, and is kept in the term, so that a copied
    or unpickled one goes on with it. `layer` and `c` are those published for Zephyr-7B; u of length c must be long
    beside the model's own states at that layer to be out of place there, so both want choosing for another model.

    The paper trains the weights of three layers up to `layer` only; here every adapter weight up to it learns, and
    those of later layers do not move, as the loss does not depend on them.
    """

    name: ClassVar[str] = "rmu"
    layer: int | None = 7
    c: float = 6.5
    seed: int = 0
    _vectors: dict[int, Tensor] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not (math.isfinite(self.c) and self.c > 0):
            raise FastforgetError(f"{self.name}: c must be positive and finite, not {self.c}")
        if isinstance(self.seed, bool) or not isinstance(self.seed, int) or not 0 <= self.seed < 2**63:
            raise FastforgetError(f"{self.name}: seed must be a whole number from 0 to 2^63 - 1, not {self.seed!r}")
        self._request = StateRequest(layer=self.layer, anchor=self.target)

    def target(self, width: int) -> Tensor:
        """c u for states of this width (D,), float32 on the CPU; the same tensor each time."""
        if width not in self._vectors:
            u = torch.rand(width, generator=torch.Generator().manual_seed(self.seed))
            self._vectors[width] = self.c * u / torch.linalg.vector_norm(u)
        return self._vectors[width]


@dataclass(kw_only=True, eq=False)
class HiddenMSE(SquaredDistance):
    """Keeps the states of a layer where the frozen model has them: mean |h - h_ref|^2 (arXiv 2403.03218, retain loss).

    It is 0, and has no gradient, as long as the adapter does nothing.
    """

    name: ClassVar[str] = "hidden_mse"
    starts_at_zero: ClassVar[bool] = True
    on: Side = "retain"

    def __post_init__(self) -> None:
        super().__post_init__()
        self._request = StateRequest(layer=self.layer, anchor="reference")
