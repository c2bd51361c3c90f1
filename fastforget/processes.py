"""Several processes, each with a part of the batch: counts, gradients and errors that all of them share.

In `DistributedDataParallel` a reducer runs where a loss is differentiated by the user. Within a step it is bypassed: a
process may have no label of a side and so no forward of it, a forward may end at a layer and leave weights without a
gradient, and either would leave the reducer waiting. Instead every process takes part in the same two exchanges of each
`backward`, whatever its part of the batch holds: of counts before it, of gradients behind it. Under FSDP2 forwards and
backwards are exchanges themselves, of which all processes have as many (`shards.py`).
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import fields

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from fastforget.batch import ROLES, LabelCounts, count_name
from fastforget.collectives import attempt, failures_told, process_count, raise_together
from fastforget.errors import FastforgetError
from fastforget.head import wrapped_module
from fastforget.output import UnlearnOutput

BUCKET_ELEMENTS = 2**24  # of gradients that go through one exchange: a second copy of so many is in memory


def parallel_wrapper(model: nn.Module) -> DistributedDataParallel | None:
    """Return the `DistributedDataParallel` among a model's wrappers."""
    inner: nn.Module | None = model
    while inner is not None and not isinstance(inner, DistributedDataParallel):
        inner = wrapped_module(inner)
    return inner


def check_parallel(model: nn.Module, sharded: bool) -> None:
    """Raise where several processes run and nothing keeps their weights alike."""
    if process_count() > 1 and not sharded and parallel_wrapper(model) is None:
        raise FastforgetError(
            f"{process_count()} processes run, and the model is not in DistributedDataParallel: each would train "
            "weights of its own. Wrap it (step.prepare(accelerator) and UnlearnTrainer do), or shard it by FSDP2 "
            "(torch.distributed.fsdp.fully_shard) before the step is made, or run one process"
        )


@contextlib.contextmanager
def without_buffer_broadcast(model: nn.Module) -> Iterator[None]:
    """Let forwards send no buffers: processes may differ in how many forwards they run."""
    wrapper = parallel_wrapper(model)
    if wrapper is None:
        yield
        return
    before, wrapper.require_forward_param_sync = wrapper.require_forward_param_sync, False
    try:
        yield
    finally:
        wrapper.require_forward_param_sync = before


def sum_counts(counts: LabelCounts, device: torch.device) -> LabelCounts:
    """Return the counts of all processes together."""
    return counts if process_count() == 1 else counts_together(lambda: counts, device)


def counts_together(count: Callable[[], LabelCounts], device: torch.device) -> LabelCounts:
    """Sum what every process counts; an error of one is raised in all."""
    own, error = attempt(count)
    names = [field.name for field in fields(LabelCounts)]
    row = [int(error is not None), *(0 if own is None else getattr(own, name) for name in names)]
    shared = torch.tensor(row, dtype=torch.int64, device=device)
    dist.all_reduce(shared)
    failed, *totals = shared.tolist()
    raise_together(error, failed)
    return LabelCounts(**dict(zip(names, totals, strict=True)))


def run_together(
    model: nn.Module,
    terms: Iterable[str],
    parameters: Sequence[Tensor],
    count: Callable[[], LabelCounts],
    run: Callable[[LabelCounts], UnlearnOutput],
    device: torch.device,
) -> UnlearnOutput:
    """Run this process's part of a batch, and leave in `.grad` what one process with all of it would have.

    As under `DistributedDataParallel` gradients are averaged, so `run` scales its losses with the number of processes;
    within its `no_sync()` they stay this process's own until a later call. FSDP2 averages and postpones by itself.

    Args:
        count: this process's labels.
        run: called with those of all processes; the backward passes.

    Returns:
        The output of the whole batch, the same in every process.

    Raises:
        Exception: that of this process, or FastforgetError with the message of another one.
    """
    counts = counts_together(count, device)
    wrapper = parallel_wrapper(model)
    if wrapper is None:
        with failures_told():
            return sum_outputs(run(counts), terms, device)
    synchronised = wrapper.require_backward_grad_sync
    with wrapper.no_sync(), without_buffer_broadcast(model):
        out, error = attempt(lambda: run(counts))
    failed = torch.tensor(int(error is not None), device=device)
    dist.all_reduce(failed)
    raise_together(error, int(failed))
    assert out is not None
    if synchronised:
        average_gradients(parameters, device)
    return sum_outputs(out, terms, device)


@torch.no_grad()
def average_gradients(parameters: Sequence[Tensor], device: torch.device) -> None:
    """Average `.grad` over the processes; it stays None where no process has one."""
    trained = [parameter for parameter in parameters if parameter.requires_grad]
    present = torch.tensor([parameter.grad is not None for parameter in trained], dtype=torch.int32, device=device)
    dist.all_reduce(present, dist.ReduceOp.MAX)
    given = [parameter for parameter, has in zip(trained, present.tolist(), strict=True) if has]
    for parameter in given:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
    for bucket in buckets([parameter.grad for parameter in given if parameter.grad is not None]):
        shared = torch.cat([gradient.reshape(-1) for gradient in bucket])
        dist.all_reduce(shared)
        shared /= process_count()
        parts = shared.split([gradient.numel() for gradient in bucket])
        for gradient, part in zip(bucket, parts, strict=True):
            gradient.copy_(part.view_as(gradient))


def buckets(gradients: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """Yield gradients that go through an exchange together: of one dtype and device, up to `BUCKET_ELEMENTS`."""
    bucket: list[Tensor] = []
    size = 0
    for gradient in gradients:
        like = bucket and (bucket[0].dtype, bucket[0].device) == (gradient.dtype, gradient.device)
        if bucket and (not like or size + gradient.numel() > BUCKET_ELEMENTS):
            yield bucket
            bucket, size = [], 0
        bucket.append(gradient)
        size += gradient.numel()
    if bucket:
        yield bucket


def sum_outputs(out: UnlearnOutput, terms: Iterable[str], device: torch.device) -> UnlearnOutput:
    """Sum the processes' shares of an output: of a side that one of them lacks it has no terms."""
    if process_count() == 1:
        return out
    names = [*terms]
    nlls = [f"{count_name(side, stream)}_nll" for side, stream in ROLES]

    def values(given: Mapping[str, Tensor], keys: Sequence[str]) -> list[Tensor]:
        return [
            given[key].to(device, torch.float32) if key in given else torch.zeros((), device=device) for key in keys
        ]

    present = [float(name in out.terms) for name in names] + [float(name in out.stats) for name in nlls]
    shared = torch.cat(
        [
            torch.stack(
                [out.loss.detach().to(device, torch.float32), *values(out.terms, names), *values(out.stats, nlls)]
            ),
            torch.tensor(present, device=device),
        ]
    )
    dist.all_reduce(shared)
    loss, *sums = shared[: 1 + len(present)].unbind()
    seen = dict(zip([*names, *nlls], sums, strict=True))
    found = {name for name, count in zip([*names, *nlls], shared[1 + len(present) :].tolist(), strict=True) if count}
    return UnlearnOutput(
        loss=loss,
        terms={name: seen[name] for name in names if name in found},
        stats={name: seen[name] for name in nlls if name in found},
    )
