"""NaN, infinity, one-hot tokens, autocast, overwritten logits: every backend says what plain torch says of them."""

import itertools
import math

import pytest
import torch
from kernel_device import OURS, device_of
from oracle import LOGITS

import fastforget as ff
from fastforget.stats import DIVERGENCES

EVERY = pytest.mark.parametrize("backend", ["eager", *OURS])
SWEEPS = pytest.mark.parametrize("backend", OURS)


def randn(backend, *shape):
    """Seeded normal numbers on the backend's device."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(device_of(backend))


@pytest.mark.parametrize("broken", [[3], [0], [30], [3, 9, 30], [9], [20, 9, 33], [], None], ids=str)
def test_nan_among_logits_is_not_hidden(any_backend, broken, monkeypatch):
    """NaN at the label (9), at some tokens or at all in row 1: argmax is the first, as torch's; no other row knows."""
    monkeypatch.setenv("FASTFORGET_TILE", "4x48" if broken == [0] else "2x16")
    logits, labels, other = randn(any_backend, 3, 40), torch.tensor([5, 9, 7]), randn(any_backend, 3, 40) + 1
    if broken == []:
        logits[1, 7] = torch.inf
    else:
        logits[1, slice(None) if broken is None else broken] = torch.nan
    others = logits.scatter(1, labels[:, None].to(logits.device), -torch.inf)
    stats = ff.token_stats_from_logits(logits, labels, outputs=LOGITS, backend=any_backend)
    assert stats.argmax.tolist() == logits.argmax(dim=1).tolist()
    assert stats.others_argmax.tolist() == others.argmax(dim=1).tolist()
    torch.testing.assert_close(stats.max_logit, logits.amax(dim=1), rtol=0, atol=0, equal_nan=True)
    if broken == []:
        return
    apart = {"others_entropy"} if broken == [9] else set() if broken is None or 9 in broken else {"label_logit"}
    for name in set(LOGITS) - {"argmax", "others_argmax"}:
        assert getattr(stats, name).isnan().tolist() == [False, name not in apart, False], name
    if broken not in ([3], [9], None):
        return
    for kind, pair in itertools.product(DIVERGENCES, ((logits, other), (other, logits))):
        value = ff.divergence(*pair, ff.LMHead(None), kind, backend=any_backend)
        assert value.isnan().tolist() == [False, True, False], kind


@EVERY
@pytest.mark.parametrize("broken", [3, 30])
def test_a_bias_of_nan_is_in_every_row(backend, broken, monkeypatch):
    monkeypatch.setenv("FASTFORGET_TILE", "2x16")
    bias = torch.zeros(40, device=device_of(backend))
    bias[broken] = torch.nan
    head, labels = ff.LMHead(randn(backend, 40, 8), bias), torch.tensor([5, 9, 7])
    stats = ff.token_stats(randn(backend, 3, 8), head, labels, outputs=("argmax", "max_logit"), backend=backend)
    assert stats.argmax.tolist() == [broken] * 3 and stats.max_logit.isnan().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("metric", ["l2", "cosine"])
def test_distance_of_an_infinite_state(any_backend, metric, dtype):
    """And from an infinite anchor: NaN by its cosine; a state of no direction is at 1 from everything."""
    hidden, anchor = randn(any_backend, 5, 37).to(dtype), torch.ones(5, 37, device=device_of(any_backend))
    hidden[1, 2], hidden[2, 3], hidden[3], anchor[4, 0] = torch.inf, torch.nan, 0.0, -torch.inf
    expected = torch.linalg.vector_norm(hidden.float() - anchor, dim=1)
    if metric == "cosine":
        lengths = torch.linalg.vector_norm(hidden.float(), dim=1) * torch.linalg.vector_norm(anchor, dim=1)
        expected = 1 - (hidden.float() * anchor).sum(1) / lengths
        expected[3] = 1.0
    for row in range(5):
        given = hidden[row : row + 1], anchor[row], anchor[row : row + 1]
        for value in ff.hidden_stats(*given, metric, backend=any_backend):
            torch.testing.assert_close(value[0], expected[row], equal_nan=True)


