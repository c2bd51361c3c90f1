"""Frozen weights as they are stored (int8, NF4, FP4, 16 or 32 bit), and their cast into a buffer that layers share.

The buffer belongs to a device, dtype and stream. A cast and the products that read it are one critical section: whoever
finds the buffer in use (another thread, a captured CUDA graph) casts into memory of its own. What is in it afterwards
counts for nothing: a backward pass casts again, and a forward pass that runs inside a backward pass (checkpointing) may
overwrite it.

* float32 and float64: as many rows at a time as `tiling.CAST_BYTES` hold. AMD EPYC, one thread, 2026-11-28: int8 to
  float32 into the buffer takes 0.06 to 0.1 ms for (1536, 576) beside 18 ms for its product with 1,024 rows, and for
  (4096, 4096) 5.2 ms where a fresh tensor, as in bitsandbytes, takes 32: plain torch is enough on a CPU.
* 16 bit: a whole layer at a time, as sums over tiles would be rounded at each: the buffer is as large as the largest
  layer in 16 bit (117 MB for an 8B Llama).

On a GPU int8 is cast by a Triton kernel that moves 3 bytes a weight. Its time was measured nowhere yet.
"""

from __future__ import annotations

import contextlib
import functools
import math
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fastforget.backends import why_not_triton
from fastforget.backends.tiling import CAST_BYTES, even_rows

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


class FrozenWeight(NamedTuple):
    """A weight W (out, in) as it is stored.

    Attributes:
        stored: W itself; or its int8 codes (out, in), contiguous, in units of `scale / 127`; or packed 4-bit codes.
        kind: "plain", "int8", "nf4" or "fp4".
        scale: int8: each row's largest magnitude, (out,) float32; 4 bit: each block's, float32 or coded in 8 bits.
        block: weights in a block of 4 bit.
        outer_scale, outer_code, outer_offset, outer_block: how `scale` itself is coded (double quantisation).
    """

    stored: Tensor
    kind: str
    out_features: int
    in_features: int
    scale: Tensor | None = None
    block: int = 0
    outer_scale: Tensor | None = None
    outer_code: Tensor | None = None
    outer_offset: Tensor | None = None
    outer_block: int = 0

    def casts_to(self, dtype: torch.dtype) -> bool:
        """Tell whether products in a dtype need a cast."""
        return self.stored.dtype != dtype


def weight_of(layer: nn.Module) -> FrozenWeight:
    """Return the weight of an nn.Linear, a transformers Conv1D or a bitsandbytes linear, without a copy."""
    weight: Any = layer.weight
    if isinstance(layer, nn.Linear) and weight.dtype.is_floating_point and not hasattr(weight, "quant_state"):
        return FrozenWeight(weight, "plain", layer.out_features, layer.in_features)
    if not isinstance(layer, nn.Linear):  # Conv1D keeps (in, out)
        return FrozenWeight(weight.T, "plain", weight.shape[1], weight.shape[0])
    shape = layer.out_features, layer.in_features
    if weight.dtype == torch.int8:
        scale: Any = weight.SCB if weight.SCB is not None else layer.state.SCB  # type: ignore[union-attr]
        return FrozenWeight(weight.data, "int8", *shape, scale)
    state, packed = weight.quant_state, weight.data.view(torch.uint8).view(-1)
    found = FrozenWeight(packed, state.quant_type, *shape, state.absmax, state.blocksize)
    if not state.nested:
        return found
    outer = state.state2
    return found._replace(
        outer_scale=outer.absmax, outer_code=outer.code, outer_offset=state.offset, outer_block=outer.blocksize
    )


@dataclass
class _Shared:
    """A buffer that all layers share, and who uses it."""

    lock: threading.Lock = field(default_factory=threading.Lock)
    tensor: Tensor | None = None


_buffers: dict[tuple[torch.device, torch.dtype, int], _Shared] = {}


@contextlib.contextmanager
def cast_buffer(weight: FrozenWeight, dtype: torch.dtype) -> Iterator[Tensor | None]:
    """Memory for one tile of a weight in a dtype, until the block ends; None where nothing has to be cast."""
    if not weight.casts_to(dtype):
        yield None
        return
    device, size = weight.stored.device, tile_rows(weight, dtype) * weight.in_features
    stream = torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0
    shared = _buffers.setdefault((device, dtype, stream), _Shared())
    captured = device.type == "cuda" and torch.cuda.is_current_stream_capturing()  # its memory must be the graph's
    if captured or not shared.lock.acquire(blocking=False):
        yield torch.empty(size, dtype=dtype, device=device)
        return
    try:
        if shared.tensor is None or shared.tensor.numel() < size:
            shared.tensor = None  # before the larger one is there
            with torch.inference_mode(False):  # else it could never be written outside of that mode
                shared.tensor = torch.empty(size, dtype=dtype, device=device)
        yield shared.tensor[:size]
    finally:
        shared.lock.release()


