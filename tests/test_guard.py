"""The guard of `UnlearnStep`: what is skipped and taken back, when it gives up, and that it waits for no device."""

import copy

import pytest
import torch
from helpers import BreaksAt, NoLooking, adapter_of, load_perturbed, same

import fastforget as ff
from fastforget import guard as guard_module


@pytest.fixture(params=["host", "device"])
def where(request, monkeypatch):
    """The decisions of a CPU, and those of a device whose flags the host does not read."""
    if request.param == "device":
        monkeypatch.setattr(guard_module, "on_host", lambda flag: False)


def step_of(model, optimizer=torch.optim.SGD, terms="grad_diff", lr=0.05, **options):
    return ff.UnlearnStep(model, optimizer, terms=terms, lr=lr, **options)


class Poison(torch.autograd.Function):
    """The identity, whose gradient is NaN."""

    @staticmethod
    def forward(context, value):
        return value.clone()

    @staticmethod
    def backward(context, gradient):
        return gradient * torch.nan


BROKEN = {
    "hidden states": lambda states: states * torch.nan,
    "infinity": lambda states: states * 1e38,
    "gradients": Poison.apply,
}


def broken_once(model, step, batch, how):
    """Take a step in which the model is broken in one way."""
    if how == "logits":
        head = model.get_base_model().lm_head
        kept = head.weight.data.clone()
        head.weight.data.fill_(torch.nan)
        try:
            step(batch(2, 5), batch(2, 6))
        finally:
            head.weight.data.copy_(kept)
        return
    handle = model.get_base_model().model.norm.register_forward_hook(lambda module, given, states: BROKEN[how](states))
    try:
        step(batch(2, 5), batch(2, 6))
    finally:
        handle.remove()


@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.AdamW])
@pytest.mark.parametrize("how", ["logits", *BROKEN])
def test_a_bad_step_is_skipped_and_the_update_before_it_taken_back(tiny, batch, where, how, optimizer):
    model = load_perturbed(tiny["llama"])
    step = step_of(model, optimizer)
    step(batch(2, 1), batch(2, 2))
    before = adapter_of(model)
    step(batch(2, 3), batch(2, 4))
    assert not same(adapter_of(model), before)
    broken_once(model, step, batch, how)
    assert same(adapter_of(model), before), "at once, whoever saves it now"
    assert all(value.isfinite().all() for state in step.state.values() for value in state.values() if value is not None)
    step(batch(2, 7), batch(2, 8))
    assert step.guard.skipped == 1 and step.state_dict()["param_groups"][0]["unlearn_skipped"] == 1
    assert not same(adapter_of(model), before) and all(value.isfinite().all() for value in adapter_of(model).values())


def test_after_some_in_a_row_it_stops_with_the_last_good_adapter(tiny, batch, where):
    """Reading is a step late; nothing moves meanwhile."""
    model = load_perturbed(tiny["llama"])
    step = step_of(model, terms=[BreaksAt(step=3), ff.CE(on="retain")], guard=ff.GuardSettings(bad_steps=2))
    step(batch(2, 1), batch(2, 2))
    before = adapter_of(model)
    for seed in (3, 5, 7):
        step(batch(2, seed), batch(2, 2))
    with pytest.raises(
        ff.NonFiniteLossError, match=r"the loss became nan at step 4, the last of 2 in a row; .* 1 steps"
    ) as error:
        step(batch(2, 9), batch(2, 2))
    assert same(adapter_of(model), before) and error.value.good_steps == 1 and step.guard.skipped == 2


@pytest.mark.parametrize("rate", [1e6, 1e37, torch.inf])
def test_a_learning_rate_that_breaks_the_model_leaves_it_whole(tiny, batch, where, rate):
    """A good step follows each bad one, with the weights that were put back; that ends no row."""
    model = load_perturbed(tiny["llama"])
    step = step_of(model, torch.optim.AdamW, lr=rate, terms=[ff.NegatedCE(), ff.HiddenMSE()])
    before = adapter_of(model)
    with pytest.raises(ff.NonFiniteLossError, match=r"the last of 3 in a row; .* after"):
        for seed in range(12):
            step(batch(2, seed), batch(2, seed + 20))
    assert all(value.isfinite().all() for value in adapter_of(model).values())
    assert ff.UnlearnLoss(model, "grad_diff")(batch(2, 1), batch(2, 2)).loss.isfinite()
    if rate > 1e6:
        assert same(adapter_of(model), before)


def test_bad_steps_far_apart_do_not_add_up(tiny, batch, where):
    model = load_perturbed(tiny["llama"])
    step = step_of(model, lr=1e-3, guard=ff.GuardSettings(bad_steps=2))
    step(batch(2, 1), batch(2, 2))
    for seed in range(4):
        broken_once(model, step, batch, "hidden states")
        for more in range(3):
            step(batch(2, seed), batch(2, seed + more))
    assert step.guard.skipped == 4


