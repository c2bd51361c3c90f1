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
KINDS = {"reverse_kl": 0, "jsd": 1}  # as FastforgetKind
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
        count = len(product)
        shape = (count, tile.columns)
        names = len(LABEL_ACCUMULATORS) if block.moments else BASIC_ACCUMULATORS
        arguments = library.LabelTile(
            *tile_of(tile, count),
            *rows_of("products", product, shape, tile.padded),
            *rows_of("written rows", rows, shape, tile.padded),
            vector_of("labels", block.labels, count),
            *vectors_of("accumulators", block.accumulators, names, count, torch.float64),
            *grad_of("the gradient", block.grad, count, tile),
            block.moments,
        )
        run("fastforget_label_tile", arguments)

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
        count = len(policy)
        shape = (count, tile.columns)
        grad = grad_of("the gradient", block.grad, count, tile)
        embedding = grad_of("the reference's gradient", block.reference_grad, count, tile)
        if embedding != NO_ROWS and embedding[2] != grad[2]:
            raise FastforgetError(f"both gradients must be of one width, not {grad[2]} and {embedding[2]}")
        arguments = library.PairedTile(
            *tile_of(tile, count),
            *rows_of("the policy's products", policy, shape, tile.padded),
            *rows_of("the reference's products", reference, shape, tile.padded),
            *rows_of("written rows", rows, shape, tile.padded),
            *rows_of("the reference's rows", reference_rows, shape, tile.padded),
            vector_of("labels", block.labels, count),
            *vectors_of("accumulators", block.accumulators, len(PAIRED_ACCUMULATORS), count, torch.float64),
            None if block.shift is None else vector_of("the shift", block.shift, count, torch.float32),
            *embedding[:2],
            *grad,
        )
        run("fastforget_paired_tile", arguments)

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
        count = len(policy)
        shape = (count, tile.columns)
        normalisers = vectors_of(
            "normalisers", block.normalisers, len(COUPLED_NORMALISERS), count, torch.float32, contiguous=True
        )
        arguments = library.CoupledTile(
            *tile_of(tile, count),
            *rows_of("the policy's products", policy, shape, tile.padded),
            *rows_of("the reference's products", reference, shape, tile.padded),
            *rows_of("written rows", rows, shape, tile.padded),
            *rows_of("the policy's rows", policy_rows, shape, tile.padded),
            vector_of("labels", block.labels, count),
            normalisers[0],
            *vectors_of("accumulators", block.accumulators, len(COUPLED_ACCUMULATORS), count, torch.float64),
            KINDS[block.kind],
        )
        run("fastforget_coupled_tile", arguments)

    def gradient_tile(
        self, tile: Tile, product: Tensor, projected: Tensor | None, rows: Tensor, block: GradientBlock
    ) -> None:
        """As `TilePasses.gradient_tile`."""
        count = len(product)
        shape = (count, tile.columns)
        coefficients = vectors_of(
            "coefficients", block.coefficients, len(GRADIENT_COEFFICIENTS), count, torch.float32, contiguous=True
        )
        arguments = library.GradientTile(
            *tile_of(tile, count),
            *rows_of("products", product, shape, tile.padded),
            *rows_of("projected products", projected, shape, tile.padded),
            *rows_of("written rows", rows, shape, tile.padded),
            vector_of("labels", block.labels, count),
            vector_of("argmax", block.argmax, count),
            coefficients[0],
        )
        run("fastforget_gradient_tile", arguments)

    def state_pass(self, block: StateBlock) -> None:
        """As `TilePasses.state_pass`; states in float64 are plain torch's."""
        states, anchor, centres = block.states, block.targets.anchor, block.targets.centres
        if states.dtype == torch.float64:
            return TorchPasses().state_pass(block)
        count, width = states.shape
        if anchor is None:
            anchor_rows: tuple[int | None, int] = (None, 0)
        elif anchor.dim() == 1:
            anchor_rows = vector_of("the anchor", anchor, width, torch.float32), 0
        else:
            anchor_rows = vectors_of("the anchor", anchor, count, width, torch.float32)
        centre_rows: tuple[int | None, int] = (None, 0)
        if centres is not None:
            pointer, _ = vectors_of("centres", centres, len(centres), width, torch.float32, contiguous=True)
            centre_rows = pointer, len(centres)
        arguments = library.StateRows(
            count,
            width,
            *rows_of("hidden states", states, (count, width), width),
            *anchor_rows,
            *centre_rows,
            *vectors_of("values", block.values, 2, count, torch.float32),
            vector_of("nearest", block.nearest, count),
            block.targets.cosine,
            torch.get_num_threads(),
            library.instruction_set(),
        )
        run("fastforget_state_rows", arguments)


