"""`step.prepare(accelerator)` where Accelerate shards by FSDP2: the weights of one process, and its checkpoints."""

import copy
import os
from types import SimpleNamespace

import accelerate
import pytest
import torch
from accelerate import DistributedType
from accelerate.state import AcceleratorState, GradientState, PartialState
from accelerate.utils import FullyShardedDataParallelPlugin
from helpers import adapter_of, assert_gradients, load_perturbed, same, tiny_model
from integrations.loops import GRAD_DIFF, flat, grad_diff, replay, rows
from integrations.test_trainer import Recording, arguments
from processes import in_processes, micro_batches

import fastforget as ff
from fastforget.shards import whole

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="forks, which autograd's threads for GPUs forbid")


def begin(rank):
    """Let Accelerate see one of two processes."""
    AcceleratorState._reset_state(True)  # of this process's parent
    GradientState._reset_state()
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}


def let_shard(accelerator):
    """An accelerator as it is on GPUs; on a CPU it takes no notice of the plugin by itself."""
    accelerator.state.distributed_type = DistributedType.FSDP
    PartialState._shared_state["distributed_type"] = DistributedType.FSDP
    accelerator.state.fsdp_plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2, auto_wrap_policy="transformer_based_wrap", cpu_ram_efficient_loading=False
    )
    return accelerator


def made(kind, folder):
    """A step with an adapter, whose forwards may end at a layer, or over all weights, the head's too."""
    if kind == "full":
        model = tiny_model("llama").train()
        terms, options = [ff.NPO(weight=0.5, beta=0.5), ff.CE()], {"lr": 0.05, "momentum": 0.9}
        reference = copy.deepcopy(model).requires_grad_(False)
        return ff.UnlearnStep(model, torch.optim.SGD, terms=terms, reference=reference, **options)
    terms = {"adapter": [ff.NPO(weight=0.5), ff.DualCE(), ff.KL(weight=0.7)], "layer": ff.preset("rmu", layer=0)}[kind]
    return ff.UnlearnStep(load_perturbed(folder), torch.optim.AdamW, terms=terms, lr=1e-3)


def train(rank, folder, kind, state):
    """Losses and weights after steps, of which the last two come again from a checkpoint.

    Where forwards end at a layer AdamW has no state of the weights behind it, and PyTorch's loader wants one.
    """
    begin(rank)
    accelerator = let_shard(accelerate.Accelerator(cpu=True, gradient_accumulation_steps=2))
    step = made(kind, folder)
    step.prepare(accelerator)

    def take(number):
        batches = micro_batches(number, rank)
        counts, loss = ff.count_labels(batches), 0.0
        for batch in batches:
            with accelerator.accumulate(step.model):
                loss += float(step.backward(batch, counts=counts).loss)
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(step.model.parameters(), 1.0)
                step.step()
                step.zero_grad()
        return loss

    losses = [take(number) for number in range(3)]
    if kind != "layer":
        accelerator.save_state(state)
    losses += [take(number) for number in (3, 4)]
    weights = {name: whole(tensor) for name, tensor in adapter_of(step.model).items()}
    if kind == "layer":
        return weights, losses
    accelerator.load_state(state)
    again = [take(number) for number in (3, 4)]
    assert again == losses[3:] and step.param_groups[0]["unlearn_steps"] == 5
    assert same({name: whole(tensor) for name, tensor in adapter_of(step.model).items()}, weights)
    return weights, losses


@pytest.mark.parametrize("kind", ["adapter", "layer", "full"])
def test_accelerates_shards_end_with_the_weights_of_one_process(kind, tiny, tmp_path):
    results = in_processes(tmp_path, 2, train, tiny["llama"], kind, tmp_path / "state")
    step, expected = made(kind, tiny["llama"]), []
    for number in range(5):
        batches = [batch for rank in (0, 1) for batch in micro_batches(number, rank)]
        counts = ff.count_labels(batches)
        expected.append(sum(float(step.backward(batch, counts=counts).loss) for batch in batches))
        torch.nn.utils.clip_grad_norm_(step.model.parameters(), 1.0)
        step.step()
        step.zero_grad()
    for weights, losses in results:
        assert losses == pytest.approx(expected, rel=1e-5)
        assert_gradients(weights, adapter_of(step.model))


EVALUATED = (rows(3, 5), rows(2, 6))


def train_by_trainer(rank, folder, out):
    begin(rank)
    model = load_perturbed(folder)
    sets = {"forget_dataset": rows(8, 1), "retain_dataset": rows(9, 2), "eval_dataset": EVALUATED}
    trainer = Recording(model, arguments(out, per_device_train_batch_size=1, max_steps=3), terms=GRAD_DIFF, **sets)
    let_shard(trainer.accelerator)
    trainer.is_fsdp_enabled = True
    trainer.train()
    losses = [log["loss"] for log in trainer.state.log_history if "loss" in log]
    weights = {name: whole(tensor) for name, tensor in adapter_of(model).items()}
    return trainer.groups, weights, losses, trainer.evaluate()["eval_loss"]


def test_a_trainer_over_accelerates_shards(tiny, tmp_path):
    first, second = in_processes(tmp_path, 2, train_by_trainer, tiny["llama"], tmp_path / "out")
    groups, weights, losses, evaluated = first
    joined = [[*own, *other] for own, other in zip(groups, second[0], strict=True)]
    expected, expected_losses = replay(tiny["llama"], joined)
    assert_gradients(weights, adapter_of(expected))
    assert losses == pytest.approx(expected_losses, rel=1e-5)
    with torch.no_grad():
        assert evaluated == pytest.approx(float(grad_diff(expected, [flat(*EVALUATED)])), rel=1e-5)


class Engine(torch.nn.Module):
    """A wrapper as DeepSpeed's, whose `config` is no model's."""

    __module__ = "deepspeed.runtime.engine"

    def __init__(self, module):
        super().__init__()
        self.module, self.config = module, {"zero_optimization": {"stage": 2}}


class PartitioningOptimizer:
    __module__ = "deepspeed.runtime.zero.stage_1_and_2"


def test_deepspeed_is_refused_before_the_first_forward(model):
    engine = Engine(model)
    for act in (
        lambda: ff.UnlearnStep(engine, torch.optim.SGD, terms="npo", lr=0.1),
        lambda: ff.UnlearnLoss(engine, "npo"),
        lambda: ff.UnlearnStep(model, PartitioningOptimizer(), terms="npo"),
        lambda: ff.UnlearnStep(model, torch.optim.SGD, terms="npo", lr=0.1).attach(engine),
    ):
        with pytest.raises(ff.FastforgetError, match="DeepSpeed keeps gradients, and at stage 3 weights, to itself"):
            act()
    next(model.parameters()).ds_id = 0  # stage 3, within `zero.Init`
    with pytest.raises(ff.FastforgetError, match="DeepSpeed keeps gradients"):
        ff.UnlearnLoss(model, "npo")


@pytest.mark.parametrize("kind", ["FSDP", "DEEPSPEED", "MEGATRON_LM"])
def test_other_ways_to_shard_are_refused(model, kind):
    step = ff.UnlearnStep(model, torch.optim.SGD, terms="npo", lr=0.1)
    accelerator = SimpleNamespace(distributed_type=DistributedType[kind], is_fsdp2=False)
    with pytest.raises(ff.FastforgetError, match=f"Accelerate's {kind}.* is not supported"):
        step.prepare(accelerator)
