"""Weights that change from step to step."""

import math
import pickle

import pytest
import torch
from helpers import gradients

import fastforget as ff


def test_linear_goes_from_start_to_end_and_stays():
    weight = ff.Linear(0.0, 2.0, 4)
    assert [weight(step) for step in (0, 1, 2, 4, 9)] == [0.0, 0.5, 1.0, 2.0, 2.0]
    assert ff.Linear(3.0, 1.0, 2)(1) == 2.0 and pickle.loads(pickle.dumps(weight)) == weight


def test_each_step_has_its_own_weight(model, batch):
    asked = []
    weight = ff.Linear(0.0, 2.0, 4)
    terms = [ff.NegatedCE(weight=lambda step: asked.append(step) or weight(step)), ff.CE()]
    step = ff.UnlearnStep(model, torch.optim.SGD, terms=terms, lr=0.0)
    for taken in range(6):
        counts = ff.count_labels([(batch(2, 1), batch(2, 2))])
        step.backward(batch(2, 1), batch(2, 2), counts=counts, micro_batch=1)
        ours = gradients(model)
        model.zero_grad()
        plain_terms = [ff.NegatedCE(weight=weight(taken) or 1e-30), ff.CE()]
        ff.UnlearnLoss(model, plain_terms)(batch(2, 1), batch(2, 2)).loss.backward()
        for name, gradient in gradients(model).items():
            assert torch.allclose(ours[name], gradient, rtol=1e-4, atol=1e-7), (taken, name)
        step.step()
        step.zero_grad()
    assert asked == list(range(6)), "once a call, whatever the number of micro-batches"
    saved = step.state_dict()
    resumed = ff.UnlearnStep(model, torch.optim.SGD, terms=terms, lr=0.0)
    resumed.load_state_dict(saved)
    resumed.backward(batch(2, 1), batch(2, 2))
    assert asked[-1] == 6, "a checkpoint carries the number of steps"


def test_the_loss_alone_is_told_the_step(model, batch):
    loss = ff.UnlearnLoss(model, [ff.NegatedCE(weight=ff.Linear(1.0, 3.0, 2))])
    first, last = loss(batch(2, 1)), loss(batch(2, 1), step=5)
    assert float(last.loss.detach()) == pytest.approx(3 * float(first.loss.detach()))
    assert float(last.terms["negated_ce"]) == float(first.terms["negated_ce"]), "terms are told unweighted"


@pytest.mark.parametrize("value", [-0.5, math.nan, math.inf, None, "1", torch.tensor(1.0), True])
def test_a_wrong_value_raises_at_its_step_before_the_forward(model, batch, monkeypatch, value):
    terms = ff.preset("npo", forget_weight=lambda step: value if step == 1 else 1.0)
    step = ff.UnlearnStep(model, torch.optim.SGD, terms=terms, lr=0.1)
    step(batch(2, 1), batch(2, 2))
    monkeypatch.setattr(step.loss.backbone, "states", lambda *_: pytest.fail("a forward"))
    with pytest.raises(ff.FastforgetError, match=r"npo: the schedule of its weight gave .* at step 1"):
        step.backward(batch(2, 1), batch(2, 2))
