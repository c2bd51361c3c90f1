"""Micro-benchmarks of each tile pass: `pytest benchmarks --benchmark-only`; `pytest` alone does not collect them.

A tile is 1,024 x 4,096 float32 in the middle of a vocabulary. `extra_info` holds, beside the time: the bytes that must
move (each buffer once per read and once per write), bytes per second, their share of what a plain copy of such a tile
reaches (measured here, in the same run), and nanoseconds an element. Products are overwritten by a pass, so each round
gets them anew.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from fastforget.backends import passes_of, why_not_native
from fastforget.backends.protocol import (
    BASIC_ACCUMULATORS,
    COUPLED_ACCUMULATORS,
    COUPLED_NORMALISERS,
    GRADIENT_COEFFICIENTS,
    LABEL_ACCUMULATORS,
    PAIRED_ACCUMULATORS,
    CoupledBlock,
    Coupling,
    GradientBlock,
    LabelBlock,
    LogitMap,
    PairedBlock,
    StateBlock,
    StateTargets,
    Tile,
    TilePasses,
)

pytest.importorskip("pytest_benchmark")

ROWS, COLUMNS = 1024, 4096
STATES, HIDDEN, CENTRES = 8192, 512, 8  # states of another layer, where D is so much less than V
ROUNDS, WARMUP = 7, 1
FLOAT32_BYTES = 4


@pytest.fixture(params=["torch", "native"])
def passes(request: pytest.FixtureRequest) -> TilePasses:
    """A backend's tile passes."""
    missing = why_not_native(torch.device("cpu")) if request.param == "native" else None
    if missing:
        pytest.skip(missing)
    return passes_of(request.param, torch.float32)


@pytest.fixture(scope="module")
def copy_bandwidth() -> float:
    """Bytes a second of copying a tile: it is read once and written once."""
    source = torch.randn(ROWS, COLUMNS)
    target = torch.empty_like(source)
    target.copy_(source)
    seconds = []
    for _ in range(3 * ROUNDS):
        began = time.perf_counter()
        target.copy_(source)
        seconds.append(time.perf_counter() - began)
    return 2 * source.nbytes / statistics.median(seconds)


def tile() -> Tile:
    """The second of three of a vocabulary, at which accumulators are read and written."""
    return Tile(COLUMNS, COLUMNS, 3 * COLUMNS, COLUMNS, LogitMap(None, 1.0, 0.0))


