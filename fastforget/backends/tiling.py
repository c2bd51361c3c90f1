"""Every size and byte budget of the sweep, each with the measurement that decided it.

* CPU: at most 2,048 rows, in blocks of much the same size; at most 4,096 columns, and 12 MB in all buffers. MKL's
  product of 512 rows of 2,048 with 50,272 columns runs 4 to 7 % faster in 4,096 columns at a time (2026-11-21). 12 MB
  are no slower than 16 for NLL and KL (2026-11-28), stay in a large cache, and glibc hands them from call to call
  without new pages.
* GPU: about 1,024 rows, a multiple of 128; 32 MiB in all buffers, which are 8,192 columns of float32. H100, D 4,096,
  V 128,256 (2026-11-28): both products of 8,192 rows in tiles of 8,192 columns take 23.9 ms, of 4,096 26.7; whole rows
  256 at a time 28.9 ms, 1,024 at a time 22.3. 33 MB stay in its L2 of 50 MB, where a pass costs no device memory.
* Where a 16-bit weight is cast to float32: as many columns as 32 MiB of it hold.

Where there are few rows a tile takes more columns: at 64 rows on a GPU the whole of most vocabularies. FASTFORGET_TILE
("1024x8192") overrides rows and columns, for tuning (`benchmarks/gpu.sh`); logits that are there already go by whole
rows in any case.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from fastforget.errors import FastforgetError

OVERRIDE = "FASTFORGET_TILE"
ALIGNMENT = 64  # a tile's columns, and its rows' strides: kernels and products then use wide accesses
CPU_BYTES = 12 * 2**20
CPU_ROWS = 2048
CPU_COLUMNS = 4096
DEVICE_BYTES = 32 * 2**20
DEVICE_ROWS = 1024
ROW_STEP = 128  # rows that a GPU's product works on together: a block of 131 would cost it as much as one of 256
CAST_BYTES = 32 * 2**20
CPU_STATE_BYTES = 2 * 2**20  # hidden states in float32 that are worked on at a time, where nothing else bounds them
DEVICE_STATE_BYTES = 32 * 2**20  # each time is a few launches


@dataclass(frozen=True)
class TileShape:
    """Rows of a block, and columns of a tile."""

    rows: int
    columns: int


def tile_shape(count: int, vocabulary: int, device: torch.device, itemsize: int, cast_width: int = 0) -> TileShape:
    """The shape that `count` rows go through a vocabulary in, where a head makes their logits.

    Args:
        itemsize: bytes that one token of one row takes in all buffers of a tile.
        cast_width: D where each tile of the head's weight is cast to float32, else 0.

    Raises:
        FastforgetError: FASTFORGET_TILE is set and is no "ROWSxCOLUMNS".
    """
    on_cpu = device.type == "cpu"
    asked = os.environ.get(OVERRIDE)
    step = 1 if asked else ALIGNMENT
    if asked:
        most_rows, columns = parsed(asked)
        rows = even_rows(count, most_rows, 1)
    else:
        rows = even_rows(count, CPU_ROWS, 1) if on_cpu else even_rows(count, DEVICE_ROWS, ROW_STEP)
        columns = (CPU_BYTES if on_cpu else DEVICE_BYTES) // (rows * itemsize)
        columns = min(columns, CPU_COLUMNS) if on_cpu else columns
    if cast_width:
        columns = min(columns, CAST_BYTES // (cast_width * torch.float32.itemsize))
    columns = max(columns // step * step, step)
    tiles = max(1, -(-vocabulary // columns))  # of much the same size: a short one is slow
    return TileShape(rows, min(columns, aligned(-(-vocabulary // tiles), step)))


def whole_rows(count: int, vocabulary: int, device: torch.device, itemsize: int) -> TileShape:
    """The shape for logits that are there already: whole rows in one tile, as many as a few buffers' bytes hold."""
    budget = CPU_BYTES if device.type == "cpu" else 4 * DEVICE_BYTES
    return TileShape(even_rows(count, max(1, budget // (max(vocabulary, 1) * itemsize)), 1), vocabulary)


def parsed(asked: str) -> tuple[int, int]:
    """Rows and columns of FASTFORGET_TILE."""
    rows, _, columns = asked.partition("x")
    if not (rows.isdecimal() and columns.isdecimal() and int(rows) and int(columns)):
        raise FastforgetError(f"{OVERRIDE}={asked!r} is no tile: give rows and columns, as in {OVERRIDE}=1024x8192")
    return int(rows), int(columns)


def even_rows(count: int, most: int, step: int) -> int:
    """How many of `count` rows make blocks of much the same size, about `most` each and a multiple of `step`."""
    blocks = max(1, -(-count // most))
    return max(1, min(count, aligned(-(-count // blocks), step)))


def aligned(size: int, step: int = ALIGNMENT) -> int:
    """The next multiple of `step`."""
    return -(-size // step) * step


def row_blocks(count: int, rows: int) -> Iterator[slice]:
    """Slices of `rows` rows each, the last one perhaps shorter."""
    for start in range(0, count, rows):
        yield slice(start, min(start + rows, count))


def state_blocks(count: int, states: torch.Tensor) -> Iterator[slice]:
    """Slices of `count` rows as wide as the states (_, D), each a few megabytes in float32."""
    budget = CPU_STATE_BYTES if states.device.type == "cpu" else DEVICE_STATE_BYTES
    return row_blocks(count, max(1, budget // (max(states.shape[1], 1) * torch.float32.itemsize)))
