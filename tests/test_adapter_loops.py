"""Weights after five steps with each kind of adapter and optimizer: those of a loop written out, with full logits."""

import copy

import peft
import pytest
import torch
import torch.distributed.checkpoint as checkpoint
from helpers import FORGET, QUICK, RETAIN, make_batch, tiny_model, token_log_probs
from integrations.loops import assert_same_weights
from safetensors.torch import load_file
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict
from torch.nn.functional import logsigmoid
from transformers import AutoModelForCausalLM

import fastforget as ff
from fastforget.jobs.evaluate import evaluate

TARGETS = ["q_proj", "v_proj"]
ADALORA = {"init_r": 4, "target_r": 2, "tinit": 1, "tfinal": 2, "deltaT": 1, "total_step": 6}
KINDS = {
    "LoRA": lambda: peft.LoraConfig(r=4, target_modules=TARGETS),
    "LoRA with biases of its own": lambda: peft.LoraConfig(r=4, target_modules=TARGETS, lora_bias=True),
    "LoRA on the embeddings": lambda: peft.LoraConfig(r=4, target_modules=[*TARGETS, "embed_tokens"]),
    "LoRA and modules_to_save": lambda: peft.LoraConfig(r=4, target_modules=TARGETS, modules_to_save=["norm"]),
    "LoRA and new tokens": lambda: peft.LoraConfig(r=4, target_modules=TARGETS, trainable_token_indices=[5, 6, 7]),
    "rsLoRA": lambda: peft.LoraConfig(r=4, target_modules=TARGETS, use_rslora=True),
    "DoRA": lambda: peft.LoraConfig(r=4, target_modules=TARGETS, use_dora=True),
    "AdaLoRA": lambda: peft.AdaLoraConfig(target_modules=TARGETS, **ADALORA),
    "IA3": lambda: peft.IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"]),
    "VeRA": lambda: peft.VeraConfig(r=8, target_modules=TARGETS),
    "OFT": lambda: peft.OFTConfig(r=0, oft_block_size=16, target_modules=TARGETS),
    "LoHa": lambda: peft.LoHaConfig(r=4, target_modules=TARGETS),
    "LoKr": lambda: peft.LoKrConfig(r=4, target_modules=TARGETS),
    "BOFT": lambda: peft.BOFTConfig(boft_block_size=4, target_modules=TARGETS),
    "FourierFT": lambda: peft.FourierFTConfig(n_frequency=50, target_modules=TARGETS),
    "HRA": lambda: peft.HRAConfig(r=4, target_modules=TARGETS),
    "LayerNorm tuning": lambda: peft.LNTuningConfig(target_modules=["input_layernorm", "norm"]),
    "MiSS": lambda: peft.MissConfig(r=4, target_modules=TARGETS),
    "RandLoRA": lambda: peft.RandLoraConfig(r=4, target_modules=TARGETS),
    "SHiRA": lambda: peft.ShiraConfig(r=4, target_modules=TARGETS),
    "VB-LoRA": lambda: peft.VBLoRAConfig(r=4, target_modules=TARGETS, num_vectors=8, vector_length=16, topk=2),
    "trainable tokens": lambda: peft.TrainableTokensConfig(token_indices=[5, 6, 7], target_modules=["embed_tokens"]),
}