def run(name: str, arguments: ctypes.Structure) -> None:
    """Call a pass. Raises FastforgetError for what it found wrong before it wrote anything."""
    result = getattr(library.load(), name)(ctypes.byref(arguments))
    if result:
        raise FastforgetError(f"{name}: {RESULTS.get(result, f'error {result}')}")


def tile_of(tile: Tile, count: int) -> tuple[int | float | None, ...]:
    """The fields of a FastforgetTile. The bias outlives the call, as the tile holds it."""
    given, bias = tile.logit_map, None
    if given.bias is not None:
        bias = vector_of("the bias", given.bias, tile.vocabulary, torch.float32)
    return (
        count,
        tile.first,
        tile.columns,
        tile.vocabulary,
        tile.padded,
        bias,
        given.scale,
        given.softcap,
        torch.get_num_threads(),
        library.instruction_set(),
    )


def rows_of(name: str, tensor: Tensor | None, shape: tuple[int, int], padded: int) -> tuple[int | None, int, int]:
    """The fields of a FastforgetRows: rows contiguous, each with room for `padded` elements."""
    if tensor is None:
        return NO_ROWS
    check(name, tensor, None)
    dtype = DTYPES.get(tensor.dtype)
    if dtype is None or tensor.shape != shape:
        raise wrong(name, tensor, shape, "float32, bfloat16 or float16")
    stride, step = tensor.stride()
    rows, columns = shape
    if step != 1 and columns > 1:
        raise apart(name, tensor)
    if padded > columns and rows:  # what lies past the last row's end is there too
        end = tensor.storage_offset() + (rows - 1) * stride + padded
        if end * tensor.itemsize > tensor.untyped_storage().nbytes():
            raise FastforgetError(f"{name} have no {padded} elements in the last row's memory")
    return tensor.data_ptr(), stride, dtype


def grad_of(name: str, tensor: Tensor | None, count: int, tile: Tile) -> tuple[int | None, int, int]:
    """Pointer, stride and width of what product 2 has added up to; null at the first tile, where it is not read."""
    if tensor is None:
        return NO_ROWS
    if tensor.dim() != 2:
        raise wrong(name, tensor, (count, "D"), "float32")
    width = tensor.shape[1]
    pointer, stride = vectors_of(name, tensor, count, width, torch.float32)
    return pointer if tile.first else None, stride, width


def vectors_of(
    name: str, tensor: Tensor, vectors: int, count: int, dtype: torch.dtype, contiguous: bool = False
) -> tuple[int, int]:
    """Pointer and stride of vectors of `count` numbers side by side."""
    check(name, tensor, dtype, (vectors, count))
    stride, step = tensor.stride()
    if (step != 1 and count > 1) or (contiguous and stride != count and vectors > 1):
        raise apart(name, tensor)
    return tensor.data_ptr(), stride


def vector_of(name: str, tensor: Tensor, count: int, dtype: torch.dtype = torch.int64) -> int:
    """Pointer of a vector of `count` numbers side by side."""
    check(name, tensor, dtype, (count,))
    if count > 1 and tensor.stride(0) != 1:
        raise apart(name, tensor)
    return tensor.data_ptr()


def check(name: str, tensor: Tensor, dtype: torch.dtype | None, shape: tuple[int, ...] | None = None) -> None:
    """Raise for a tensor that no pointer may be passed of; None: any dtype, any shape."""
    if not tensor.is_cpu or tensor.layout != torch.strided:
        raise FastforgetError(f"{name} must be ordinary tensors on the CPU, not {tensor.layout} on {tensor.device}")
    if (dtype is not None and tensor.dtype != dtype) or (shape is not None and tensor.shape != shape):
        raise wrong(name, tensor, shape or "", str(dtype).removeprefix("torch."))


def wrong(name: str, tensor: Tensor, shape: object, dtype: str) -> FastforgetError:
    """The error for a shape or dtype."""
    return FastforgetError(f"{name} must be {shape} of {dtype}, not {tuple(tensor.shape)} of {tensor.dtype}")


def apart(name: str, tensor: Tensor) -> FastforgetError:
    """The error for elements that do not lie side by side."""
    return FastforgetError(f"{name} must have elements side by side, not strides {tensor.stride()}")
