"""Processes under DistributedDataParallel are one: losses, weights and scalars; and an error ends all."""

import os

import pytest
import torch
import torch.distributed as dist
from accelerate.state import AcceleratorState
from helpers import adapter_of, assert_gradients, load_perturbed, make_batch, same
from integrations.loops import flat, rows
from processes import five_steps, in_processes, messages_of, micro_batches
from torch.nn.parallel import DistributedDataParallel
from transformers import TrainingArguments

import fastforget as ff
from fastforget.collectives import failures_told

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="forks, which autograd's threads for GPUs forbid")

TERMS = [ff.NPO(weight=0.5), ff.DualCE(), ff.KL(weight=0.7)]


def train(rank, folder, passes):
    model = load_perturbed(folder)
    step = ff.UnlearnStep(DistributedDataParallel(model), torch.optim.AdamW, terms=TERMS, lr=1e-3, passes=passes)
    losses, scalars = five_steps(step, lambda number: micro_batches(number, rank))
    return adapter_of(model), losses, scalars


@pytest.mark.parametrize("count, passes", [(2, "sequential"), (2, "joint"), (4, "sequential")])
def test_five_steps_of_processes_are_those_of_one(count, passes, tiny, tmp_path):
    (weights, losses, scalars), *others = in_processes(tmp_path, count, train, tiny["llama"], passes)
    model = load_perturbed(tiny["llama"])
    step = ff.UnlearnStep(model, torch.optim.AdamW, terms=TERMS, lr=1e-3)
    expected, expected_scalars = five_steps(
        step, lambda number: [batch for rank in range(count) for batch in micro_batches(number, rank)]
    )
    assert losses == pytest.approx(expected, rel=1e-5)
    assert scalars == pytest.approx(expected_scalars, rel=1e-5)
    assert len(scalars) > 1 and scalars["unlearn_steps"] == 5
    assert_gradients(weights, adapter_of(model))
    for other, other_losses, other_scalars in others:
        assert other_losses == losses and other_scalars == scalars
        assert same(other, weights), "the processes' weights are the same to the bit"


def clip_all(rank, folder):
    model = load_perturbed(folder)
    trained, *others = (parameter for parameter in model.parameters() if parameter.requires_grad)
    step = ff.UnlearnStep(
        DistributedDataParallel(model), torch.optim.SGD, terms=[ff.NegatedCE()], lr=0.1, params=[trained]
    )
    step.backward(make_batch(2, 1 + rank))
    return float(torch.nn.utils.clip_grad_norm_([trained, *others], 0.01)), trained.grad


def test_weights_that_no_optimizer_holds_have_gradients_that_are_averaged_too(tiny, tmp_path):
    (norm, gradient), (other_norm, other) = in_processes(tmp_path, 2, clip_all, tiny["llama"])
    assert norm == other_norm and torch.equal(gradient, other), "clipping gives all processes the same gradient"


def train_to_a_layer(rank, folder):
    model = load_perturbed(folder)
    terms = ff.preset("rmu", layer=0, alpha=3.0)
    step = ff.UnlearnStep(DistributedDataParallel(model), torch.optim.SGD, terms=terms, lr=1e-3)
    for number in range(2):
        out = step(make_batch(2 + rank, 7 + number + rank), make_batch(2, 20 + number + rank))
    moved = {name: value.grad for name, value in model.named_parameters() if value.requires_grad}
    return adapter_of(model), float(out.loss), all(gradient is None for gradient in moved.values())


def test_forwards_that_end_at_a_layer_leave_weights_without_a_gradient(tiny, tmp_path):
    (weights, loss, cleared), (other, other_loss, _) = in_processes(tmp_path, 2, train_to_a_layer, tiny["llama"])
    untrained = adapter_of(load_perturbed(tiny["llama"]))
    moved = {name for name in weights if not torch.equal(weights[name], untrained[name])}
    assert moved and all(".layers.0." in name for name in moved) and cleared and loss == other_loss
    assert all(torch.equal(weights[name], other[name]) for name in weights)


