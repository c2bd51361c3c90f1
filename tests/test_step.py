"""UnlearnLoss and UnlearnStep against a loop with full logits and a deep-copied reference."""

import copy
import pickle
import warnings
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from helpers import (
    adapter_of,
    assert_follows,
    assert_gradients,
    gradients,
    load_perturbed,
    reference_of,
    token_log_probs,
)

import fastforget as ff


def loss_by_hand(name, model, reference, forget, retain):
    """Each preset's formula, on full logits."""
    _, logp, kept = token_log_probs(model, forget)
    with torch.no_grad():
        _, ref_logp, _ = token_log_probs(reference, forget)
        ref_retain, _, _ = token_log_probs(reference, retain)
    retain_all, retain_logp, retain_kept = token_log_probs(model, retain)
    ascent = logp[kept].mean()
    ce = -retain_logp[retain_kept].mean()
    kl = F.kl_div(retain_all, ref_retain, log_target=True, reduction="none").sum(-1)[retain_kept].mean()
    reverse = F.kl_div(ref_retain, retain_all, log_target=True, reduction="none").sum(-1)[retain_kept].mean()
    nll, ref_nll = -(logp * kept).sum(1), -(ref_logp * kept).sum(1)
    if name == "grad_ascent":
        return ascent
    if name == "grad_diff":
        return ascent + ce
    if name == "npo":
        return -(2 / 0.1) * F.logsigmoid(0.1 * (nll - ref_nll)).mean() + ce
    if name == "npo_mean":
        return -(2 / 2.5) * F.logsigmoid(2.5 * (nll - ref_nll) / kept.sum(1)).mean() + ce + kl
    if name == "npo_token":
        return -(2 / 2.0) * F.logsigmoid(-2.0 * (logp - ref_logp)[kept]).mean() + ce + kl
    if name == "simnpo":
        return -0.125 * (2 / 4.5) * F.logsigmoid(4.5 * nll / kept.sum(1)).mean() + ce
    if name == "simnpo with delta":
        return -(2 / 0.7) * F.logsigmoid(0.7 * (nll / kept.sum(1) - 0.3)).mean()
    if name == "reverse_kl":
        return ascent + reverse
    mixture = ((retain_all.exp() + ref_retain.exp()) / 2).log()
    jsd = sum((one.exp() * (one - mixture)).sum(-1)[retain_kept].mean() / 2 for one in (retain_all, ref_retain))
    return ascent + 0.5 * jsd


OTHER_TERMS = {
    "simnpo with delta": [ff.SimNPO(beta=0.7, delta=0.3)],
    "reverse_kl": [ff.NegatedCE(), ff.KL(direction="reverse_kl")],
    "jsd": [ff.NegatedCE(), ff.KL(direction="jsd", weight=0.5)],
}


def terms_of(name):
    return OTHER_TERMS[name] if name in OTHER_TERMS else ff.preset(name)


@pytest.mark.parametrize("bits", [32, 8])
@pytest.mark.parametrize("kind", ["opt", "llama"])
def test_every_lora_gradient_equals_a_full_logits_loop(tiny, batch, kind, bits):
    model = load_perturbed(tiny[kind], bits)
    sides, reference = (batch(4, 1), batch(3, 2, width=17)), reference_of(model)
    for name in ("grad_ascent", "grad_diff", "npo", "npo_mean", "npo_token", "simnpo", *OTHER_TERMS):
        formula = partial(loss_by_hand, name, model, reference, *sides)
        found = assert_follows(formula, model, terms_of(name), *sides, bound=1e-5)  # measured: 1e-6, in 8 bit too
        assert len(found) == 2 * 2 * {"opt": 6, "llama": 7}[kind]


