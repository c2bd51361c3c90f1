"""Processes with shards of one model (FSDP2) are one: losses, gradients, weights and scalars."""

import pytest
import torch
from helpers import adapter_of, load_perturbed, stack_of
from processes import five_steps, in_processes, micro_batches
from torch.distributed.fsdp import fully_shard

import fastforget as ff
from fastforget.shards import whole

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="forks, which autograd's threads for GPUs forbid")

TERMS = [ff.NPO(weight=0.5), ff.DualCE(), ff.KL(weight=0.7)]


def shard(model):
    for layer in stack_of(model):
        fully_shard(layer)
    return fully_shard(model)


def whole_of(tensors):
    return {name: whole(tensor) for name, tensor in tensors.items()}


def train(rank, folder):
    model = shard(load_perturbed(folder))
    step = ff.UnlearnStep(model, torch.optim.AdamW, terms=TERMS, lr=1e-3)
    losses, scalars = five_steps(step, lambda number: micro_batches(number, rank))
    return whole_of(adapter_of(model)), losses, scalars, step.loss.reference.forwards


@pytest.mark.parametrize("count", [2, 4])
def test_five_steps_over_shards_are_those_of_one_process(count, tiny, tmp_path):
    results = in_processes(tmp_path, count, train, tiny["llama"])
    model = load_perturbed(tiny["llama"])
    step = ff.UnlearnStep(model, torch.optim.AdamW, terms=TERMS, lr=1e-3)
    expected, expected_scalars = five_steps(
        step, lambda number: [batch for rank in range(count) for batch in micro_batches(number, rank)]
    )
    for weights, losses, scalars, _ in results:
        assert losses == results[0][1] == pytest.approx(expected, rel=1e-5)
        assert scalars == results[0][2] == pytest.approx(expected_scalars, rel=1e-5)
        for name, value in adapter_of(model).items():
            assert float((weights[name] - value).norm()) <= 1e-5 * float(value.norm()), name
