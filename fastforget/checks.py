"""What the statistics' arguments must be, and rows that are left out: shared by `stats.py` and `divergences.py`."""

from __future__ import annotations

import math
from collections.abc import Collection

import torch
from torch import Tensor

from fastforget.backends import OUTPUTS
from fastforget.errors import FastforgetError
from fastforget.head import LMHead

IGNORE_INDEX = -100
EMPTY = {"argmax": -1}  # what a field holds where the label is ignored, if not 0
METRICS = ("l2", "cosine")


def masked_rows(value: Tensor, labels: Tensor, name: str = "") -> Tensor:
    """Values (N, ...) of all rows, 0 (argmax: -1) where the label is ignored."""
    kept = (labels != IGNORE_INDEX).view(-1, *[1] * (value.dim() - 1))
    return torch.where(kept, value, EMPTY.get(name, 0))


def spread(value: Tensor, positions: Tensor, count: int, name: str = "") -> Tensor:
    """Kept values (n, ...) at their positions among `count` rows, 0 elsewhere (argmax: -1)."""
    empty = value.new_full((count, *value.shape[1:]), EMPTY.get(name, 0))
    return empty.index_copy(0, positions, value)


def check_token_arguments(
    hidden: Tensor, head: LMHead, labels: Tensor, outputs: Collection[str], tail_mass: float
) -> None:
    """Raise where the arguments of `token_stats` do not fit."""
    check_hidden(hidden, head)
    if labels.shape != hidden.shape[:1]:
        raise FastforgetError(f"labels must be ({hidden.shape[0]},) to go with hidden, not {tuple(labels.shape)}")
    if labels.dtype != torch.int64:
        raise FastforgetError(f"labels must be int64, not {labels.dtype}")
    unknown = set(outputs) - set(OUTPUTS)
    if unknown:
        raise FastforgetError(f"unknown output {sorted(unknown)[0]!r}: choose from {', '.join(OUTPUTS)}")
    if "expected_embedding" in outputs and (head.softcap is not None or head.is_identity):
        raise FastforgetError("expected_embedding is defined for heads with a weight and without a softcap only")
    if not 0.0 <= tail_mass < 1.0:
        raise FastforgetError(f"tail_mass must be from 0 (exact) to less than 1, not {tail_mass}")


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


def check_labels(labels: Tensor, vocabulary: int, positions: Tensor | None = None) -> None:
    """Raise for a kept label outside the vocabulary. Only on the CPU: on a device looking would synchronise."""
    if torch.compiler.is_compiling() or not labels.is_cpu:
        return
    kept = labels[labels != IGNORE_INDEX] if positions is None else labels[positions.cpu()]
    wrong = kept[(kept < 0) | (kept >= vocabulary)]
    if len(wrong):
        raise FastforgetError(
            f"label {int(wrong[0])} is outside the vocabulary of {vocabulary} (ignored labels are -100)"
        )
