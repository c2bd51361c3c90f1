"""Figures of every step, written to a file or handed to a library that the user has: `--log-to`."""

from __future__ import annotations

import contextlib
import importlib.util
import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from fastforget.errors import FastforgetError
from fastforget.evaluate.report import strict

LIBRARIES = {"jsonl": None, "tensorboard": "tensorboard", "wandb": "wandb"}  # by the kind of log; None: none is needed
LOG_FILE = "log.jsonl"

StepLog = Callable[[int, Mapping[str, float]], None]  # called with each step and its figures


def check_log(kind: str | None) -> None:
    """Raise FastforgetError where there is no such log, or its library is not installed."""
    if kind is None:
        return
    if kind not in LIBRARIES:
        raise FastforgetError(f"--log-to must be one of {', '.join(LIBRARIES)}, not {kind!r}")
    library = LIBRARIES[kind]
    if library is not None and importlib.util.find_spec(library) is None:
        raise FastforgetError(f"--log-to {kind} needs the library {library}: pip install {library}")


@contextlib.contextmanager
def step_log(kind: str | None, out: Path, goes_on: bool = False) -> Iterator[StepLog]:
    """Open a log of a job that writes into `out`; None: one that keeps nothing.

    A JSONL file gets a line for each step, at once, behind those of an earlier run where the job `goes_on`; a folder of
    TensorBoard's lies in `out`, and so do the files of wandb, whose own settings (WANDB_MODE, WANDB_PROJECT, ...)
    decide where a run goes.
    """
    if kind == "jsonl":
        with open(out / LOG_FILE, "a" if goes_on else "w", encoding="utf-8") as file:

            def write_line(step: int, figures: Mapping[str, float]) -> None:
                file.write(json.dumps(strict({"step": step, **figures})) + "\n")
                file.flush()

            yield write_line
    elif kind == "tensorboard":
        from torch.utils.tensorboard import SummaryWriter

        with SummaryWriter(out / "tensorboard") as writer:

            def write_scalars(step: int, figures: Mapping[str, float]) -> None:
                for name, value in figures.items():
                    writer.add_scalar(name, value, step)

            yield write_scalars
    elif kind == "wandb":
        import wandb

        with wandb.init(dir=out) as run:
            yield lambda step, figures: run.log(dict(figures), step=step)
    else:
        yield lambda step, figures: None
