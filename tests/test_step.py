"""UnlearnLoss and UnlearnStep against a loop with full logits and a deep-copied reference."""

import copy
import pickle
import warnings

import pytest
import torch
import torch.nn.functional as F
from helpers import gradients, load_perturbed, token_log_probs

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
    if name == "reverse_kl":
        return ascent + reverse
    mixture = ((retain_all.exp() + ref_retain.exp()) / 2).log()
    jsd = sum((one.exp() * (one - mixture)).sum(-1)[retain_kept].mean() / 2 for one in (retain_all, ref_retain))
    return ascent + 0.5 * jsd


def terms_of(name):
    if name == "reverse_kl":
        return [ff.NegatedCE(), ff.KL(direction="reverse_kl")]
    return [ff.NegatedCE(), ff.KL(direction="jsd", weight=0.5)] if name == "jsd" else ff.preset(name)


@pytest.mark.parametrize("bits", [32, 8])
@pytest.mark.parametrize("kind", ["opt", "llama"])
def test_every_lora_gradient_equals_a_full_logits_loop(tiny, batch, kind, bits):
    model = load_perturbed(tiny[kind], bits)
    reference = copy.deepcopy(model)
    reference.base_model.disable_adapter_layers()
    forget, retain = batch(4, 1), batch(3, 2, width=17)
    for name in ("grad_ascent", "grad_diff", "npo", "npo_mean", "npo_token", "simnpo", "reverse_kl", "jsd"):
        model.zero_grad()
        expected_loss = loss_by_hand(name, model, reference, forget, retain)
        expected_loss.backward()
        expected = gradients(model)
        model.zero_grad()
        out = ff.UnlearnStep(model, torch.optim.SGD, terms=terms_of(name), lr=0.1).backward(forget, retain)
        ours = gradients(model)
        assert float(out.loss) == pytest.approx(float(expected_loss.detach()), rel=1e-5)
        assert ours.keys() == expected.keys() and len(ours) == 2 * 2 * {"opt": 6, "llama": 7}[kind]
        for key, gradient in expected.items():
            assert float(gradient.norm()) > 0
            error = float((ours[key] - gradient).norm() / gradient.norm())
            assert error < 1e-5, (name, key, error)  # measured: 1e-6, in 8 bit too


@pytest.mark.parametrize("bits", [32, 8])
@pytest.mark.parametrize("kind", ["opt", "llama"])
def test_kl_is_zero_at_lora_init(tiny, batch, kind, bits):
    model = ff.load(tiny[kind], bits=bits, lora={"r": 4}).train()
    out = ff.UnlearnLoss(model, [ff.KL(on="forget"), ff.NPO(beta=1.0)])(batch(4, 1))
    assert float(out.terms["kl"]) == 0.0
    assert float(out.terms["npo"]) == pytest.approx(2 * 0.6931472, rel=1e-6)


def test_micro_batches_give_the_gradients_of_the_whole(tiny, batch):
    model = load_perturbed(tiny["llama"])
    forget, retain = batch(5, 1), batch(4, 2)
    step = ff.UnlearnStep(model, torch.optim.SGD, terms="npo_mean", lr=0.1)
    whole_out = step.backward(forget, retain)
    whole = gradients(model)

    def same():
        for key, gradient in gradients(model).items():
            assert torch.allclose(gradient, whole[key], rtol=1e-4, atol=1e-7), key
        model.zero_grad()

    same()
    for size in (1, 2, 3):
        out = step.backward(forget, retain, micro_batch=size)
        assert float(out.loss) == pytest.approx(float(whole_out.loss), rel=1e-5)
        same()

    def rows(part, start, stop):
        return {key: value[start:stop] for key, value in part.items()}

    pieces = [(rows(forget, 0, 1), rows(retain, 0, 3)), (rows(forget, 1, 5), rows(retain, 3, 4))]
    counts = ff.count_labels(pieces)
    assert counts.retain_sequences == 4 and counts.forget_tokens == int((forget["labels"][:, 1:] != -100).sum())
    losses = []
    for one, other in pieces:
        step.backward(one, other, counts=counts, backward=lambda loss: (losses.append(loss), loss.backward()))
    assert float(sum(losses).detach()) == pytest.approx(float(whole_out.loss), rel=1e-5)
    same()
    flat = {key: torch.cat([forget[key], retain[key]]) for key in forget}
    flat |= {"role": torch.tensor([0] * 5 + [1] * 4), "example_id": torch.arange(9)}
    step.backward(flat)
    same()