def moved(model):
    """The model in training mode, with the weights that train away from where they began."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for _, parameter in sorted(model.named_parameters()):
            if parameter.requires_grad:
                parameter.add_(0.02 * torch.randn(parameter.shape, generator=generator))
    return model.train()


def adapted(config):
    torch.manual_seed(1)  # of what PEFT draws
    return moved(peft.get_peft_model(tiny_model("llama"), config))


def batches(step):
    return make_batch(3, 2 * step), make_batch(2, 2 * step + 1)


def npo_and_kl(model, reference, forget, retain):
    """The loss of [NPO(), KL()]: beta 0.1, means over sequences and over label tokens."""
    with torch.no_grad():
        _, reference_logp, _ = token_log_probs(reference, forget)
        reference_log_probs, _, _ = token_log_probs(reference, retain)
    _, logp, labelled = token_log_probs(model, forget)
    log_probs, _, kept = token_log_probs(model, retain)
    npo = -(2 / 0.1) * logsigmoid(-0.1 * ((logp - reference_logp) * labelled).sum(1)).mean()
    return npo + (reference_log_probs.exp() * (reference_log_probs - log_probs)).sum(-1)[kept].mean()


def written_out(model, reference, optimizer, penalty=lambda: 0.0, afterwards=lambda step: None):
    """Take five steps of the loop that people write; the losses."""
    losses = []
    for number in range(5):
        loss = npo_and_kl(model, reference, *batches(number)) + penalty()
        loss.backward()
        optimizer.step()
        afterwards(number)
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    return losses


def five_steps(model, optimizer=torch.optim.AdamW, **options):
    step = ff.UnlearnStep(model, optimizer, terms=[ff.NPO(), ff.KL()], **options)
    return [float(step(*batches(number)).loss) for number in range(5)]


def trained(model):
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


@pytest.mark.parametrize("kind", KINDS)
def test_adapters(kind):
    model, other = (adapted(KINDS[kind]()) for _ in range(2))
    penalty, afterwards = lambda: 0.0, lambda step: None
    if kind == "AdaLoRA":
        ids = make_batch(1, 9)["input_ids"]

        def penalty():  # as PEFT adds it: to the loss of a forward with labels
            with_penalty = other.base_model(input_ids=ids, labels=ids).loss
            return with_penalty - other.get_base_model()(input_ids=ids, labels=ids).loss

        afterwards = other.base_model.update_and_allocate
    optimizer = torch.optim.AdamW(trained(other), lr=1e-3, weight_decay=0.0)
    losses = written_out(other, tiny_model("llama").eval(), optimizer, penalty, afterwards)
    assert five_steps(model, lr=1e-3, weight_decay=0.0) == pytest.approx(losses, rel=1e-5)
    assert_same_weights(model, other)
    before = adapted(KINDS[kind]())
    with pytest.raises(AssertionError):
        assert_same_weights(model, before)
    if kind == "AdaLoRA":
        ranks = [module.lora_E["default"].count_nonzero() for module in model.modules() if hasattr(module, "lora_E")]
        assert sum(map(int, ranks)) < 4 * len(ranks), "ranks have been taken away"


def test_adalora_under_accumulation_has_one_penalty():
    """However many calls a batch comes in; and a layer without a gradient does not stop the ranks' being shared out."""
    models = [adapted(KINDS["AdaLoRA"]()) for _ in range(2)]
    forget, retain = batches(0)
    whole, parts = (ff.UnlearnStep(each, torch.optim.SGD, terms="grad_diff", lr=0.1) for each in models)
    counts = ff.count_labels([(forget, retain)] * 2)
    expected = whole.backward(forget, retain)
    outs = [parts.backward(forget, retain, counts=counts, micro_batch=1) for _ in range(2)]
    assert float(expected.terms["adalora_orthogonality"]) > 0.1
    assert sum(float(out.terms["adalora_orthogonality"]) for out in outs) == pytest.approx(
        float(expected.terms["adalora_orthogonality"]), rel=1e-6
    )
    for one, other in zip(trained(models[0]), trained(models[1]), strict=True):
        torch.testing.assert_close(one.grad, other.grad, rtol=1e-4, atol=1e-6)
    step = ff.UnlearnStep(models[0], torch.optim.SGD, terms=ff.preset("rmu", layer=0), lr=0.1)
    for number in range(3):
        step(*batches(number))


def test_lora_with_trained_biases_against_a_frozen_copy():
    """With the adapter off its biases would stay changed: the reference is one of the user's."""
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], bias="all")
    models = [moved(peft.get_peft_model(tiny_model("opt", dropout=0.0), config)) for _ in range(2)]
    reference = tiny_model("opt").eval().requires_grad_(False)
    written_out(models[1], reference, torch.optim.SGD(trained(models[1]), lr=1e-2))
    five_steps(models[0], torch.optim.SGD, lr=1e-2, reference=reference)
    assert_same_weights(*models)
    assert any(name.endswith("fc1.bias") and each.requires_grad for name, each in models[0].named_parameters())


def test_full_fine_tuning_against_a_frozen_copy():
    reference = tiny_model("llama").eval().requires_grad_(False)
    models = [tiny_model("llama") for _ in range(2)]
    for model in models:
        model.get_output_embeddings().requires_grad_(False)
        moved(model)
    written_out(models[1], reference, torch.optim.AdamW(trained(models[1]), lr=1e-4))
    five_steps(models[0], lr=1e-4, reference=reference)
    assert_same_weights(*models)


@pytest.fixture
def tuned(tmp_path, tiny):
    """The folder of a fine-tuning adapter, of another rank and on other layers than ours."""
    torch.manual_seed(5)
    config = peft.LoraConfig(r=3, lora_alpha=5, target_modules=["k_proj", "v_proj", "embed_tokens"], use_rslora=True)
    base = AutoModelForCausalLM.from_pretrained(tiny["llama"])
    moved(peft.get_peft_model(base, config)).save_pretrained(tmp_path / "tuned", save_embedding_layers=False)
    return tmp_path / "tuned"


