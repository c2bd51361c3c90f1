"""The tile passes of the `triton` backend: what a sweep gives, checked for how kernels read it, and launched.

Nothing here looks at a value on the device, and no tensor is made but of a model's own 16-bit logits. The checks are of
shapes, strides and dtypes, and cost a few microseconds a tile: a kernel that is given another layout would read and
write what is not its own.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastforget.backends.protocol import (
    BASIC_ACCUMULATORS,
    COUPLED_ACCUMULATORS,
    COUPLED_NORMALISERS,
    GRADIENT_COEFFICIENTS,
    LABEL_ACCUMULATORS,
    PAIRED_ACCUMULATORS,
    CoupledBlock,
    GradientBlock,
    LabelBlock,
    PairedBlock,
    StateBlock,
    Tile,
)
from fastforget.errors import FastforgetError
from fastforget_kernels.coupled_tile import coupled_tile
from fastforget_kernels.gradient_tile import gradient_tile
from fastforget_kernels.label_tile import label_tile
from fastforget_kernels.launching import Place
from fastforget_kernels.paired_tile import paired_tile
from fastforget_kernels.state_rows import States, state_rows

FLOAT32 = torch.float32
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
        count = len(product)
        check_tile("product", product, count, tile, FLOATS if rows is None else (FLOAT32,))
        if rows is not None:
            check_tile("rows", rows, count, tile, FLOATS)
            check_in_place(product, rows)
        elif product.dtype != FLOAT32:
            check_finished(tile)
        check_index("labels", block.labels, count)
        kept = len(LABEL_ACCUMULATORS) if block.moments else BASIC_ACCUMULATORS
        check_numbers("accumulators", block.accumulators, kept, count)
        check_grad(block.grad, count)
        states = None
        if block.states is not None and tile.first == 0:
            states = checked_states(block.states, count)
        label_tile(
            product,
            rows,
            block.labels,
            block.accumulators,
            block.grad,
            states,
            place_of(tile),
        )

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
        count, policy, reference = len(policy), widened(policy), widened(reference)
        check_pair(tile, policy, reference, rows, reference_rows, FLOATS)
        if (rows is None) != (block.grad is None) or (reference_rows is None) != (block.reference_grad is None):
            raise FastforgetError("the paired pass writes rows for each gradient that it is given, and for no other")
        check_index("labels", block.labels, count)
        check_numbers("accumulators", block.accumulators, len(PAIRED_ACCUMULATORS), count)
        if block.shift is not None:
            check_numbers("shift", block.shift[None], 1, count)
        check_grad(block.grad, count)
        check_grad(block.reference_grad, count)
        paired_tile(
            policy,
            reference,
            rows,
            reference_rows,
            block.labels,
            block.accumulators,
            block.shift,
            block.grad,
            block.reference_grad,
            place_of(tile),
        )

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
        count, policy, reference = len(policy), widened(policy), widened(reference)
        check_pair(tile, policy, reference, rows, policy_rows, TRAINED)
        if (rows is None) != (policy_rows is None):
            raise FastforgetError("the coupled pass writes both rows or neither")
        check_index("labels", block.labels, count)
        check_numbers("normalisers", block.normalisers, len(COUPLED_NORMALISERS), count)
        check_numbers("accumulators", block.accumulators, len(COUPLED_ACCUMULATORS), count)
        coupled_tile(
            block.kind,
            policy,
            reference,
            rows,
            policy_rows,
            block.labels,
            block.normalisers,
            block.accumulators,
            place_of(tile),
        )

    def gradient_tile(
        self, tile: Tile, product: Tensor, projected: Tensor | None, rows: Tensor, block: GradientBlock
    ) -> None:
        """As `TilePasses.gradient_tile`."""
        count = len(product)
        check_tile("product", product, count, tile, FLOATS if projected is None else (FLOAT32,))
        check_tile("rows", rows, count, tile, TRAINED if product.dtype == FLOAT32 else (product.dtype,))
        check_in_place(product, rows)
        if projected is not None:
            check_tile("projected", projected, count, tile, (FLOAT32,))
        check_index("labels", block.labels, count)
        check_index("argmax", block.argmax, count)
        check_numbers("coefficients", block.coefficients, len(GRADIENT_COEFFICIENTS), count)
        gradient_tile(
            product,
            projected,
            rows,
            block.labels,
            block.argmax,
            block.coefficients,
            place_of(tile),
        )

    def state_pass(self, block: StateBlock) -> None:
        """As `TilePasses.state_pass`."""
        count = len(block.states)
        if count:
            state_rows(checked_states(block, count))


def refuse(name: str, tensor: Tensor, wanted: str) -> FastforgetError:
    """What a tensor should have been."""
    found = f"{tuple(tensor.shape)} {tensor.dtype} of strides {tensor.stride()}"
    return FastforgetError(f"the Triton kernels take {name} as {wanted}, not {found}")


def widened(logits: Tensor) -> Tensor:
    """Logits of 16 bits, which only a model's own are, in float32: kernels of two rows have no more configurations."""
    return logits.float() if logits.dtype in NARROW else logits


