"""Host time of one `ff.token_stats` and its backward pass: what Python and torch take beside products and passes.

    python -m benchmarks.host_time [--readme]       line by line: python -m cProfile -s tottime -m benchmarks.host_time

N = 64, D = 64, V = 512, float32, in CPU time of one thread, which busy neighbours disturb less than a clock's. What is
"stubbed" leaves out products and passes (of Triton's: only the launches), so it needs no GPU; microseconds a tile are
the slope between one tile and TILES of them. Every torch operation is a launch of its own on a GPU: they are counted.
`--readme` writes the tables into kernels/README.md.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import importlib
import os
import re
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
from benchmarks.demo_table import table
from benchmarks.surroundings import ROOT, commit, machine, write_whole
from fastforget import backends, stats
from fastforget.backends import fields, ops, sweep, tiling

COUNT, WIDTH, VOCABULARY, TILES = 64, 64, 512, 32
CALLS, WARMUP = 300, 30
README = ROOT / "kernels" / "README.md"
BEGIN, END = "<!-- host time -->", "<!-- end of host time -->"
PASSES = ("label_tile", "paired_tile", "coupled_tile", "gradient_tile")
# what a call is made of: the time inside a function, less that inside others of these
COMPONENTS = (
    (stats, "check_token_arguments", "arguments checked"),
    (stats, "kept_rows", "labels of the kept rows, checked"),
    (sweep, "Tiling", "tile shape and buffers"),
    (ops, "label_sweep", "the sweep: blocks, tiles, passes' arguments"),
    (fields, "label_fields", "statistics from accumulators"),
    (sweep, "close_label_", "the kept gradient closed"),
    (ops.TokenStatsFunction, "apply", "autograd.Function: called, saved for the backward pass"),
    (stats, "spread", "kept rows put among all"),
    (ops, "token_stats_backward_body", "the backward pass"),
)
Call = Callable[[], tuple[float, float]]  # one call; seconds of forward and backward


class Kernel:
    """In place of a Triton kernel: takes its arguments, launches nothing."""

    def __getitem__(self, grid: Any) -> Callable[..., None]:
        return lambda *arguments, **options: None


class Operations(TorchDispatchMode):
    """Counts torch's operations, but for views."""

    count = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += not function.is_view
        return function(*args, **(kwargs or {}))


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print, and write the tables where that is asked for."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.host_time", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--readme", action="store_true", help="write the tables between kernels/README.md's markers")
    parser.add_argument("--calls", type=int, default=CALLS)
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    text = report(options.calls)
    print(text)
    if options.readme:
        whole = README.read_text(encoding="utf-8")
        pattern = re.compile(rf"{re.escape(BEGIN)}\n.*?{re.escape(END)}", re.DOTALL)
        if len(pattern.findall(whole)) != 1:
            print(f"host_time: {README.name} needs {BEGIN} and {END}, each on a line", file=sys.stderr)
            return 2
        write_whole(README, pattern.sub(lambda _: f"{BEGIN}\n{text}\n{END}", whole))
    return 0


def report(calls: int) -> str:
    """Both tables, in Markdown."""
    here = "native" if backends.why_not_native(torch.device("cpu")) is None else "torch"
    rows = [cells("eager", "the usual cross-entropy", eager, calls)]
    rows.append(cells(here, "all", functools.partial(step_of, here), calls))
    parts: dict[str, dict[str, float]] = {}
    for name in (here, "triton") if backends.has_triton() else (here,):
        with stubbed(name):
            rows.append(cells(name, "stubbed", functools.partial(step_of, name), calls))
            parts[name] = components(step_of(name), calls)
    if torch.cuda.is_available():
        rows.append(cells("triton", "all, to the last launch", functools.partial(step_of, "triton", "cuda"), calls))
    headings = ("backend", "what runs", "ms a call", "forward", "backward", "torch ops", "µs a tile more")
    split = [[about, *(f"{1e6 * part[about]:.0f}" for part in parts.values())] for about in parts[here]]
    about = (
        f"`python -m benchmarks.host_time`, {machine()['cpu']}, torch {torch.__version__}, commit {commit()}. Asked "
    )
    about += "of what is stubbed: at most 0.4 ms a call and 20 µs a tile."
    return "\n".join([about, "", *table(headings, rows), "", *table(("µs, stubbed", *parts), split)])


