"""Task vectors: exact subtraction, what is refused, and the job that trains and subtracts."""

import copy
import json
import math

import peft
import pytest
import torch
from helpers import FORGET, QUICK, RETAIN, load_perturbed
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import fastforget as ff
from fastforget.jobs.checkpoints import Checkpoints
from fastforget.jobs.loop import JobSettings, run_job

pytestmark = pytest.mark.usefixtures("short_continuations")


def lora_products(model):
    """{name of the layer: s * B A} of every LoRA layer, float64."""
    found = {}
    for name, module in model.named_modules():
        if isinstance(module, peft.tuners.lora.LoraLayer):
            a, b = module.lora_A["default"].weight.double(), module.lora_B["default"].weight.double()
            found[name.removeprefix("base_model.model.")] = module.scaling["default"] * (b @ a)
    return found


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("kind", ["opt", "llama"])
def test_merged_weights_are_w_minus_alpha_s_b_a(tiny, tmp_path, kind, rslora):
    model = load_perturbed(tiny[kind], lora_alpha=7, use_rslora=rslora)
    base = dict(AutoModelForCausalLM.from_pretrained(tiny[kind]).named_parameters())
    products = lora_products(model)
    assert ff.task_vector(model, 0.3) is model
    ff.save_adapter(model, None, tmp_path)
    again = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny[kind]), tmp_path)
    for each in (model, again):
        merged = dict(each.merge_and_unload().named_parameters())
        assert len(products) == 2 * {"opt": 6, "llama": 7}[kind]
        for name, weight in base.items():
            product = products.get(name.removesuffix(".weight"))
            expected = weight.double() if product is None else weight.double() - 0.3 * product
            assert torch.allclose(merged[name].double(), expected, rtol=0, atol=1e-6), name
            assert product is None or float(product.abs().max()) > 1e-3


