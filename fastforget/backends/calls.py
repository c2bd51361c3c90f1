"""Checked calls of the CPU library: no pointer is passed before shape, dtype and strides of its tensor are known."""

from __future__ import annotations

import ctypes
from collections.abc import Collection, Sequence

import torch
from torch import Tensor

from fastforget.backends import library
from fastforget.errors import FastforgetError
from fastforget.head import LMHead

DTYPES = (torch.float32, torch.bfloat16, torch.float16)  # in the order of FastforgetDtype
BAD_INDEX = 1
RESULTS = {BAD_INDEX: "a label or argmax is outside the vocabulary", 2: "an argument is wrong", 3: "no memory is left"}


def common(
    count: int, vocabulary: int, bias: Tensor | None = None, scale: float = 1.0, softcap: float | None = None
) -> library.Common:
    """What all passes share. The bias must outlive the call."""
    return library.Common(
        count,
        vocabulary,
        pointer(bias),
        scale,
        softcap or 0.0,
        torch.get_num_threads(),
        library.instruction_set(),
    )


def call(name: str, arguments: ctypes.Structure) -> None:
    """Call a pass. Raises FastforgetError for what it found wrong before it wrote anything."""
    result = getattr(library.load(), name)(ctypes.byref(arguments))
    if result:
        raise FastforgetError(f"{name}: {RESULTS.get(result, f'error {result}')}")


def pointer(tensor: Tensor | None) -> int | None:
    """Where a tensor's elements begin; null for none."""
    return None if tensor is None else tensor.data_ptr()


def float32_bias(head: LMHead, vocabulary: int) -> Tensor | None:
    """The head's bias as the passes read it."""
    if head.bias is None:
        return None
    bias = head.bias.detach().float().contiguous()
    check_vector("the bias", bias, vocabulary, torch.float32)
    return bias


def check_rows(
    name: str, tensor: Tensor, dtypes: Collection[torch.dtype] = (torch.float32,), shape: Sequence[int] | None = None
) -> None:
    """Raise for rows that no pointer may be passed of."""
    if not tensor.is_cpu or tensor.layout != torch.strided:
        raise FastforgetError(f"{name} must be an ordinary tensor on the CPU, not {tensor.layout} on {tensor.device}")
    if tensor.dtype not in dtypes:
        raise FastforgetError(f"{name} must be {' or '.join(map(str, dtypes))}, not {tensor.dtype}")
    if tensor.dim() != 2 or (shape is not None and tuple(tensor.shape) != tuple(shape)):
        wanted = "(rows, columns)" if shape is None else tuple(shape)
        raise FastforgetError(f"{name} must be {wanted}, not {tuple(tensor.shape)}")
    if tensor.shape[1] > 1 and tensor.stride(1) != 1:
        raise FastforgetError(f"{name} must have contiguous rows, not strides {tensor.stride()}")


def check_vector(name: str, tensor: Tensor, count: int, dtype: torch.dtype) -> None:
    """Raise for a vector that no pointer may be passed of."""
    if not tensor.is_cpu or tensor.layout != torch.strided:
        raise FastforgetError(f"{name} must be an ordinary tensor on the CPU, not {tensor.layout} on {tensor.device}")
    if tensor.dtype != dtype or tuple(tensor.shape) != (count,):
        raise FastforgetError(f"{name} must be {dtype} ({count},), not {tensor.dtype} {tuple(tensor.shape)}")
    if count > 1 and tensor.stride(0) != 1:
        raise FastforgetError(f"{name} must be contiguous, not of stride {tensor.stride(0)}")
