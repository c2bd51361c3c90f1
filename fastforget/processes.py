"""Several processes, each with a part of the batch: counts, gradients and errors that all of them share.

In `DistributedDataParallel` a reducer runs where a loss is differentiated by the user. Within a step it is bypassed: a
process may have no label of a side and so no forward of it, a forward may end at a layer and leave weights without a
gradient, and either would leave the reducer waiting. Instead every process takes part in the same exchanges of each
`backward`, whatever its part of the batch holds: of counts before it, of gradients behind it, and between them of the
constants that terms take from a batch (KTO's). Under FSDP2 forwards and backwards are exchanges themselves, of which
all processes have as many (`shards.py`).
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import fields
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from fastforget.backbone import Backbone
from fastforget.batch import ROLES, LabelCounts, count_name
from fastforget.collectives import agreed, attempt, failures_told, process_count, raise_together, sum_by_name
from fastforget.combine import Agree, Average, alone
from fastforget.errors import FastforgetError
from fastforget.head import wrapped_module
from fastforget.output import UnlearnOutput
from fastforget.shards import postpones_gradients

BUCKET_ELEMENTS = 2**24  # of gradients that go through one exchange: a second copy of so many is in memory


def parallel_wrapper(model: nn.Module) -> DistributedDataParallel | None:
    """Return the `DistributedDataParallel` among a model's wrappers."""
    inner: nn.Module | None = model
    while inner is not None and not isinstance(inner, DistributedDataParallel):
        inner = wrapped_module(inner)
    return inner


def check_parallel(model: nn.Module, backbone: Backbone, combine: str, micro_batch: Any) -> None:
    """Raise where several processes run and nothing keeps their weights alike, or for what they cannot do."""
    if process_count() == 1:
        return
    if micro_batch == "auto" and (backbone.sharded or backbone.shares_batches):
        raise FastforgetError(
            "micro_batch='auto' does not work where weights are sharded (FSDP2, tensor parallelism): a process whose "
            "memory runs out leaves the others in the middle of an exchange. Give a number"
        )
    if backbone.sharded and combine != "sum" and postpones_gradients(model):
        raise FastforgetError(
            f"combine={combine!r} needs the gradients of each side, and FSDP2 adds them up where it does not exchange "
            "them: leave set_requires_gradient_sync(False) out"
        )
    if not backbone.sharded and not backbone.shares_batches and parallel_wrapper(model) is None:
        raise FastforgetError(
            f"{process_count()} processes run, and the model is not in DistributedDataParallel: each would train "
            "weights of its own. Wrap it (step.prepare(accelerator) and UnlearnTrainer do), or shard it by FSDP2 "
            "(torch.distributed.fsdp.fully_shard) before the step is made, or run one process"
        )


def accelerated(
    accelerator: Any, model: nn.Module, optimizer: torch.optim.Optimizer
) -> tuple[nn.Module, torch.optim.Optimizer]:
    """Return a model and its optimizer as an `accelerate.Accelerator` wraps them.

    Raises:
        FastforgetError: it would shard the model otherwise than by FSDP2.
    """
    kind = accelerator.distributed_type.value
    if kind == "FSDP" and accelerator.is_fsdp2:
        return accelerator.prepare(model, optimizer)  # FSDP2 puts shards into both at once
    if kind in ("FSDP", "DEEPSPEED", "MEGATRON_LM"):
        name = "FSDP (version 1)" if kind == "FSDP" else kind
        raise FastforgetError(
            f"Accelerate's {name} is not supported (docs/loop.md says what was tried): let it shard by FSDP2 "
            "(FullyShardedDataParallelPlugin(fsdp_version=2)), or shard the model by "
            "torch.distributed.fsdp.fully_shard, make the step over the shards, and leave prepare out"
        )
    return accelerator.prepare_model(model), accelerator.prepare_optimizer(optimizer)


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
    count: Callable[[], LabelCounts],
    run: Callable[[LabelCounts], UnlearnOutput],
    finish: Callable[[Average | None, Agree], None],
    device: torch.device,
) -> UnlearnOutput:
    """Run this process's part of a batch, and leave in `.grad` what one process with all of it would have.

    As under `DistributedDataParallel` gradients are averaged, so `run` scales its losses with the number of processes;
    within its `no_sync()` they stay this process's own until a later call. FSDP2 averages and postpones by itself.

    Args:
        count: this process's labels.
        run: called with those of all processes; the backward passes.
        finish: called behind them, with what averages gradients over the processes, where that is due, and with
            `agreed` (`SideGradients.finish`).

    Returns:
        The output of the whole batch, the same in every process.

    Raises:
        Exception: that of this process, or FastforgetError with the message of another one.
    """
    counts = counts_together(count, device)
    wrapper = parallel_wrapper(model)
    if wrapper is None:
        with failures_told():
            out = run(counts)
            finish(None, alone)
            return sum_outputs(out, terms, device)
    synchronised = wrapper.require_backward_grad_sync
    with wrapper.no_sync(), without_buffer_broadcast(model):
        out = agreed(lambda: run(counts), device)
    averages = functools.partial(average, device=device) if synchronised else None
    finish(averages, functools.partial(agreed, device=device))
    return sum_outputs(out, terms, device)


@torch.no_grad()
def average(
    parameters: Sequence[Tensor], gradients: Sequence[Tensor | None], device: torch.device
) -> list[Tensor | None]:
    """Average parameters' gradients over the processes, in place; None where no process has one."""
    present = torch.tensor([gradient is not None for gradient in gradients], dtype=torch.int32, device=device)
    dist.all_reduce(present, dist.ReduceOp.MAX)
    filled = [
        torch.zeros_like(parameter) if gradient is None and has else gradient
        for parameter, gradient, has in zip(parameters, gradients, present.tolist(), strict=True)
    ]
    for bucket in buckets([gradient for gradient in filled if gradient is not None]):
        shared = torch.cat([gradient.reshape(-1) for gradient in bucket])
        dist.all_reduce(shared)
        shared /= process_count()
        parts = shared.split([gradient.numel() for gradient in bucket])
        for gradient, part in zip(bucket, parts, strict=True):
            gradient.copy_(part.view_as(gradient))
    return filled


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
    nlls = [f"{count_name(side, stream)}_nll" for side, stream in ROLES]
    names = [*(f"term {name}" for name in terms), *(f"stat {name}" for name in nlls)]  # each may be called as another
    own = {f"term {name}": value for name, value in out.terms.items()}
    own |= {f"stat {name}": value for name, value in out.stats.items()}
    sums = sum_by_name({"loss": out.loss.detach(), **own}, ["loss", *names], device)
    return UnlearnOutput(
        loss=sums.pop("loss"),
        terms={name.removeprefix("term "): value for name, value in sums.items() if name.startswith("term ")},
        stats={name.removeprefix("stat "): value for name, value in sums.items() if name.startswith("stat ")},
    )
