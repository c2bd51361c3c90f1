"""The floor of the head's benchmark: the products that cannot be left out, alone.

Its sizes are its own constants, so that tuning ours cannot move it. A cross-entropy takes two products: logits of the
kept tokens, and rows over the vocabulary times the head. A forward KL takes four (both sides' logits, and the
reference's rows besides), or three where the reference's embedding is known. Written rows are softmaxes, as ours are:
products of zeros run faster.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from benchmarks.head_problem import Answer, Problem

Step = Callable[[], Answer | None]  # None: a floor, which has no answer

CHUNK_BYTES = 112 * 2**20  # of one buffer of whole rows of logits
TILE_ROWS = 2048  # of a tile on the CPU, at most
COLUMNS = 4096  # MKL's product of 512 rows of 2,048 with 50,272 columns runs 4 to 7 % faster so (2026-11-21)
TILE_BYTES = 16 * 2**20  # of one buffer of a tile: it stays in a large cache


class NotMeasured(Exception):
    """A contestant that cannot take part here; the message is what its row says."""


def floor(problem: Problem, known: bool = False) -> Step:
    """In chunks of whole rows."""
    return bare_products(problem, chunk_rows(problem), None, False, known)


def floor_tiled(problem: Problem, known: bool = False) -> Step:
    """The same with the logits in tiles of columns."""
    return bare_products(problem, chunk_rows(problem), COLUMNS, False, known)


def floor_together(problem: Problem, known: bool = False) -> Step:
    """All products of one tile, then of the next."""
    rows = even(len(problem.positions), TILE_ROWS)
    columns = min(COLUMNS, TILE_BYTES // (rows * torch.float32.itemsize))
    return bare_products(problem, rows, even(len(problem.weight), max(columns, 64)), True, known)


def floor_unchunked(problem: Problem, known: bool = False) -> Step:
    """Each product at once."""
    return bare_products(problem, len(problem.positions), None, False, known)


def chunk_rows(problem: Problem) -> int:
    """Tokens in a chunk of whole rows."""
    buffers = 2 if problem.loss.fields == ("kl",) else 1
    most = CHUNK_BYTES // (buffers * len(problem.weight) * torch.float32.itemsize)
    return even(len(problem.positions), max(1, most))


def even(count: int, most: int) -> int:
    """How many of `count` make parts of much the same size, at most `most` each: a short one is slow."""
    parts = max(1, -(-count // most))
    return max(1, -(-count // parts))


def bare_products(problem: Problem, rows: int, columns: int | None, together: bool, known: bool) -> Step:
    """The products of `rows` tokens at a time, logits of `columns` tokens of the vocabulary at a time.

    together: the products with rows over the vocabulary follow in the same tile, else on whole rows.
    """
    divergence = problem.loss.fields == ("kl",)
    vocabulary = len(problem.weight)
    columns = columns or vocabulary
    buffers = columns if together else vocabulary
    with torch.no_grad():
        kept = problem.hidden[problem.positions]
        inputs = [kept, problem.reference[problem.positions]] if divergence else [kept]
        rows = min(rows, len(kept))
        logits = [kept.new_empty(rows, buffers, dtype=torch.float32) for _ in inputs]
        mm_into(kept[:rows], problem.weight[:buffers].T, logits[0])
        written = torch.softmax(logits[0], dim=1).to(problem.dtype)
        gradients = [torch.empty_like(kept, dtype=torch.float32) for _ in range(2 if divergence and not known else 1)]
        tiles = problem.weight.split(columns)

    def step() -> None:
        with torch.no_grad():
            for start in range(0, len(kept), rows):
                part = slice(start, min(start + rows, len(kept)))
                count = part.stop - start
                for place, tile in enumerate(tiles):
                    first = 0 if together else place * columns
                    for states, buffer in zip(inputs, logits, strict=True):
                        mm_into(states[part], tile.T, buffer[:count, first : first + len(tile)])
                    if together:
                        for gradient in gradients:
                            mm_into(written[:count, : len(tile)], tile, gradient[part], add=place > 0)
                if not together:
                    for gradient in gradients:
                        mm_into(written[:count], problem.weight, gradient[part])

    return step


def mm_into(left: Tensor, right: Tensor, out: Tensor, add: bool = False) -> None:
    """One product into a float32 buffer, or added to what it holds."""
    options: dict[str, Any] = {"out": out}
    if left.dtype != out.dtype:
        if not left.is_cuda:
            raise NotMeasured("not measured: the CPU has no product of 16-bit operands with a float32 result")
        options["out_dtype"] = out.dtype
    if add:
        torch.addmm(out, left, right, **options)
    else:
        torch.mm(left, right, **options)
