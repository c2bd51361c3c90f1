"""token_stats_from_logits(in_place=True): the values and gradients of the ordinary call, in the logits' own memory."""

import pytest
import torch
from kernel_device import OURS, device_of

import fastforget as ff
from fastforget.backends import tiling

DIFFERENTIABLE = ("logp", "lse", "label_logit", "log_not_label", "entropy", "max_logit", "logit_mean")


def problem(backend, dtype=torch.float32, rows=7, vocabulary=150):
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(rows, 12, generator=generator, requires_grad=True)
    weight = torch.randn(vocabulary, 12, generator=generator)
    labels = torch.randint(0, vocabulary, (rows,), generator=generator)
    labels[2] = -100
    hidden = hidden.detach().to(device_of(backend)).requires_grad_()
    return hidden, (2 * hidden @ weight.to(hidden.device).T).to(dtype), labels.to(hidden.device)


@pytest.mark.parametrize("backend", OURS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_values_and_gradients_are_those_of_the_ordinary_call(monkeypatch, backend, dtype):
    monkeypatch.setattr(tiling, "CPU_BYTES", 2000)  # several blocks of rows
    results = []
    for in_place in (False, True):
        hidden, logits, labels = problem(backend, dtype)
        memory = logits.data_ptr()
        stats = ff.token_stats_from_logits(
            logits if in_place else logits.double(),
            labels,
            hidden,
            outputs=(*DIFFERENTIABLE, "argmax"),
            anchor=torch.ones(12),
            backend=backend if in_place else "eager",
            in_place=in_place,
        )
        loss = sum((index + 1.5) * getattr(stats, name).sum() for index, name in enumerate(DIFFERENTIABLE))
        grads = []
        logits.register_hook(grads.append)
        (loss + stats.distance.sum()).backward()
        assert not in_place or grads[0].data_ptr() == memory, "the gradient lies in another tensor"
        fields = [getattr(stats, name).detach() for name in (*DIFFERENTIABLE, "argmax", "distance")]
        results.append([*fields, grads[0].float(), hidden.grad])
    rounding = max(1e-5, 2 * torch.finfo(dtype).eps)  # of float32 exponents of size 20, and of the rows' dtype
    for index, (expected, ours) in enumerate(zip(*results, strict=True)):
        tolerance = 1e-5 if index < len(fields) else rounding
        assert (ours - expected).abs().max() <= tolerance * expected.abs().max(), index


@pytest.mark.parametrize("backend", OURS)
def test_rows_that_are_not_kept_get_no_gradient(backend):
    _, logits, labels = problem(backend)
    logits = logits.detach()
    logits[2] = torch.inf
    logits.requires_grad_()
    stats = ff.token_stats_from_logits(logits, labels, positions=torch.tensor([0, 4]), backend=backend, in_place=True)
    assert (stats.logp == 0).tolist() == [False, True, True, True, False, True, True]
    stats.logp.sum().backward()
    assert (logits.grad.abs().sum(1) > 0).tolist() == [True, False, False, False, True, False, False]
    assert logits.grad.isfinite().all()


def test_what_cannot_be_is_refused():
    _, logits, labels = problem("torch")
    with pytest.raises(ff.FastforgetError, match="'eager' leaves gradients"):
        ff.token_stats_from_logits(logits, labels, backend="eager", in_place=True)
    with pytest.raises(ff.FastforgetError, match="rows are contiguous"):
        ff.token_stats_from_logits(logits.detach().T.contiguous().T, labels, in_place=True)
    with pytest.raises(ff.FastforgetError, match="outside the vocabulary"):
        ff.token_stats_from_logits(logits, labels + 150, in_place=True)
    stats = ff.token_stats_from_logits(logits, labels, in_place=True)
    stats.logp.sum().backward(retain_graph=True)
    with pytest.raises(ff.FastforgetError, match="one backward pass only"):
        stats.logp.sum().backward()
