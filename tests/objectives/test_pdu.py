"""PDU: the whole loss against its formula, and its dual variable over steps."""

import pytest
import torch
from helpers import NoLooking, assert_gradients, gradients, load_perturbed, token_log_probs

import fastforget as ff

KEY = "unlearn_dual_ce.dual"
SETTING = {"epsilon": 3.0, "dual_rate": 2.0, "dual": 1.5}


def make_step(model, optimizer=torch.optim.SGD, lr=0.01, **setting):
    return ff.UnlearnStep(model, optimizer, terms=ff.preset("pdu", **{**SETTING, **setting}), lr=lr)


def dual_of(step):
    return float(step.param_groups[0][KEY])


def retain_nll(model, batch):
    with torch.no_grad():
        _, logp, kept = token_log_probs(model, batch)
    return -float(logp[kept].mean())


@pytest.mark.parametrize("kind", ["opt", "llama"])
def test_loss_gradient_and_dual_follow_the_formulas(tiny, batch, kind):
    model = load_perturbed(tiny[kind])
    step = make_step(model)
    forget, retain = batch(3, 1), batch(2, 2)
    alpha = 1.5
    for _ in range(3):
        logits = model(input_ids=forget["input_ids"], attention_mask=forget["attention_mask"]).logits[:, :-1]
        kept = forget["labels"][:, 1:] != -100
        margin = (logits.max(-1).values - logits.mean(-1))[kept].square().mean()
        _, logp, retain_kept = token_log_probs(model, retain)
        nll = -logp[retain_kept].mean()
        expected = margin + alpha * nll
        expected.backward()
        truth = gradients(model)
        model.zero_grad()
        out = step.backward(forget, retain)
        assert float(out.loss) == pytest.approx(float(expected.detach()), rel=1e-5)
        assert float(out.terms["dual_ce"]) == pytest.approx(float(nll.detach()), rel=1e-5), "reported without alpha"
        assert_gradients(gradients(model), truth, 2e-5)
        assert dual_of(step) == pytest.approx(alpha, rel=1e-6), "alpha moves after the step"
        step.step()
        step.zero_grad()
        alpha = max(0.0, alpha + 2.0 * (float(nll.detach()) - 3.0))
        assert dual_of(step) == pytest.approx(alpha, rel=1e-5)


def test_dual_is_never_negative(model, batch):
    step = make_step(model, epsilon=1000.0)
    for seed in range(2):
        step(batch(2, seed), batch(2, 10 + seed))
        assert dual_of(step) == 0.0


def test_one_update_a_step_whatever_the_accumulation(model, batch):
    """By the retain loss of the whole batch: micro-batches, parts with counts, and parts without a retain side."""
    forget, retain = batch(4, 1), batch(3, 2)  # row 0 of each is shorter
    expected = 1.5 + 2.0 * (retain_nll(model, retain) - 3.0)

    def rows(part, start, stop):
        return {key: value[start:stop] for key, value in part.items()}

    pieces = [
        (rows(forget, 0, 1), rows(retain, 0, 2)),
        (rows(forget, 1, 3), None),
        (rows(forget, 3, 4), rows(retain, 2, 3)),
    ]
    counts = ff.count_labels(pieces)

    def micro(step):
        step.backward(forget, retain, micro_batch=1)

    def parts(step):
        for piece in pieces:
            step.backward(*piece, counts=counts)

    for accumulate in (micro, parts):
        step = make_step(model, lr=0.0)
        accumulate(step)
        assert dual_of(step) == 1.5
        step.step()
        assert dual_of(step) == pytest.approx(expected, rel=1e-5)
        step.zero_grad()

    step = make_step(model, lr=0.0)  # without counts each call's mean is its own: the mean of these
    calls = [batch(2, seed) for seed in (5, 6)]
    for call in calls:
        step.backward(forget, call)
    step.step()
    mean = sum(retain_nll(model, call) for call in calls) / 2
    assert dual_of(step) == pytest.approx(1.5 + 2.0 * (mean - 3.0), rel=1e-5)


def test_no_backward_or_cleared_gradients_change_nothing(model, batch):
    step = make_step(model)
    step.step()
    assert dual_of(step) == 1.5
    step.backward(batch(2, 1), batch(2, 2))
    step.zero_grad()  # as after a step that a scaler skipped
    step.step()
    assert dual_of(step) == 1.5
    step(batch(2, 1), batch(2, 2))
    after = dual_of(step)
    step.step()
    assert after != 1.5 and dual_of(step) == after


def test_a_state_of_the_bare_optimizer_begins_anew(model, batch):
    step = make_step(model)
    bare = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5).state_dict()
    step(batch(2, 1), batch(2, 2))
    step.load_state_dict(bare)
    assert dual_of(step) == 1.5 and step.param_groups[0]["lr"] == 0.5


def test_the_loss_alone_keeps_alpha_and_the_step_s_own_follows(model, batch):
    step = make_step(model)
    forget, retain = batch(2, 1), batch(2, 2)

    def alpha(loss):
        out = loss(forget, retain)
        return (float(out.loss) - float(out.terms["logit_margin"])) / float(out.terms["dual_ce"])

    alone = ff.UnlearnLoss(model, ff.preset("pdu", **SETTING))
    for _ in range(2):
        step(forget, retain)
        assert alpha(alone) == pytest.approx(1.5, rel=1e-3)
        assert alpha(step.loss) == pytest.approx(dual_of(step), rel=1e-3)


def test_two_of_them_have_a_dual_each(model, batch):
    terms = [ff.DualCE(epsilon=1.0, dual=2.0), ff.DualCE(on="forget", epsilon=4.0, dual=3.0, dual_rate=1.0)]
    step = ff.UnlearnStep(model, torch.optim.SGD, terms=terms, lr=0.0)
    out = step(batch(2, 1), batch(2, 2))
    group = step.param_groups[0]
    assert float(group[KEY]) == pytest.approx(2.0 + 5.0 * (float(out.terms["dual_ce"]) - 1.0), rel=1e-5)
    expected = 3.0 + (float(out.terms["dual_ce_2"]) - 4.0)
    assert float(group["unlearn_dual_ce_2.dual"]) == pytest.approx(expected, rel=1e-5)


def test_the_update_looks_at_no_value(model, batch):
    step = make_step(model)
    step.backward(batch(2, 1), batch(2, 2))
    with NoLooking():
        step._states.update()
    assert dual_of(step) != 1.5


def test_a_closure_updates_by_its_last_evaluation(model, batch):
    step = make_step(model, torch.optim.LBFGS, lr=1e-3)
    step.base.param_groups[0]["max_iter"] = 2
    seen = []

    def closure():
        step.zero_grad()
        out = step.backward(batch(2, 1), batch(2, 2))
        seen.append(float(out.terms["dual_ce"]))
        return out.loss

    step.step(closure)
    assert len(seen) > 1
    assert dual_of(step) == pytest.approx(1.5 + 2.0 * (seen[-1] - 3.0), rel=1e-5)