def test_losses_of_parts_add_up_and_a_flat_batch_is_the_same(model, batch):
    """Parts may lack a side, or labels; micro-batches are tested with all companions in `test_streams.py`."""
    forget, retain = batch(5, 1), batch(4, 2)
    step = ff.UnlearnStep(model, torch.optim.SGD, terms="npo_mean", lr=0.1)
    whole = step.backward(forget, retain)
    expected = gradients(model)
    unlabelled = batch(1, 3) | {"labels": torch.full((1, 20), -100)}
    flat = []
    for part, role, rows in (
        (forget, 0, slice(0, 1)),
        (retain, 1, slice(0, 3)),
        (unlabelled, 0, slice(None)),
        (forget, 0, slice(1, 5)),
        (retain, 1, slice(3, 4)),
    ):
        chosen = {key: value[rows] for key, value in part.items()}
        flat.append(chosen | {"role": torch.full((len(chosen["labels"]),), role)})
    counts = ff.count_labels(flat)
    assert counts.retain_sequences == 4 and counts.forget_tokens == int((forget["labels"][:, 1:] != -100).sum())
    step.zero_grad()
    losses = []
    for part in flat:
        out = step.backward(part, counts=counts, backward=lambda loss: (losses.append(loss), loss.backward()))
        assert (float(out.loss) == 0.0) == (part["labels"] == -100).all()
    assert float(sum(losses).detach()) == pytest.approx(float(whole.loss), rel=1e-5)
    assert_gradients(gradients(model), expected)
    step.zero_grad()
    step.backward({key: torch.cat([part[key] for part in flat]) for key in flat[0]} | {"example_id": torch.arange(10)})
    assert_gradients(gradients(model), expected)


def test_keeps_the_promises_of_an_optimizer(model, batch):
    step = ff.UnlearnStep(model, torch.optim.AdamW, terms="grad_diff", lr=1e-3)
    assert isinstance(step, torch.optim.Optimizer)
    step.load_state_dict(step.state_dict())  # before step 1, as Accelerate does
    seen = []
    step.register_step_post_hook(lambda optimizer, args, kwargs: seen.append(optimizer))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        scheduler = torch.optim.lr_scheduler.LambdaLR(step, lambda epoch: 0.5**epoch)
        step(batch(2, 1), batch(2, 2))
        scheduler.step()
    assert step.param_groups[0]["lr"] == 5e-4 and step.base.param_groups[0]["lr"] == 5e-4
    assert seen == [step] and step.param_groups[0]["unlearn_steps"] == 1
    step.step()
    assert step.param_groups[0]["unlearn_steps"] == 1, "a step without a backward moves no counter"
    assert step.step(lambda: 3.0) == 3.0

    extra = torch.nn.Parameter(torch.zeros(2))
    step.add_param_group({"params": [extra], "lr": 1.0})
    assert step.base.param_groups[-1]["params"][0] is extra


DUAL = "unlearn_dual_ce.dual"


@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.AdamW])
@pytest.mark.parametrize("name", ["npo", "pdu"])
def test_a_state_dict_continues_identically(tiny, batch, name, optimizer, tmp_path):
    """Counters and duals with it; a state that was taken stays as it was."""

    def run(step, seeds):
        for seed in seeds:
            step(batch(2, seed), batch(2, seed + 10))

    straight = load_perturbed(tiny["llama"])
    whole = ff.UnlearnStep(straight, optimizer, terms=name, lr=1e-3)
    run(whole, range(4))
    first = load_perturbed(tiny["llama"])
    step = ff.UnlearnStep(first, optimizer, terms=name, lr=1e-3)
    run(step, range(2))
    kept, half = step.state_dict(), float(step.param_groups[0].get(DUAL, 0.0))
    torch.save(kept, tmp_path / "step.pt")
    second = copy.deepcopy(first)
    resumed = ff.UnlearnStep(second, optimizer, terms=name, lr=9.0)
    resumed.load_state_dict(torch.load(tmp_path / "step.pt", weights_only=True))
    assert resumed.param_groups[0]["unlearn_steps"] == 2
    run(resumed, range(2, 4))
    assert all(torch.equal(one, second.get_parameter(key)) for key, one in straight.named_parameters())
    ends = [float(each.param_groups[0].get(DUAL, 0.0)) for each in (whole, resumed)]
    assert ends[0] == ends[1] and (ends[0] != half) == (name == "pdu")
    assert float(kept["param_groups"][0].get(DUAL, 0.0)) == half and kept["param_groups"][0]["unlearn_steps"] == 2