def fail(rank, folder):
    model = load_perturbed(folder)
    step = ff.UnlearnStep(DistributedDataParallel(model), torch.optim.SGD, terms=[ff.NegatedCE()], lr=0.1)
    messages = []
    handle = model.register_forward_hook(lambda *_: 1 / 0) if rank == 1 else None
    for batch in (make_batch(2, 1), {"input_ids": torch.ones(1, 2)} if rank == 0 else make_batch(2, 1)):
        try:
            step.backward(batch)
        except (ff.FastforgetError, ZeroDivisionError) as error:
            messages.append(f"{type(error).__name__}: {error}")
        if handle is not None:
            handle.remove()
        assert all(parameter.grad is None for parameter in model.parameters())
    step(make_batch(2, 1 + rank))
    return messages, adapter_of(model)


def test_an_error_of_one_process_ends_all_with_its_message(tiny, tmp_path):
    (first, weights), (second, other) = in_processes(tmp_path, 2, fail, tiny["llama"])
    assert second[0] == "ZeroDivisionError: division by zero"
    assert (
        first[0] == "ProcessFailedError: process 1 failed, so this one stops too: ZeroDivisionError: division by zero"
    )
    assert "it has no 'labels'" in first[1] and second[1].startswith("ProcessFailedError: process 0 failed")
    assert all(torch.equal(weights[name], other[name]) for name in weights), "and a step after it is one again"


def fail_alike(rank):
    if rank == 1:
        dist.barrier()  # the other one has failed by now
    with pytest.raises(ff.NonFiniteLossError) as error, failures_told():
        raise ff.NonFiniteLossError(f"found by {rank}")
    if rank == 0:
        dist.barrier()
    return str(error.value)


def test_an_error_that_all_have_is_the_own_one_of_each(tmp_path):
    assert in_processes(tmp_path, 2, fail_alike) == ["found by 0", "found by 1"]


def refused(rank, folder):
    model = load_perturbed(folder)
    wrapped = DistributedDataParallel(model)
    attempts = {
        "unwrapped": lambda: ff.UnlearnStep(model, torch.optim.SGD, terms="npo", lr=0.1).backward(make_batch(2, 1)),
        "loss": lambda: ff.UnlearnLoss(wrapped, [ff.NegatedCE()])(make_batch(2, 1)),
        "auto": lambda: ff.UnlearnStep(wrapped, torch.optim.SGD, terms="npo", lr=0.1)(
            make_batch(2, 1), make_batch(2, 1), micro_batch="auto"
        ),
        "combine": lambda: ff.UnlearnStep(wrapped, torch.optim.SGD, terms="npo", lr=0.1, combine="pcgrad")(
            make_batch(2, 1), make_batch(2, 1)
        ),
    }
    return messages_of(attempts)


def test_what_several_processes_cannot_do_is_said(tiny, tmp_path):
    for messages in in_processes(tmp_path, 2, refused, tiny["llama"]):
        assert "the model is not in DistributedDataParallel" in messages["unwrapped"]
        assert "UnlearnLoss knows only this one's labels" in messages["loss"]
        assert messages["auto"].startswith("micro_batch='auto' does not work over several processes")
        assert messages["combine"].startswith("combine='pcgrad' does not work over several processes")


def evaluate(rank, folder, out):
    AcceleratorState._reset_state(True)  # of this process's parent
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    options = {"per_device_eval_batch_size": 2, "use_cpu": True, "report_to": [], "disable_tqdm": True}
    trainer = ff.UnlearnTrainer(
        load_perturbed(folder),
        TrainingArguments(str(out), **options),
        terms=[ff.NegatedCE(), ff.CE(), ff.KL()],
        forget_dataset=rows(2, 1),
        eval_dataset=EVALUATED,
    )
    assert trainer.accelerator.num_processes == 2
    return {name: value for name, value in trainer.evaluate().items() if name.endswith(("loss", "ce", "kl", "nll"))}


EVALUATED = (rows(4, 5), rows(1, 6))  # the last round of two processes with two rows each has one row


def test_rows_that_fill_up_the_last_batches_are_not_evaluated_twice(tiny, tmp_path):
    first, second = in_processes(tmp_path, 2, evaluate, tiny["llama"], tmp_path)
    assert first == second
    loss = ff.UnlearnLoss(load_perturbed(tiny["llama"]), [ff.NegatedCE(), ff.CE(), ff.KL()])
    with torch.no_grad():
        out = loss(flat(*EVALUATED))
    expected = {"loss": out.loss, **out.terms, **out.stats}
    assert first == pytest.approx({f"eval_{name}": float(value) for name, value in expected.items()}, rel=1e-5)
