"""The passes of the `native` backend: C++ on the CPU, between products that torch computes.

Shape, dtype and strides of every tensor are checked here before a pointer is passed, and every label by the library
before it writes anything. What each pass computes is said in `protocol.py`, and how in `csrc/`. A call costs about ten
microseconds; that is why attributes are read once and pointers are passed as numbers.
"""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from fastforget.backends.native import library
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
from fastforget.backends.torch_passes import TorchPasses
from fastforget.errors import FastforgetError

DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}  # as FastforgetDtype numbers them
RESULTS = {1: "a label or argmax is outside the vocabulary", 2: "an argument is wrong, or rows overlap"}
NO_ROWS = (None, 0, 0)


class NativePasses:
    """The passes of the `native` backend."""

    name = "native"

    def accumulator_dtype(self, products: torch.dtype) -> torch.dtype:
        """float64: sums of floats inside 2,048 columns, of doubles between them."""
        return torch.float64

    def row_dtype(self, operands: torch.dtype) -> torch.dtype:
        """float32, which a 16-bit weight is cast to a tile at a time."""
        return torch.float32

    def label_tile(self, tile: Tile, product: Tensor, rows: Tensor | None, block: LabelBlock) -> None:
        """As `TilePasses.label_tile`."""
        if block.states is not None and tile.first == 0:
            self.state_pass(block.states)
        name, kept = ("label_moments", len(LABEL_ACCUMULATORS)) if block.moments else ("label", BASIC_ACCUMULATORS)
        grads = block.grad, None
        run(name, tile, (product, None), (rows, None), block.labels, (block.accumulators, kept), grads=grads)

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
        run(
            "paired",
            tile,
            (policy, reference),
            (rows, reference_rows),
            block.labels,
            (block.accumulators, len(PAIRED_ACCUMULATORS)),
            given=pointer_of("the shift", block.shift, (len(policy),))[0],
            grads=(block.grad, block.reference_grad),
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
        shape = len(COUPLED_NORMALISERS), len(policy)
        run(
            block.kind,
            tile,
            (policy, reference),
            (rows, policy_rows),
            block.labels,
            (block.accumulators, len(COUPLED_ACCUMULATORS)),
            given=pointer_of("normalisers", block.normalisers, shape, contiguous=True)[0],
        )

    def gradient_tile(
        self, tile: Tile, product: Tensor, projected: Tensor | None, rows: Tensor, block: GradientBlock
    ) -> None:
        """As `TilePasses.gradient_tile`."""
        shape = len(GRADIENT_COEFFICIENTS), len(product)
        run(
            "gradient",
            tile,
            (product, projected),
            (rows, None),
            block.labels,
            (None, 0),
            given=pointer_of("coefficients", block.coefficients, shape, contiguous=True)[0],
            argmax=pointer_of("argmax", block.argmax, shape[1:], torch.int64)[0],
        )

    def state_pass(self, block: StateBlock) -> None:
        """As `TilePasses.state_pass`, in plain torch: beside the products its time does not show."""
        TorchPasses().state_pass(block)


def run(
    name: str,
    tile: Tile,
    products: tuple[Tensor, Tensor | None],
    rows: tuple[Tensor | None, Tensor | None],
    labels: Tensor,
    accumulators: tuple[Tensor | None, int],
    *,
    given: int | None = None,
    argmax: int | None = None,
    grads: tuple[Tensor | None, Tensor | None] = (None, None),
) -> None:
    """Check tensors and call the pass `name` of `library.PASSES`; what comes in pairs is as FastforgetTile has it.

    Raises FastforgetError for what is wrong, before anything is written.
    """
    count, logit_map = len(products[0]), tile.logit_map
    shape, width = (count, tile.columns), 0 if grads[0] is None else grads[0].shape[-1]
    arguments = library.TileArguments(
        count,
        tile.first,
        tile.columns,
        tile.vocabulary,
        tile.padded,
        pointer_of("the bias", logit_map.bias, (tile.vocabulary,))[0],
        logit_map.scale,
        logit_map.softcap,
        torch.get_num_threads(),
        library.instruction_set(),
        *rows_of("products", products[0], shape, tile.padded),
        *rows_of("the second products", products[1], shape, tile.padded),
        *rows_of("written rows", rows[0], shape, tile.padded),
        *rows_of("the second written rows", rows[1], shape, tile.padded),
        pointer_of("labels", labels, (count,), torch.int64)[0],
        argmax,
        *pointer_of("accumulators", accumulators[0], (accumulators[1], count), torch.float64),
        given,
        *grad_of("the gradient", grads[0], (count, width), tile),
        *grad_of("the second gradient", grads[1], (count, width), tile),
        width,
    )
    result = library.load().fastforget_tile(library.PASSES.index(name), ctypes.byref(arguments))
    if result:
        raise FastforgetError(f"the native {name} pass: {RESULTS.get(result, f'error {result}')}")


def rows_of(name: str, tensor: Tensor | None, shape: tuple[int, int], padded: int) -> tuple[int | None, int, int]:
    """The fields of a FastforgetRows: rows contiguous, each with room for `padded` elements."""
    if tensor is None:
        return NO_ROWS
    dtype = DTYPES.get(tensor.dtype)
    if dtype is None:
        raise wrong(name, tensor, shape, "float32, bfloat16 or float16")
    pointer, stride = pointer_of(name, tensor, shape, tensor.dtype)
    rows, columns = shape
    if padded > columns and rows:  # what lies past the last row's end is there too
        end = tensor.storage_offset() + (rows - 1) * stride + padded
        if end * tensor.itemsize > tensor.untyped_storage().nbytes():
            raise FastforgetError(f"{name} have no {padded} elements in the last row's memory")
    return pointer, stride, dtype


def grad_of(name: str, tensor: Tensor | None, shape: tuple[int, int], tile: Tile) -> tuple[int | None, int, int]:
    """The fields of a FastforgetRows of what product 2 has added up to; null at the first tile, which reads none."""
    pointer, stride = pointer_of(name, tensor, shape)
    return pointer if tile.first else None, stride, 0


def pointer_of(
    name: str,
    tensor: Tensor | None,
    shape: tuple[int, ...],
    dtype: torch.dtype = torch.float32,
    contiguous: bool = False,
) -> tuple[int | None, int]:
    """Pointer of a vector or matrix whose rows have elements side by side, and the stride of its rows; null for None.

    Raises FastforgetError for a tensor that no pointer may be passed of.
    """
    if tensor is None:
        return None, 0
    if not tensor.is_cpu or tensor.layout != torch.strided:
        raise FastforgetError(f"{name} must be ordinary tensors on the CPU, not {tensor.layout} on {tensor.device}")
    if tensor.dtype != dtype or tensor.shape != shape:
        raise wrong(name, tensor, shape, str(dtype).removeprefix("torch."))
    *strides, step = tensor.stride()
    stride = strides[0] if strides else 0
    if (step != 1 and shape[-1] > 1) or (contiguous and stride != shape[-1] and shape[0] > 1):
        raise FastforgetError(f"{name} must have elements side by side, not strides {tensor.stride()}")
    return tensor.data_ptr(), stride


def wrong(name: str, tensor: Tensor, shape: tuple[int, ...], dtype: str) -> FastforgetError:
    """The error for a shape or dtype."""
    return FastforgetError(f"{name} must be {shape} of {dtype}, not {tuple(tensor.shape)} of {tensor.dtype}")
