"""What processes that train together agree on: how many they are, whether one of them computes, and errors."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from fastforget.errors import FastforgetError

Result = TypeVar("Result")
_blocks = itertools.count()  # of `failures_told`, which all processes enter in the same order


# of errors that have no type of their own: the CPU's allocator, drivers, cuBLAS
OUT_OF_MEMORY = ("DefaultCPUAllocator", "out of memory", "CUBLAS_STATUS_ALLOC_FAILED")


class ProcessFailedError(FastforgetError):
    """Another process failed, and this one stops too.

    for_memory: all that failed did so for want of memory.
    """

    def __init__(self, rank: int, message: str, for_memory: bool = False) -> None:
        super().__init__(f"process {rank} failed, so this one stops too: {message}")
        self.for_memory = for_memory


def ran_out_of_memory(error: BaseException) -> bool:
    """Tell whether an error is that of a device or the CPU without memory, here or in another process."""
    if isinstance(error, ProcessFailedError):
        return error.for_memory
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or any(each in str(error) for each in OUT_OF_MEMORY)


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


def own_part() -> slice:
    """Which of things that all processes know are this one's: every so many-th."""
    return slice(None) if process_count() == 1 else slice(dist.get_rank(), None, process_count())


def union(numbers: Iterable[int], count: int, device: torch.device) -> set[int]:
    """Return those of the numbers 0 to `count` - 1 that any process has; all of them must ask."""
    found = set(numbers)
    if process_count() == 1:
        return found
    flags = torch.tensor([number in found for number in range(count)], dtype=torch.int32, device=device)
    dist.all_reduce(flags, dist.ReduceOp.MAX)
    return {number for number, flag in enumerate(flags.tolist()) if flag}


def most(number: int, device: torch.device) -> int:
    """Return the largest of all processes' numbers; all of them must ask."""
    shared = torch.tensor(number, dtype=torch.int64, device=device)
    dist.all_reduce(shared, dist.ReduceOp.MAX)
    return int(shared)


def sum_by_name(values: Mapping[str, Tensor], names: Iterable[str], device: torch.device) -> dict[str, Tensor]:
    """Sum scalars over the processes: those of each name, which is missing where no process has it."""
    names = [*names]
    numbers = [
        values[name].to(device, torch.float32) if name in values else torch.zeros((), device=device) for name in names
    ]
    present = torch.tensor([float(name in values) for name in names], device=device)
    shared = torch.cat([torch.stack(numbers), present])
    dist.all_reduce(shared)
    sums, found = shared[: len(names)].unbind(), shared[len(names) :].tolist()
    return {name: value for name, value, has in zip(names, sums, found, strict=True) if has}


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
    """Raise in every process where one failed: its own error there, and its message in the others.

    Where one failed for want of memory and another one for another reason, that other one is told of.
    """
    if not failed:
        return
    told: list[tuple[str, bool] | None] = [None] * process_count()
    own = None if error is None else (f"{type(error).__name__}: {error}", ran_out_of_memory(error))
    dist.all_gather_object(told, own)
    failures = [(rank, *each) for rank, each in enumerate(told) if each is not None]
    rank, message, for_memory = min(failures, key=lambda failure: failure[2])
    if error is not None and (for_memory or own is None or not own[1]):
        raise error
    raise ProcessFailedError(rank, message, for_memory)


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