@pytest.mark.parametrize("name", ["npo", "pdu"])
def test_copies_go_on_as_the_original_once_attached(model, batch, name):
    step = ff.UnlearnStep(model, torch.optim.AdamW, terms=name, lr=1e-3)
    step(batch(2, 1), batch(2, 2))
    other_model, other = copy.deepcopy((model, step))
    alone, third_model = pickle.loads(pickle.dumps(step)), copy.deepcopy(model)
    for each, of in ((other, other_model), (alone, third_model)):
        assert each.param_groups[0]["unlearn_steps"] == 1
        with pytest.raises(ff.FastforgetError, match="attach"):
            each(batch(2, 3), batch(2, 4))
        each.attach(of)
    before = adapter_of(model)
    for each in (step, other, alone):
        each(batch(2, 3), batch(2, 4))
        assert step.param_groups[0].get(DUAL) == each.param_groups[0].get(DUAL)
    for key, parameter in model.named_parameters():
        assert torch.equal(parameter, other_model.get_parameter(key)), key
        assert torch.equal(parameter, third_model.get_parameter(key)), key
        assert key not in before or not torch.equal(parameter, before[key]), "it trains"
        assert third_model.get_parameter(key).grad is None, "and clears its gradients"


def test_parameters_of_another_model_are_refused(tiny):
    model, stranger = load_perturbed(tiny["llama"]), load_perturbed(tiny["opt"])
    optimizer = torch.optim.SGD([p for p in stranger.parameters() if p.requires_grad], lr=0.1)
    with pytest.raises(ff.FastforgetError, match="belong to the model"):
        ff.UnlearnStep(model, optimizer, terms="npo")
    step = copy.deepcopy(ff.UnlearnStep(stranger, optimizer, terms="npo"))
    with pytest.raises(ff.FastforgetError, match="do not match"):
        step.attach(model)


def test_a_side_without_terms_is_not_looked_at(model, batch):
    loss = ff.UnlearnLoss(model, "grad_ascent")
    assert torch.equal(loss(batch(2, 1), {"input_ids": torch.ones(1, 3)}).loss, loss(batch(2, 1)).loss)


def test_nan_is_not_hidden(model, batch):
    next(p for name, p in model.named_parameters() if "lora_A" in name).data[0, 0] = torch.nan
    for name in ("grad_diff", "npo", "npo_mean", "npo_token", "jsd"):
        loss = ff.UnlearnLoss(model, terms_of(name))
        loss.backbone.checked = True  # else the model itself is found broken, with an error
        assert loss(batch(2, 1), batch(2, 2)).loss.isnan(), name
    with pytest.raises(ff.FastforgetError, match="not finite on the first batch"):
        ff.UnlearnLoss(model, "grad_diff")(batch(2, 1), batch(2, 2))


def test_closure_that_computes_the_loss(model, batch):
    step = ff.UnlearnStep(model, torch.optim.LBFGS, terms="grad_diff", lr=1e-3, max_iter=2)

    def closure():
        step.zero_grad()
        return step.backward(batch(2, 1), batch(2, 2)).loss

    first = float(step.step(closure))
    assert float(closure()) < first
    assert step.param_groups[0]["unlearn_steps"] == 1


def test_takes_over_optimizers_that_exist_and_bitsandbytes_ones(model, batch):
    import bitsandbytes as bnb

    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for base in (torch.optim.SGD(trainable, lr=0.1), bnb.optim.AdamW8bit(trainable, lr=1e-3, min_8bit_size=64)):
        step = ff.UnlearnStep(model, base, terms="grad_diff")
        before = [parameter.detach().clone() for parameter in trainable]
        assert step(batch(2, 1), batch(2, 2)).loss.isfinite()
        assert all(not torch.equal(old, new) for old, new in zip(before, trainable, strict=True))
        step.load_state_dict(step.state_dict())
        assert step.param_groups[0]["unlearn_steps"] == 1
    with pytest.raises(ff.FastforgetError, match="lr cannot be set here"):
        ff.UnlearnStep(model, torch.optim.SGD(trainable, lr=0.1), terms="npo", lr=0.2)


