"""Processes under DistributedDataParallel are one: losses, weights and scalars; and an error ends all."""

import os
import weakref

import pytest
import torch
import torch.distributed as dist
from accelerate.state import AcceleratorState
from helpers import adapter_of, assert_gradients, gradients, load_perturbed, make_batch, same, stack_of
from integrations.loops import flat, rows
from processes import calls_with_mismatched, five_steps, in_processes, merged, messages_of, micro_batches
from torch.nn.parallel import DistributedDataParallel
from transformers import TrainingArguments

import fastforget as ff
import fastforget.combine as combine_module
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


OTHERS = {  # terms, how their sides are combined, and what a process has for each step
    "mgda": (TERMS, "mgda", micro_batches),
    "pcgrad": (TERMS, "pcgrad", micro_batches),
    "kto": ([ff.KTO(beta=0.5), ff.CE()], "sum", calls_with_mismatched),
}


def train_others(rank, folder):
    found = {}
    for name, (terms, combine, calls) in OTHERS.items():
        model = load_perturbed(folder)
        wrapped = DistributedDataParallel(model)
        step = ff.UnlearnStep(wrapped, torch.optim.AdamW, terms=terms, lr=1e-3, combine=combine)
        losses, _ = five_steps(step, lambda number, calls=calls: calls(number, rank))
        found[name] = adapter_of(model), losses
    return found


def test_combined_gradients_and_constants_of_a_batch_are_those_of_one_process(tiny, tmp_path):
    """KTO's mean over mismatched pairs is over those of all processes in a call, wherever they are."""
    first, second = in_processes(tmp_path, 2, train_others, tiny["llama"])
    for name, (terms, combine, calls) in OTHERS.items():
        model = load_perturbed(tiny["llama"])
        step = ff.UnlearnStep(model, torch.optim.AdamW, terms=terms, lr=1e-3, combine=combine)
        expected, _ = five_steps(
            step,
            lambda number, calls=calls: [
                merged(parts) for parts in zip(*(calls(number, r) for r in (0, 1)), strict=True)
            ],
        )
        weights, losses = first[name]
        assert losses == pytest.approx(expected, rel=1e-5) and second[name][1] == losses
        assert_gradients(weights, adapter_of(model))
        assert same(weights, second[name][0])


def fail_with_combined_sides(rank, folder):
    model = load_perturbed(folder)
    step = ff.UnlearnStep(DistributedDataParallel(model), torch.optim.SGD, terms=TERMS, lr=0.1, combine="pcgrad")
    batches = micro_batches(0, rank)
    counts = ff.count_labels(batches)
    with step.model.no_sync():
        step.backward(batches[0], counts=counts)
    before = gradients(model)
    messages = []
    handle = model.register_forward_hook(lambda *_: 1 / 0) if rank == 1 else None
    with pytest.raises((ff.FastforgetError, ZeroDivisionError)) as error:
        step.backward(batches[1], counts=counts)
    messages.append(str(error.value))
    assert same(gradients(model), before)
    if handle is not None:
        handle.remove()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1e-3)
    with pytest.raises(ff.FastforgetError) as error:
        step.backward(batches[1], counts=counts)
    messages.append(str(error.value))
    return messages


def test_combined_sides_are_as_before_where_a_process_fails(tiny, tmp_path):
    first, second = in_processes(tmp_path, 2, fail_with_combined_sides, tiny["llama"])
    assert "process 1 failed" in first[0] and second[0] == "division by zero"
    assert "clip after the last micro-batch only" in second[1] and first[1].startswith("process 1 failed")


def run_out(rank, folder):
    """Three steps in which one process has memory for two sequences at once."""
    model = load_perturbed(folder)
    layer = stack_of(model)[0]
    shapes, failed = [], []

    def look(_, arguments):
        assert all(each() is None for each in failed), "what the failed forward held is gone before the next one"
        shapes.append(len(arguments[0]))
        if rank == 1 and shapes[-1] > 2:
            failed.append(weakref.ref(arguments[0]))
            raise torch.OutOfMemoryError("out of memory")

    layer.register_forward_pre_hook(look)
    step = ff.UnlearnStep(DistributedDataParallel(model), torch.optim.AdamW, terms=TERMS, lr=1e-3)
    with pytest.warns(UserWarning, match="memory ran out with 5 sequences at once; from here on 2 are") as warned:
        losses = [float(step(*unequal(number, rank), micro_batch="auto").loss) for number in range(3)]
    return adapter_of(model), losses, max(shapes[-4:]), len(warned)


