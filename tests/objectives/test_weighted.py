"""Terms that are a mean over tokens: against their formulas on full float64 logits."""

import math
from functools import partial

import pytest
import torch
from helpers import assert_follows, load_perturbed, reference_of, with_known_labels
from kernel_device import KINDS_AND_BACKENDS, OURS, device_of

import fastforget as ff
from fastforget.objectives import Field, SideStats


def formula(name, logits, labels, ref_logits):
    """(n,) the term of each token, written out; the weights are constants."""
    log_probs = logits.log_softmax(-1)
    column = labels[:, None]
    logp = log_probs.gather(-1, column)[:, 0]
    ref_logp = ref_logits.log_softmax(-1).gather(-1, column)[:, 0]
    p = logp.detach().exp()
    if name in ("grad_ascent", "ce"):
        return logp if name == "grad_ascent" else -logp
    if name == "ceu":
        target = logits.detach().scatter(-1, column, -torch.inf).softmax(-1)
        return -(target * log_probs).sum(-1)
    if name.startswith("undial"):
        beta = {"undial": 10.0, "undial 2": 2.0, "undial 0": 0.0}[name]
        target = ref_logits.scatter_add(-1, column, torch.full_like(column, -beta, dtype=torch.float64)).softmax(-1)
        return -(target * log_probs).sum(-1)
    if name == "pdu":
        return (logits.max(-1).values - logits.mean(-1)).square()
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
    "grad_ascent": ff.preset("grad_ascent"),
    "ce": [ff.CE(on="forget")],
    "ceu": ff.preset("ceu"),
    "undial": ff.preset("undial"),
    "undial 2": ff.preset("undial", beta=2.0),
    "undial 0": ff.preset("undial", beta=0.0),
    "pdu": ff.preset("pdu")[:1],
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
        ref = [row for row, _ in rows(reference)]
    per_row = [formula(name, *pair, ref_logits) for pair, ref_logits in zip(rows(model), ref, strict=True)]
    return torch.cat(per_row).mean() if reduction == "token" else torch.stack([row.mean() for row in per_row]).mean()


@pytest.mark.parametrize(("kind", "backend"), KINDS_AND_BACKENDS)
def test_every_lora_gradient_is_that_of_the_formula(tiny, batch, kind, backend):
    model = load_perturbed(tiny[kind])
    reference, forget = reference_of(model), with_known_labels(model, batch(2, 1, width=14))
    for name, (term,) in CASES.items():
        for reduction in ("token", "sequence") if backend == "torch" else ("token",):
            term.reduction = reduction
            formula = partial(expected_loss, name, reduction, model, reference, forget)
            assert_follows(formula, model, [term], forget, backend=backend)


@pytest.mark.parametrize("backend", OURS)
def test_ceu_of_a_memorised_token(backend):
    """At 1 - p_y = e^-60 the value is 60 nats and the others' own entropy, which their share of p's would not give."""
    logits = torch.tensor([[1.0, 2.0, 0.0, 0.5, -1.0]])
    others = logits[0, [0, 1, 3, 4]].double().softmax(0)
    entropy = float(-(others * others.log()).sum())
    logits[0, 2] = 60.0 + float(logits[0, [0, 1, 3, 4]].logsumexp(0))
    logits = logits.to(device_of(backend)).requires_grad_()
    outputs = ("log_not_label", "others_entropy")
    stats = ff.token_stats_from_logits(logits, torch.tensor([2]), outputs=outputs, backend=backend)
    tensors = {Field(name): getattr(stats, name) for name in outputs}
    side = SideStats(torch.tensor([0]), 1, 1, 1, tensors=tensors)
    value = ff.CEU().value(side)
    value.backward()
    assert float(stats.others_entropy) == pytest.approx(entropy, rel=1e-6)
    assert float(value.detach()) == pytest.approx(60.0 + entropy, rel=1e-6)
    expected = torch.tensor([[-others[0], -others[1], 1.0, -others[2], -others[3]]])
    assert torch.allclose(logits.grad.cpu(), expected.float(), atol=1e-6)