def test_padding_does_not_matter(tiny, batch):
    model = load_perturbed(tiny["opt"])
    forget, retain = batch(3, 1), batch(3, 2)
    loss = ff.UnlearnLoss(model, "npo_mean", reference_cache_bytes=0)
    plain = float(loss(forget, retain).loss)
    for left in (0, 3):
        padded = {
            key: F.pad(value, (left, 4 - left), value={"labels": -100}.get(key, 0)) for key, value in forget.items()
        }
        assert float(loss(padded, retain).loss) == pytest.approx(plain, rel=1e-5)


def test_keeps_the_promises_of_an_optimizer(tiny, batch):
    model = load_perturbed(tiny["llama"])
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


def test_state_dict_round_trip_continues_identically(tiny, batch):
    def steps(step, seeds):
        for seed in seeds:
            step(batch(2, seed), batch(2, seed + 10))

    straight = load_perturbed(tiny["llama"])
    steps(ff.UnlearnStep(straight, torch.optim.AdamW, terms="npo", lr=1e-3), range(4))
    first = load_perturbed(tiny["llama"])
    step = ff.UnlearnStep(first, torch.optim.AdamW, terms="npo", lr=1e-3)
    steps(step, range(2))
    saved = pickle.loads(pickle.dumps(step.state_dict()))
    second = load_perturbed(tiny["llama"])
    second.load_state_dict(first.state_dict())
    resumed = ff.UnlearnStep(second, torch.optim.AdamW, terms="npo", lr=9.0)
    resumed.load_state_dict(saved)
    assert resumed.param_groups[0]["unlearn_steps"] == 2
    steps(resumed, range(2, 4))
    for (name, one), (_, other) in zip(straight.named_parameters(), second.named_parameters(), strict=True):
        assert torch.equal(one, other), name


def test_copies_have_no_model_until_attached(tiny, batch):
    model = load_perturbed(tiny["llama"])
    step = ff.UnlearnStep(model, torch.optim.AdamW, terms="npo", lr=1e-3)
    step(batch(2, 1), batch(2, 2))
    for other in (copy.deepcopy(step), pickle.loads(pickle.dumps(step))):
        assert other.param_groups[0]["unlearn_steps"] == 1
        with pytest.raises(ff.FastforgetError, match="attach"):
            other(batch(2, 1), batch(2, 2))
        other.attach(model)
        before = [parameter.detach().clone() for parameter in model.parameters() if parameter.requires_grad]
        other(batch(2, 1), batch(2, 2))
        after = [parameter for parameter in model.parameters() if parameter.requires_grad]
        assert all(not torch.equal(old, new) for old, new in zip(before, after, strict=True)), "it trains this model"
        assert all(parameter.grad is None for parameter in after), "and clears its gradients"


def test_a_copy_made_with_its_model_goes_on_as_the_original(tiny, batch):
    model = load_perturbed(tiny["llama"])
    step = ff.UnlearnStep(model, torch.optim.AdamW, terms="npo", lr=1e-3)
    step(batch(2, 1), batch(2, 2))
    other_model, other = copy.deepcopy((model, step))
    other.attach(other_model)
    alone = pickle.loads(pickle.dumps(step))
    third_model = copy.deepcopy(model)
    alone.attach(third_model)
    for each in (step, other, alone):
        each(batch(2, 3), batch(2, 4))
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, other_model.get_parameter(name)), name
        assert torch.equal(parameter, third_model.get_parameter(name)), name


def test_parameters_of_another_model_are_refused(tiny):
    model, stranger = load_perturbed(tiny["llama"]), load_perturbed(tiny["opt"])
    optimizer = torch.optim.SGD([p for p in stranger.parameters() if p.requires_grad], lr=0.1)
    with pytest.raises(ff.FastforgetError, match="belong to the model"):
        ff.UnlearnStep(model, optimizer, terms="npo")
    step = copy.deepcopy(ff.UnlearnStep(stranger, optimizer, terms="npo"))
    with pytest.raises(ff.FastforgetError, match="do not match"):
        step.attach(model)


def test_parts_of_an_accumulated_batch_may_lack_a_side_or_labels(tiny, batch):
    model = load_perturbed(tiny["llama"])
    step = ff.UnlearnStep(model, torch.optim.SGD, terms="grad_diff", lr=0.1)
    forget, retain = batch(2, 1), batch(3, 2)
    step.backward(forget, retain)
    whole = gradients(model)
    model.zero_grad()
    unlabelled = batch(1, 3) | {"labels": torch.full((1, 20), -100)}
    flat = [
        part | {"role": torch.full((len(part["labels"]),), role)}
        for part, role in ((retain, 1), (forget, 0), (unlabelled, 0))
    ]
    counts = ff.count_labels(flat)
    losses = [step.backward(part, counts=counts).loss for part in flat]
    assert float(losses[2]) == 0.0
    for key, gradient in gradients(model).items():
        assert torch.allclose(gradient, whole[key], rtol=1e-4, atol=1e-7), key


