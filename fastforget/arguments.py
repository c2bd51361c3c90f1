"""What the arguments of `stats.py` must be, and which rows its functions compute."""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass

import torch
from torch import Tensor

from fastforget.backends.fields import BY_NAME, EMPTY, NAMES
from fastforget.backends.protocol import Targets
from fastforget.backends.state_ops import checked_labels, outside
from fastforget.batch import IGNORE_INDEX
from fastforget.errors import FastforgetError
from fastforget.head import LMHead

METRICS = ("l2", "cosine")
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def check_states(hidden: Tensor, name: str = "hidden") -> None:
    """Raise for what is no (N, D) of a dtype that the backends compute in."""
    if not is_dense(hidden) or hidden.dim() != 2 or not hidden.shape[1] or hidden.dtype not in DTYPES:
        known = ", ".join(str(dtype).removeprefix("torch.") for dtype in DTYPES)
        raise FastforgetError(f"{name} must be a floating-point (N, D), D >= 1, of {known}, not {kind_of(hidden)}")


def check_hidden(hidden: Tensor, head: LMHead) -> None:
    """Raise where hidden states and head do not fit."""
    if not isinstance(head, LMHead):
        raise FastforgetError(f"head must be an LMHead (see LMHead.from_model), not {kind_of(head)}")
    check_states(hidden, "the logits" if head.is_identity else "hidden")
    if not head.is_identity and head.weight.shape[1] != hidden.shape[1]:
        raise FastforgetError(f"hidden has D = {hidden.shape[1]}, the head's weight D = {head.weight.shape[1]}")


def check_labels(labels: Tensor, count: int) -> None:
    """Raise for labels that are not int64 (N,), N the number of states."""
    if not is_dense(labels) or labels.dtype != torch.int64 or labels.shape != (count,):
        raise FastforgetError(f"labels must be int64 ({count},) to go with the states, not {kind_of(labels)}")


def check_outputs(outputs: Collection[str], head: LMHead) -> None:
    """Raise for names of no statistic, and for embeddings of a head that has none."""
    for name in outputs:
        if name not in BY_NAME:
            raise FastforgetError(f"unknown output {name!r}: choose from {', '.join(NAMES)}")
        if BY_NAME[name].needs == "embedding" and (head.softcap is not None or head.is_identity):
            raise FastforgetError(f"{name} is defined for heads with a weight and without a softcap only")


def check_metric(metric: str, margin: float | None) -> None:
    """Raise for an unknown metric or a margin that is not positive."""
    if metric not in METRICS:
        raise FastforgetError(f"unknown metric {metric!r}: choose one of {', '.join(METRICS)}")
    if margin is not None and not (math.isfinite(margin) and margin > 0):
        raise FastforgetError(f"margin must be positive and finite, or None, not {margin}")


def check_positions(positions: Tensor, count: int) -> None:
    """Raise for positions that are not distinct rows of `count`; on a device only their form is looked at."""
    if not isinstance(positions, Tensor) or positions.dtype != torch.int64 or positions.dim() != 1:
        raise FastforgetError(f"positions must be an int64 tensor (n,), not {kind_of(positions)}")
    if torch.compiler.is_compiling() or not positions.is_cpu or not len(positions):
        return
    if int(positions.amin()) < 0 or int(positions.amax()) >= count:
        wrong = positions[(positions < 0) | (positions >= count)][0]
        raise FastforgetError(f"position {int(wrong)} is none of the {count} rows")
    if int(torch.zeros(count, dtype=torch.bool).index_fill_(0, positions, True).sum()) != len(positions):
        raise FastforgetError("positions must be distinct: a row that is named twice would get its gradient twice")


def check_vocabulary(labels: Tensor, vocabulary: int) -> None:
    """Raise for a kept label, on the CPU, outside the vocabulary."""
    if len(labels) and not 0 <= int(labels.amin()) <= int(labels.amax()) < vocabulary:
        raise outside(int(labels[(labels < 0) | (labels >= vocabulary)][0]), vocabulary)


