"""WGA, TNPO, SatImp, unlikelihood and max-entropy: against their formulas on full float64 logits."""

import copy
import math

import pytest
import torch
from kernel_device import DEVICE, OURS
from test_step import gradients, load_perturbed

import fastforget as ff


def formula(name, logits, labels, ref_logp):
    """(n,) the term of each token, written out; the weights are constants."""
    log_probs = logits.log_softmax(-1)
    logp = log_probs.gather(-1, labels[:, None])[:, 0]
    p = logp.detach().exp()
    vocabulary = logits.shape[-1]
    if name == "wga":
        return p**0.7 * logp
    if name == "tnpo":
        return 2 * p**1.3 / (p**1.3 + ref_logp.exp() ** 1.3) * logp
    if name == "satimp":
        return p**2 * (1 - p) ** 0.5 * logp
    if name == "unlikelihood":
        return -torch.log1p(-logp.exp())
    if name == "me":
        return (1 / vocabulary * (math.log(1 / vocabulary) - log_probs)).sum(-1)
    return (log_probs.exp() * (log_probs + math.log(vocabulary))).sum(-1)  # KL(p||U)


CASES = {
    "wga": ff.preset("wga", beta=0.7, retain=None),
    "tnpo": ff.preset("tnpo", beta=1.3, retain=None),
    "satimp": ff.preset("satimp", beta1=2.0, beta2=0.5, retain=None),
    "unlikelihood": ff.preset("unlikelihood", retain=None),
    "me": ff.preset("me", forget_weight=1.0, retain=None),
    "me reverse": ff.preset("me", forget_weight=1.0, direction="reverse", retain=None),
}


def expected_loss(name, reduction, model, reference, batch):
    def rows(which):
        logits = which(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1].double()
        labels = batch["labels"][:, 1:]
        return [(row[kept], label[kept]) for row, label, kept in zip(logits, labels, labels != -100, strict=True)]

    with torch.no_grad():
        ref = [row.log_softmax(-1).gather(-1, label[:, None])[:, 0] for row, label in rows(reference)]
    per_row = [formula(name, *pair, ref_logp) for pair, ref_logp in zip(rows(model), ref, strict=True)]
    return torch.cat(per_row).mean() if reduction == "token" else torch.stack([row.mean() for row in per_row]).mean()


@pytest.mark.parametrize("backend", OURS if DEVICE.type == "cpu" else ["chunked"])  # the tiny models are on the CPU
@pytest.mark.parametrize("kind", ["opt", "llama"])
def test_every_lora_gradient_is_that_of_the_formula(tiny, batch, kind, backend):
    model = load_perturbed(tiny[kind])
    reference = copy.deepcopy(model)
    reference.base_model.disable_adapter_layers()
    forget = batch(2, 1, width=14)
    for name, (term,) in CASES.items():
        for reduction in ("token", "sequence") if backend == "chunked" else ("token",):
            term.reduction = reduction
            model.zero_grad()
            loss = expected_loss(name, reduction, model, reference, forget)
            loss.backward()
            expected = gradients(model)
            model.zero_grad()
            out = ff.UnlearnLoss(model, [term], backend=backend)(forget)
            out.loss.backward()
            assert float(out.loss) == pytest.approx(float(loss), rel=1e-5), name
            for key, gradient in gradients(model).items():
                error = float((gradient - expected[key]).norm() / expected[key].norm())
                assert error < 2e-5, (name, reduction, key, error)


def test_memorised_tokens_keep_their_gradient():
    """At 1 - p_y = e^-60 unlikelihood is 60 nats, and its gradient the softmax over the other tokens - onehot."""
    logits = torch.zeros(1, 5)
    logits[0, 2] = 60.0 + math.log(4)
    stats = ff.token_stats_from_logits(logits.requires_grad_(), torch.tensor([2]), outputs=("log_not_label",))
    (-stats.log_not_label).sum().backward()
    assert float(-stats.log_not_label) == pytest.approx(60.0, rel=1e-6)
    assert torch.allclose(logits.grad, torch.tensor([[-0.25, -0.25, 1.0, -0.25, -0.25]]), atol=1e-6)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: ff.preset("wga", beta=-1.0), "wga: beta must be finite and not negative"),
        (lambda: ff.preset("satimp", beta2=math.nan), "satimp: beta2 must be"),
        (lambda: ff.preset("satimp", beta=1.0), "no parameter 'beta': it takes reduction, beta1, beta2, forget_weight"),
        (lambda: ff.preset("me", direction="both"), "direction must be forward or reverse"),
        (lambda: ff.preset("tnpo", reduction="batch"), "reduction must be token or sequence"),
    ],
)
def test_wrong_parameters_are_refused(call, message):
    with pytest.raises(ff.FastforgetError, match=message):
        call()


def test_defaults_are_as_published():
    (satimp, ce), (me, _) = ff.preset("satimp"), ff.preset("me")
    assert (satimp.beta1, satimp.beta2, satimp.weight, ce.name, me.weight) == (5.0, 1.0, 1.0, "ce", 0.1)