def test_a_side_without_terms_is_not_looked_at(tiny, batch):
    loss = ff.UnlearnLoss(load_perturbed(tiny["llama"]), "grad_ascent")
    assert torch.equal(loss(batch(2, 1), {"input_ids": torch.ones(1, 3)}).loss, loss(batch(2, 1)).loss)


def test_nan_is_not_hidden(tiny, batch):
    model = load_perturbed(tiny["llama"])
    next(p for name, p in model.named_parameters() if "lora_A" in name).data[0, 0] = torch.nan
    for name in ("grad_diff", "npo", "npo_mean", "npo_token", "jsd"):
        loss = ff.UnlearnLoss(model, terms_of(name))
        loss.backbone.checked = True  # else the model itself is found broken, with an error
        assert loss(batch(2, 1), batch(2, 2)).loss.isnan(), name
    with pytest.raises(ff.FastforgetError, match="not finite on the first batch"):
        ff.UnlearnLoss(model, "grad_diff")(batch(2, 1), batch(2, 2))


def test_closure_that_computes_the_loss(tiny, batch):
    model = load_perturbed(tiny["llama"])
    step = ff.UnlearnStep(model, torch.optim.LBFGS, terms="grad_diff", lr=1e-3, max_iter=2)

    def closure():
        step.zero_grad()
        return step.backward(batch(2, 1), batch(2, 2)).loss

    first = float(step.step(closure))
    assert float(closure()) < first
    assert step.param_groups[0]["unlearn_steps"] == 1


def test_takes_over_optimizers_that_exist_and_bitsandbytes_ones(tiny, batch):
    import bitsandbytes as bnb

    model = load_perturbed(tiny["llama"])
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


def test_grad_scaler(tiny, batch):
    model = load_perturbed(tiny["llama"])
    step = ff.UnlearnStep(model, torch.optim.SGD, terms="grad_diff", lr=0.1)
    step.backward(batch(2, 1), batch(2, 2))
    plain = gradients(model)
    step.zero_grad()
    scaler = torch.amp.GradScaler("cpu", init_scale=256.0)
    step.backward(batch(2, 1), batch(2, 2), backward=lambda loss: scaler.scale(loss).backward())
    scaler.unscale_(step)
    for key, gradient in gradients(model).items():
        assert torch.allclose(gradient, plain[key], rtol=1e-4, atol=1e-8), key
    scaler.step(step)
    scaler.update()
    assert step.param_groups[0]["unlearn_steps"] == 1
    step.zero_grad()
    step.backward(batch(2, 1), batch(2, 2), backward=lambda loss: (loss * torch.inf).backward())
    scaler.unscale_(step)
    scaler.step(step)
    step.zero_grad()
    step.step()
    assert step.param_groups[0]["unlearn_steps"] == 1, "it was skipped, and no backward is pending"


def test_errors_say_what_is_wrong(tiny, batch):
    model = load_perturbed(tiny["llama"])
    loss = ff.UnlearnLoss(model, "grad_diff")
    good = batch(2, 1)
    unlabelled = good | {"labels": torch.full_like(good["labels"], -100)}
    cases = [
        ("need a retain batch", good, None),
        ("the forget batch has no label", unlabelled, good),
        ("the retain batch has no label", good, unlabelled),
        ("labels are", good | {"labels": good["labels"][:, :-1]}, good),
        ("outside the vocabulary", good | {"labels": good["labels"].clamp(min=0) + 1000}, good),
        ("needs input_ids", {"input_ids": good["input_ids"]}, good),
        (r"needs input_ids, .*its 'input_ids' is \(20,\)", {key: value[0] for key, value in good.items()}, good),
        ("the forget batch needs input_ids, .*it is a list", [good], good),
    ]
    for message, forget, retain in cases:
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


def test_a_step_s_loss_is_copied_and_pickled(tiny, batch):
    model = load_perturbed(tiny["llama"])
    step = ff.UnlearnStep(model, torch.optim.SGD, terms="pdu", lr=0.01)
    step(batch(2, 1), batch(2, 2))
    expected = step.loss(batch(2, 1), batch(2, 2)).loss
    for other in (copy.deepcopy(step.loss), pickle.loads(pickle.dumps(step.loss))):
        assert torch.equal(other(batch(2, 1), batch(2, 2)).loss, expected)
