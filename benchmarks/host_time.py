"""Host time of one `ff.token_stats` and its backward pass: what Python and torch take beside products and passes.

    python -m benchmarks.host_time [--readme]       line by line: python -m cProfile -s tottime -m benchmarks.host_time

N = 64, D = 64, V = 512, float32, in CPU time of one thread, which busy neighbours disturb less than a clock's. What is
"stubbed" leaves out products and passes (of Triton's: only the launches), so it needs no GPU; microseconds a tile are
the slope between one tile and TILES of them. Every torch operation is a launch of its own on a GPU: they are counted.
`--readme` writes the table into kernels/README.md. What is patched here are internals of the backends, and this is
the only benchmark that knows them.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import fastforget as ff
from benchmarks.harness import ROOT, commit, write_whole
from benchmarks.peers import TILE
from benchmarks.tables import replace_block, table
from fastforget import backends, doctor
from fastforget.backends import sweep

COUNT, WIDTH, VOCABULARY, TILES = 64, 64, 512, 32
CALLS, WARMUP = 300, 30
README = ROOT / "kernels" / "README.md"
BEGIN, END = "<!-- host time -->", "<!-- end of host time -->"
PASSES = ("label_tile", "paired_tile", "coupled_tile", "gradient_tile")
HEADINGS = ("backend", "what runs", "ms a call", "forward", "backward", "torch ops", "µs a tile more")
Call = Callable[[], tuple[float, float]]  # one call; seconds of forward and backward


class Kernel:
    """In place of a Triton kernel: takes its arguments, launches nothing."""

    def __getitem__(self, grid: object) -> Callable[..., None]:
        return lambda *arguments, **options: None


class Operations(TorchDispatchMode):
    """Counts torch's operations, but for views."""

    count = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += not function.is_view
        return function(*args, **(kwargs or {}))


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print, and write the table where that is asked for."""
    parser = argparse.ArgumentParser("python -m benchmarks.host_time", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--readme", action="store_true", help="write the table between kernels/README.md's markers")
    parser.add_argument("--calls", type=int, default=CALLS)
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    here = "native" if backends.why_not_native(torch.device("cpu")) is None else "torch"
    rows = [cells(name, "all", call_of(name), options.calls) for name in ("eager", here)]
    for name in (here, "triton") if backends.has_triton() else (here,):
        with stubbed(name):
            rows.append(cells(name, "stubbed", call_of(name), options.calls))
    if torch.cuda.is_available():
        rows.append(cells("triton", "all, to the last launch", call_of("triton", "cuda"), options.calls))
    where = f"{dict(doctor.report())['cpu']}, torch {torch.__version__}, commit {commit()}"
    about = f"`python -m benchmarks.host_time`, {where}. Asked of what is stubbed: ≤ 0.4 ms a call, ≤ 20 µs a tile."
    text = "\n".join([about, "", *table(HEADINGS, rows)])
    print(text)
    try:
        if options.readme:
            write_whole(README, replace_block(README.read_text(encoding="utf-8"), BEGIN, END, text))
    except ValueError as error:
        print(f"host_time: {README.name}: {error}", file=sys.stderr)
        return 2
    return 0


def cells(name: str, what: str, call: Call, calls: int) -> list[str]:
    """Measure a line of the table: medians of so many calls, operations of one, and what each further tile costs."""

    def medians() -> tuple[float, ...]:
        times = [call() for _ in range(WARMUP + calls)][WARMUP:]
        return tuple(statistics.median(part) for part in zip(*times, strict=True))

    one = medians()
    with Operations() as operations:
        call()
    with mock.patch.dict(os.environ, {TILE: f"{COUNT}x{VOCABULARY // TILES}"}):
        tile = (sum(medians()) - sum(one)) / (TILES - 1)
    times = [f"{1e3 * seconds:.3f}" for seconds in (sum(one), *one)]
    return [f"`{name}`", what, *times, str(operations.count), "" if name == "eager" else f"{1e6 * tile:.1f}"]


def call_of(name: str, device: str = "cpu") -> Call:
    """Make a call of `token_stats` and its backward pass, or of the usual cross-entropy as "eager".

    A GPU's backward passes run in another thread: there it is timed by the clock, and unwaited for.
    """
    hidden = torch.randn(COUNT, WIDTH, device=device, requires_grad=True)
    weight = torch.randn(VOCABULARY, WIDTH, device=device)
    labels, positions, head = torch.randint(VOCABULARY, (COUNT,)), torch.arange(COUNT), ff.LMHead(weight)
    now = time.perf_counter if hidden.is_cuda else time.thread_time

    def call() -> tuple[float, float]:
        if hidden.is_cuda:
            torch.cuda.synchronize()
        began = now()
        if name == "eager":
            loss = F.cross_entropy(hidden @ weight.T, labels)
        else:
            loss = ff.token_stats(hidden, head, labels, positions=positions, backend=name).logp.sum()
        middle = now()
        torch.autograd.grad(loss, hidden)
        return middle - began, now() - middle

    return call


@contextlib.contextmanager
def stubbed(name: str) -> Iterator[None]:
    """Let products and passes do nothing; on `triton` the launchers run, and launch nothing."""
    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.object(sweep, "product", lambda states, weight, out: out))
        stack.enter_context(mock.patch.object(sweep, "accumulate", lambda *arguments, **options: None))
        if name == "triton":
            stack.enter_context(mock.patch.object(backends, "why_not_triton", lambda device: None))
            for kernel in PASSES:
                module = importlib.import_module(f"fastforget_kernels.{kernel}")
                stack.enter_context(mock.patch.object(module, f"{kernel}_kernel", Kernel()))
        else:
            passes = type(backends.passes_of(name, torch.float32))
            for method in PASSES:
                stack.enter_context(mock.patch.object(passes, method, lambda *arguments: None))
        yield


if __name__ == "__main__":
    sys.exit(main())
