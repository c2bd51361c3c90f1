"""Gradients as they were, after a call that failed: half of a step's would spoil the next one's update."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

Saved = tuple[Tensor, int, Tensor]  # a tensor, how often it had been written to, and what it held


def saved(tensor: Tensor | None) -> Saved | None:
    """Save what `put_back` needs; a copy only where there is a tensor (after `zero_grad` there is no gradient)."""
    return None if tensor is None else (tensor, tensor._version, tensor.detach().clone())


@torch.no_grad()
def put_back(before: Saved | None) -> Tensor | None:
    """Return the same tensor, holding what it held; one that nobody wrote to stays untouched."""
    if before is None:
        return None
    tensor, version, values = before
    return tensor if tensor._version == version else tensor.copy_(values)


@contextlib.contextmanager
def gradients_as_before(parameters: Iterable[Tensor]) -> Iterator[None]:
    """Put every `.grad` back where an exception leaves the block: None, or the same tensor with its values."""
    before = [(parameter, saved(parameter.grad)) for parameter in parameters if parameter.requires_grad]
    try:
        yield
    except BaseException:
        for parameter, gradient in before:
            parameter.grad = put_back(gradient)
        raise
