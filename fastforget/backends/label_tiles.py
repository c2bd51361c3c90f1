"""The label row pass of the `native` backend a tile of vocabulary at a time (`csrc/label_tiles.h`).

Of a tile's logits nothing is kept but their sum of weights e^(z - top) times the head's rows, for the largest `top` so
far, as attention kernels do it. A row of logits is never whole: many rows fit a small buffer, and the head is read once
for both products, which is faster than two products over whole rows.
"""

from __future__ import annotations

import ctypes
from collections.abc import Collection

import torch
from torch import Tensor

from fastforget.backends import gemm, library
from fastforget.backends.calls import call, check_rows, check_vector, common, float32_bias, pointer
from fastforget.backends.chunks import LabelPass
from fastforget.backends.label_fields import LabelFields
from fastforget.errors import FastforgetError
from fastforget.head import LMHead

WHOLE_VECTORS = 16  # floats of the longest vector


def tiled_label_pass(
    hidden: Tensor, labels: Tensor, head: LMHead, names: Collection[str], buffer: Tensor, grad: Tensor | None
) -> LabelPass:
    """Products of hidden (n, D) with the head, and statistics of each row; of no row a gradient over the logits.

    Args:
        buffer: (n or more, columns of a tile), float32; a multiple of 16 columns, as the last vector is written whole.
        grad: (n, D), float32, or None. Filled with softmax over the other tokens, times the softcap's slope, times
            scale * W.
    """
    count, vocabulary = len(labels), len(head.weight)
    wide = hidden.to(torch.float32)  # of any strides: it is an operand of products only
    check_rows("the buffer", buffer)
    check_vector("labels", labels, count, torch.int64)
    if len(buffer) < count or buffer.shape[1] % WHOLE_VECTORS or buffer.stride(0) < buffer.shape[1]:
        raise FastforgetError(f"the buffer must have {count} rows of whole vectors, not {tuple(buffer.shape)}")
    if grad is not None:
        check_rows("the gradient", grad, shape=wide.shape)
    fields = LabelFields(labels, names)
    states = torch.empty(count, ctypes.sizeof(library.LabelState), dtype=torch.uint8)
    bias = float32_bias(head, vocabulary)
    stride, width = (0, 0) if grad is None else (grad.stride(0), grad.shape[1])
    for columns, weight in gemm.weight_tiles(head.weight.detach(), torch.float32, buffer.shape[1]):
        tile, first = buffer[:count, : len(weight)], columns.start
        torch.mm(wide, weight.T, out=tile)
        call(
            "fastforget_label_tile",
            library.LabelTile(
                common(count, len(weight), bias, head.scale, head.softcap),
                vocabulary,
                tile.data_ptr(),
                tile.stride(0),
                first,
                labels.data_ptr(),
                states.data_ptr(),
                pointer(grad) if first else None,
                stride,
                width,
                int(grad is not None),
                int(fields.argmax is not None),
            ),
        )
        if grad is not None:
            torch.addmm(grad, tile, weight, beta=1.0 if first else 0.0, out=grad)
    call(
        "fastforget_label_end",
        library.LabelEnd(
            common(count, vocabulary, scale=head.scale, softcap=head.softcap),
            states.data_ptr(),
            fields.values.data_ptr(),
            pointer(fields.argmax),
            pointer(grad),
            stride,
            width,
        ),
    )
    return LabelPass(fields.told(), None, label_slope=None if head.softcap is None else fields["label_slope"])
