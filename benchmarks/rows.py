"""Micro-benchmarks of each tile pass: `pytest benchmarks/rows.py --benchmark-only`.

A tile is 1,024 x 4,096 float32 in the middle of a vocabulary. `extra_info` holds bytes per second (each buffer moves
once per read and once per write), their share of what a plain copy of such a tile reaches in the same run, and
nanoseconds an element. Products are overwritten by a pass, so each round gets them anew.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.harness import timed
from fastforget.backends import passes_of, protocol, why_not_native
from fastforget.backends.protocol import Tile, TilePasses

pytest.importorskip("pytest_benchmark")

ROWS, COLUMNS = 1024, 4096
STATES, HIDDEN, CENTRES = 8192, 512, 8  # states of another layer, where D is so much less than V
ROUNDS, WARMUP = 7, 1
Case = tuple[tuple[Tensor, ...], Callable[..., None]]  # what a pass reads and writes once each, and the pass


def drawn(*shape: int, seed: int = 0, scale: float = 2.0) -> Tensor:
    """Draw normal numbers."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).mul_(scale)


def case(passes: TilePasses, name: str) -> Case:
    """Make the operands of a pass at the second of three tiles, where accumulators are read and written."""
    tile = Tile(COLUMNS, COLUMNS, 3 * COLUMNS, COLUMNS, protocol.LogitMap(None, 1.0, 0.0))
    labels = torch.randint(3 * COLUMNS, (ROWS,), generator=torch.Generator().manual_seed(1))  # a third in the tile
    logits, grad = drawn(ROWS, COLUMNS), drawn(ROWS, HIDDEN)
    pair = (logits + drawn(ROWS, COLUMNS, seed=2, scale=0.1), logits)
    kind, _, variant = name.partition(":")

    def accumulators(count: int) -> Tensor:  # as a first tile may have left them: everything of order one
        return torch.ones(count, ROWS, dtype=passes.accumulator_dtype(torch.float32))

    if kind == "label":
        count = protocol.BASIC_ACCUMULATORS if variant == "basic" else len(protocol.LABEL_ACCUMULATORS)
        label = protocol.LabelBlock(labels, accumulators(count), grad)
        return (logits,), lambda product: passes.label_tile(tile, product, product, label)
    if kind == "paired":
        known, sums = variant == "known", accumulators(len(protocol.PAIRED_ACCUMULATORS))
        other = None if known else drawn(ROWS, HIDDEN)
        paired = protocol.PairedBlock(labels, sums, torch.zeros(ROWS) if known else None, grad, other)
        return pair, lambda one, two: passes.paired_tile(tile, one, two, one, None if known else two, paired)
    if kind in ("reverse_kl", "jsd"):
        normalisers = torch.ones(len(protocol.COUPLED_NORMALISERS), ROWS)
        coupling: protocol.Coupling = "reverse_kl" if kind == "reverse_kl" else "jsd"
        sums = accumulators(len(protocol.COUPLED_ACCUMULATORS))
        coupled = protocol.CoupledBlock(coupling, labels, normalisers, sums)
        return pair, lambda one, two: passes.coupled_tile(tile, one, two, one, two, coupled)
    if kind == "gradient":
        coefficients = torch.full((len(protocol.GRADIENT_COEFFICIENTS), ROWS), 0.5)
        gradient = protocol.GradientBlock(labels, torch.full((ROWS,), -1), coefficients)
        return (logits,), lambda product: passes.gradient_tile(tile, product, None, product, gradient)
    targets = protocol.StateTargets(drawn(STATES, HIDDEN, seed=2), drawn(CENTRES, HIDDEN, seed=3), variant == "cosine")
    values, nearest = torch.empty(2, STATES), torch.empty(STATES, dtype=torch.int64)
    block = protocol.StateBlock
    return (drawn(STATES, HIDDEN),), lambda states: passes.state_pass(block(states, targets, values, nearest))


CASES = "label:basic label:moments paired:unknown paired:known reverse_kl jsd gradient state:l2 state:cosine".split()


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("backend", ["torch", "native"])
def test_tile_pass(benchmark: Any, backend: str, name: str) -> None:
    """Time a pass on fresh copies of its tiles, and put rates beside the time."""
    missing = why_not_native(torch.device("cpu")) if backend == "native" else None
    if missing:
        pytest.skip(missing)
    sources, action = case(passes_of(backend, torch.float32), name)
    copies = tuple(source.clone() for source in sources)

    def fresh() -> tuple[tuple[Tensor, ...], dict[str, Any]]:
        for copy, source in zip(copies, sources, strict=True):
            copy.copy_(source)
        return copies, {}

    with torch.no_grad():
        benchmark.pedantic(action, setup=fresh, rounds=ROUNDS, warmup_rounds=WARMUP, iterations=1)
    if benchmark.stats is None:  # --benchmark-disable
        return
    seconds, moved = benchmark.stats.stats.median, 2 * sum(source.nbytes for source in sources)
    copied = statistics.median(timed(fresh, "cpu") for _ in range(3 * ROUNDS))
    benchmark.extra_info.update(
        gigabytes_per_second=round(moved / seconds / 1e9, 2),
        share_of_copy=round(copied / seconds, 3),
        nanoseconds_per_element=round(1e9 * seconds / (moved / 8), 4),
        threads=torch.get_num_threads(),
    )