def test_retain_nll_above_its_bound_stops_at_once(tiny, batch, where):
    model = load_perturbed(tiny["llama"])
    first = step_of(model, lr=0.0)(batch(2, 1), batch(2, 2)).stats["retain_nll"]
    step = step_of(
        model, lr=2.0, guard=ff.GuardSettings(max_retain_nll=float(first) + 0.5), terms=[ff.NegatedCE(), ff.KL()]
    )
    adapters = [adapter_of(model)]
    with pytest.raises(ff.RetainNLLError, match=r"the retain NLL rose to .*, above .*, at step \d+; .* after") as error:
        for seed in range(1, 30):
            step(batch(2, seed), batch(2, 2))
            adapters.append(adapter_of(model))
    assert same(adapter_of(model), adapters[error.value.good_steps])
    assert float(ff.UnlearnLoss(model, "grad_diff")(batch(2, 1), batch(2, 2)).stats["retain_nll"]) <= float(first) + 0.5
    for terms in ("grad_ascent", [ff.NegatedCE(), ff.HiddenMSE(layer=0)]):
        with pytest.raises(ff.FastforgetError, match="max_retain_nll: no term computes"):
            step_of(model, terms=terms, guard=ff.GuardSettings(max_retain_nll=3.0))
    for wrong in ({"bad_steps": 0}, {"max_retain_nll": -1.0}, {"max_retain_nll": torch.nan}):
        with pytest.raises(ff.FastforgetError, match="must be"):
            ff.GuardSettings(**wrong)


def test_good_steps_are_those_without_a_guard(tiny, batch, where):
    found = []
    for settings in (ff.GuardSettings(), None):
        model = load_perturbed(tiny["llama"])
        step = step_of(model, torch.optim.AdamW, terms="pdu", guard=settings, combine="mgda")
        counts = ff.count_labels([(batch(2, 1), batch(2, 2)), (batch(3, 1), batch(2, 2))])
        for _ in range(3):
            for rows in (2, 3):
                step.backward(batch(rows, 1), batch(2, 2), counts=counts, micro_batch=1)
            torch.nn.utils.clip_grad_norm_(step.param_groups[0]["params"], 1.0)
            step.step()
            step.zero_grad()
        found.append(adapter_of(model) | {"dual": step.param_groups[0]["unlearn_dual_ce.dual"]})
    assert same(*found)


def test_nan_in_one_of_several_backwards_skips_the_step_and_no_dual_moves(tiny, batch, where):
    model = load_perturbed(tiny["llama"])
    step = step_of(model, terms=[BreaksAt(step=4), ff.DualCE(on="retain")])
    counts = ff.count_labels([(batch(2, 1), batch(2, 2))] * 2)
    found = []
    for _ in range(2):
        for _ in range(2):
            step.backward(batch(2, 1), batch(2, 2), counts=counts)
        found.append((adapter_of(model), float(step.param_groups[0]["unlearn_dual_ce.dual"])))
        step.step()
        step.zero_grad()
    assert float(step.param_groups[0]["unlearn_dual_ce.dual"]) == found[1][1] != found[0][1]
    assert same(adapter_of(model), found[0][0])


def test_a_scaler_that_skips_a_step_is_no_bad_step_and_nan_under_it_is(tiny, batch, where):
    """Overflow under loss scaling is a scaler's business, as long as the loss is finite."""
    model = load_perturbed(tiny["llama"])
    step = step_of(model, guard=ff.GuardSettings(bad_steps=1))
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**127)
    before = adapter_of(model)

    def take(seed):
        step.backward(batch(2, seed), batch(2, 2), backward=lambda loss: scaler.scale(loss).backward())
        scaler.step(step)
        scaler.update(new_scale=2.0**10 if seed else None)
        step.zero_grad()

    step.backward(batch(2, 1), batch(2, 2), backward=lambda loss: scaler.scale(loss * 1e4).backward())
    scaler.step(step)
    scaler.update(new_scale=2.0**10)
    step.zero_grad()
    step.guard.settle()
    assert same(adapter_of(model), before) and step.guard.skipped == 0
    take(3)
    step.guard.settle()
    assert not same(adapter_of(model), before) and step.guard.skipped == 0
    handle = model.get_base_model().model.norm.register_forward_hook(lambda module, given, states: states * torch.nan)
    take(4)
    handle.remove()
    with pytest.raises(ff.NonFiniteLossError, match="the loss became nan at step 2"):
        step.guard.settle()
    assert same(adapter_of(model), before)


def test_a_scaler_inside_the_base_optimizer_sees_the_gradients_itself(tiny, batch, where):
    """As in Accelerate's optimizers: it skips, and only the loss and the weights are judged."""
    model = load_perturbed(tiny["llama"])
    step = step_of(model)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**127)
    norm, adapters = model.get_base_model().model.norm, [adapter_of(model)]
    for what in ("overflow", "", "", "NaN", ""):
        scale = scaler.get_scale()
        handle = norm.register_forward_hook(lambda *given, what=what: given[2] * torch.nan if what == "NaN" else None)
        larger = 1e4 if what == "overflow" else 1.0
        step.backward(
            batch(2, len(adapters)), batch(2, 50), backward=lambda loss, by=larger: scaler.scale(loss * by).backward()
        )
        handle.remove()
        step.guard.before_update(scaled=True)
        scaler.step(step.base)
        step.guard.after_update()
        scaler.update()
        assert (scaler.get_scale() < scale) == (what != ""), "it saw the infinite ones"
        if what == "overflow":
            scaler.update(new_scale=2.0**10)
        step.zero_grad()
        adapters.append(adapter_of(model))
    step.guard.settle()
    assert step.guard.skipped == 1
    assert same(adapters[1], adapters[0]) and not same(adapters[2], adapters[1]) and not same(adapters[3], adapters[2])
    assert same(adapters[4], adapters[2]), "the update that led to NaN is taken back"
    assert not same(adapters[5], adapters[4])


