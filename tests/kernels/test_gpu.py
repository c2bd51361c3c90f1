"""What only a GPU can show: sizes past 32 bits, the largest vocabularies, 16-bit products, and no synchronisation."""

import pytest
import torch

import fastforget as ff
from fastforget.backends.fields import NAMES as OUTPUTS
from fastforget.stats import DIVERGENCES

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device"),
]
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def problem(rows, width, vocabulary, dtype, memorised=False):
    generator = torch.Generator("cuda").manual_seed(0)
    weight = (torch.randn(vocabulary, width, generator=generator, device="cuda") / width**0.5).to(dtype)
    labels = torch.randint(0, vocabulary, (rows,), generator=generator, device="cuda")
    hidden = torch.randn(rows, width, generator=generator, device="cuda")
    if memorised:
        hidden = hidden + 0.5 * width**0.5 * weight[labels].float()
    return hidden.to(dtype), weight, labels


def of_rows(hidden, weight, labels, rows, outputs):
    """The truth for some rows, in float64."""
    leaf = hidden[rows].double().requires_grad_()
    stats = ff.token_stats(leaf, ff.LMHead(weight.double()), labels[rows], outputs=outputs, backend="eager")
    return stats, leaf


def rms(value):
    return float(value.double().square().mean().sqrt())


def eager_of_the_same_product(hidden, weight, labels, outputs):
    """Eager statistics of materialised float32 logits, and the gradient of logp, of the very products that ours are.

    A tensor core's product of 16-bit operands has two to three times the error of a float32 one: cuBLAS's, not ours.
    """
    if hidden.dtype == torch.float32:
        logits = hidden @ weight.T
    else:
        logits = torch.mm(hidden, weight.T, out_dtype=torch.float32)
    logits.requires_grad_()
    stats = ff.token_stats_from_logits(logits, labels, outputs=outputs, backend="eager")
    (rows,) = torch.autograd.grad(stats.logp.sum(), logits)
    if hidden.dtype == torch.float32:
        return stats, rows @ weight
    return stats, torch.mm(rows.to(hidden.dtype), weight, out_dtype=torch.float32).to(hidden.dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("memorised", [False, True])
@pytest.mark.parametrize("vocabulary", [50257, 50272, 262144])
def test_rms_error_at_real_sizes(dtype, memorised, vocabulary):
    """RMS error <= 1.5 x that of eager PyTorch on materialised float32 logits, statistics and gradient."""
    hidden, weight, labels = problem(384, 256, vocabulary, dtype, memorised)
    outputs = ("logp", "log_not_label", "entropy", "logp_var", "others_entropy", "lse")
    rows = torch.arange(0, 384, 3, device="cuda")
    truth, leaf = of_rows(hidden, weight, labels, rows, outputs)
    (true_grad,) = torch.autograd.grad(truth.logp.sum(), leaf)
    leaf = hidden.clone().requires_grad_()
    ours = ff.token_stats(leaf, ff.LMHead(weight), labels, outputs=outputs, backend="triton")
    (our_grad,) = torch.autograd.grad(ours.logp.sum(), leaf)
    eager, eager_grad = eager_of_the_same_product(hidden, weight, labels, outputs)
    for name in outputs:
        expected = getattr(truth, name).detach()
        error, theirs = (rms(getattr(stats, name).detach()[rows] - expected) for stats in (ours, eager))
        assert error <= 1.5 * theirs + 2**-24 * rms(expected), (name, error, theirs)
    error, theirs = (rms(grad[rows].double() - true_grad) for grad in (our_grad, eager_grad))
    assert error <= 1.5 * theirs + 2**-24 * rms(true_grad), ("gradient", error, theirs)


def test_more_than_two_to_the_31_logits():
    """N V > 2^31 in one tensor (float16: 4.3 GB), in place: every row where it belongs, the last one too."""
    rows, vocabulary = 8400, 262144
    logits = torch.empty(rows, vocabulary, dtype=torch.float16, device="cuda")
    logits.normal_(generator=torch.Generator("cuda").manual_seed(0))
    labels = torch.randint(0, vocabulary, (rows,), device="cuda")
    sample = torch.tensor([0, 1, 8190, 8191, 8192, rows - 1], device="cuda")
    truth = logits[sample].double().log_softmax(1)
    leaf = logits.requires_grad_()
    stats = ff.token_stats_from_logits(leaf, labels, in_place=True)
    assert torch.allclose(stats.logp[sample].double(), truth.gather(1, labels[sample, None])[:, 0], rtol=0, atol=1e-4)
    stats.logp.sum().backward()
    expected = -truth.exp().scatter_add(1, labels[sample, None], -torch.ones(len(sample), 1, device="cuda").double())
    assert (leaf.grad[sample].double() - expected).abs().max() < 1e-3


def test_states_and_heads_past_32_bits():
    """Row offsets of states and of a head whose V D passes 2^31."""
    rows, width, vocabulary = 300, 16384, 140000
    weight = torch.empty(vocabulary, width, dtype=torch.bfloat16, device="cuda").normal_()
    labels = torch.full((rows,), vocabulary - 1, device="cuda")
    hidden = (weight[labels] / width).requires_grad_()
    stats = ff.token_stats(hidden, ff.LMHead(weight), labels, anchor="label")
    logits = hidden[:1].detach().double() @ weight[-2000:].double().T
    assert float(stats.label_logit[0] if stats.label_logit is not None else logits[0, -1]) == pytest.approx(
        float(logits[0, -1]), rel=1e-2
    )
    stats.logp.sum().backward()
    assert hidden.grad.isfinite().all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_nothing_synchronises(dtype):
    hidden, weight, labels = problem(300, 64, 1009, dtype)
    labels[::3] = -100
    positions = (labels != -100).nonzero()[:, 0]
    head, anchor, centres = ff.LMHead(weight), hidden + 0.1, weight[:5].float()

    def everything():
        leaf = hidden.clone().requires_grad_()
        stats = ff.token_stats(leaf, head, labels, positions=positions, outputs=OUTPUTS, anchor=anchor, centres=centres)
        (stats.logp.sum() + stats.distance.sum() + stats.pull.sum() + stats.entropy.sum()).backward()
        for kind in DIVERGENCES:
            ff.divergence(leaf, anchor, head, kind, positions=positions).sum().backward()
            shift = {"labels": labels, "label_shift": -1.0}
            ff.divergence(leaf, anchor, head, kind, positions=positions, **shift).sum().backward()
        distance, pull = ff.hidden_stats(leaf, anchor, centres, "cosine", 0.5)
        (distance.sum() + pull.sum()).backward()
        return leaf.grad

    everything()  # compiles, and fills the caches of what is asked of a device once
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        grad = everything()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert grad.isfinite().all()


def test_memory_stays_within_its_budget():
    """Peak extra memory of the mean NLL and its gradient: at most 3 N D x bytes + 256 MB, whatever V."""
    rows, width, vocabulary = 4096, 2048, 128256
    hidden, weight, labels = problem(rows, width, vocabulary, torch.bfloat16)
    positions = torch.arange(rows, device="cuda")
    hidden.requires_grad_()
    for _ in range(2):
        hidden.grad = None
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        stats = ff.token_stats(hidden, ff.LMHead(weight), labels, positions=positions)
        (-stats.logp.mean()).backward()
        torch.cuda.synchronize()
    extra = torch.cuda.max_memory_allocated() - before
    assert extra <= 3 * rows * width * 2 + 256 * 2**20, f"{extra / 2**20:.0f} MiB"