def test_errors_say_what_is_wrong(model, batch):
    """Of batches `test_batch.py` and `test_streams.py` know more."""
    loss, good = ff.UnlearnLoss(model, "grad_diff"), batch(2, 1)
    unlabelled = good | {"labels": torch.full_like(good["labels"], -100)}
    beyond, below = (good | {"input_ids": torch.full_like(good["input_ids"], token)} for token in (320, -1))
    for message, forget, retain in (
        ("need a retain batch", good, None),
        ("the forget batch has no label", unlabelled, good),
        ("the forget batch has no label", {key: value[:0] for key, value in good.items()}, good),
        ("the forget batch has no label", {key: value[:, :0] for key, value in good.items()}, good),
        ("the retain batch has no label", good, {key: value[:0] for key, value in good.items()}),
        ("the forget batch has token 320, and the model has embeddings of 320 tokens", beyond, good),
        ("the retain batch has token -1, and the model has embeddings of 320 tokens", good, below),
        ("labels are", good | {"labels": good["labels"][:, :-1]}, good),
        ("outside the vocabulary", good | {"labels": good["labels"].clamp(min=0) + 1000}, good),
        ("the forget batch needs input_ids, .*it is a list", [good], good),
    ):
        with pytest.raises(ff.FastforgetError, match=message):
            loss(forget, retain)
    with pytest.raises(ff.FastforgetError, match="there are no terms"):
        ff.UnlearnLoss(model, [])
    with pytest.raises(ff.FastforgetError, match="no parameter of the model requires a gradient"):
        ff.UnlearnStep(model.requires_grad_(False), torch.optim.SGD, terms="grad_ascent", lr=0.1)


@pytest.mark.parametrize(("retain", "products"), [("kl", 1), ("ce", 1), ("ce+kl", 2)])
def test_a_side_pays_for_the_gradients_that_it_learns_from(tiny, monkeypatch, batch, retain, products):
    """The NLL of a side with KL alone is reported, and its gradient not computed."""
    from fastforget.backends import sweep

    model = ff.load(tiny["llama"], bits=32, lora={"r": 2})
    loss = ff.UnlearnLoss(model, ff.preset("grad_diff", retain=retain), backend="torch")
    calls = []
    real = sweep.accumulate
    monkeypatch.setattr(sweep, "accumulate", lambda *given, **named: calls.append(1) or real(*given, **named))
    loss(batch(2, 0), batch(2, 1))  # the reference's embedding takes a product of its own, once
    calls.clear()
    out = loss(batch(2, 0), batch(2, 1))
    assert len(calls) == 1 + products and out.stats["retain_nll"] > 0  # one for the forget side


def own_vector():
    """RMU with a vector that is not its seed's."""
    term = ff.RMU(layer=0)
    term.target(64).copy_(torch.linspace(-1, 1, 64))
    return [term]


COPIED = {
    "npo": {"terms": ff.preset("npo")},
    "a dual": {"terms": ff.preset("pdu", dual=3.0)},
    "centres": {"terms": ff.preset("distance_cluster", centres=torch.linspace(-1, 1, 192).view(3, 64))},
    "a vector": {"terms": own_vector()},
    "mgda": {"terms": ff.preset("grad_diff"), "combine": "mgda"},
}


@pytest.mark.parametrize("name", COPIED)
def test_copies_and_pickles_compute_the_same(model, batch, name):
    step = ff.UnlearnStep(model, torch.optim.SGD, lr=0.1, **COPIED[name])
    sides = batch(3, 1), batch(2, 2)
    loss = step.backward(*sides).loss
    expected = gradients(model)
    for other in (copy.deepcopy(step), pickle.loads(pickle.dumps(step))):
        step.zero_grad()
        other.attach(model)
        assert torch.equal(other.backward(*sides).loss, loss)
        assert all(torch.equal(gradient, expected[key]) for key, gradient in gradients(model).items())
    for other in (copy.deepcopy(step.loss), pickle.loads(pickle.dumps(step.loss))):
        assert torch.equal(other(*sides).loss, loss)
