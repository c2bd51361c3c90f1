"""What the statistics' arguments must be, and rows that are left out: shared by `stats.py` and `divergences.py`."""

from __future__ import annotations

import math
from collections.abc import Collection

import torch
from torch import Tensor

from fastforget.backends.fields import BY_NAME, NAMES
from fastforget.backends.state_ops import outside
from fastforget.errors import FastforgetError
from fastforget.head import LMHead

IGNORE_INDEX = -100
METRICS = ("l2", "cosine")


def masked_rows(value: Tensor, labels: Tensor, empty: int = 0) -> Tensor:
    """Values (N, ...) of all rows, `empty` where the label is ignored."""
    kept = (labels != IGNORE_INDEX).view(-1, *[1] * (value.dim() - 1))
    return torch.where(kept, value, empty)


def spread(value: Tensor, positions: Tensor, count: int, empty: int = 0) -> Tensor:
    """Kept values (n, ...) at their positions among `count` rows, `empty` elsewhere."""
    return value.new_full((count, *value.shape[1:]), empty).index_copy(0, positions, value)


def check_token_arguments(hidden: Tensor, head: LMHead, labels: Tensor, outputs: Collection[str]) -> None:
    """Raise where the arguments of `token_stats` do not fit."""
    check_hidden(hidden, head)
    if labels.shape != hidden.shape[:1]:
        raise FastforgetError(f"labels must be ({hidden.shape[0]},) to go with hidden, not {tuple(labels.shape)}")
    if labels.dtype != torch.int64:
        raise FastforgetError(f"labels must be int64, not {labels.dtype}")
    for name in outputs:
        if name not in BY_NAME:
            raise FastforgetError(f"unknown output {name!r}: choose from {', '.join(NAMES)}")
        if BY_NAME[name].needs == "embedding" and (head.softcap is not None or head.is_identity):
            raise FastforgetError(f"{name} is defined for heads with a weight and without a softcap only")


def check_hidden(hidden: Tensor, head: LMHead) -> None:
    """Raise where hidden states and head do not fit."""
    if hidden.dim() != 2 or not hidden.is_floating_point():
        raise FastforgetError(f"hidden must be a floating-point (N, D), not {hidden.dtype} {tuple(hidden.shape)}")
    if not head.is_identity and head.weight.shape[1] != hidden.shape[1]:
        raise FastforgetError(f"hidden has D = {hidden.shape[1]}, the head's weight D = {head.weight.shape[1]}")


def check_metric(metric: str, margin: float | None) -> None:
    """Raise for an unknown metric or a margin that is not positive."""
    if metric not in METRICS:
        raise FastforgetError(f"unknown metric {metric!r}: choose one of {', '.join(METRICS)}")
    if margin is not None and not (math.isfinite(margin) and margin > 0):
        raise FastforgetError(f"margin must be positive and finite, or None, not {margin}")


def check_anchor(anchor: Tensor, hidden: Tensor) -> None:
    """Raise where an anchor does not fit the states."""
    count, width = hidden.shape
    if anchor.shape not in ((count, width), (width,)):
        raise FastforgetError(
            f"anchor must be ({count}, {width}) or ({width},) for these states, not {tuple(anchor.shape)}"
        )


def check_positions(positions: Tensor, count: int) -> None:
    """Raise for positions that are not distinct rows of `count`; on a device only their form is looked at."""
    if not isinstance(positions, Tensor) or positions.dtype != torch.int64 or positions.dim() != 1:
        raise FastforgetError(f"positions must be an int64 tensor (n,), not {positions!r:.80}")
    if torch.compiler.is_compiling() or not positions.is_cpu or not len(positions):
        return
    if int(positions.amin()) < 0 or int(positions.amax()) >= count:
        wrong = positions[(positions < 0) | (positions >= count)][0]
        raise FastforgetError(f"position {int(wrong)} is none of the {count} rows")
    if int(torch.zeros(count, dtype=torch.bool).index_fill_(0, positions, True).sum()) != len(positions):
        raise FastforgetError("positions must be distinct: a row that is named twice would get its gradient twice")


def check_labels(labels: Tensor, vocabulary: int) -> None:
    """Raise for a kept label, on the CPU, outside the vocabulary."""
    if len(labels) and not 0 <= int(labels.amin()) <= int(labels.amax()) < vocabulary:
        raise outside(int(labels[(labels < 0) | (labels >= vocabulary)][0]), vocabulary)