def test_float16_overflow_leaves_the_last_good_weights(tiny, batch, where):
    """Without a scaler, in weights of 16 bit."""
    model = load_perturbed(tiny["llama"])
    for parameter in model.parameters():
        parameter.data = parameter.data.half()
    step = step_of(model, lr=0.05, guard=ff.GuardSettings(bad_steps=1))
    step(batch(2, 1), batch(2, 2))
    before = adapter_of(model)
    step(batch(2, 3), batch(2, 4))
    handle = model.get_base_model().model.norm.register_forward_hook(lambda module, given, states: states * 6e4)
    step(batch(2, 5), batch(2, 6))
    handle.remove()
    assert same(adapter_of(model), before) and all(value.isfinite().all() for value in before.values())


def test_closures_are_guarded_each_time_they_are_called(tiny, batch, where):
    model = load_perturbed(tiny["llama"])
    step = step_of(model, torch.optim.LBFGS, lr=1e-3, terms=[BreaksAt(step=4), ff.CE(on="retain")])

    def closure():
        step.zero_grad()
        return step.backward(batch(2, 1), batch(2, 2)).loss

    step.step(closure)
    step.step(closure)
    step.guard.settle()
    assert all(value.isfinite().all() for value in adapter_of(model).values())
    assert step.guard.skipped == 2, "both steps, each of which saw NaN"


def test_a_step_without_a_backward_is_not_guarded(tiny, batch):
    model = load_perturbed(tiny["llama"])
    step = step_of(model)
    step(batch(2, 1), batch(2, 2))
    step.guard.settle()
    state = copy.deepcopy(
        {name: value for name, value in vars(step.guard).items() if name not in ("optimizer", "_good_of")}
    )
    adapter = adapter_of(model)
    step.step()
    assert same(adapter_of(model), adapter)
    for name, value in state.items():
        now = getattr(step.guard, name)
        assert all(map(torch.equal, now, value)) if name == "_good" else now == value, name


def test_the_best_adapter_is_kept(tiny, batch):
    model = load_perturbed(tiny["llama"])
    step = step_of(model)
    with pytest.raises(ff.FastforgetError, match="no best adapter"):
        step.guard.restore_best()
    adapters = []
    for seed, figure in enumerate((3.0, 1.0, float("nan"), 2.0)):
        step(batch(2, seed), batch(2, 9))
        adapters.append(adapter_of(model))
        assert step.guard.keep_best(figure) == (seed < 2)
    assert step.guard.restore_best() == 1.0 and same(adapter_of(model), adapters[1])


def test_nothing_waits_for_the_device_but_one_read_a_step_late(tiny, batch, monkeypatch):
    """Flags and numbers are looked at once a step, and those of the step before."""
    model = load_perturbed(tiny["llama"])
    monkeypatch.setattr(guard_module, "on_host", lambda flag: False)
    read = []
    numbers = guard_module.Reading.numbers
    monkeypatch.setattr(guard_module.Reading, "numbers", lambda self: (read.append(self.step), numbers(self))[1])
    step = step_of(model)
    step(batch(2, 1), batch(2, 2))
    for seed in (2, 3, 4):
        step.backward(batch(2, seed), batch(2, 9))
        with NoLooking():
            step.step()
        step.zero_grad()
    assert read == [1, 2, 3]


def test_parameters_that_are_added_are_guarded(tiny, batch, where):
    model = load_perturbed(tiny["llama"])
    step = step_of(model)
    step(batch(2, 1), batch(2, 2))
    before = adapter_of(model)
    step(batch(2, 3), batch(2, 2))
    extra = torch.nn.Parameter(torch.ones(2))
    step.add_param_group({"params": [extra], "lr": 1.0})
    extra.grad = torch.full((2,), torch.nan)
    step(batch(2, 3), batch(2, 2))
    assert same(adapter_of(model), before) and torch.equal(extra.detach(), torch.ones(2))


def test_weights_that_were_loaded_are_not_taken_back(tiny, batch, where):
    model = load_perturbed(tiny["llama"])
    step = step_of(model, terms=[BreaksAt(step=3)])
    step(batch(2, 1))
    loaded, state = adapter_of(model), copy.deepcopy(step.state_dict())
    step(batch(2, 2))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                parameter.copy_(loaded[name])
    step.load_state_dict(state)
    step(batch(2, 3))
    step.guard.settle()
    assert step.guard.skipped == 1 and same(adapter_of(model), loaded) and step.guard.good_steps == 1
