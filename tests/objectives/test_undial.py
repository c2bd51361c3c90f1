"""UNDIAL: on tokens that the reference has memorised, with a softcap, and what is cached of the reference."""

import copy
import math

import pytest
import torch
from helpers import with_known_labels
from kernel_device import OURS, device_of

import fastforget as ff
from fastforget.backends import backend_of
from fastforget.objectives import Field, SideStats


def memorised(doubt, beta):
    """Reference and policy logits (3, 101) whose labels have probability 1 - doubt, and labels."""
    generator = torch.Generator().manual_seed(0)
    reference = torch.randn(3, 101, generator=generator, dtype=torch.float64)
    labels = torch.tensor([7, 100, 0])
    others = reference.scatter(1, labels[:, None], -torch.inf).logsumexp(1)
    reference[range(3), labels] = others + math.log((1 - doubt) / doubt)
    return (reference + 0.1 * torch.randn(3, 101, generator=generator)).float(), reference.float(), labels


@pytest.mark.parametrize("backend", OURS)
@pytest.mark.parametrize("beta", [0.5, 10.0, 40.0])
@pytest.mark.parametrize("doubt", [1e-9, 1e-5, 0.3])
def test_value_and_gradient_of_a_memorised_token(doubt, beta, backend):
    """Both to float32's digits, where t_y is almost 1 (beta 0.5) as where it is almost 0 (beta 40)."""
    policy, reference, labels = memorised(doubt, beta)
    # the formula, with 1 - t_y and 1 - p_y from sums over the other tokens: 1e-9 would cost float64 digits too
    target = reference.double()
    target[range(3), labels] -= beta
    expected = -(target.softmax(1) * policy.double().log_softmax(1)).sum(1).sum()
    apart = [each.double().scatter(1, labels[:, None], -torch.inf) for each in (policy, target)]
    row, t = ((a - b.logsumexp(1)[:, None]).exp() for a, b in zip(apart, (policy.double(), target), strict=True))
    row -= t
    row[range(3), labels] = -row.sum(1)

    device, term = device_of(backend), ff.UNDIAL(beta=beta)
    leaf, other, labels = policy.to(device).requires_grad_(), reference.to(device), labels.to(device)
    head = ff.LMHead(None)
    outputs = ("logp", "log_not_label", "others_entropy")
    computes = backend_of(backend, device)
    cached = computes.token_stats(other, labels, head, outputs)
    kl, _ = computes.divergence(leaf, other, head, "forward_kl", labels=labels, label_shift=-beta)
    stats = SideStats(
        sequence=torch.zeros(3, dtype=torch.long),
        sequence_count=1,
        token_total=1,
        sequence_total=1,
        tensors={term.divergence: kl, **{Field(name, of="reference"): cached[name] for name in outputs}},
    )
    value = term.value(stats)
    value.backward()
    assert float(value.detach()) == pytest.approx(float(expected), rel=2e-6)
    error = (leaf.grad.cpu().double() - row).norm(dim=1)
    assert (error <= 1e-5 * row.norm(dim=1)).all(), error / row.norm(dim=1)


@pytest.mark.parametrize("backend", ["eager", *OURS])
def test_the_shift_is_of_the_capped_logit(backend):
    generator = torch.Generator().manual_seed(0)
    weight, bias = torch.randn(40, 8, generator=generator), torch.randn(40, generator=generator)
    hidden, ref_hidden = 4 * torch.randn(2, 5, 8, generator=generator)
    labels = torch.tensor([3, -100, 39, 0, 7])

    def logits(states):
        return 3.0 * torch.tanh((0.5 * states.double() @ weight.double().T + bias.double()) / 3.0)

    target = logits(ref_hidden)
    for row in (0, 2, 3, 4):
        target[row, labels[row]] -= 2.5
    leaf = hidden.double().requires_grad_()
    expected = (target.softmax(1) * (target.log_softmax(1) - logits(leaf).log_softmax(1))).sum(1)
    (gradient,) = torch.autograd.grad(expected.sum(), leaf)

    device = device_of(backend)
    ours = hidden.to(device).requires_grad_()
    head = ff.LMHead(weight.to(device), bias.to(device), 0.5, 3.0)
    value = ff.divergence(ours, ref_hidden.to(device), head, labels=labels, label_shift=-2.5, backend=backend)
    assert torch.allclose(value.cpu().double(), expected.detach(), rtol=1e-5)
    (our_gradient,) = torch.autograd.grad(value.sum(), ours)
    assert torch.allclose(our_gradient.cpu().double(), gradient, rtol=1e-4, atol=1e-6)


def test_two_betas_and_a_kl_in_one_loss(model, batch):
    """Each with its own target, from one set of cached states."""
    forget = with_known_labels(model, batch(3, 1))
    terms = [ff.UNDIAL(beta=2.0), ff.UNDIAL(beta=5.0, weight=0.5), ff.KL(on="forget")]
    together = ff.UnlearnLoss(model, terms)(forget)
    alone = [float(ff.UnlearnLoss(copy.copy(model), [term])(forget).terms[term.name]) for term in terms]
    assert [float(value) for value in together.terms.values()] == pytest.approx(alone, rel=1e-6)
    assert alone[0] != pytest.approx(alone[1], rel=1e-3)
