"""Checkpointed layers and micro-batches that fit: the gradients of a step that has all the memory it wants."""

import warnings
import weakref

import pytest
import torch
from helpers import gradients, load_perturbed, stack_of

import fastforget as ff
from fastforget.memory import checkpoint_layers

TERMS = "npo"  # a label sweep and the reference


def step_gradients(model, batch, **options):
    """The output and the gradients of one `backward`, which are then cleared."""
    step = ff.UnlearnStep(model, torch.optim.SGD, terms=TERMS, lr=0.0)
    out = step.backward(batch(3, 1), batch(2, 2), **options)
    found = gradients(model)
    step.zero_grad()
    return out, found


def assert_equal(found, expected, tolerance=1e-6):
    assert found.keys() == expected.keys() != set()
    for name, gradient in found.items():
        assert float((gradient - expected[name]).norm()) <= tolerance * float(expected[name].norm()), name


def trained(model):
    return {name: each for name, each in model.named_parameters() if each.requires_grad}


def assert_trains_every_weight(model, batch):
    """Each of them has a gradient, and moves by a step (open-unlearning #178)."""
    before = {name: each.detach().clone() for name, each in trained(model).items()}
    step = ff.UnlearnStep(model, torch.optim.AdamW, terms=TERMS, lr=1e-3)
    step.backward(batch(3, 1), batch(2, 2))
    assert [name for name, gradient in gradients(model).items() if not float(gradient.norm()) > 0] == []
    assert gradients(model).keys() == before.keys()
    step.step()
    assert [name for name, each in trained(model).items() if torch.equal(each, before[name])] == []


@pytest.mark.parametrize("kind", ["opt", "llama"])
@pytest.mark.parametrize("bits", [32, 8, 4])
def test_loading_with_checkpointing(tiny, batch, kind, bits):
    plain = load_perturbed(tiny[kind], bits)
    lora = {"r": 4, "target_modules": "all-linear"}
    model = ff.load(tiny[kind], bits=bits, lora=lora, checkpointing=True).train()
    with torch.no_grad():
        for ours, other in zip(trained(model).values(), trained(plain).values(), strict=True):
            ours.copy_(other)
    calls = []
    stack_of(model)[1].self_attn.q_proj.register_forward_pre_hook(lambda *_: calls.append(torch.is_grad_enabled()))
    out, found = step_gradients(model, batch)
    assert sum(calls) == 4  # once in each of two forwards, once in each backward pass
    expected_out, expected = step_gradients(plain, batch)
    assert torch.equal(out.loss, expected_out.loss)
    assert_equal(found, expected)
    assert_trains_every_weight(model, batch)


def test_a_model_that_the_user_checkpointed(tiny, batch):
    """Reentrantly, and as older releases of transformers leave it: no input requires a gradient."""
    model, plain = load_perturbed(tiny["llama"], 8), load_perturbed(tiny["llama"], 8)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": True})
    model.get_base_model().disable_input_require_grads()
    assert_equal(step_gradients(model, batch)[1], step_gradients(plain, batch)[1])
    assert_trains_every_weight(model, batch)


def test_an_architecture_that_cannot(tiny):
    model = ff.load(tiny["opt"], bits=32)
    model.get_base_model().supports_gradient_checkpointing = False
    with pytest.raises(ff.FastforgetError, match=r"checkpointing: .*does not support"):
        checkpoint_layers(model)


def cuda_error(rows):
    raise torch.OutOfMemoryError(f"CUDA out of memory with {rows} rows.")


def cpu_error(rows):
    torch.empty(2**50)


def python_error(rows):
    raise MemoryError


def limit_rows(model, most, fail=cuda_error):
    """Let the last decoder layer fail with more than so many rows; returns the list of what it was called with."""
    seen = []

    def hook(_module, inputs):
        rows = inputs[0].shape[0]
        if torch.is_grad_enabled():
            seen.append(rows)
            if rows > most:
                fail(rows)

    stack_of(model)[-1].register_forward_pre_hook(hook)
    return seen


