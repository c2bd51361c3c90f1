"""A job in several processes, as `torchrun` and `accelerate launch` start them: each computes its share of every batch.

All of them read and load the same, and so go through the same steps; the first one alone shows and writes.
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from fastforget.batch import COMPANIONS, Batch, rows_of
from fastforget.collectives import failures_told, own_part, process_count
from fastforget.jobs.options import UnlearnOptions
from fastforget.models import usable_device

PLACE = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")  # what launchers tell a process


@contextlib.contextmanager
def launched_processes(options: UnlearnOptions) -> Iterator[None]:
    """Join the processes that a launcher started, or those there are; an error of one ends all, with its message."""
    began = False
    if not dist.is_initialized() and all(name in os.environ for name in PLACE) and int(os.environ["WORLD_SIZE"]) > 1:
        on_gpu = own_device(options.device).type == "cuda"
        dist.init_process_group("nccl" if on_gpu else "gloo")
        began = True
    try:
        with (
            terminated_in_order() if began else contextlib.nullcontext(),
            failures_told() if process_count() > 1 else contextlib.nullcontext(),
        ):
            yield
    finally:
        if began:
            dist.destroy_process_group()


@contextlib.contextmanager
def terminated_in_order() -> Iterator[None]:
    """Let SIGTERM, by which a launcher ends all processes when one has failed, end this one as an exception does.

    What it holds is then put in order: the first process leaves no empty folder behind. The signal comes at any moment,
    before the process may learn of the failure in an exchange.
    """
    if threading.current_thread() is not threading.main_thread():  # which alone may set it
        yield
        return

    def end(number: int, _: Any) -> None:
        raise SystemExit(128 + number)

    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def own_device(device: str | None) -> torch.device:
    """Return the device named; of several processes on a machine each has a GPU of its own."""
    chosen = usable_device(device)
    local = os.environ.get("LOCAL_RANK")
    if chosen.type != "cuda" or chosen.index is not None or local is None:
        return chosen
    chosen = usable_device(f"cuda:{local}")
    torch.cuda.set_device(chosen)
    return chosen


def in_parallel(model: nn.Module) -> nn.Module:
    """Return the model as a step takes it: of several processes in `DistributedDataParallel`."""
    return model if process_count() == 1 else DistributedDataParallel(model)


def own_share(batch: Batch) -> Batch:
    """Return this process's rows of one side of a batch, and of its companions: every so many-th, possibly none."""
    if process_count() == 1:
        return batch
    answers = {key: value for key, value in batch.items() if key not in COMPANIONS}
    share: dict[str, Any] = rows_of(answers, own_part(), len(answers["input_ids"]))
    return share | {key: own_share(batch[key]) for key in COMPANIONS if key in batch}
