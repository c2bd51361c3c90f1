"""Adapters however they were made, and a reference of the user's own."""

import copy
import pickle

import pytest
import torch
from helpers import assert_gradients, gradients, load_perturbed, make_batch, tiny_model, token_log_probs
from peft import LoraConfig, get_peft_model, inject_adapter_in_model

import fastforget as ff

LORA = {"r": 4, "target_modules": ["q_proj", "v_proj"]}


def perturb(model):
    generator = torch.Generator().manual_seed(3)
    for name, parameter in sorted(model.named_parameters()):
        if "lora_" in name:
            parameter.data.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model.train()


def step_of(model, **options):
    step = ff.UnlearnStep(model, torch.optim.SGD, terms=[ff.NPO(), ff.KL()], lr=0.1, **options)
    out = step.backward(make_batch(3, 1), make_batch(2, 2))
    found = {name.removeprefix("base_model.model."): gradient for name, gradient in gradients(model).items()}
    return float(out.loss), found


@pytest.mark.parametrize("how", ["add_adapter", "inject"])
def test_an_adapter_without_a_peft_model(how):
    expected = step_of(perturb(get_peft_model(tiny_model("llama"), LoraConfig(**LORA))))
    model = tiny_model("llama")
    if how == "add_adapter":
        model.add_adapter(LoraConfig(**LORA))
    else:
        model = inject_adapter_in_model(LoraConfig(**LORA), model)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lora_" in name)
    loss, found = step_of(perturb(model))
    assert loss == pytest.approx(expected[0], rel=1e-6)
    assert_gradients(found, expected[1])
    assert all(parameter.requires_grad == ("lora_" in name) for name, parameter in model.named_parameters())


@pytest.mark.parametrize("initial", ["pissa", "olora"])
def test_an_initialisation_that_rewrites_the_base_is_refused(initial):
    original = tiny_model("llama")
    model = get_peft_model(copy.deepcopy(original), LoraConfig(init_lora_weights=initial, **LORA))
    with pytest.raises(
        ff.FastforgetError, match=f"init_lora_weights='{initial}', which takes its start out of the base"
    ):
        ff.UnlearnLoss(model, "npo")
    ff.UnlearnLoss(model, [ff.NegatedCE()])
    loss = ff.UnlearnLoss(model, [ff.KL(on="forget")], reference=original.requires_grad_(False))
    assert 0.0 <= float(loss(make_batch(3, 1)).loss.detach()) < 1e-4, "what was taken out is in the adapter"


def test_full_fine_tuning_against_a_frozen_copy():
    model = tiny_model("llama").train()
    reference = copy.deepcopy(model).requires_grad_(False)
    model.get_output_embeddings().requires_grad_(False)
    with torch.no_grad():
        for parameter in model.model.layers.parameters():
            parameter.add_(0.02 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    forget, retain = make_batch(3, 1), make_batch(2, 2)
    _, logp, labelled = token_log_probs(model, forget)
    with torch.no_grad():
        _, reference_logp, _ = token_log_probs(reference, forget)
        reference_log_probs, _, _ = token_log_probs(reference, retain)
    ratio = ((logp - reference_logp) * labelled).sum(1)
    npo = -(2 / 0.1) * torch.nn.functional.logsigmoid(-0.1 * ratio).mean()
    log_probs, _, kept = token_log_probs(model, retain)
    kl = (reference_log_probs.exp() * (reference_log_probs - log_probs)).sum(-1)[kept].mean()
    (npo + kl).backward()
    expected = gradients(model)
    model.zero_grad()
    loss, found = step_of(model, reference=reference)
    assert loss == pytest.approx(float((npo + kl).detach()), rel=1e-5)
    assert_gradients(found, expected, 2e-5)
    assert len(found) == 20 and all(parameter.grad is None for parameter in reference.parameters())


def test_what_cannot_be_a_reference_is_said():
    model = tiny_model("llama")
    with pytest.raises(ff.FastforgetError, match="give a frozen copy as reference="):
        ff.UnlearnLoss(model, "npo")
    with pytest.raises(ff.FastforgetError, match="the reference has weights that train"):
        ff.UnlearnLoss(model, "npo", reference=model)
    frozen = copy.deepcopy(model).requires_grad_(False)
    with pytest.raises(ff.FastforgetError, match="takes one frozen head"):
        ff.UnlearnLoss(model, [ff.KL()], reference=frozen)
    ff.UnlearnLoss(model, [ff.NPO()], reference=frozen)


def test_a_loss_can_be_pickled(model):
    loss = ff.UnlearnLoss(model, [ff.NPO(), ff.KL()])
    before = loss(make_batch(3, 1), make_batch(2, 2)).loss
    again = pickle.loads(pickle.dumps(loss))
    assert float(again(make_batch(3, 1), make_batch(2, 2)).loss.detach()) == float(before.detach())


class Modes(torch.optim.SGD):
    """As schedule-free optimizers do."""

    mode = "train"

    def train(self):
        self.mode = "train"

    def eval(self):
        self.mode = "eval"


def test_parameter_groups_and_a_schedule_free_optimizer(tiny):
    model = load_perturbed(tiny["llama"])
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    groups = [
        {"params": [p for name, p in named if "lora_A" in name]},
        {"params": [p for name, p in named if "lora_B" in name], "lr": 0.5},
    ]
    step = ff.UnlearnStep(model, Modes, terms=[ff.NegatedCE()], params=groups, lr=0.1)
    assert [group["lr"] for group in step.param_groups] == [0.1, 0.5]
    step.eval()
    assert step.base.mode == "eval"
    step.train()
    assert step.base.mode == "train"
    plain = ff.UnlearnStep(model, torch.optim.SGD, terms=[ff.NegatedCE()], lr=0.1)
    plain.train()
    plain.eval()