def states_of(logits):
    """(hidden states, head) of logits (n, V), minus infinity included: what is beyond float32 once it is doubled."""
    states = (0.5 * logits).where(logits > -torch.inf, -3e38)
    return states, ff.LMHead(torch.eye(logits.shape[1], device=logits.device), scale=2.0)


def divergence_and_gradient(policy, reference, kind, backend):
    """KL or JSD and its gradient over the logits, in float64."""
    head = ff.LMHead(None)
    if backend != "eager":
        (policy, head), (reference, _) = states_of(policy), states_of(reference)
    policy = policy.clone().requires_grad_()
    value = ff.divergence(policy, reference, head, kind, backend=backend)
    value.sum().backward()
    return value.detach().double(), policy.grad.double() / head.scale


@SWEEPS
@pytest.mark.parametrize("kind", ["forward_kl", "reverse_kl", "jsd"])
def test_tokens_that_neither_side_can_say_add_nothing(backend, kind, monkeypatch):
    """Whole tiles of them first, and some later: as if those tokens were not there."""
    monkeypatch.setenv("FASTFORGET_TILE", "2x16")
    policy, reference = randn(backend, 2, 3, 48)
    kept = [index for index in range(16, 48) if index not in (20, 39)]
    policy[:, :16] = reference[:, :16] = policy[:, [20, 39]] = reference[:, [20, 39]] = -torch.inf
    expected = divergence_and_gradient(policy[:, kept].double(), reference[:, kept].double(), kind, "eager")
    whole = divergence_and_gradient(policy.double(), reference.double(), kind, "eager")
    for value, grad in (whole, divergence_and_gradient(policy, reference, kind, backend)):
        torch.testing.assert_close(value, expected[0], rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(grad[:, kept], expected[1], rtol=1e-5, atol=1e-6)
        assert not grad[:, [0, 20, 39]].any()


@SWEEPS
@pytest.mark.parametrize("apart", [-300.0, 300.0])
def test_a_policy_that_arrives_far_from_the_reference(backend, apart, monkeypatch):
    """It cannot say the first tile's tokens, which the reference can: the KL is infinite, and its gradient p - q."""
    monkeypatch.setenv("FASTFORGET_TILE", "2x16")
    policy, reference = randn(backend, 2, 3, 48)
    policy[:, :16] = -torch.inf
    policy[:, 16:] += apart
    value, grad = divergence_and_gradient(policy, reference, "forward_kl", backend)
    assert value.isposinf().all()
    torch.testing.assert_close(grad, (policy.double().softmax(1) - reference.double().softmax(1)), rtol=1e-4, atol=1e-6)


@EVERY
def test_autocast_rounds_nothing(backend):
    hidden, ref_hidden = randn(backend, 2, 5, 16)
    head, labels = ff.LMHead(randn(backend, 64, 16)), torch.arange(5)
    found = []
    for enabled in (False, True):
        with torch.autocast(hidden.device.type, torch.bfloat16, enabled=enabled):
            given = hidden.clone().requires_grad_()
            logp = ff.token_stats(given, head, labels, backend=backend).logp
            kl = ff.divergence(given, ref_hidden, head, backend=backend)
        (logp.sum() + kl.sum()).backward()
        found.append((logp.detach(), kl.detach(), given.grad))
    for plain, cast in zip(*found, strict=True):
        torch.testing.assert_close(cast, plain)


@SWEEPS
def test_two_gradients_into_the_same_logits_are_refused(backend):
    given, labels = randn(backend, 4, 30).requires_grad_() * 1.0, torch.arange(4)
    both = [ff.token_stats_from_logits(given, labels, backend=backend, in_place=True).logp for _ in range(2)]
    with pytest.raises(ff.FastforgetError, match="changed after their statistics"):
        (both[0].sum() + both[1].sum()).backward()


@SWEEPS
@pytest.mark.parametrize("tile", ["1x16", "1x4096"])
def test_entropy_of_a_token_that_comes_late_keeps_its_digits(backend, tile, monkeypatch):
    """The likeliest lies 20 above what came before it: means of z kept from there would round at 20."""
    monkeypatch.setenv("FASTFORGET_TILE", tile)
    logits = randn(backend, 2, 400)
    logits[:, 300] += 20.0
    logits[:, 350] += 15.0
    results = []
    for name, dtype in ((backend, torch.float32), ("eager", torch.float64)):
        states, head = states_of(logits.to(dtype))
        states.requires_grad_()
        head = ff.LMHead(head.weight.to(dtype), scale=head.scale)
        entropy = ff.token_stats(states, head, torch.tensor([7, 300]), outputs=("entropy",), backend=name).entropy
        entropy.sum().backward()
        results.append((entropy.detach().double(), states.grad.double()))
    for ours, exact in zip(*results, strict=True):
        torch.testing.assert_close(ours, exact, rtol=2e-6, atol=1e-9)


@pytest.mark.parametrize("backend", OURS)
def test_a_logit_of_minus_infinity_costs_no_gradient(backend):
    """Padded vocabulary has such a bias: where gradients are computed anew (entropy), it must add nothing."""
    device = device_of(backend)
    generator = torch.Generator().manual_seed(0)
    weight, hidden = torch.randn(40, 8, generator=generator), torch.randn(3, 8, generator=generator)
    bias = torch.zeros(40)
    bias[-5:] = -torch.inf
    labels = torch.tensor([1, 2, 3])

    def gradient(name, head, states):
        states = states.clone().requires_grad_()
        found = ff.token_stats(states, head, labels.to(states.device), outputs=("logp", "entropy"), backend=name)
        (found.logp + found.entropy).sum().backward()
        return states.grad

    ours = gradient(backend, ff.LMHead(weight.to(device), bias.to(device)), hidden.to(device))
    short = gradient("eager", ff.LMHead(weight[:-5].double()), hidden.double())
    torch.testing.assert_close(ours.cpu().double(), short, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("backend", OURS)
@pytest.mark.parametrize("doubt", [1e-9, 1e-6, 0.5])
@pytest.mark.parametrize("kind", DIVERGENCES)
def test_a_memorised_reference_with_its_label_shifted(kind, doubt, backend):
    """With 1 - q_y = 1e-9, and 2e-5 after a shift of 10, nothing is lost; eager float32 loses 0.3 to 100 %."""
    generator = torch.Generator().manual_seed(0)
    reference = torch.randn(3, 301, generator=generator, dtype=torch.float64)
    labels = torch.tensor([7, 300, 0])
    others = reference.scatter(1, labels[:, None], -torch.inf).logsumexp(1)
    reference[range(3), labels] = others + math.log((1 - doubt) / doubt)
    policy = (reference + 0.1 * torch.randn(3, 301, generator=generator)).float()
    shift = {"labels": labels, "label_shift": -10.0}
    results = []
    for dtype, name in ((torch.float64, "eager"), (torch.float32, backend)):
        leaf = policy.to(device_of(name), dtype).requires_grad_()
        ref_logits = reference.float().to(device_of(name), dtype)
        value = ff.divergence(leaf, ref_logits, ff.LMHead(None), kind, backend=name, **shift)
        results.append((value.detach().cpu(), torch.autograd.grad(value.sum(), leaf)[0].cpu()))
    (value, grad), (our_value, our_grad) = results
    assert ((our_value - value).abs() <= 2e-6 * value).all()  # measured: 6e-7
    assert ((our_grad - grad).norm(dim=1) <= 3e-6 * grad.norm(dim=1)).all()  # measured: 1e-6


@pytest.mark.parametrize("kind", DIVERGENCES)
def test_divergence_of_one_hot_distributions_is_finite(kind):
    logits = torch.tensor([[1e4, 0.0, -1e4], [0.0, 1e4, 5.0]])
    reference = torch.tensor([[0.0, 1e4, 3.0], [0.0, 1e4, 5.0]])
    value = ff.divergence(logits.requires_grad_(), reference, ff.LMHead(None), kind)
    value.sum().backward()
    truth = ff.divergence(logits.detach().double(), reference.double(), ff.LMHead(None), kind, backend="eager")
    assert torch.allclose(value.detach().double(), truth, rtol=1e-6) and logits.grad.isfinite().all()