def unequal(number, *ranks):
    """Rows of each side, of which the first process has more."""
    parts = [(make_batch(5 - 2 * rank, 10 * number + rank), make_batch(2, 50 + 10 * number + rank)) for rank in ranks]
    return tuple({key: torch.cat([part[key] for part in side]) for key in side[0]} for side in zip(*parts, strict=True))


def test_all_processes_take_fewer_rows_where_memory_runs_out_in_one(tiny, tmp_path):
    first, second = in_processes(tmp_path, 2, run_out, tiny["llama"])
    model = load_perturbed(tiny["llama"])
    step = ff.UnlearnStep(model, torch.optim.AdamW, terms=TERMS, lr=1e-3)
    expected = [float(step(*unequal(number, 0, 1)).loss) for number in range(3)]
    for weights, losses, most, _ in (first, second):
        assert losses == pytest.approx(expected, rel=1e-5) and most == 2
        assert_gradients(weights, adapter_of(model))


def run_out_elsewhere(rank, folder):
    """Memory runs out in one process, where sides are combined, and then where another one has a single side."""
    model = load_perturbed(folder)
    step = ff.UnlearnStep(DistributedDataParallel(model), torch.optim.AdamW, terms=TERMS, lr=1e-3, combine="pcgrad")
    combine, failures = combine_module.combined, [torch.OutOfMemoryError("out of memory")] * rank

    def combined(*arguments):
        if failures:
            raise failures.pop()
        return combine(*arguments)

    combine_module.combined = combined
    forget, retain = make_batch(2, rank), make_batch(4, 5 + rank)
    step.backward(forget, retain, micro_batch="auto")
    found = gradients(model)
    step.zero_grad()
    if rank == 1:
        failures += [torch.OutOfMemoryError("out of memory")]
    step.backward(None if rank == 0 else forget, retain, micro_batch="auto")
    return found, step.rows_at_once("auto")


def test_memory_that_runs_out_behind_the_passes_or_where_a_side_is_missing(tiny, tmp_path):
    model = load_perturbed(tiny["llama"])
    step = ff.UnlearnStep(model, torch.optim.AdamW, terms=TERMS, lr=1e-3, combine="pcgrad")
    step.backward(*(merged([make_batch(rows, seed + rank) for rank in (0, 1)]) for rows, seed in ((2, 0), (4, 5))))
    for found, rows_at_once in in_processes(tmp_path, 2, run_out_elsewhere, tiny["llama"]):
        assert_gradients(found, gradients(model))
        assert rows_at_once == 1


def fail_twice(rank, folder):
    """One process has no memory, and the other fails for another reason: nothing is tried again."""
    model = load_perturbed(folder)
    error = torch.OutOfMemoryError("no memory") if rank == 0 else ValueError("no wish")
    tries = []

    def fail(*_):
        tries.append(1)
        raise error

    model.register_forward_pre_hook(fail)
    step = ff.UnlearnStep(DistributedDataParallel(model), torch.optim.SGD, terms=[ff.NegatedCE()], lr=0.1)
    with pytest.raises((ff.FastforgetError, ValueError)) as caught:
        step(make_batch(4, rank), micro_batch="auto")
    return str(caught.value), len(tries)


def test_another_error_beside_the_want_of_memory_ends_all(tiny, tmp_path):
    first, second = in_processes(tmp_path, 2, fail_twice, tiny["llama"])
    assert second == ("no wish", 1)
    assert first == ("process 1 failed, so this one stops too: ValueError: no wish", 1)


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
        "counts": lambda: ff.UnlearnStep(wrapped, torch.optim.SGD, terms="npo", lr=0.1).backward(
            make_batch(2, 1), counts={"forget_tokens": 3}
        ),
        "unwrapped": lambda: ff.UnlearnStep(model, torch.optim.SGD, terms="npo", lr=0.1).backward(make_batch(2, 1)),
        "loss": lambda: ff.UnlearnLoss(wrapped, [ff.NegatedCE()])(make_batch(2, 1)),
    }
    return messages_of(attempts)


def test_what_several_processes_cannot_do_is_said(tiny, tmp_path):
    for messages in in_processes(tmp_path, 2, refused, tiny["llama"]):
        assert "the model is not in DistributedDataParallel" in messages["unwrapped"]
        assert "UnlearnLoss knows only this one's labels" in messages["loss"]
        assert "counts must be what fastforget.count_labels returns, not a dict" in messages["counts"]


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
