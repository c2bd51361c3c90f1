"""The tile passes of the `triton` backend: what a sweep gives, checked for how kernels read it, and launched.

Nothing here looks at a value on the device, and no tensor is made but of a model's own 16-bit logits. The checks are of
shapes, strides and dtypes (a tile's at each tile, what a block's tiles share at the first of them) and cost a few
microseconds: a kernel that is given another layout would read and write what is not its own.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastforget.backends import protocol
from fastforget.backends.protocol import CoupledBlock, GradientBlock, LabelBlock, PairedBlock, StateBlock, Tile
from fastforget.errors import FastforgetError
from fastforget_kernels import coupled_tile, gradient_tile, label_tile, paired_tile, state_rows

Dtypes = tuple[torch.dtype, ...]

FLOAT32 = torch.float32
INDEX = (torch.int64,)
NARROW = (torch.bfloat16, torch.float16)
FLOATS = (FLOAT32, *NARROW)
TRAINED = (FLOAT32, torch.bfloat16)  # of rows that no scale for float16 is known of


class TritonPasses:
    """The passes of the `triton` backend."""

    name = "triton"

    def accumulator_dtype(self, products: torch.dtype) -> torch.dtype:
        """float32."""
        return FLOAT32

    def row_dtype(self, operands: torch.dtype) -> torch.dtype:
        """The weight's own dtype where it has 16 bits, else float32."""
        return operands if operands in NARROW else FLOAT32

    def label_tile(self, tile: Tile, product: Tensor, rows: Tensor | None, block: LabelBlock) -> None:
        """As `TilePasses.label_tile`."""
        count, numbers, transforms = len(product), block.accumulators, has_transform(tile)
        check_tile("product", product, count, tile, FLOATS if rows is None else (FLOAT32,))
        if rows is not None:
            check_tile("rows", rows, count, tile, FLOATS, product)
        elif transforms and product.dtype != FLOAT32:
            raise FastforgetError("the Triton kernels add a bias or a softcap to float32 products only")
        out, fused = product if rows is None else rows, False
        measured: tuple[Tensor | int, ...] = (numbers, 0, numbers, 0, numbers, numbers, 0, block.labels, 0, 0, 0, 0)
        if tile.first == 0:
            kept = len(protocol.LABEL_ACCUMULATORS) if block.moments else protocol.BASIC_ACCUMULATORS
            check("labels", block.labels, (count,), INDEX)
            check("accumulators", numbers, (kept, count))
        if tile.first == 0 and block.states is not None:
            written = block.states.states if rows is None else rows  # where nothing is written, any dtype will do
            fused = not (transforms or block.moments) and product.dtype == FLOAT32
            fused = fused and written.dtype == block.states.states.dtype
            if fused:
                out, measured = written, state_arguments(block.states, count)
            else:  # rarely: in a launch of its own, for fewer configurations
                self.state_pass(block.states)
        # fmt: off
        label_tile.label_tile_kernel[(count,)](
            product, product.stride(0), out, out.stride(0), *place_of(tile, numbers), block.labels,
            numbers, numbers.stride(0), int(block.moments), *movable(block.grad, tile, numbers),
            int(rows is not None), *measured, **label_tile.options(transforms, block.moments, fused),
        )
        # fmt: on

    def paired_tile(
        self,
        tile: Tile,
        policy: Tensor,
        reference: Tensor,
        rows: Tensor | None,
        reference_rows: Tensor | None,
        block: PairedBlock,
    ) -> None:
        """As `TilePasses.paired_tile`."""
        count, numbers, shift = len(policy), block.accumulators, block.shift
        pair = pair_of(tile, policy, reference, rows, reference_rows, FLOATS)
        wrong = (rows is None) != (block.grad is None) or (reference_rows is None) != (block.reference_grad is None)
        if wrong or (rows is None and reference_rows is not None):
            raise FastforgetError("the paired pass writes rows for each gradient that it is given: none, one or both")
        if tile.first == 0:
            check("labels", block.labels, (count,), INDEX)
            check("accumulators", numbers, (len(protocol.PAIRED_ACCUMULATORS), count))
            if shift is not None:
                check("shift", shift, (count,))
        # fmt: off
        paired_tile.paired_tile_kernel[(count,)](
            *pair, *place_of(tile, numbers), block.labels, numbers, numbers.stride(0),
            numbers if shift is None else shift, int(shift is not None), *movable(block.grad, tile, numbers),
            *movable(block.reference_grad, tile, numbers), int(rows is not None), int(reference_rows is not None),
            **paired_tile.options(has_transform(tile)),
        )
        # fmt: on

    def coupled_tile(
        self,
        tile: Tile,
        policy: Tensor,
        reference: Tensor,
        rows: Tensor | None,
        policy_rows: Tensor | None,
        block: CoupledBlock,
    ) -> None:
        """As `TilePasses.coupled_tile`."""
        count, numbers, normalisers = len(policy), block.accumulators, block.normalisers
        pair = pair_of(tile, policy, reference, rows, policy_rows, TRAINED)
        if (rows is None) != (policy_rows is None):
            raise FastforgetError("the coupled pass writes both rows or neither")
        if tile.first == 0:
            check("labels", block.labels, (count,), INDEX)
            check("normalisers", normalisers, (len(protocol.COUPLED_NORMALISERS), count))
            check("accumulators", numbers, (len(protocol.COUPLED_ACCUMULATORS), count))
        # fmt: off
        coupled_tile.coupled_tile_kernel[(count,)](
            *pair, *place_of(tile, numbers), block.labels, normalisers, normalisers.stride(0), numbers,
            numbers.stride(0), int(rows is not None), **coupled_tile.options(block.kind == "jsd"),
        )
        # fmt: on

    def gradient_tile(
        self, tile: Tile, product: Tensor, projected: Tensor | None, rows: Tensor, block: GradientBlock
    ) -> None:
        """As `TilePasses.gradient_tile`."""
        count, numbers = len(product), block.coefficients
        check_tile("product", product, count, tile, FLOATS if projected is None else (FLOAT32,))
        check_tile("rows", rows, count, tile, TRAINED if product.dtype == FLOAT32 else (product.dtype,), product)
        if projected is not None:
            check_tile("projected", projected, count, tile, (FLOAT32,))
        if tile.first == 0:
            check("labels", block.labels, (count,), INDEX)
            check("argmax", block.argmax, (count,), INDEX)
            check("coefficients", numbers, (len(protocol.GRADIENT_COEFFICIENTS), count))
        along = product if projected is None else projected
        # fmt: off
        gradient_tile.gradient_tile_kernel[(count,)](
            product, product.stride(0), along, along.stride(0), rows, rows.stride(0), *place_of(tile, numbers),
            block.labels, block.argmax, numbers, numbers.stride(0), **gradient_tile.options(projected is not None),
        )
        # fmt: on

    def state_pass(self, block: StateBlock) -> None:
        """As `TilePasses.state_pass`."""
        count = len(block.states)
        if count:
            state_rows.state_rows_kernel[(count,)](*state_arguments(block, count), **state_rows.options())


