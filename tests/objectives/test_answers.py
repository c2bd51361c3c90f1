"""Terms on refusals, alternative and mismatched answers: against their formulas on full float64 logits."""

import decimal
import math
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from helpers import assert_follows, load_perturbed, reference_of
from kernel_device import KINDS_AND_BACKENDS

import fastforget as ff
from fastforget.objectives import LOGP, SideStats


@pytest.fixture
def sides(batch):
    """(forget, retain), each stream of another width and another padding."""
    forget = batch(3, 1, width=14) | {"refusal": batch(3, 2, width=12, prompt=4), "mismatch": batch(5, 13, width=16)}
    retain = batch(2, 4, width=13) | {"refusal": batch(2, 5, width=15, prompt=7)}
    return forget, retain


def rows(model, batch):
    """[(T, V) float64 log-probs of the label tokens, (T,) their log-probs] of each row, by a forward of its own."""
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1].double()
    found = []
    for row, labels in zip(logits.log_softmax(-1), batch["labels"][:, 1:], strict=True):
        kept = labels != -100
        found.append((row[kept], row[kept].gather(-1, labels[kept][:, None])[:, 0]))
    return found


def label_log_probs(model, batch):
    return [label for _, label in rows(model, batch)]


def nll(model, batch):
    """(B,) the NLL of each whole answer."""
    return -torch.stack([row.sum() for row in label_log_probs(model, batch)])


def token_mean(per_row, reduction):
    return torch.cat(per_row).mean() if reduction == "token" else torch.stack([row.mean() for row in per_row]).mean()


def jsd_from_one_hot(log_probs, labels):
    """(T,) JSD(p || e): KL(p || m) summed over the whole vocabulary, KL(e || m) over the only token where e > 0."""
    p = log_probs.exp()
    m = (p + F.one_hot(labels, log_probs.shape[-1])) / 2
    return 0.5 * ((p * (log_probs - m.log())).sum(-1) - m.gather(-1, labels[:, None])[:, 0].log())


def loss_by_formula(name, model, reference, forget, retain):
    """Each term's formula, on full logits; the reference is a copy."""
    refusal, mismatch = forget["refusal"], forget["mismatch"]
    with torch.no_grad():
        ref = {key: nll(reference, part) for key, part in (("win", refusal), ("lose", forget), ("far", mismatch))}
    if name == "dpo":
        win, lose = ref["win"] - nll(model, refusal), ref["lose"] - nll(model, forget)
        return -(2 / 0.3) * F.logsigmoid(0.3 * (win - lose)).mean()
    if name == "ap":
        return -(1 / 0.3) * F.logsigmoid(0.3 * (nll(model, retain["refusal"]) - nll(model, retain))).mean()
    if name.startswith("idk"):
        return -token_mean(label_log_probs(model, refusal), name.split()[1])
    if name.startswith("random_mismatch"):
        return -token_mean(label_log_probs(model, mismatch), name.split()[1])
    if name.startswith("jensun"):
        labels = [row[1:][row[1:] != -100] for row in refusal["labels"]]
        per_row = [jsd_from_one_hot(row, kept) for (row, _), kept in zip(rows(model, refusal), labels, strict=True)]
        return token_mean(per_row, name.split()[1])
    if name == "kto clamped":
        return (1 - torch.sigmoid(0.3 * (nll(model, forget) - ref["lose"]))).mean()
    if name == "kto":
        with torch.no_grad():
            far = ref["far"] - nll(model, mismatch)
        assert float(far.mean()) > 0.2, "above the clamp"
        z = float(far.mean())
        return (1 - torch.sigmoid(0.3 * (z - (ref["lose"] - nll(model, forget))))).mean()
    template, forgotten = (
        torch.stack([row.exp().mean() for row in label_log_probs(model, part)]) for part in (refusal, forget)
    )
    if name == "flat kl":
        return (torch.exp(forgotten - 1) - template).mean()
    if name == "flat tv":
        return (torch.tanh(forgotten) / 2 - torch.tanh(template) / 2).mean()
    if name == "flat pearson":
        return (forgotten**2 / 4 + forgotten - template).mean()
    template = torch.log(2 / (1 + torch.exp(-template)))  # js: g, and f*(t) = -log(2 - exp(t)) at t = g
    forgotten = torch.log(2 / (1 + torch.exp(-forgotten)))
    return (-torch.log(2 - torch.exp(forgotten)) - template).mean()


CASES = {
    "dpo": ff.DPO(beta=0.3),
    "ap": ff.AnswerPreservation(beta=0.3),
    "idk token": ff.RefusalCE(),
    "idk sequence": ff.RefusalCE(reduction="sequence"),
    "random_mismatch token": ff.RandomMismatch(),
    "random_mismatch sequence": ff.RandomMismatch(reduction="sequence"),
    "jensun token": ff.JensUn(),
    "jensun sequence": ff.JensUn(reduction="sequence"),
    "kto": ff.KTO(beta=0.3),
    "kto clamped": ff.KTO(beta=0.3),
    **{f"flat {name}": ff.FLAT(divergence=name) for name in ("kl", "tv", "js", "pearson")},
}


@pytest.mark.parametrize(("kind", "backend"), KINDS_AND_BACKENDS)
def test_every_lora_gradient_is_that_of_the_formula(tiny, sides, batch, kind, backend):
    model = load_perturbed(tiny[kind])
    reference = reference_of(model)
    for name, term in CASES.items():
        if backend != "torch" and name in ("idk sequence", "random_mismatch sequence", "jensun sequence"):
            continue  # another mean of the same tokens
        if backend == "triton" and name in ("flat tv", "flat js", "flat pearson"):
            continue  # other functions of the same log-probs
        forget, retain = sides
        if name == "kto clamped":  # mismatched answers that became less likely: their mean log ratio is negative
            forget = forget | {"mismatch": batch(5, 3, width=16)}
        rounding = 2**-24 if name.startswith("flat") else 0.0  # a difference of numbers up to 1
        formula = partial(loss_by_formula, name, model, reference, forget, retain)
        assert_follows(formula, model, [term], forget, retain, rounding=rounding, backend=backend)


@pytest.mark.parametrize("logp", [-1e-30, -1e-9, -1e-4, -0.7, -10.0, -60.0, -300.0])
def test_jensun_keeps_its_digits_at_both_ends(logp):
    """Against the formula in 50 digits, in float32; the gradient is dJSD/dlogp = 1/2 p log(p / (1 + p))."""
    with decimal.localcontext(prec=50):
        exact = decimal.Decimal(float(torch.tensor(logp)))
        p, log2 = exact.exp(), decimal.Decimal(2).ln()
        expected = (p * exact - (1 + p) * ((1 + p) / 2).ln() + (1 - p) * log2) / 2
        slope = p * (exact - (1 + p).ln()) / 2
    label = torch.tensor([logp], requires_grad=True)
    stats = SideStats(torch.tensor([0]), 1, 1, 1, tensors={LOGP: label}, vocabulary=9)
    value = ff.JensUn().value(stats)
    value.backward()
    assert 0 <= float(value.detach()) <= math.log(2) * (1 + 1e-6)
    assert float(value.detach()) == pytest.approx(float(expected), rel=1e-6)
    assert float(label.grad) == pytest.approx(float(slope), rel=1e-5, abs=1e-37)