def drawn(*shape: int, seed: int = 0, scale: float = 2.0) -> Tensor:
    """Random normal numbers."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).mul_(scale)


def labels_of() -> Tensor:
    """A label a row, a third of them in the tile."""
    return torch.randint(3 * COLUMNS, (ROWS,), generator=torch.Generator().manual_seed(1))


def accumulators_of(passes: TilePasses, kinds: int) -> Tensor:
    """Accumulators as a first tile may have left them: everything of order one."""
    return torch.ones(kinds, ROWS, dtype=passes.accumulator_dtype(torch.float32))


def run(benchmark: Any, copy_bandwidth: float, sources: tuple[Tensor, ...], action: Callable[..., None]) -> None:
    """Time `action` of fresh copies of tiles, which it reads and writes once each, and put rates beside the time."""
    copies = tuple(source.clone() for source in sources)

    def fresh() -> tuple[tuple[Tensor, ...], dict[str, Any]]:
        for copy, source in zip(copies, sources, strict=True):
            copy.copy_(source)
        return copies, {}

    with torch.no_grad():
        benchmark.pedantic(action, setup=fresh, rounds=ROUNDS, warmup_rounds=WARMUP, iterations=1)
    if benchmark.stats is None:  # --benchmark-disable
        return
    seconds = benchmark.stats.stats.median
    moved = sum(2 * source.nbytes for source in sources)
    benchmark.extra_info.update(
        bytes_moved=moved,
        gigabytes_per_second=round(moved / seconds / 1e9, 2),
        copy_gigabytes_per_second=round(copy_bandwidth / 1e9, 2),
        share_of_copy=round(moved / seconds / copy_bandwidth, 3),
        nanoseconds_per_element=round(1e9 * seconds / (moved / 2 / FLOAT32_BYTES), 4),
        threads=torch.get_num_threads(),
    )


@pytest.mark.parametrize("kinds", [BASIC_ACCUMULATORS, len(LABEL_ACCUMULATORS)], ids=["basic", "moments"])
def test_label_tile(benchmark: Any, passes: TilePasses, copy_bandwidth: float, kinds: int) -> None:
    """Accumulators of a cross-entropy, and the weights for product 2 in place."""
    block = LabelBlock(labels_of(), accumulators_of(passes, kinds), drawn(ROWS, HIDDEN))
    run(
        benchmark,
        copy_bandwidth,
        (drawn(ROWS, COLUMNS),),
        lambda product: passes.label_tile(tile(), product, product, block),
    )


@pytest.mark.parametrize("known", [False, True], ids=["embedding-unknown", "embedding-known"])
def test_paired_tile(benchmark: Any, passes: TilePasses, copy_bandwidth: float, known: bool) -> None:
    """Forward KL of two tiles, and the rows of the third and, where the embedding is unknown, the fourth product."""
    grad, other = drawn(ROWS, HIDDEN), drawn(ROWS, HIDDEN)
    accumulators = accumulators_of(passes, len(PAIRED_ACCUMULATORS))
    block = PairedBlock(labels_of(), accumulators, torch.zeros(ROWS) if known else None, grad, None if known else other)
    reference = drawn(ROWS, COLUMNS)
    sources = (reference + drawn(ROWS, COLUMNS, seed=2, scale=0.1), reference)

    def action(policy: Tensor, reference: Tensor) -> None:
        passes.paired_tile(tile(), policy, reference, policy, None if known else reference, block)

    run(benchmark, copy_bandwidth, sources, action)


@pytest.mark.parametrize("kind", ["reverse_kl", "jsd"])
def test_coupled_tile(benchmark: Any, passes: TilePasses, copy_bandwidth: float, kind: Coupling) -> None:
    """Reverse KL or JSD of two tiles, and both rows."""
    normalisers = torch.ones(len(COUPLED_NORMALISERS), ROWS)
    block = CoupledBlock(kind, labels_of(), normalisers, accumulators_of(passes, len(COUPLED_ACCUMULATORS)))
    reference = drawn(ROWS, COLUMNS)
    sources = (reference + drawn(ROWS, COLUMNS, seed=2, scale=0.1), reference)

    def action(policy: Tensor, reference: Tensor) -> None:
        passes.coupled_tile(tile(), policy, reference, policy, reference, block)

    run(benchmark, copy_bandwidth, sources, action)


def test_gradient_tile(benchmark: Any, passes: TilePasses, copy_bandwidth: float) -> None:
    """The row of a gradient sweep, in place."""
    coefficients = torch.full((len(GRADIENT_COEFFICIENTS), ROWS), 0.5)
    block = GradientBlock(labels_of(), torch.full((ROWS,), -1), coefficients)
    run(
        benchmark,
        copy_bandwidth,
        (drawn(ROWS, COLUMNS),),
        lambda product: passes.gradient_tile(tile(), product, None, product, block),
    )


@pytest.mark.parametrize("metric", ["l2", "cosine"])
def test_state_pass(benchmark: Any, passes: TilePasses, copy_bandwidth: float, metric: str) -> None:
    """Distance from the anchor and pull towards the nearest centre: states and anchors are read, nothing is written."""
    targets = StateTargets(drawn(STATES, HIDDEN, seed=2), drawn(CENTRES, HIDDEN, seed=3), metric == "cosine")
    values, nearest = torch.empty(2, STATES), torch.empty(STATES, dtype=torch.int64)
    run(
        benchmark,
        copy_bandwidth,
        (drawn(STATES, HIDDEN),),
        lambda states: passes.state_pass(StateBlock(states, targets, values, nearest)),
    )
