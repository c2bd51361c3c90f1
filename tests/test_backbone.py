"""Hidden states by layer, and forwards that end at the deepest layer that is wanted."""

import warnings

import pytest
import torch
from helpers import assert_gradients, gradients, load_perturbed, prepared, stack_of

import fastforget as ff
from fastforget.backbone import Backbone
from fastforget.head import base_causal_lm

CPU = torch.device("cpu")


def tail_of(model):
    """The module after the last layer (the final norm), and the head."""
    base = base_causal_lm(model)
    inner = base.model.decoder if hasattr(base.model, "decoder") else base.model
    return getattr(inner, "final_layer_norm", None) or inner.norm, base.get_output_embeddings()


@pytest.fixture
def count_calls():
    """count_calls(module, ...) -> a list with the number of forwards of each, kept up to date."""
    handles = []

    def watch(*modules):
        calls = [0] * len(modules)

        def counter(place):
            def hook(*_):
                calls[place] += 1

            return hook

        handles.extend(module.register_forward_pre_hook(counter(i)) for i, module in enumerate(modules))
        return calls

    yield watch
    for handle in handles:
        handle.remove()


@pytest.mark.parametrize("kind", ["opt", "llama"])
def test_the_forward_ends_at_the_deepest_layer(tiny, batch, kind, count_calls):
    model = load_perturbed(tiny[kind])
    assert Backbone(model).layer(-1) is Backbone(model).layer(1)
    side = prepared(batch(3, 1))
    whole = Backbone(model).states(side.inputs, side.positions, (None, 0, 1, -1))
    assert torch.equal(whole[1], whole[-1]) and not torch.equal(whole[0], whole[1])
    calls = count_calls(*stack_of(model), *tail_of(model))
    for layers, expected in (((0,), [1, 0, 0, 0]), ((-2, 0), [1, 0, 0, 0]), ((0, -1), [1, 1, 0, 0])):
        calls[:] = [0] * 4
        found = Backbone(model).states(side.inputs, side.positions, layers)
        assert calls == expected and found.keys() == set(layers)
        assert all(torch.equal(state, whole[layer % 2]) for layer, state in found.items())
    assert Backbone(model).states(side.inputs, side.positions, (None,)).keys() == {None}


@pytest.mark.parametrize("bits", [32, 8])
def test_an_rmu_step_runs_no_later_layer_and_no_head(tiny, batch, bits, count_calls):
    model = load_perturbed(tiny["llama"], bits)
    calls = count_calls(*stack_of(model), *tail_of(model))
    step = ff.UnlearnStep(model, torch.optim.SGD, terms=ff.preset("rmu", layer=0), lr=0.1)
    out = step.backward(batch(2, 1), batch(2, 2))
    assert calls == [3, 0, 0, 0], "forget, retain, and the reference of the retain side"
    assert out.stats == {} and out.loss.isfinite() and set(out.terms) == {"rmu", "hidden_mse"}
    moved = {name for name, gradient in gradients(model).items() if gradient.abs().sum() > 0}
    assert moved and all(".layers.0." in name for name in moved)
    # a term beside them that needs the head takes that side there, and it alone
    calls[:] = [0] * 4
    terms = [*ff.preset("rmu", layer=0), ff.CE()]
    out = ff.UnlearnLoss(model, terms)(batch(2, 1), batch(2, 2))
    assert calls[0] == 5 and calls[1:] == [3, 3, 3], "of these two runs check the head"
    assert out.stats.keys() == {"retain_nll"}


CHECKPOINTED = [ff.preset("rmu", layer=0, alpha=3.0), [ff.EmbeddingDistance(layer=0, metric="cosine"), ff.CE()]]


@pytest.mark.parametrize("terms", CHECKPOINTED, ids=["ends at a layer", "whole"])
@pytest.mark.parametrize("kind", ["opt", "llama"])
@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_gives_the_same_gradients(tiny, batch, kind, reentrant, terms, count_calls):
    model = load_perturbed(tiny[kind])
    step = ff.UnlearnStep(model, torch.optim.SGD, terms=terms, lr=0.1)
    step.backward(batch(3, 1), batch(2, 2))
    plain = gradients(model)
    model.zero_grad()
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    calls = count_calls(*stack_of(model), *tail_of(model))
    step.backward(batch(3, 1), batch(2, 2))
    assert (calls[1:] == [0, 0, 0]) == (terms[0].name == "rmu")
    assert_gradients(gradients(model), plain)


def test_nothing_is_left_behind_also_after_an_error(model, batch):
    side = prepared(batch(2, 1))
    backbone = Backbone(model)
    hooks = [len(module._forward_hooks) for module in model.modules()]
    modes = [module.training for module in model.modules()]
    before = backbone.states(side.inputs, side.positions, (0,))[0]
    broken = stack_of(model)[0].register_forward_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        backbone.states(side.inputs, side.positions, (0,))
    broken.remove()
    loss = ff.UnlearnLoss(model, ff.preset("rmu", layer=0))
    loss(batch(2, 1), batch(2, 2))
    assert [len(module._forward_hooks) for module in model.modules()] == hooks
    assert [module.training for module in model.modules()] == modes and torch.is_grad_enabled()
    assert torch.equal(backbone.states(side.inputs, side.positions, (0,))[0], before)
    logits = model(input_ids=batch(2, 1)["input_ids"]).logits
    assert logits.isfinite().all(), "the whole model still runs"


def test_a_layer_that_was_left_out_is_said(tiny, batch):
    model = load_perturbed(tiny["opt"])
    model.base_model.model.model.decoder.layerdrop = 1.0
    side = prepared(batch(2, 1))
    with pytest.raises(ff.FastforgetError, match="layer 0 did not run in this forward: switch layer drop off"):
        Backbone(model).states(side.inputs, side.positions, (0,))


def test_inputs_that_are_no_tensors_go_to_the_model(model, batch):
    loss = ff.UnlearnLoss(model, [ff.NegatedCE()])
    plain = ff.UnlearnLoss(model, [ff.NegatedCE()])(batch(3, 1)).loss
    assert torch.equal(loss({**batch(3, 1), "output_attentions": False}).loss, plain)


@pytest.mark.parametrize("kept", [15, torch.arange(5, 20)], ids=["number", "places"])
def test_states_of_other_positions_are_refused(model, batch, kept):
    """Their places are within the batch's, so that without a check other tokens' states would be taken."""
    side = batch(3, 1)
    side["labels"][:, 12:] = -100
    with pytest.raises(ff.FastforgetError, match="leave logits_to_keep out"):
        ff.UnlearnLoss(model, [ff.NegatedCE()])({**side, "logits_to_keep": kept})


def test_rows_longer_than_the_context_are_said(model, batch):
    loss = ff.UnlearnLoss(model, [ff.NegatedCE()])
    with pytest.warns(UserWarning, match="the forget batch has a row of 300 tokens, and the model's context is 256"):
        loss(batch(2, 1, width=300))
    padded = {key: value.clone() for key, value in batch(2, 1, width=300).items()}
    padded["attention_mask"][:, 256:], padded["labels"][:, 256:] = 0, -100
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        loss(padded)


def test_a_head_that_was_replaced_is_said(model, batch):
    loss = ff.UnlearnLoss(model, [ff.NegatedCE()])
    loss(batch(3, 1))
    model.get_base_model().resize_token_embeddings(330, mean_resizing=False)
    with pytest.raises(ff.FastforgetError, match="did not call the head that it had"):
        loss(batch(3, 1))
