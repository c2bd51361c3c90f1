"""hidden_stats, and the anchor and centres of token_stats, against formulas in float64 (`oracle.py`)."""

import pytest
import torch
from oracle import state_distance

import fastforget as ff


@pytest.mark.parametrize(("metric", "noise", "bound"), [("l2", 1e-6, 1e-6), ("l2", 1e-3, 1e-6), ("cosine", 1e-3, 1e-4)])
def test_a_state_almost_on_its_anchor_keeps_its_digits(metric, noise, bound):
    """At the start of a LoRA run states are almost their references: the expanded forms return mostly rounding."""
    generator = torch.Generator().manual_seed(0)
    anchor = 100 * torch.randn(256, 128, generator=generator)
    hidden = anchor * (1 + noise * torch.randn(anchor.shape, generator=generator))
    expected = torch.stack([state_distance(h, a, metric)[0] for h, a in zip(hidden, anchor, strict=True)])
    if metric == "l2":
        squares = hidden.square().sum(1) + anchor.square().sum(1) - 2 * (hidden * anchor).sum(1)
        expanded = squares.clamp_min(0).sqrt()
    else:
        expanded = 1 - torch.cosine_similarity(hidden, anchor)
    ours = ff.hidden_stats(hidden, anchor, metric=metric)[0]
    error, drowned = (float((value.double() - expected).norm() / expected.norm()) for value in (ours, expanded))
    assert error < bound and drowned > 0.01, (error, drowned)


def test_token_stats_take_anchor_and_centres_along():
    generator = torch.Generator().manual_seed(1)
    hidden = torch.randn(7, 12, generator=generator).requires_grad_()
    head = ff.LMHead(torch.randn(31, 12, generator=generator))
    labels = torch.tensor([3, -100, 5, 30, -100, 0, 7])
    kept = (labels != -100).nonzero()[:, 0]
    centres, anchor = torch.randn(4, 12, generator=generator), torch.randn(7, 12, generator=generator)
    for given_anchor, rows in ((anchor, anchor), ("label", head.weight[labels.clamp(min=0)]), (anchor[0], anchor[0])):
        stats = ff.token_stats(hidden, head, labels, anchor=given_anchor, centres=centres, metric="cosine", margin=0.9)
        distance, pull = ff.hidden_stats(hidden, rows, centres, "cosine", 0.9)
        for value, full in ((stats.distance, distance), (stats.pull, pull)):
            assert torch.equal(value[kept], full[kept]) and value[labels == -100].eq(0).all()
        assert torch.equal(stats.logp, ff.token_stats(hidden, head, labels).logp)
        total = stats.logp.sum() + 2 * stats.distance.sum() - 3 * stats.pull.sum()
        grad = torch.autograd.grad(total, hidden)[0]
        parts = ff.token_stats(hidden, head, labels).logp.sum() + (2 * distance - 3 * pull)[kept].sum()
        assert torch.allclose(grad, torch.autograd.grad(parts, hidden)[0], atol=1e-6)
        assert grad[labels == -100].eq(0).all()
    logits = head.logits(hidden).detach().requires_grad_()
    stats = ff.token_stats_from_logits(logits, labels, hidden, anchor=anchor, centres=centres)
    assert torch.allclose(stats.distance, ff.token_stats(hidden, head, labels, anchor=anchor).distance)
    assert torch.autograd.grad(stats.pull.sum(), hidden)[0].abs().sum() > 0
    assert ff.token_stats(hidden, head, labels).distance is None


def test_only_what_was_asked_for_comes_back():
    hidden = torch.randn(5, 8, requires_grad=True)
    distance, pull = ff.hidden_stats(hidden, torch.randn(8))
    assert distance.shape == (5,) and pull is None
    distance, pull = ff.hidden_stats(hidden, centres=torch.randn(3, 8))
    assert distance is None and pull.shape == (5,)
    anchor = torch.randn(5, 8, requires_grad=True)
    ff.hidden_stats(hidden, anchor)[0].sum().backward()
    assert anchor.grad is None, "an anchor is a constant"
    empty = ff.hidden_stats(torch.randn(0, 8, requires_grad=True), torch.randn(0, 8), torch.randn(2, 8))
    assert empty[0].shape == empty[1].shape == (0,)
    nan = ff.hidden_stats(torch.full((1, 2), torch.nan), torch.zeros(2), torch.zeros(1, 2), margin=1.0)
    assert nan[0].isnan().all() and nan[1].isnan().all(), "NaN is not hidden, by the margin either"


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda h: ff.hidden_stats(h), "needs an anchor, centres, or both"),
        (lambda h: ff.hidden_stats(h, torch.zeros(3, 8)), r"anchor must be \(5, 8\) or \(8,\)"),
        (lambda h: ff.hidden_stats(h, centres=torch.zeros(3, 7)), r"centres must be \(K, 8\)"),
        (lambda h: ff.hidden_stats(h, centres=torch.zeros(0, 8)), "K >= 1"),
        (lambda h: ff.hidden_stats(h, h, metric="l1"), "unknown metric 'l1': choose one of l2, cosine"),
        (lambda h: ff.hidden_stats(h, h, margin=0.0), "margin must be positive"),
        (lambda h: ff.hidden_stats(h[0], h[0]), r"hidden must be a floating-point \(N, D\)"),
        (lambda h: ff.token_stats_from_logits(h, torch.zeros(5).long(), anchor=h), "give hidden"),
        (lambda h: ff.token_stats(h, ff.LMHead(h), torch.zeros(5).long(), anchor="labels"), "must be 'label'"),
        (lambda h: ff.token_stats(h, ff.LMHead(None), torch.zeros(5).long(), anchor="label"), "only logits"),
    ],
)
def test_errors_say_what_is_wrong(call, message):
    with pytest.raises(ff.FastforgetError, match=message):
        call(torch.randn(5, 8))