def on_top(tiny, tuned, name):
    """A model with that adapter, frozen, and one of ours on top of it."""
    model = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny["llama"]), tuned, "first")
    torch.manual_seed(6)
    model.add_adapter(name, peft.LoraConfig(r=4, target_modules=TARGETS))
    model.base_model.set_adapter(["first", name])
    for key, parameter in model.named_parameters():
        parameter.requires_grad_(f".{name}." in key)
    return moved(model)


@pytest.mark.parametrize("name", ["unlearn", "another"])
def test_on_top_of_another_adapter(tiny, tuned, tmp_path, name):
    """The reference is the model with the first one; and plain PEFT loads what was saved onto the bare base."""
    model, other = on_top(tiny, tuned, name), on_top(tiny, tuned, name)
    reference = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny["llama"]), tuned).eval()
    written_out(other, reference, torch.optim.AdamW(trained(other), lr=1e-3))
    five_steps(model, lr=1e-3)
    assert_same_weights(model, other)
    ff.save_adapter(model, None, tmp_path / "saved")
    assert sorted(path.name for path in (tmp_path / "saved").iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
    named = peft.PeftConfig.from_pretrained(tmp_path / "saved").base_model_name_or_path
    plain = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(named), tmp_path / "saved")
    ids = make_batch(2, 9)["input_ids"]
    with torch.no_grad():
        expected = model.eval()(input_ids=ids).logits
        assert torch.allclose(plain.eval()(input_ids=ids).logits, expected, atol=1e-4)
        assert not torch.allclose(reference(input_ids=ids).logits, expected, atol=1e-2)
    merged = AutoModelForCausalLM.from_pretrained(ff.merge(tiny["llama"], tmp_path / "saved", tmp_path / "m", bits=32))
    assert torch.allclose(merged(input_ids=ids).logits, expected, atol=1e-4)


def test_a_job_on_an_adapters_folder(tiny, tuned, tmp_path, short_continuations):
    """Its result is measured on the bare base; a checkpoint of it is joined too."""
    options = {"retain": RETAIN, "save_steps": 2, "lora_targets": "q_proj", **QUICK}
    report = ff.unlearn(tuned, FORGET, tmp_path / "out", **options)
    measured = {"adapter": tmp_path / "out", "bits": 32, "max_length": 48, "quiet": True}
    evaluated = evaluate(tiny["llama"], FORGET, tmp_path / "evaluated", **measured)
    assert evaluated["forget_nll_after"] == pytest.approx(report["forget_nll_after"], rel=1e-4)
    assert abs(evaluated["forget_nll_before"] - report["forget_nll_before"]) > 1e-3, "the bare base is another model"
    shapes = [
        {name: value.shape for name, value in load_file(folder / "adapter_model.safetensors").items()}
        for folder in (tmp_path / "out", tmp_path / "out" / "checkpoint-2")
    ]
    assert shapes[0] == shapes[1] and len(shapes[0]) == 2 * 7


def test_one_adapter_of_any_name_is_saved(tiny, tmp_path):
    base = AutoModelForCausalLM.from_pretrained(tiny["llama"])
    model = moved(peft.get_peft_model(base, peft.LoraConfig(r=4, target_modules=TARGETS), adapter_name="mine"))
    model.add_adapter("unused", peft.LoraConfig(r=2, target_modules=TARGETS))
    ff.save_adapter(model, None, tmp_path)
    plain = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny["llama"]), tmp_path).eval()
    ids = make_batch(2, 9)["input_ids"]
    assert torch.equal(plain(input_ids=ids).logits, model.eval()(input_ids=ids).logits)


def test_adapters_that_cannot_be_joined_are_refused_early(tiny, tmp_path):
    base = AutoModelForCausalLM.from_pretrained(tiny["llama"])
    config = peft.LoraConfig(r=4, target_modules=TARGETS, use_dora=True)
    peft.get_peft_model(base, config).save_pretrained(tmp_path / "dora")
    with pytest.raises(ff.FastforgetError, match=r"dora' cannot be unlearned .*merge it into its base first.*DoRA"):
        ff.load(tmp_path / "dora", bits=32)
    model = on_top(tiny, tmp_path / "dora", "another")
    with pytest.raises(ff.FastforgetError, match="adapter 'first' cannot be joined with the others that are on: DoRA"):
        ff.save_adapter(model, None, tmp_path / "saved")
    assert not (tmp_path / "saved").exists()


