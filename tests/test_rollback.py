"""A step that fails leaves every gradient as it was, and the next one does what it would have done without it."""

import pytest
import torch

import fastforget as ff


@pytest.fixture
def model(tiny):
    torch.manual_seed(1)
    return ff.load(tiny["llama"], bits=32, lora={"r": 4, "init_lora_weights": False}).train()


def state_of(model):
    return [(p.grad, None if p.grad is None else p.grad.clone()) for p in model.parameters()]


def same(one, other):
    """The same tensors, with the same values, bit for bit."""
    return all(a[0] is b[0] and (a[0] is None or torch.equal(a[1], b[1])) for a, b in zip(one, other, strict=True))


def raising(at, error):
    """A backward that raises at its n-th call, after its gradient has been added."""
    calls = []

    def backward(loss):
        calls.append(loss)
        loss.backward()
        if len(calls) == at:
            raise error

    return backward


def failures(model, batch):
    """(what a step is called with, the exception): after the forget pass, in both, or before either."""
    good = (batch(2, 1), batch(2, 2))
    outside = batch(2, 2) | {"labels": batch(2, 2)["labels"].clamp(min=0) + 1000}
    yield (good[0], outside), {}, ff.FastforgetError
    yield (good[0], good[1] | {"attention_mask": torch.ones(2, 3)}), {}, ff.FastforgetError
    yield good, {"backward": raising(2, RuntimeError("out of memory"))}, RuntimeError
    yield good, {"backward": raising(1, KeyboardInterrupt())}, KeyboardInterrupt
    yield good, {"backward": raising(3, RuntimeError("out of memory")), "micro_batch": 1}, RuntimeError
    yield good, {"model raises": 2}, ZeroDivisionError


def fail(step, model, arguments, options, error):
    options = dict(options)
    count, calls = options.pop("model raises", None), []

    def hook(*_):
        calls.append(torch.is_grad_enabled())
        if sum(calls) == count:
            raise ZeroDivisionError

    handle = model.get_base_model().model.norm.register_forward_hook(hook) if count else None
    try:
        with pytest.raises(error):
            step.backward(*arguments, **options)
    finally:
        if handle:
            handle.remove()


@pytest.mark.parametrize("accumulated", [0, 1, 2])
@pytest.mark.parametrize("combine", ["sum", "mgda", "pcgrad"])
def test_gradients_are_as_they_were(model, batch, combine, accumulated):
    step = ff.UnlearnStep(model, torch.optim.SGD, terms="grad_diff", lr=0.1, combine=combine)
    more = (batch(3, 5), batch(3, 6))
    counts = ff.count_labels([more] * 3)
    for _ in range(accumulated):
        step.backward(*more, counts=counts)
    before = state_of(model)
    cases = list(failures(model, batch))
    for arguments, options, error in cases:
        fail(step, model, arguments, options, error)
        assert same(state_of(model), before), options
    step.backward(*more, counts=counts)
    found = state_of(model)
    step.zero_grad()
    for _ in range(accumulated + 1):
        step.backward(*more, counts=counts)
    assert all((a is None) == (b is None) for (_, a), (_, b) in zip(found, state_of(model), strict=True))
    assert all(a is None or torch.equal(a, b) for (_, a), (_, b) in zip(found, state_of(model), strict=True))


def test_a_failed_step_changes_nothing_about_the_next(model, batch):
    good, bad = (batch(2, 1), batch(2, 2)), (batch(2, 1), batch(2, 2) | {"labels": batch(2, 2)["labels"] * 0 + 999})
    updates = []
    start = [p.detach().clone() for p in model.parameters() if p.requires_grad]
    for tries in ([good], [bad, good]):
        step = ff.UnlearnStep(model, torch.optim.SGD, terms="grad_diff", lr=0.1)
        for batches in tries:
            try:
                step(*batches)
            except ff.FastforgetError:
                assert step.param_groups[0]["unlearn_steps"] == 0
        trained = [p for p in model.parameters() if p.requires_grad]
        updates.append([p.detach() - old for p, old in zip(trained, start, strict=True)])
        with torch.no_grad():
            for p, old in zip(trained, start, strict=True):
                p.copy_(old)
    assert all(torch.equal(a, b) for a, b in zip(*updates, strict=True))
