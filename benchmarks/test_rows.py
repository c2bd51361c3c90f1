"""Micro-benchmarks of each row pass: `pytest benchmarks --benchmark-only`; `pytest` alone does not collect them.

A chunk is as the driver makes it for V = 50,272. `extra_info` holds, beside the time: the bytes that must move (each
matrix once per read and once per write), bytes per second, their share of what a plain copy of such a matrix reaches
(measured here, in the same run), and nanoseconds an element. Products are overwritten by a pass, so each round gets
them anew.
"""

from __future__ import annotations

import importlib
import statistics
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import fastforget as ff
from fastforget.backends import BACKENDS, gemm, pick
from fastforget.backends.chunks import ALIGNMENT, Against
from fastforget.errors import FastforgetError

pytest.importorskip("pytest_benchmark")

VOCABULARY, HIDDEN, CENTRES = 50272, 512, 8
STATES = 8192  # states of a pass over another layer's: D is so much less than V
ROUNDS, WARMUP = 9, 2
FLOAT32_BYTES = 4
PADDED = -(-VOCABULARY // ALIGNMENT) * ALIGNMENT
ROWS = gemm.chunk_rows(PADDED, torch.empty(0))
TILE_ROWS = 1024  # of the pass whose rows are never whole
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def available() -> list[str]:
    """The backends whose row passes run on this machine's CPU, as kernels or in torch."""
    found: list[str] = []
    for name in ("chunked", "native"):
        if name not in BACKENDS:
            continue
        try:
            pick(name, torch.device("cpu"))
        except FastforgetError:
            continue
        if hasattr(importlib.import_module(f"fastforget.backends.{name}"), "label_pass"):
            found.append(name)
    return found


@pytest.fixture(params=available())
def passes(request: pytest.FixtureRequest) -> Any:
    """A backend's module."""
    return importlib.import_module(f"fastforget.backends.{request.param}")


@pytest.fixture(scope="module")
def copy_bandwidth() -> float:
    """Bytes a second of copying a chunk: it is read once and written once."""
    source = torch.randn(ROWS, PADDED)
    target = torch.empty_like(source)
    target.copy_(source)
    seconds = []
    for _ in range(3 * ROUNDS):
        began = time.perf_counter()
        target.copy_(source)
        seconds.append(time.perf_counter() - began)
    return 2 * source.nbytes / statistics.median(seconds)


def matrix(dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    """Logits (rows, V) in a buffer as the driver has it."""
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randn(ROWS, PADDED, generator=generator).mul_(2.0)
    return drawn.to(dtype)[:, :VOCABULARY]


def labels_of(rows: int) -> Tensor:
    """A label a row."""
    return torch.randint(VOCABULARY, (rows,), generator=torch.Generator().manual_seed(1))


def head_of(dtype: torch.dtype = torch.float32) -> ff.LMHead:
    """A head of which the passes read the dtype only."""
    return ff.LMHead(torch.empty(VOCABULARY, 1, dtype=dtype))


def run(benchmark: Any, action: Callable[..., Any], fresh: Callable[[], tuple[Any, ...]]) -> None:
    """Time `action(*fresh())`, without `fresh`."""
    with torch.no_grad():
        benchmark.pedantic(action, setup=lambda: (fresh(), {}), rounds=ROUNDS, warmup_rounds=WARMUP, iterations=1)


def tell(benchmark: Any, copy_bandwidth: float, moved: int, elements: int) -> None:
    """Put bytes and rates beside the time."""
    if benchmark.stats is None:  # --benchmark-disable
        return
    seconds = benchmark.stats.stats.median
    rate = moved / seconds
    benchmark.extra_info.update(
        bytes_moved=moved,
        gigabytes_per_second=round(rate / 1e9, 2),
        copy_gigabytes_per_second=round(copy_bandwidth / 1e9, 2),
        share_of_copy=round(rate / copy_bandwidth, 3),
        nanoseconds_per_element=round(1e9 * seconds / elements, 4),
        threads=torch.get_num_threads(),
        rows=ROWS,
        vocabulary=VOCABULARY,
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
@pytest.mark.parametrize("names", [("logp", "lse"), ("logp", "entropy", "argmax")], ids=["plain", "moments"])
def test_label_pass(benchmark: Any, passes: Any, copy_bandwidth: float, dtype: torch.dtype, names: tuple[str]) -> None:
    """Statistics of a label pass, and the row that it writes over the logits."""
    if dtype != torch.float32 and not passes.ANY_DTYPE:
        pytest.skip("this backend's products are float32")
    source, labels, head = matrix(dtype), labels_of(ROWS), head_of(dtype)
    product = matrix(dtype)

    def fresh() -> tuple[Tensor]:
        product.copy_(source)
        return (product,)

    run(benchmark, lambda given: passes.label_pass(given, labels, head, names, given, padded=PADDED), fresh)
    tell(benchmark, copy_bandwidth, 2 * ROWS * VOCABULARY * dtype.itemsize, ROWS * VOCABULARY)


def test_tiled_label_pass(benchmark: Any, passes: Any, copy_bandwidth: float) -> None:
    """The label pass a tile of vocabulary at a time, with both products of a head of one column: hardly any."""
    if not hasattr(passes, "tiled_label_pass"):
        pytest.skip("this backend's rows of logits are whole")
    weight = matrix()[:1].T.contiguous()
    hidden, labels, grad = torch.ones(TILE_ROWS, 1), labels_of(TILE_ROWS), torch.empty(TILE_ROWS, 1)
    buffer = torch.empty(gemm.logit_tile(TILE_ROWS, weight))
    head = ff.LMHead(weight)
    run(benchmark, lambda: passes.tiled_label_pass(hidden, labels, head, ("logp",), buffer, grad), lambda: ())
    tell(benchmark, copy_bandwidth, 2 * TILE_ROWS * VOCABULARY * FLOAT32_BYTES, TILE_ROWS * VOCABULARY)


@pytest.mark.parametrize("written", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
@pytest.mark.parametrize("kind", ["forward_kl", "reverse_kl", "jsd"])
def test_paired_pass(benchmark: Any, passes: Any, copy_bandwidth: float, written: torch.dtype, kind: str) -> None:
    """A divergence of two chunks of logits, and the row that it writes, in the dtype that a head of `written` takes."""
    head = head_of(written)
    if passes.row_dtype(head, torch.empty(0, dtype=written)) != written:
        pytest.skip(f"this backend does not write rows in {written}")
    source, other = matrix(), matrix(seed=2)
    policy, reference = matrix(), matrix()
    out = policy if written == torch.float32 else matrix(written)

    def fresh() -> tuple[Tensor, Tensor]:
        policy.copy_(source)
        reference.copy_(other)
        return policy, reference

    run(benchmark, lambda one, two: passes.paired_pass(one, two, head, kind, out, PADDED), fresh)
    moved = ROWS * VOCABULARY * (2 * FLOAT32_BYTES + written.itemsize)
    tell(benchmark, copy_bandwidth, moved, ROWS * VOCABULARY)


def test_gradient_pass(benchmark: Any, passes: Any, copy_bandwidth: float) -> None:
    """The row of a recompute: entropy and the label's log-prob."""
    source, labels, head = matrix(), labels_of(ROWS), head_of()
    product = matrix()
    coefficients = {"unit": torch.full((ROWS,), 0.5), "entropy": torch.full((ROWS,), 0.25)}

    def fresh() -> tuple[Tensor]:
        product.copy_(source)
        return (product,)

    def action(given: Tensor) -> None:
        passes.gradient_pass(given, labels, head, coefficients, argmax=None, projected=None, out=given, padded=PADDED)

    run(benchmark, action, fresh)
    tell(benchmark, copy_bandwidth, 2 * ROWS * VOCABULARY * FLOAT32_BYTES, ROWS * VOCABULARY)


@pytest.mark.parametrize("metric", ["l2", "cosine"])
def test_state_pass(benchmark: Any, passes: Any, copy_bandwidth: float, metric: str) -> None:
    """Distance from the anchor and pull towards the nearest centre: states and anchors are read once."""
    from fastforget.backends import states

    generator = torch.Generator().manual_seed(0)
    hidden, anchor = (torch.randn(STATES, HIDDEN, generator=generator) for _ in range(2))
    against = Against(hidden, anchor, torch.randn(CENTRES, HIDDEN, generator=generator), metric)
    measure = getattr(passes, "state_pass", states.measure)
    run(benchmark, lambda: measure(hidden, None, against.anchor, against.centres, metric), lambda: ())
    tell(benchmark, copy_bandwidth, 2 * STATES * HIDDEN * FLOAT32_BYTES, STATES * HIDDEN)