def checked_targets(
    hidden: Tensor, anchor: Tensor | None, centres: Tensor | None, metric: str, margin: float | None
) -> Targets:
    """Anchor and centres, checked, as constants on the device of the states."""
    check_metric(metric, margin)
    count, width = hidden.shape
    if anchor is not None:
        if not is_dense(anchor) or anchor.shape not in ((count, width), (width,)):
            raise FastforgetError(
                f"anchor must be ({count}, {width}) or ({width},) for these states, not {kind_of(anchor)}"
            )
        anchor = anchor.detach().to(hidden.device)
    if centres is not None:
        if not is_dense(centres) or centres.dim() != 2 or not len(centres) or centres.shape[1] != width:
            raise FastforgetError(f"centres must be (K, {width}) with K >= 1, not {kind_of(centres)}")
        centres = centres.detach().to(hidden.device)
    return Targets(anchor, centres, metric)


def is_dense(value: object) -> bool:
    """Tell whether a value is a tensor of real numbers, one at each place: not sparse, not of the meta device."""
    if not isinstance(value, Tensor) or value.is_complex():
        return False
    return value.layout == torch.strided and not value.is_meta


def kind_of(value: object) -> str:
    """Describe a value for messages: a tensor's dtype and shape, and how it is held, or its type."""
    if isinstance(value, Tensor):
        held = "" if value.layout == torch.strided and not value.is_meta else f", {value.layout} on {value.device}"
        return f"{str(value.dtype).removeprefix('torch.')} {tuple(value.shape)}{held}"
    return f"a {type(value).__name__}"


@dataclass(frozen=True)
class ComputedRows:
    """The rows of N that are computed, and how what was computed goes back among all of them.

    labels: (n,) of the rows computed, each inside the vocabulary.
    positions: (n,) int64, the rows computed; None: all N.
    mask: (N,) bool, where all N rows are computed and only some count.
    """

    count: int
    labels: Tensor
    positions: Tensor | None = None
    mask: Tensor | None = None

    def spread(self, name: str, value: Tensor) -> Tensor:
        """Spread the values (n, ...) of a field over all N rows: 0, or -1 of an index, where a row does not count."""
        empty = EMPTY.get(name, 0)
        if self.mask is not None:
            return torch.where(self.mask.view(-1, *[1] * (value.dim() - 1)), value, empty)
        if self.positions is None:
            return value
        return value.new_full((self.count, *value.shape[1:]), empty).index_copy(0, self.positions, value)


def kept_rows(labels: Tensor, positions: Tensor | None, vocabulary: int, device: torch.device) -> ComputedRows:
    """Return the labelled rows, or those at `positions`, on a device, once their labels are known right."""
    if positions is not None:
        check_positions(positions, len(labels))
    if torch.compiler.is_compiling() or not labels.is_cpu:
        if positions is None and torch.compiler.is_compiling():  # their number is not known when the graph is built
            return masked_rows(labels, None, vocabulary, device)
        labels = labels.to(device, non_blocking=True)
        positions = (labels != IGNORE_INDEX).nonzero()[:, 0] if positions is None else positions
        positions = positions.to(device, non_blocking=True)
        kept = checked_labels(labels[positions], vocabulary, None)  # none of them may be ignored
        return ComputedRows(len(labels), kept, positions)
    if positions is None:
        positions = (labels != IGNORE_INDEX).nonzero()[:, 0]
        if len(positions) == len(labels):  # all of them: nothing to gather, nothing to spread
            positions = None
    kept = labels if positions is None else labels[positions.cpu()]
    check_vocabulary(kept, vocabulary)
    positions = None if positions is None else positions.to(device, non_blocking=True)
    return ComputedRows(len(labels), kept.to(device, non_blocking=True), positions)


def masked_rows(labels: Tensor, positions: Tensor | None, vocabulary: int, device: torch.device) -> ComputedRows:
    """Return all rows, of which the labelled ones, or those of them at `positions`, count."""
    if positions is not None:
        check_positions(positions, len(labels))
    labels = labels.to(device, non_blocking=True)
    mask = labels != IGNORE_INDEX
    if positions is not None:
        mask = mask & torch.zeros_like(mask).index_fill(0, positions.to(device, non_blocking=True), True)
        labels = labels.masked_fill(~mask, IGNORE_INDEX)
    return ComputedRows(len(labels), checked_labels(labels, vocabulary, IGNORE_INDEX), None, mask)
