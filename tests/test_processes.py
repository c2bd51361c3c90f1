"""Two processes under DistributedDataParallel are one: losses, weights and scalars; and an error ends both."""

import contextlib
import multiprocessing
import os
import traceback

import pytest
import torch
import torch.distributed as dist
from accelerate.state import AcceleratorState
from helpers import adapter_of, load_perturbed, make_batch
from integrations.loops import flat, rows
from torch.nn.parallel import DistributedDataParallel
from transformers import TrainingArguments

import fastforget as ff

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="forks, which autograd's threads for GPUs forbid")

TERMS = [ff.NPO(weight=0.5), ff.DualCE(), ff.KL(weight=0.7)]


def start(rank, work, folder, arguments):
    """A child's whole life; what `work` returns, or its traceback, goes into a file."""
    store = dist.FileStore(str(folder / "store"), 2)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=2)
    try:
        result = work(rank, *arguments)
    except BaseException:
        result = traceback.format_exc()
    torch.save(result, folder / f"{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture
def in_two_processes(tmp_path):
    """in_two_processes(work, ...) -> [work(0, ...), work(1, ...)], each run in a process of its own."""

    def run(work, *arguments):
        # forked: nothing is imported again, and the tests run with one thread
        context = multiprocessing.get_context("fork")
        children = [context.Process(target=start, args=(rank, work, tmp_path, arguments)) for rank in range(2)]
        for child in children:
            child.start()
        for child in children:
            child.join(60)
            hung = child.is_alive()
            if hung:
                child.kill()
            assert not hung, "a process hangs"
        results = [torch.load(tmp_path / f"{rank}.pt", weights_only=False) for rank in range(2)]
        for result in results:
            assert not isinstance(result, str), result
        return results

    return run


def micro_batches(step, rank):
    """Two of each step and process, of uneven counts; in some a process has no forget rows, or no label at all."""
    first, second = (100 * step + 10 * rank, 100 * step + 10 * rank + 5)
    forgets = 0 if rank == 1 and step in (1, 3) else 2 - rank
    batches = [
        flat(rows(forgets, first), rows(1 + rank, first + 1)),
        flat(rows(forgets, second), rows(2, second + 1)),
    ]
    if rank == 1 and step == 3:
        for batch in batches:
            batch["labels"] = torch.full_like(batch["labels"], -100)
    return batches


def five_steps(step, batches_of):
    losses = []
    for number in range(5):
        batches = batches_of(number)
        counts = ff.count_labels(batches)
        loss = 0.0
        for place, batch in enumerate(batches):
            apart = getattr(step.model, "no_sync", contextlib.nullcontext)
            with apart() if place < len(batches) - 1 else contextlib.nullcontext():
                loss += float(step.backward(batch, counts=counts).loss)
        step.step()
        step.zero_grad()
        losses.append(loss)
    scalars = {k: float(v) for k, v in step.param_groups[0].items() if k.startswith("unlearn_")}
    return losses, scalars


def train(rank, folder):
    model = load_perturbed(folder)
    step = ff.UnlearnStep(DistributedDataParallel(model), torch.optim.AdamW, terms=TERMS, lr=1e-3)
    losses, scalars = five_steps(step, lambda number: micro_batches(number, rank))
    return adapter_of(model), losses, scalars


def test_five_steps_of_two_processes_are_those_of_one(tiny, in_two_processes):
    (weights, losses, scalars), (other, other_losses, other_scalars) = in_two_processes(train, tiny["llama"])
    model = load_perturbed(tiny["llama"])
    step = ff.UnlearnStep(model, torch.optim.AdamW, terms=TERMS, lr=1e-3)
    expected, expected_scalars = five_steps(step, lambda number: micro_batches(number, 0) + micro_batches(number, 1))
    assert losses == other_losses == pytest.approx(expected, rel=1e-5)
    assert scalars == other_scalars == pytest.approx(expected_scalars, rel=1e-5)
    assert len(scalars) > 1 and scalars["unlearn_steps"] == 5
    for name, value in adapter_of(model).items():
        assert torch.equal(weights[name], other[name]), "the processes' weights are the same to the bit"
        assert float((weights[name] - value).norm()) <= 1e-5 * float(value.norm()), name


def train_to_a_layer(rank, folder):
    model = load_perturbed(folder)
    terms = ff.preset("rmu", layer=0, alpha=3.0)
    step = ff.UnlearnStep(DistributedDataParallel(model), torch.optim.SGD, terms=terms, lr=1e-3)
    for number in range(2):
        out = step(make_batch(2 + rank, 7 + number + rank), make_batch(2, 20 + number + rank))
    moved = {name: value.grad for name, value in model.named_parameters() if value.requires_grad}
    return adapter_of(model), float(out.loss), all(gradient is None for gradient in moved.values())


def test_forwards_that_end_at_a_layer_leave_weights_without_a_gradient(tiny, in_two_processes):
    (weights, loss, cleared), (other, other_loss, _) = in_two_processes(train_to_a_layer, tiny["llama"])
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


def test_an_error_of_one_process_ends_all_with_its_message(tiny, in_two_processes):
    (first, weights), (second, other) = in_two_processes(fail, tiny["llama"])
    assert second[0] == "ZeroDivisionError: division by zero"
    assert first[0] == "FastforgetError: process 1 failed, so this one stops too: ZeroDivisionError: division by zero"
    assert "it has no 'labels'" in first[1] and second[1].startswith("FastforgetError: process 0 failed")
    assert all(torch.equal(weights[name], other[name]) for name in weights), "and a step after it is one again"


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
    messages = {}
    for name, attempt in attempts.items():
        with pytest.raises(ff.FastforgetError) as error:
            attempt()
        messages[name] = str(error.value)
    return messages


def test_what_several_processes_cannot_do_is_said(tiny, in_two_processes):
    for messages in in_two_processes(refused, tiny["llama"]):
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


def test_rows_that_fill_up_the_last_batches_are_not_evaluated_twice(tiny, tmp_path, in_two_processes):
    first, second = in_two_processes(evaluate, tiny["llama"], tmp_path)
    assert first == second
    loss = ff.UnlearnLoss(load_perturbed(tiny["llama"]), [ff.NegatedCE(), ff.CE(), ff.KL()])
    with torch.no_grad():
        out = loss(flat(*EVALUATED))
    expected = {"loss": out.loss, **out.terms, **out.stats}
    assert first == pytest.approx({f"eval_{name}": float(value) for name, value in expected.items()}, rel=1e-5)
