"""OtherTokens: value and gradient against the formula in float64; sharpness of a divergence, also with a cache."""

import pytest
import torch
from helpers import load_perturbed, with_known_labels

import fastforget as ff
from fastforget.batch import IGNORE_INDEX
from fastforget.objectives import Divergence


def expected_loss(model, batch, beta, sharpness):
    """KL(t || p) from all logits, in float64, with its graph."""
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    labels = batch["labels"][:, 1:]
    kept = labels != IGNORE_INDEX
    with torch.no_grad(), model.disable_adapter():
        frozen = model(**inputs).logits[:, :-1][kept].double()
    target = sharpness * frozen
    target[range(len(target)), labels[kept]] -= beta
    log_p = model(**inputs).logits[:, :-1][kept].double().log_softmax(-1)
    target = target.log_softmax(-1)
    return (target.exp() * (target - log_p)).sum(-1).mean()


@pytest.mark.parametrize(("beta", "sharpness"), [(30.0, 2.0), (5.0, 0.5), (0.0, 3.0)])
@pytest.mark.parametrize("kind", ["opt", "llama"])
def test_value_and_gradients_are_those_of_the_formula(tiny, batch, kind, beta, sharpness):
    model = load_perturbed(tiny[kind])
    data = with_known_labels(model, batch(3, seed=1))
    expected = expected_loss(model, data, beta, sharpness)
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    wanted = torch.autograd.grad(expected, trainable)
    loss = ff.UnlearnLoss(model, [ff.OtherTokens(beta=beta, sharpness=sharpness)])
    for _ in range(2):  # the second time the reference is cached
        value = loss(data).loss
        found = torch.autograd.grad(value, trainable)
        assert float(value.detach()) == pytest.approx(float(expected.detach()), rel=1e-4)
        for one, other in zip(found, wanted, strict=True):
            assert (one - other).norm() <= 1e-4 * other.norm() + 1e-8


def test_sharpness_one_is_the_divergence_itself(tiny, batch):
    model = load_perturbed(tiny["llama"])
    data = batch(2, seed=2)
    values = [
        float(ff.UnlearnLoss(model, [term])(data).loss.detach())
        for term in (ff.OtherTokens(beta=0.0, sharpness=1.0), ff.KL(on="forget"))
    ]
    assert values[0] == pytest.approx(values[1], rel=1e-5)


def test_it_is_the_default_and_keeps_the_rest():
    term, *rest = ff.preset("other_tokens")
    assert (term.beta, term.sharpness, [each.name for each in rest]) == (30.0, 1.5, ["ce", "kl"])


@pytest.mark.parametrize("sharpness", [0.0, -1.0, float("nan"), float("inf")])
def test_a_sharpness_that_is_not_positive_is_refused(sharpness):
    with pytest.raises(ff.FastforgetError, match="sharpness must be"):
        ff.OtherTokens(sharpness=sharpness)
    with pytest.raises(ff.FastforgetError, match="sharpness must be finite and positive"):
        Divergence("forward_kl", sharpness=sharpness)
