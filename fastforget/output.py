"""What one call of an unlearning loss returns, and the sum of its parts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class UnlearnOutput:
    """What one call returns; all scalars, float32, on the model's device.

    `terms` holds the unweighted value of each term by name, `stats` the positive mean NLL per label token of each side
    that a term looked at (`forget_nll`, `retain_nll`), and of each companion (`forget_refusal_nll`, ...). Of a side
    whose terms all look at layers its forward ends at the deepest of them, and there is no NLL of it.
    """

    loss: Tensor
    terms: dict[str, Tensor]
    stats: dict[str, Tensor]
    side: str | None = None  # where all of it is of one side


def add_outputs(parts: Sequence[UnlearnOutput]) -> UnlearnOutput:
    """The sum of parts whose denominators are those of the whole."""
    if not parts:  # a part of a larger batch, without a label of its own
        return UnlearnOutput(loss=torch.zeros(()), terms={}, stats={})
    side = parts[0].side if len({part.side for part in parts}) == 1 else None
    total = UnlearnOutput(parts[0].loss, dict(parts[0].terms), dict(parts[0].stats), side)
    for part in parts[1:]:
        total.loss = total.loss + part.loss
        add_to(total.terms, part.terms)
        add_to(total.stats, part.stats)
    return total


def add_to(totals: dict[str, Tensor], shares: Mapping[str, Tensor]) -> None:
    """Add values to those of the same name."""
    for name, share in shares.items():
        totals[name] = totals[name] + share if name in totals else share
