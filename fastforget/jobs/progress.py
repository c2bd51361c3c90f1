"""What a job shows of its steps: a bar on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

from fastforget.evaluate.report import peak_rss_mb
from fastforget.jobs.loop import Progress as StepProgress
from fastforget.jobs.step_logs import step_log
from fastforget.jobs.until import GreedyShare
from fastforget.output import UnlearnOutput

LINES = 10  # of a job that is not shown on a terminal, and one at its end


@contextlib.contextmanager
def shown_steps(
    label: str, printer: Console, *, log_to: str | None, out: Path, goes_on: bool = False
) -> Iterator[StepProgress]:
    """Show each step of a job on the error stream where that is a terminal, or lines on the printer; log them all.

    Args:
        label: what the bar is of.
        printer: where lines go; nothing is shown where it is quiet.
        log_to, out, goes_on: the log and the job's folder, as in `step_log`.
    """
    terminal = Console(stderr=True)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(bar_width=16),
        MofNCompleteColumn(),
        TextColumn("{task.fields[note]}"),
    )
    shown = terminal.is_terminal and not printer.quiet
    with step_log(log_to, out, goes_on) as log, Progress(*columns, console=terminal, disable=not shown) as bar:
        task = bar.add_task(label, total=None, note="")
        clock = Clock()

        def progress(step: int, total: int, output: UnlearnOutput) -> None:
            figures = figures_of(output)
            note = ", ".join((*described(figures), *clock.described(step, total)))
            bar.update(task, completed=step, total=total, note=note)
            if not shown and (step == total or step % max(1, total // LINES) == 0):
                printer.print(f"step {step} of {total}: {note}", highlight=False, soft_wrap=True)
            log(step, {**figures, "seconds": clock.seconds()})

        yield progress


class Clock:
    """Tells how fast steps are, and how long the rest will take; the first step, which is slower, does not count."""

    def __init__(self) -> None:
        self.start = time.perf_counter()
        self.first: tuple[int, float] | None = None

    def seconds(self) -> float:
        """Return the seconds since the job began."""
        return time.perf_counter() - self.start

    def described(self, step: int, total: int) -> list[str]:
        """Say steps a second, time left and peak memory in a few words, as far as they are known."""
        now = self.seconds()
        if self.first is None:
            self.first = (step, now)
        done, seconds = step - self.first[0], now - self.first[1]
        pace = []
        if done > 0 and seconds > 0.0:
            pace = [f"{done / seconds:.3g} it/s", f"{duration((total - step) * seconds / done)} left"]
        return [*pace, f"{peak_gb():.3g} GB"]


def figures_of(output: UnlearnOutput) -> dict[str, float]:
    """Return a step's loss, NLLs and terms by name; waits for the device."""
    terms = {f"term/{name}": float(value) for name, value in output.terms.items()}
    return {"loss": float(output.loss), **{name: float(value) for name, value in output.stats.items()}, **terms}


def described(figures: Mapping[str, float]) -> list[str]:
    """Say a step's NLLs, or its loss where no forward reached the head, and how much is known by heart, if that is."""
    nlls = [
        f"{name.removesuffix('_nll').replace('_', ' ')} NLL {value:.2f}"
        for name, value in figures.items()
        if name.endswith("_nll")
    ]
    memorised = figures.get(f"term/{GreedyShare.name}")
    known = [] if memorised is None else [f"memorised {memorised:.0%}"]
    return (nlls or [f"loss {figures['loss']:.3g}"]) + known


def duration(seconds: float) -> str:
    """Write seconds as a person says them."""
    if seconds < 60.0:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60.0)
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


def peak_gb() -> float:
    """Return the peak of the GPU's memory, or of the process's where there is none, in GB."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 1e9
    return peak_rss_mb() / 1e3