def buffer_bytes() -> int:
    """Count the bytes in all buffers that layers share."""
    return sum(shared.tensor.nbytes for shared in list(_buffers.values()) if shared.tensor is not None)


def free_buffers() -> None:
    """Give the shared buffers back; the next cast allocates anew."""
    _buffers.clear()


def tile_rows(weight: FrozenWeight, dtype: torch.dtype) -> int:
    """Rows that are cast at a time; of 4 bit those that make whole blocks."""
    if dtype.itemsize < torch.float32.itemsize:
        return weight.out_features
    step = weight.block // math.gcd(weight.block, weight.in_features) if weight.block else 1
    return even_rows(weight.out_features, max(1, CAST_BYTES // (weight.in_features * dtype.itemsize)), step)


def tiles(weight: FrozenWeight, dtype: torch.dtype, buffer: Tensor | None) -> Iterator[tuple[slice, Tensor]]:
    """Yield the weight in a dtype, some rows (r, in) at a time, each in the buffer until the next one is asked for."""
    if buffer is None:
        yield slice(0, weight.out_features), weight.stored.detach()
        return
    blocks = block_scales(weight)
    step = tile_rows(weight, dtype)
    for start in range(0, weight.out_features, step):
        rows = slice(start, min(start + step, weight.out_features))
        tile = buffer[: (rows.stop - start) * weight.in_features].view(-1, weight.in_features)
        if blocks is not None:
            tile = cast_4bit(weight, blocks, rows, tile)
        elif weight.scale is not None:
            cast_int8(weight.stored[rows], weight.scale[rows], tile)
        else:
            tile.copy_(weight.stored[rows])
        yield rows, tile


def cast_int8(codes: Tensor, scale: Tensor, out: Tensor) -> None:
    """Write `codes * scale / 127`.

    The scale is folded into the weight, not applied to the product. RMS error against float64 (products accumulated in
    float32, 256 rows, widths 576 and 4,096): folded, or 16-bit products scaled afterwards, both 2.35e-3 in bfloat16 and
    2.9e-4 in float16, for y as for dx. Only scaling float32 products comes closer (1.66e-3), for a float32 copy of
    every output, and in float16 unscaled products overflow.
    """
    if takes_triton(codes.device):
        from fastforget_kernels.cast_weight import cast_weight

        cast_weight(codes, scale, out)
        return
    factor = scale.to(torch.promote_types(out.dtype, torch.float32)) / 127
    out.copy_(codes).mul_(factor[:, None])  # codes are exact in every one of these dtypes


@functools.cache
def takes_triton(device: torch.device) -> bool:
    """Tell whether the kernel casts on a device (the interpreter does not)."""
    return device.type != "cpu" and why_not_triton(device) is None


def block_scales(weight: FrozenWeight) -> Tensor | None:
    """Return the scale of each block of 4 bit, float32; None for other weights."""
    if not weight.block or weight.outer_scale is None:
        return weight.scale if weight.block else None
    outer = (weight.outer_scale, weight.outer_code, weight.outer_block, torch.float32)
    return torch.ops.bitsandbytes.dequantize_blockwise(weight.scale, *outer) + weight.outer_offset


def cast_4bit(weight: FrozenWeight, blocks: Tensor, rows: slice, out: Tensor) -> Tensor:
    """Rows of a 4-bit weight, by bitsandbytes; on a GPU they are in `out`, elsewhere its operator has no such argument.

    It is asked for one long row: for (48, 96), whose rows are no whole blocks, its CPU operator (0.50.2) returns other
    numbers than were stored.
    """
    first, last = rows.start * weight.in_features, rows.stop * weight.in_features
    packed = weight.stored[first // 2 : -(-last // 2)]
    scales = blocks[first // weight.block : -(-last // weight.block)]
    dtype = torch.float32 if out.dtype == torch.float64 else out.dtype
    options = (packed, scales, weight.block, weight.kind, (1, last - first), dtype)
    if packed.is_cuda and dtype == out.dtype:
        torch.ops.bitsandbytes.dequantize_4bit.out(*options, out=out.view(1, -1))
        return out
    return torch.ops.bitsandbytes.dequantize_4bit(*options).to(out.dtype).view_as(out)
