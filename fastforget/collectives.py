"""What processes that train together agree on: how many they are, whether one of them computes, and errors."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

import torch
import torch.distributed as dist

from fastforget.errors import FastforgetError

Result = TypeVar("Result")
_blocks = itertools.count()  # of `failures_told`, which all processes enter in the same order


class ProcessFailedError(FastforgetError):
    """Another process failed, and this one stops too."""

    def __init__(self, rank: int, message: str) -> None:
        super().__init__(f"process {rank} failed, so this one stops too: {message}")


def has_group() -> bool:
    """Tell whether this process belongs to a group of processes."""
    return dist.is_available() and dist.is_initialized()


def process_count() -> int:
    """How many processes train together."""
    return dist.get_world_size() if has_group() else 1


def is_first() -> bool:
    """Tell whether this process is the one that shows and writes."""
    return process_count() == 1 or dist.get_rank() == 0


def any_process(flag: bool, device: torch.device) -> bool:
    """Tell whether a flag is true in any process; all of them must ask."""
    shared = torch.tensor(int(flag), device=device)
    dist.all_reduce(shared, dist.ReduceOp.MAX)
    return bool(shared)


def check_alike(numbers: Sequence[int], device: torch.device, what: str) -> None:
    """Raise, in every process, where they do not have the same numbers, of which each has as many.

    Raises:
        FastforgetError: with `what`, which says what they are of.
    """
    own = torch.tensor(numbers, dtype=torch.int64, device=device)
    found = torch.stack([own, -own])
    dist.all_reduce(found, dist.ReduceOp.MAX)
    if bool((found[0] != -found[1]).any()):
        raise FastforgetError(f"process {dist.get_rank()}: {what}")


def attempt(action: Callable[[], Result]) -> tuple[Result | None, Exception | None]:
    """Return what an action returns, or what it raises."""
    try:
        return action(), None
    except Exception as error:
        return None, error


def raise_together(error: Exception | None, failed: int) -> None:
    """Raise in every process where one failed: its own error there, and its message in the others."""
    if not failed:
        return
    messages: list[str | None] = [None] * process_count()
    dist.all_gather_object(messages, None if error is None else f"{type(error).__name__}: {error}")
    if error is not None:
        raise error
    rank, message = next((rank, message) for rank, message in enumerate(messages) if message is not None)
    raise ProcessFailedError(rank, message)


def agreed(action: Callable[[], Result], device: torch.device) -> Result:
    """Return what an action returns; what it raises in one process is raised in all, as by `raise_together`."""
    result, error = attempt(action)
    raise_together(error, int(any_process(error is not None, device)))
    return result  # type: ignore[return-value]  # there was no error


@contextlib.contextmanager
def failures_told() -> Iterator[None]:
    """Within exchanges that cannot be left in order: tell the other processes why this one fails.

    Nothing is exchanged behind a failure, as the others wait in another exchange. That one ends where the failed
    process does, with an error that names a connection; here it gets the message that was left for it.
    """
    key = f"fastforget/failure/{next(_blocks)}"
    try:
        yield
    except ProcessFailedError:
        raise
    except Exception as error:
        told = None
        with contextlib.suppress(RuntimeError):  # the store may have ended with the process that failed
            store = dist.distributed_c10d._get_default_store()
            if store.check([key]):
                told = store.get(key).decode()
            else:
                store.set(key, f"{dist.get_rank()} {type(error).__name__}: {error}")
        if told is None or not isinstance(error, RuntimeError):  # what a lost connection raises is one
            raise
        rank, message = told.split(" ", 1)
        raise ProcessFailedError(int(rank), message) from error