def check(name: str, tensor: Tensor, shape: tuple[int, ...], dtypes: Dtypes = (FLOAT32,)) -> None:
    """Refuse what is not of this shape and one of these dtypes, rows contiguous."""
    if tensor.shape != shape or tensor.dtype not in dtypes or tensor.stride(-1) != 1 < shape[-1]:
        raise refusal(name, tensor, f"{shape} of {' or '.join(map(str, dtypes))}, rows contiguous")


def refusal(name: str, tensor: Tensor, wanted: str) -> FastforgetError:
    """What a tensor should have been."""
    found = f"{tuple(tensor.shape)} {tensor.dtype} of strides {tensor.stride()}"
    return FastforgetError(f"the Triton kernels take {name} as {wanted}, not {found}")


def check_tile(name: str, tensor: Tensor, count: int, tile: Tile, dtypes: Dtypes, over: Tensor | None = None) -> None:
    """A tile's buffer: (r, c), its rows `padded` elements long, which must all be there.

    What begins where the logits that it is `over` begin must do so in every row, or one would be written over another
    still unread.
    """
    columns, padded, row_stride = tile.columns, tile.padded, tensor.stride(0)
    check(name, tensor, (count, columns), dtypes)
    end = tensor.storage_offset() + (count - 1) * row_stride + padded
    there = padded == columns or end * tensor.itemsize <= tensor.untyped_storage().nbytes()
    if padded < columns or (row_stride < padded and count > 1) or not there:
        raise refusal(name, tensor, f"rows of {padded} elements")
    if over is not None and count > 1 and tensor.data_ptr() == over.data_ptr():
        if row_stride * tensor.itemsize != over.stride(0) * over.itemsize or tensor.itemsize > over.itemsize:
            raise refusal(name, tensor, f"rows as far apart in memory as the product's {over.stride()}")


