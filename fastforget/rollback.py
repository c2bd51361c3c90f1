"""Gradients as they were, after a call that failed: half of a step's would spoil the next one's update."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

from fastforget.shards import local

Saved = tuple[Tensor, int, Tensor]  # a tensor, how often it (its part here) had been written to, and what that held


def saved(tensor: Tensor | None) -> Saved | None:
    """Save what `put_back` needs; a copy only where there is a tensor (after `zero_grad` there is no gradient)."""
    if tensor is None:
        return None
    own = local(tensor)  # FSDP2 writes to this process's part, of which the DTensor around it knows nothing
    return tensor, own._version, own.detach().clone()


@torch.no_grad()
def put_back(before: Saved | None) -> Tensor | None:
    """Return the same tensor, holding what it held; one that nobody wrote to stays untouched."""
    if before is None:
        return None
    tensor, version, values = before
    own = local(tensor)
    if own._version != version:
        own.copy_(values)
    return tensor


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
