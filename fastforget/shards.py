"""Weights in shards: FSDP2's (`torch.distributed.fsdp.fully_shard`), of which each process holds a part.

Forward and backward of such a model are made of exchanges in which all processes take part, in the same order. So they
go through a step in lockstep: all have as many forwards of each kind, of which a process without labels for one fills
its place (`Backbone.fill_in`), and one that finds the reference's answers in its cache computes with those that do not.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from fastforget.collectives import has_group, process_count
from fastforget.errors import FastforgetError

Part = TypeVar("Part")


def is_sharded(model: nn.Module) -> bool:
    """Tell whether FSDP2 shards the model, or a module of it."""
    if not has_group():
        return False
    from torch.distributed.fsdp import FSDPModule

    return any(isinstance(module, FSDPModule) for module in model.modules())


def is_shard(tensor: Tensor) -> bool:
    """Tell whether a tensor is a DTensor, of which this process may hold a part."""
    if not has_group():
        return False
    from torch.distributed.tensor import DTensor

    return isinstance(tensor, DTensor)


def local(tensor: Tensor) -> Tensor:
    """Return this process's part of a DTensor, which does not require a gradient; any other tensor as it is."""
    if not is_shard(tensor):
        return tensor
    with torch.no_grad():  # so it is the tensor itself, whose version counts, and no view of it
        return tensor.to_local()  # type: ignore[attr-defined]


def whole(tensor: Tensor) -> Tensor:
    """Gather all parts of a weight, in every process; the gradient of each part is the mean over the processes.

    All of them must call it, and so they must its backward pass.
    """
    if not is_shard(tensor):
        return tensor
    from torch.distributed.tensor import DTensor, Partial

    assert isinstance(tensor, DTensor)
    gathered = tensor.full_tensor(grad_placements=[Partial()] * tensor.device_mesh.ndim)
    if gathered.requires_grad:
        gathered.register_hook(lambda gradient: gradient / process_count())
    return gathered


def sum_of_parts(own: Tensor, like: Tensor) -> Tensor:
    """Sum a number () of each process over those that hold parts of one DTensor; replicas count once."""
    from torch.distributed.tensor import DTensor, Partial, Replicate

    assert isinstance(like, DTensor)
    placements = [Replicate() if each.is_replicate() else Partial() for each in like.placements]
    return DTensor.from_local(own, like.device_mesh, placements).full_tensor()


def postpones_gradients(model: nn.Module) -> bool:
    """Tell whether FSDP2 keeps this backward pass's gradients to itself (`set_requires_gradient_sync(False)`)."""
    return any(not group.reduce_grads for group in sharded_groups(model))


def sharded_groups(model: nn.Module) -> Iterator[Any]:
    """Yield what FSDP2 knows of each group of parameters that it gathers together."""
    from torch.distributed.fsdp import FSDPModule

    for module in model.modules():
        if isinstance(module, FSDPModule):
            state: Any = module._get_fsdp_state()
            groups = getattr(state, "_fsdp_param_groups", None) or [state._fsdp_param_group]  # older: one
            yield from (group for group in groups if group is not None)


def reshard(model: nn.Module) -> None:
    """Free the weights that FSDP2 left gathered: those of a root, after a forward that no backward followed.

    The next forward would take them as they are, whatever the optimizer has made of the shards.
    """
    if is_sharded(model):
        from torch.distributed.fsdp import FSDPModule

        for module in model.modules():
            if isinstance(module, FSDPModule):
                module.reshard()


def check_engine(*given: Any) -> None:
    """Raise for a model or an optimizer of DeepSpeed.

    It takes gradients away as soon as they are there, steps within its own `backward`, and at stage 3 leaves weights
    empty but for the layer that runs.

    Raises:
        FastforgetError: one of these is DeepSpeed's, or wraps or holds something that is.
    """
    for each in given:
        parameters = list(each.parameters()) if isinstance(each, nn.Module) else []
        if type(each).__module__.startswith("deepspeed.") or any(hasattr(own, "ds_id") for own in parameters):
            raise FastforgetError(
                "DeepSpeed keeps gradients, and at stage 3 weights, to itself, where no step or loss can reach them: "
                "shard by FSDP2 (torch.distributed.fsdp.fully_shard, or Accelerate with "
                "FullyShardedDataParallelPlugin(fsdp_version=2)), or use DistributedDataParallel"
            )


def check_shards(model: nn.Module) -> None:
    """Raise where a step over the shards of a model would be wrong.

    Raises:
        FastforgetError: FSDP1; shards on the CPU; a quantised weight; a weight that trains and is not sharded over all
            processes by FSDP2 alone.
    """
    if not has_group():
        return
    from torch.distributed.fsdp import CPUOffloadPolicy, FullyShardedDataParallel
    from torch.distributed.tensor import DTensor

    if any(isinstance(module, FullyShardedDataParallel) for module in model.modules()):
        raise FastforgetError(
            "FullyShardedDataParallel (FSDP1) flattens weights, the head's too, which cannot be read: shard the model "
            "by FSDP2 (torch.distributed.fsdp.fully_shard)"
        )
    if not is_sharded(model):
        return
    if any(isinstance(group.offload_policy, CPUOffloadPolicy) for group in sharded_groups(model)):
        raise FastforgetError(
            "FSDP2's CPUOffloadPolicy is not supported: the head, and norms of gradients, would be gathered from parts "
            "on the CPU, and sweeps run on another device; leave the policy out"
        )
    for name, module in model.named_modules():
        if type(module).__module__.startswith("bitsandbytes."):
            raise FastforgetError(
                f"{name} is quantised, and FSDP2 would shard its codes without their scales: load the base in 16 or 32 "
                "bit (fastforget.load(..., bits=16)), or keep it whole under DistributedDataParallel"
            )
    for name, parameter in model.named_parameters():
        if not isinstance(parameter, DTensor):
            if parameter.requires_grad:
                raise FastforgetError(
                    f"{name} trains, and FSDP2 does not shard it, so nothing would keep it alike in all processes: "
                    "call fully_shard on the whole model too, before making the step"
                )
            continue
        *outer, inner = parameter.placements
        if not inner.is_shard() or not all(each.is_replicate() for each in outer):
            raise FastforgetError(
                f"{name} is placed as {parameter.placements}: FSDP2 shards over the last dimension of a mesh, and "
                "together with tensor or expert parallelism it is not supported"
            )
        if parameter.device_mesh.size() != process_count():
            raise FastforgetError(
                f"{name} is sharded over {parameter.device_mesh.size()} of {process_count()} processes: a step counts "
                "labels and averages gradients over all of them, so use a mesh of all"
            )


def fill_up(parts_of: Sequence[Sequence[Part]], filler: Part, device: torch.device) -> list[list[Part]]:
    """Return each forward's parts, and fillers behind them up to as many as any process has."""
    lengths = torch.tensor([len(parts) for parts in parts_of], dtype=torch.int64, device=device)
    dist.all_reduce(lengths, dist.ReduceOp.MAX)
    return [
        [*parts, *[filler] * (length - len(parts))] for parts, length in zip(parts_of, lengths.tolist(), strict=True)
    ]
