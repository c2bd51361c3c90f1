"""`step.prepare(accelerator)`: accumulation, a scheduler, and its own checkpoints."""

import accelerate
import pytest
import torch
from accelerate.state import AcceleratorState, GradientState
from helpers import BreaksAt, adapter_of, load_perturbed
from integrations.loops import GRAD_DIFF, assert_same_weights, flat, grad_diff, replay, rows

import fastforget as ff

GROUPS = [[flat(rows(2, seed), rows(1, 50 + seed)), flat(rows(1, 20 + seed), rows(3, 70 + seed))] for seed in range(5)]


@pytest.fixture(autouse=True)
def fresh_state():
    """Accelerate keeps its state for the whole process."""
    AcceleratorState._reset_state(True)
    GradientState._reset_state()
    yield
    AcceleratorState._reset_state(True)
    GradientState._reset_state()


def prepared_step(folder, terms=GRAD_DIFF, accumulation=2, seed=1):
    model = load_perturbed(folder, seed=seed)
    accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=accumulation)
    step = ff.UnlearnStep(model, torch.optim.AdamW, terms=terms, lr=1e-3, weight_decay=0.0)
    step.prepare(accelerator)
    return model, accelerator, step


def train(accelerator, step, groups, with_counts=True):
    for group in groups:
        counts = ff.count_labels(group) if with_counts else None
        for batch in group:
            with accelerator.accumulate(step.model):
                step.backward(batch, counts=counts)
                step.step()
                step.zero_grad()


def test_weights_after_five_steps_are_those_of_a_loop_written_out(tiny):
    model, accelerator, step = prepared_step(tiny["llama"])
    train(accelerator, step, GROUPS)
    assert_same_weights(model, replay(tiny["llama"], GROUPS)[0])
    assert step.param_groups[0]["unlearn_steps"] == 5


def test_without_counts_an_update_takes_the_mean_of_its_calls(tiny):
    model, accelerator, step = prepared_step(tiny["llama"])
    for batch in GROUPS[0]:
        with accelerator.accumulate(step.model):
            step.backward(batch)
    expected = load_perturbed(tiny["llama"])
    (torch.stack([grad_diff(expected, [batch]) for batch in GROUPS[0]]).mean()).backward()
    theirs = dict(expected.named_parameters())
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert float((parameter.grad - theirs[name].grad).norm()) < 1e-5 * float(theirs[name].grad.norm()), name


def test_one_call_for_each_batch(tiny):
    _, accelerator, step = prepared_step(tiny["llama"], accumulation=1)
    scheduler = accelerator.prepare(torch.optim.lr_scheduler.LambdaLR(step, lambda taken: 1.0 / (1 + taken)))
    for group in GROUPS[:3]:
        step(group[0])
        scheduler.step()
    assert step.param_groups[0]["lr"] == pytest.approx(1e-3 / 4) and step.param_groups[0]["unlearn_steps"] == 3
    with pytest.raises(ff.FastforgetError, match="prepared already"):
        step.prepare(accelerator)


def test_a_saved_state_goes_on_as_if_it_had_not_stopped(tiny, tmp_path):
    model, accelerator, step = prepared_step(tiny["llama"], ff.preset("pdu"))
    train(accelerator, step, GROUPS[:3])
    accelerator.save_state(tmp_path)
    train(accelerator, step, GROUPS[3:])
    whole, scalars = adapter_of(model), step.param_groups[0]
    AcceleratorState._reset_state(True)
    GradientState._reset_state()
    model, accelerator, step = prepared_step(tiny["llama"], ff.preset("pdu"), seed=7)
    accelerator.load_state(tmp_path)
    assert step.param_groups[0]["unlearn_steps"] == 3
    train(accelerator, step, GROUPS[3:])
    for name, value in adapter_of(model).items():
        assert torch.equal(whole[name], value), name
    for name in (name for name in scalars if name.startswith("unlearn_")):
        assert float(scalars[name]) == float(step.param_groups[0][name]) != 0.0, name


def test_weights_that_were_loaded_are_not_taken_back(tiny, tmp_path):
    """A bad step after it leaves them, not those that the guard had found good before."""
    model, accelerator, step = prepared_step(tiny["llama"], [BreaksAt(step=2)], accumulation=1)
    accelerator.save_state(tmp_path)
    loaded = adapter_of(model)
    step(GROUPS[0][0])
    accelerator.load_state(tmp_path)
    step(GROUPS[1][0])
    step.guard.settle()
    assert step.guard.skipped == 1
    for name, value in adapter_of(model).items():
        assert torch.equal(value, loaded[name]), name