@pytest.mark.parametrize("fail", [cuda_error, cpu_error, python_error])
@pytest.mark.parametrize("combine", ["sum", "mgda"])
def test_half_as_many_rows_until_they_fit(tiny, batch, combine, fail):
    model, plain = load_perturbed(tiny["llama"]), load_perturbed(tiny["llama"])
    seen = limit_rows(model, 3, fail)
    found = []
    for each, size in ((model, "auto"), (plain, None)):
        terms = [ff.NPO(), ff.CE(on="retain"), ff.KL(on="retain")]
        step = ff.UnlearnStep(each, torch.optim.SGD, terms=terms, lr=0.0, combine=combine)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            for seed in (1, 3):  # two steps' gradients add up
                # the forget pass is through when the retain pass fails
                step.backward(batch(3, seed), batch(7, seed + 1), micro_batch=size)
        found.append(gradients(each))
        messages = [str(each.message) for each in caught if "micro_batch" in str(each.message)]
        assert len(messages) == (each is model)
    assert "with 7 sequences at once; from here on 3 are" in messages[0] if messages else True
    assert seen == [3, 7, 3, 3, 3, 1, 3, 3, 3, 1]
    assert_equal(*found)


def test_gradients_are_as_they_were_where_one_row_does_not_fit(tiny, batch):
    model = load_perturbed(tiny["llama"])
    step = ff.UnlearnStep(model, torch.optim.SGD, terms=TERMS, lr=0.0)
    step.backward(batch(3, 1), batch(2, 2))
    before = gradients(model)
    seen = limit_rows(model, 0)
    with pytest.raises(torch.OutOfMemoryError, match="with 1 rows"):
        step.backward(batch(3, 3), batch(2, 4), micro_batch="auto")
    assert seen == [3, 1]
    after = gradients(model)
    assert after.keys() == before.keys() and all(torch.equal(after[name], before[name]) for name in before)


def test_what_else_fails_is_raised(tiny, batch):
    model = load_perturbed(tiny["llama"])
    step = ff.UnlearnStep(model, torch.optim.SGD, terms=TERMS, lr=0.0)

    def fail(rows):
        raise RuntimeError("shapes do not fit")

    seen = limit_rows(model, 0, fail)
    with pytest.raises(RuntimeError, match="do not fit"):
        step(batch(3, 1), batch(2, 2), micro_batch="auto")
    assert seen == [3]
    for wrong in (0, "whole", 2.5):
        with pytest.raises(ff.FastforgetError, match="micro_batch must be at least 1, 'auto' or None"):
            step(batch(3, 1), batch(2, 2), micro_batch=wrong)


def test_what_auto_begins_with(tiny, batch):
    model = load_perturbed(tiny["llama"])
    seen = limit_rows(model, 1)
    step = ff.UnlearnStep(model, torch.optim.SGD, terms=TERMS, lr=0.0, first_micro_batch=2)
    assert step.rows_at_once("auto") == 2
    with pytest.warns(UserWarning, match="with 2 sequences at once; from here on 1 are"):
        step(batch(3, 1), batch(3, 2), micro_batch="auto")
    assert seen == [2, *[1] * 6]
    assert step.rows_at_once("auto") == 1 and step.rows_at_once(5) == 5 and step.rows_at_once(None) is None


def test_the_forget_graph_is_freed_before_the_retain_forward(tiny, batch, monkeypatch):
    """By its last reference: nothing waits for the garbage collector."""
    step = ff.UnlearnStep(load_perturbed(tiny["llama"]), torch.optim.SGD, terms="grad_diff", lr=0.0)
    own, kept, alive = step.loss.backbone.states, [], []

    def states(*arguments):
        alive.append(sum(each() is not None for each in kept))
        found = own(*arguments)
        kept.extend(map(weakref.ref, found.values()))
        return found

    monkeypatch.setattr(step.loss.backbone, "states", states)
    step.backward(batch(3, 1), batch(2, 2))
    assert alive == [0, 0] and len(kept) == 2
