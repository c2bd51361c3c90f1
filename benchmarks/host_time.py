"""Host time of one `ff.token_stats` and its backward pass, and of a whole step: what is neither product nor pass.

    python -m benchmarks.host_time [--readme]       line by line: python -m cProfile -s tottime -m benchmarks.host_time

N = 64, D = 64, V = 512, float32, in CPU time of one thread, which busy neighbours disturb less than a clock's. What is
"stubbed" leaves out products and passes (of Triton's: only the launches), so it needs no GPU; microseconds a tile are
the slope between one tile and TILES of them. A step is NPO and a KL of 4 and 4 sequences, of a model of 32 layers with
LoRA on its queries and keys, whose forward is stubbed too: its states are there. Every torch operation is a launch of
its own on a GPU: they are counted. `--readme` writes the tables into kernels/README.md. What is patched here are
internals of the backends, and this is the only benchmark that knows them.
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
LAYERS, ROWS, LENGTH = 32, 4, 17  # of the step: as many tokens a side
CALLS, WARMUP = 300, 30
README = ROOT / "kernels" / "README.md"
BEGIN, END = "<!-- host time -->", "<!-- end of host time -->"
PASSES = ("label_tile", "paired_tile", "coupled_tile", "gradient_tile")
HEADINGS = ("backend", "what runs", "ms a call", "forward", "backward", "torch ops", "µs a tile more")
STEP_HEADINGS = ("a step whose reference is", "ms a step", "backward", "step, zero_grad", "torch ops")
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
    about += " Of a step: ≤ 1 ms."
    steps = [step_cells(what, call, options.calls) for what, call in steps_of(here)]
    text = "\n".join([about, "", *table(HEADINGS, rows), "", *table(STEP_HEADINGS, steps)])
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
    one = medians(call, calls)
    with mock.patch.dict(os.environ, {TILE: f"{COUNT}x{VOCABULARY // TILES}"}):
        tile = (sum(medians(call, calls)) - sum(one)) / (TILES - 1)
    return [f"`{name}`", what, *figures(one, call), "" if name == "eager" else f"{1e6 * tile:.1f}"]


def step_cells(what: str, call: Call, calls: int) -> list[str]:
    """Measure a line of the steps' table."""
    return [what, *figures(medians(call, calls), call)]


def medians(call: Call, calls: int) -> tuple[float, ...]:
    """Return the medians of so many calls' seconds."""
    times = [call() for _ in range(WARMUP + calls)][WARMUP:]
    return tuple(statistics.median(part) for part in zip(*times, strict=True))


def figures(seconds: Sequence[float], call: Call) -> list[str]:
    """Write milliseconds, the sum and each part, and how many operations a call is."""
    with Operations() as operations:
        call()
    return [*(f"{1e3 * each:.3f}" for each in (sum(seconds), *seconds)), str(operations.count)]


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


def steps_of(name: str) -> Iterator[tuple[str, Call]]:
    """Yield steps that find the reference in its cache, and that compute it, with everything but Python stubbed."""
    import peft
    import transformers

    config = transformers.LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=WIDTH, intermediate_size=WIDTH, num_hidden_layers=LAYERS
    )
    lora = peft.LoraConfig(target_modules=["q_proj", "k_proj"])
    model = peft.get_peft_model(transformers.AutoModelForCausalLM.from_config(config), lora).train()
    states = torch.randn(ROWS, LENGTH, WIDTH, requires_grad=True)

    def forward(input_ids: torch.Tensor, **others: object) -> transformers.modeling_outputs.BaseModelOutputWithPast:
        return transformers.modeling_outputs.BaseModelOutputWithPast(states[: len(input_ids), : input_ids.shape[1]])

    model.get_base_model().model.forward = forward
    ids = torch.randint(VOCABULARY, (2, ROWS, LENGTH))
    mask = torch.ones_like(ids)
    mask[:, 0, -2:] = 0
    forget, retain = ({"input_ids": ids[i], "attention_mask": mask[i], "labels": ids[i]} for i in (0, 1))
    for what, cache_bytes in (("cached", 10**9), ("computed", 0)):
        # stubbed passes leave what was in memory, NaN too, and the guard must not give up
        guard = ff.GuardSettings(bad_steps=10**9)
        options: dict[str, Any] = {"reference_cache_bytes": cache_bytes, "backend": name, "guard": guard}
        terms = [ff.NPO(), ff.KL(on="retain")]
        step = ff.UnlearnStep(model, torch.optim.SGD, terms=terms, lr=0.0, **options)

        def call(step: ff.UnlearnStep = step) -> tuple[float, float]:
            began = time.thread_time()
            step.backward(forget, retain)
            middle = time.thread_time()
            step.step()
            step.zero_grad()
            return middle - began, time.thread_time() - middle

        step.backward(forget, retain)  # the head compares itself with the model's once
        with stubbed(name):
            yield what, call


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