class ScheduleFreeSGD(torch.optim.Optimizer):
    """Schedule-free SGD (arXiv 2405.15682): gradients at y, weights x that are used in evaluation mode."""

    def __init__(self, params, lr):
        super().__init__(params, {"lr": lr, "beta": 0.9, "steps": 0, "training": False})

    def switch(self, to_training):
        for group in self.param_groups:
            if group["training"] != to_training:
                for parameter in group["params"]:
                    z = self.state[parameter].get("z")
                    if z is not None:
                        parameter.data.lerp_(z, 1 - group["beta"] if to_training else 1 - 1 / group["beta"])
                group["training"] = to_training

    def train(self):
        self.switch(True)

    def eval(self):
        self.switch(False)

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            if not group["training"]:
                raise RuntimeError("call train() first")
            group["steps"] += 1
            for parameter in group["params"]:
                z = self.state[parameter].setdefault("z", parameter.clone())
                parameter.lerp_(z, 1 / group["steps"])
                parameter.add_(parameter.grad, alpha=group["lr"] * (group["beta"] * (1 - 1 / group["steps"]) - 1))
                z.sub_(parameter.grad, alpha=group["lr"])


def groups_of(model):
    """Two groups with rates of their own."""
    of = {letter: [p for name, p in model.named_parameters() if f"lora_{letter}" in name] for letter in "AB"}
    return [{"params": of["A"], "lr": 1e-3}, {"params": of["B"], "lr": 4e-3, "weight_decay": 0.1}]


@pytest.mark.parametrize("optimizer", [torch.optim.AdamW, torch.optim.SGD, torch.optim.Adagrad])
@pytest.mark.parametrize("how", ["class", "object"])
def test_parameter_groups(optimizer, how):
    model, other = (adapted(KINDS["LoRA"]()) for _ in range(2))
    written_out(other, tiny_model("llama").eval(), optimizer(groups_of(other), lr=1e-2))
    if how == "class":
        five_steps(model, optimizer, params=groups_of(model), lr=1e-2)
    else:
        five_steps(model, optimizer(groups_of(model), lr=1e-2))
    assert_same_weights(model, other)


def test_a_schedule_free_optimizer():
    model, other = (adapted(KINDS["LoRA"]()) for _ in range(2))
    optimizer = ScheduleFreeSGD(trained(other), lr=1e-2)
    optimizer.train()
    written_out(other, tiny_model("llama").eval(), optimizer)
    optimizer.eval()
    step = ff.UnlearnStep(model, ScheduleFreeSGD, terms=[ff.NPO(), ff.KL()], lr=1e-2)
    step.train()
    for number in range(5):
        step(*batches(number))
    in_training = copy.deepcopy(model)
    step.eval()
    assert_same_weights(model, other)
    with pytest.raises(AssertionError):
        assert_same_weights(in_training, other)


def test_a_distributed_checkpoint(tmp_path):
    """torch's own, of the model's and the step's state: what goes on from it ends as what never stopped."""

    def state_of(model, step):
        weights, optimizer = get_state_dict(model, step, options=StateDictOptions(ignore_frozen_params=True))
        return {"model": weights, "optimizer": optimizer}

    def step_of(model):
        return ff.UnlearnStep(model, torch.optim.AdamW, terms="pdu", lr=1e-3)

    whole = adapted(KINDS["LoRA"]())
    step = step_of(whole)
    for number in range(5):
        if number == 3:
            checkpoint.save(state_of(whole, step), checkpoint_id=tmp_path)
        step(*batches(number))
    resumed = adapted(KINDS["LoRA"]())
    for parameter in trained(resumed):
        parameter.data.zero_()
    other = step_of(resumed)
    state = state_of(resumed, other)
    checkpoint.load(state, checkpoint_id=tmp_path)
    set_state_dict(
        resumed,
        other,
        model_state_dict=state["model"],
        optim_state_dict=state["optimizer"],
        options=StateDictOptions(strict=False),
    )
    assert other.param_groups[0]["unlearn_steps"] == 3
    for number in (3, 4):
        other(*batches(number))
    for one, two in zip(trained(whole), trained(resumed), strict=True):
        assert torch.equal(one, two)
    scalars, others = (
        {k: float(v) for k, v in each.param_groups[0].items() if k.startswith("unlearn_")} for each in (step, other)
    )
    assert len(scalars) > 1 and scalars == others