def test_turning_twice_restores_and_frozen_adapters_stay(tiny, tmp_path):
    model = load_perturbed(tiny["llama"])
    before = lora_products(model)
    ff.task_vector(ff.task_vector(model))
    assert all(torch.equal(product, before[name]) for name, product in lora_products(model).items())
    ff.save_adapter(model, None, tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    config["base_model_name_or_path"] = str(tiny["llama"])
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    stacked = ff.load(tmp_path, bits=32, lora={"r": 2})
    for name, parameter in stacked.named_parameters():
        if ".unlearn." in name:
            parameter.data.fill_(0.5)
    ff.task_vector(stacked, 2.0)
    assert all(torch.equal(product, before[name]) for name, product in lora_products(stacked).items())
    ours = {name: p for name, p in stacked.named_parameters() if ".unlearn." in name}
    assert all((p == (-1.0 if "lora_B" in name else 0.5)).all() for name, p in ours.items())


def test_what_cannot_be_subtracted_is_refused(tiny):
    model = load_perturbed(tiny["llama"])
    for call, message in (
        (lambda: ff.task_vector(model, 0.0), "alpha must be positive"),
        (lambda: ff.task_vector(model, math.nan), "alpha must be positive"),
        (lambda: ff.preset("task_vector", alpha=-1.0), "alpha must be positive"),
        (lambda: ff.task_vector(model, adapter="other"), "no adapter 'other': it has default"),
        (lambda: ff.task_vector(AutoModelForCausalLM.from_pretrained(tiny["llama"])), "no PEFT adapter"),
    ):
        with pytest.raises(ff.FastforgetError, match=message):
            call()
    model.merge_adapter()
    with pytest.raises(ff.FastforgetError, match="is merged into the weights"):
        ff.task_vector(model)
    model.unmerge_adapter()
    for options, message in (
        ({"use_dora": True}, "DoRA"),
        ({"bias": "lora_only"}, "trains biases"),
        ({"modules_to_save": ["norm"]}, "whole modules"),
        ({"init_lora_weights": "pissa"}, "changes the base weights"),
    ):
        other = ff.load(tiny["llama"], bits=32, lora={"r": 2, **options})
        before = copy.deepcopy(other.state_dict())
        with pytest.raises(ff.FastforgetError, match=message):
            ff.task_vector(other)
        assert all(torch.equal(value, before[name]) for name, value in other.state_dict().items())


def test_the_job_fine_tunes_and_subtracts(tiny, tokenizer, passages, tmp_path):
    examples, _ = passages
    settings = {"max_steps": 6, "learning_rate": 1e-2}
    runs = {}
    for name, terms in (("tuned", [ff.CE(on="forget")]), ("turned", ff.preset("task_vector", alpha=0.5))):
        torch.manual_seed(3)
        model = ff.load(tiny["llama"], bits=32, lora={"r": 4})
        saving = JobSettings(**settings, save_steps=3)
        result = run_job(model, tokenizer, examples, None, terms, saving, checkpoints=Checkpoints(tmp_path / name))
        assert result.forget_nll[-1] < result.forget_nll[0]
        runs[name] = {key: value.detach() for key, value in model.named_parameters() if "lora_" in key}
    tuned = runs["tuned"]
    for key, value in runs["turned"].items():
        assert torch.equal(value, -0.5 * tuned[key] if "lora_B" in key else tuned[key]), key
        assert value.abs().sum() > 0
    for step in (3, 6):
        one, other = (
            load_file(tmp_path / name / f"checkpoint-{step}" / "adapter_model.safetensors")
            for name in ("tuned", "turned")
        )
        assert all(torch.equal(other[key], -0.5 * one[key] if "lora_B" in key else one[key]) for key in one), step
    with pytest.raises(ff.FastforgetError, match="a task vector is learned by lowering the forget NLL"):
        run_job(
            model, tokenizer, examples, None, ff.preset("task_vector"), JobSettings(**settings, stop_forget_nll=5.0)
        )


def test_unlearn_with_a_task_vector_raises_the_nll(tiny, tmp_path):
    options = {**QUICK, "max_steps": 12, "learning_rate": 1e-2}
    report = ff.unlearn(tiny["llama"], FORGET, tmp_path / "out", preset="task_vector", **options)
    assert report["forget_nll_after"] > report["forget_nll_before"] + 0.05
    assert (tmp_path / "out" / "adapter_model.safetensors").is_file()


def test_unlearn_with_rmu_and_combined_gradients(tiny, tmp_path):
    options = {**QUICK, "retain": RETAIN}
    more = {"preset": "rmu", "preset_options": {"layer": 1, "alpha": 2.0}}
    report = ff.unlearn(tiny["llama"], FORGET, tmp_path / "rmu", **options, **more)
    assert report["steps"] == 3 and report["combine"] == "sum"
    with pytest.raises(ff.FastforgetError, match="rmu ends before the head, so no NLL is known"):
        ff.unlearn(tiny["llama"], FORGET, tmp_path / "stop", **options, **more, stop_forget_nll=5.0)
    with pytest.raises(ff.FastforgetError, match="no layer 7: its layers are 0 to 1"):
        ff.unlearn(tiny["llama"], FORGET, tmp_path / "deep", **options, preset="rmu")
    weights = {}
    for how in ("sum", "pcgrad", "mgda"):
        out = tmp_path / how
        assert ff.unlearn(tiny["llama"], FORGET, out, **options, preset="grad_diff", combine=how)["combine"] == how
        weights[how] = torch.cat([each.flatten() for each in load_file(out / "adapter_model.safetensors").values()])
    assert not torch.equal(weights["sum"], weights["mgda"]) and weights["mgda"].isfinite().all()
    with pytest.raises(ff.FastforgetError, match="there is no term on the retain set"):
        ff.unlearn(tiny["llama"], FORGET, tmp_path / "alone", **QUICK, combine="pcgrad")
    with pytest.raises(ff.FastforgetError, match="combine must be one of sum, mgda, pcgrad"):
        ff.unlearn(tiny["llama"], FORGET, tmp_path / "word", **options, combine="mean")
    assert not (tmp_path / "alone").exists() and not (tmp_path / "deep").exists()