def pair_of(
    tile: Tile,
    policy: Tensor,
    reference: Tensor,
    rows: Tensor | None,
    other_rows: Tensor | None,
    dtypes: Dtypes,
) -> list[Tensor | int]:
    """Two products and what is written over them, of one dtype, each with its stride.

    Logits of 16 bits, which only a model's own are, become float32: kernels of two rows have no more configurations.
    """
    count = len(policy)
    policy, reference = (each.float() if each.dtype in NARROW else each for each in (policy, reference))
    out = policy if rows is None else rows
    other_out = out if other_rows is None else other_rows
    check_tile("policy", policy, count, tile, (FLOAT32,))
    check_tile("reference", reference, count, tile, (FLOAT32,))
    check_tile("rows", out, count, tile, dtypes, policy)
    check_tile("the second rows", other_out, count, tile, (out.dtype,), reference)
    return [argument for each in (policy, reference, out, other_out) for argument in (each, each.stride(0))]


def movable(grad: Tensor | None, tile: Tile, other: Tensor) -> tuple[Tensor, int, int]:
    """What is multiplied where a top moves, its stride and width; at first nothing: `other` (k, r), of width 0."""
    if grad is None:
        return other, 0, 0
    if tile.first == 0:
        check("grad", grad, (other.shape[1], grad.shape[1]))
        return other, 0, 0
    return grad, grad.stride(0), grad.shape[1]


def has_transform(tile: Tile) -> bool:
    """Whether there is a bias or a softcap."""
    return tile.logit_map.bias is not None or tile.logit_map.softcap > 0


def place_of(tile: Tile, other: Tensor) -> tuple[Tensor | int | float, ...]:
    """What kernels take from `bias` to `bias_columns`; `other`, of no columns, where there is no bias."""
    first, columns, vocabulary, padded, logit_map = tile
    bias = logit_map.bias
    if bias is not None and first == 0:
        check("bias", bias, (vocabulary,))
    place = (first, columns, padded, logit_map.scale, logit_map.softcap)
    return (other, *place, 0) if bias is None else (bias, *place, columns)


def state_arguments(block: StateBlock, count: int) -> tuple[Tensor | int, ...]:
    """What kernels take from `hidden` to `cosine`; for what is not there `values`, of width 0."""
    states, (anchor, centres), values = block.states, (block.targets.anchor, block.targets.centres), block.values
    width = states.shape[1]
    check("states", states, (count, width), FLOATS)
    check("state values", values, (2, count))
    check("nearest", block.nearest, (count,), INDEX)
    if anchor is not None:
        check("an anchor", anchor, (count, width) if anchor.dim() == 2 else (width,))
        anchor = anchor.expand(count, width)
    if centres is not None:
        check("centres", centres, (len(centres), width))
        if not centres.is_contiguous():
            raise refusal("centres", centres, "contiguous")
    # fmt: off
    return (
        states, states.stride(0), *((values, 0) if anchor is None else (anchor, anchor.stride(0))),
        values if centres is None else centres, values, values.stride(0), block.nearest, width,
        0 if centres is None else len(centres), 0 if anchor is None else width, int(block.targets.cosine),
    )
    # fmt: on
