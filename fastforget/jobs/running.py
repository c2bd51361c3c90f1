"""What both jobs run within: seeds, progress bars, and leakage under one of them."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.text import Text

from fastforget.data.examples import Example
from fastforget.evaluate.leakage import LeakageReport, leakage
from fastforget.quiet import library_bars


@contextlib.contextmanager
def surroundings(seed: int, quiet: bool) -> Iterator[None]:
    """Draw from torch by the seed, the adapter's first weights too, and show no library's progress bars where quiet.

    Torch's generators and transformers' bars are as they were afterwards.
    """
    with library_bars(off=quiet), torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        torch.manual_seed(seed)
        yield


@contextlib.contextmanager
def progress_bar(label: str, printer: Console) -> Iterator[Callable[..., None]]:
    """Show a bar on the terminal's error stream; none where that is no terminal, or the printer is quiet.

    The function given takes (done, total) and, on request, a short note.
    """
    console = Console(stderr=True)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.percentage:>3.0f}%"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
    )
    with Progress(*columns, console=console, disable=printer.quiet or not console.is_terminal) as bar:
        task = bar.add_task(label, total=None, note="")

        def update(done: float, total: float, note: str = "") -> None:
            bar.update(task, completed=done, total=total, note=note)

        yield update


def say(console: Console, text: str) -> None:
    """Print a line as it stands: in a path, neither [red] nor :smile: is markup."""
    console.print(Text(text))


def measure(
    model: Any, tokenizer: Any, sets: Mapping[str, Sequence[Example]], label: str, printer: Console
) -> dict[str, LeakageReport]:
    """Measure what the model recites of each set, under one progress bar."""
    total = 2 * sum(len(examples) for examples in sets.values())
    reports, done_before = {}, 0
    with progress_bar(label, printer) as update:

        def advance(done: int, _: int) -> None:
            update(done_before + done, total)

        for name, examples in sets.items():
            reports[name] = leakage(model, tokenizer, examples, lens=True, progress=advance)
            done_before += 2 * len(examples)
    return reports