def cells(name: str, what: str, build: Callable[[], Call], calls: int) -> list[str]:
    """A line of the first table."""
    forward, backward, operations = measured(build(), calls)
    with mock.patch.dict(os.environ, {tiling.OVERRIDE: f"{COUNT}x{VOCABULARY // TILES}"}):
        many = measured(build(), calls)
    tile = (many[0] + many[1] - forward - backward) / (TILES - 1)
    times = [f"{1e3 * seconds:.3f}" for seconds in (forward + backward, forward, backward)]
    return [f"`{name}`", what, *times, str(operations), "" if name == "eager" else f"{1e6 * tile:.1f}"]


def step_of(name: str, device: str = "cpu") -> Call:
    """A call of `token_stats` and its backward pass on a backend."""
    hidden = torch.randn(COUNT, WIDTH, device=device, requires_grad=True)
    head = ff.LMHead(torch.randn(VOCABULARY, WIDTH, device=device))
    labels, positions = torch.randint(VOCABULARY, (COUNT,)), torch.arange(COUNT)
    return timing(lambda: ff.token_stats(hidden, head, labels, positions=positions, backend=name).logp.sum(), hidden)


def eager() -> Call:
    """For comparison."""
    hidden, weight = torch.randn(COUNT, WIDTH, requires_grad=True), torch.randn(VOCABULARY, WIDTH)
    labels = torch.randint(VOCABULARY, (COUNT,))
    return timing(lambda: F.cross_entropy(hidden @ weight.T, labels), hidden)


def timing(loss_of: Callable[[], torch.Tensor], hidden: torch.Tensor) -> Call:
    """A loss and its gradient. A GPU's backward passes run in another thread: there by the clock, and unwaited for."""
    now = time.perf_counter if hidden.is_cuda else time.thread_time

    def call() -> tuple[float, float]:
        if hidden.is_cuda:
            torch.cuda.synchronize()
        began = now()
        loss = loss_of()
        middle = now()
        torch.autograd.grad(loss, hidden)
        return middle - began, now() - middle

    return call


def measured(call: Call, calls: int) -> tuple[float, float, int]:
    """Median seconds of forward and backward, and how many operations of torch both take."""
    times = [call() for _ in range(WARMUP + calls)][WARMUP:]
    with Operations() as operations:
        call()
    forward, backward = (statistics.median(part) for part in zip(*times, strict=True))
    return forward, backward, operations.count


@contextlib.contextmanager
def stubbed(name: str) -> Iterator[None]:
    """Products and passes that do nothing; on `triton` the launchers run, and launch nothing."""
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


def components(call: Call, calls: int) -> dict[str, float]:
    """Median seconds of each component, and of what is in none."""
    spent: dict[str, float] = {}
    running = [0.0]  # seconds inside components that the present one called

    def clocked(function: Callable[..., Any], about: str) -> Callable[..., Any]:
        def run(*arguments: Any, **options: Any) -> Any:
            running.append(0.0)
            began = time.thread_time()
            found = function(*arguments, **options)
            taken = time.thread_time() - began
            spent[about] = spent.get(about, 0.0) + taken - running.pop()
            running[-1] += taken
            return found

        return run

    found: list[dict[str, float]] = []
    with contextlib.ExitStack() as stack:
        for module, name, about in COMPONENTS:
            stack.enter_context(mock.patch.object(module, name, clocked(getattr(module, name), about)))
        for _ in range(WARMUP + calls):
            spent = {about: 0.0 for _, _, about in COMPONENTS}
            whole = sum(call())
            found.append(spent | {"everything else: torch's autograd, the loss": whole - sum(spent.values())})
    return {about: statistics.median(times[about] for times in found[WARMUP:]) for about in found[0]}


if __name__ == "__main__":
    sys.exit(main())