def check_tile(name: str, tensor: Tensor, count: int, tile: Tile, dtypes: tuple[torch.dtype, ...]) -> None:
    """A tile's buffer: (r, c), rows contiguous and `padded` elements long, which must all be there."""
    columns, padded = tile.columns, tile.padded
    row_stride, stride = tensor.stride()
    fits = tensor.shape == (count, columns) and tensor.dtype in dtypes and (stride == 1 or columns == 1)
    fits = fits and padded >= columns and (row_stride >= padded or count <= 1)
    if fits and padded > columns:
        end = tensor.storage_offset() + (count - 1) * row_stride + padded
        fits = end * tensor.itemsize <= tensor.untyped_storage().nbytes()
    if not fits:
        wanted = f"({count}, {columns}) of {' or '.join(map(str, dtypes))}, rows contiguous, {padded} elements a row"
        raise refuse(name, tensor, wanted)


def check_in_place(product: Tensor, rows: Tensor) -> None:
    """Rows that begin where the product's begin must all do so, or one would be written over another still unread."""
    if rows.data_ptr() == product.data_ptr() and len(rows) > 1:
        if rows.stride(0) * rows.itemsize != product.stride(0) * product.itemsize or rows.itemsize > product.itemsize:
            raise refuse("rows in place", rows, f"rows as far apart in memory as the product's {product.stride()}")


def check_pair(
    tile: Tile,
    policy: Tensor,
    reference: Tensor,
    rows: Tensor | None,
    other_rows: Tensor | None,
    dtypes: tuple[torch.dtype, ...],
) -> None:
    """Two products and what is written over them, of one dtype."""
    count = len(policy)
    check_tile("policy", policy, count, tile, (FLOAT32,))
    check_tile("reference", reference, count, tile, (FLOAT32,))
    if rows is not None:
        check_tile("rows", rows, count, tile, dtypes)
        check_in_place(policy, rows)
    if other_rows is not None:
        if rows is None:
            raise FastforgetError("the second of two rows is written only with the first")
        check_tile("the second rows", other_rows, count, tile, (rows.dtype,))
        check_in_place(reference, other_rows)


def check_finished(tile: Tile) -> None:
    """Logits of 16 bits are a model's own: there is nothing to make of them."""
    if tile.logit_map.bias is not None or tile.logit_map.softcap > 0:
        raise FastforgetError("the Triton kernels add a bias or a softcap to float32 products only")


def check_index(name: str, tensor: Tensor, count: int) -> None:
    """(r,) int64, contiguous."""
    if tensor.dtype != torch.int64 or tensor.shape != (count,) or not tensor.is_contiguous():
        raise refuse(name, tensor, f"({count},) int64, contiguous")


def check_numbers(name: str, tensor: Tensor, kinds: int, count: int) -> None:
    """(kinds, r) float32, the numbers of one kind side by side."""
    if tensor.dtype != FLOAT32 or tensor.shape != (kinds, count) or (tensor.stride(1) != 1 and count > 1):
        raise refuse(name, tensor, f"({kinds}, {count}) float32, rows contiguous")


def check_grad(grad: Tensor | None, count: int) -> None:
    """(r, D) float32, rows contiguous."""
    if grad is not None and (grad.dtype != FLOAT32 or len(grad) != count or (grad.stride(1) != 1 < grad.shape[1])):
        raise refuse("grad", grad, f"({count}, D) float32, rows contiguous")


def place_of(tile: Tile) -> Place:
    """A tile as launchers take it; its bias must be float32 and contiguous, of the whole vocabulary."""
    bias = tile.logit_map.bias
    if bias is not None and (bias.dtype != FLOAT32 or bias.shape != (tile.vocabulary,) or not bias.is_contiguous()):
        raise refuse("bias", bias, f"({tile.vocabulary},) float32, contiguous")
    return Place(tile.first, tile.columns, tile.padded, bias, tile.logit_map.scale, tile.logit_map.softcap)


def checked_states(block: StateBlock, count: int) -> States:
    """Hidden states and their targets as kernels take them."""
    states, (anchor, centres) = block.states, (block.targets.anchor, block.targets.centres)
    width = states.shape[1]
    if states.dtype not in FLOATS or len(states) != count or states.stride(1) != 1 < width:
        raise refuse("states", states, f"({count}, D) float32, bfloat16 or float16, rows contiguous")
    if anchor is not None and (
        anchor.dtype != FLOAT32 or anchor.shape not in ((count, width), (width,)) or anchor.stride(-1) != 1 < width
    ):
        raise refuse("an anchor", anchor, f"({count}, {width}) or ({width},) float32, rows contiguous")
    if centres is not None and (
        centres.dtype != FLOAT32 or centres.dim() != 2 or centres.shape[1] != width or not centres.is_contiguous()
    ):
        raise refuse("centres", centres, f"(K, {width}) float32, contiguous")
    check_numbers("state values", block.values, 2, count)
    check_index("nearest", block.nearest, count)
    return States(states, anchor, centres, block.targets.cosine, block.values, block.nearest)
