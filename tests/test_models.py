"""Loading: a checkpoint whose weights are not those of the model is an error, in every precision and from the shell."""

import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from bitsandbytes.functional import has_avx512bf16
from safetensors.torch import load_file, save_file
from transformers import GPT2Config, GPT2LMHeadModel

import fastforget as ff
from fastforget.models import check_weights

NAME = {"opt": "model.decoder.layers.1.self_attn.k_proj.weight", "llama": "model.layers.1.mlp.down_proj.weight"}
CHANGES = {
    "gone": (lambda name, weights: weights.pop(name), "1 is missing, and would be random numbers: {name}"),
    "renamed": (lambda name, weights: weights.update({f"x.{name}": weights.pop(name)}), "no weights of this model: x."),
    "shape": (lambda name, weights: weights.update({name: weights[name][1:].clone()}), "{name} .* instead of "),
    "all": (lambda name, weights: weights.clear(), "are missing, and would be random numbers: .* and [0-9]+ more"),
}


def changed(folder, target, change):
    """A copy of a model's folder, its weights changed by `change(weights)`."""
    shutil.copytree(folder, target)
    weights = load_file(target / "model.safetensors")
    change(weights)
    save_file(weights or {"nothing": torch.ones(1)}, target / "model.safetensors", metadata={"format": "pt"})
    return target


@pytest.mark.parametrize("bits", [32, 8, 4])
@pytest.mark.parametrize("what", CHANGES)
@pytest.mark.parametrize("kind", ["opt", "llama"])
def test_weights_that_do_not_fit_are_an_error_unless_asked_for(tiny, tmp_path, kind, what, bits):
    change, message = CHANGES[what]
    folder = changed(tiny[kind], tmp_path / "m", lambda weights: change(NAME[kind], weights))
    message = message.format(name=NAME[kind].replace(".", r"\."))
    with pytest.raises(ff.FastforgetError, match=f"weights of .* do not fit its config.json: .*{message}") as caught:
        ff.load(folder, bits=bits, device="cpu")
    assert "\n" not in str(caught.value)
    if bits != 32:  # random numbers are not quantised, and in another shape there is nothing to compute with
        with pytest.raises(ff.FastforgetError, match="and --bits 32 or 16, as quantised layers cannot"):
            ff.load(folder, bits=bits, device="cpu", allow_missing_weights=True)
        return
    with pytest.warns(UserWarning, match=message):
        model = ff.load(folder, bits=bits, device="cpu", allow_missing_weights=True)
    assert model(input_ids=torch.tensor([[5, 6]])).logits.isfinite().all()


def test_tied_weights_and_buffers_are_no_error(tiny, tmp_path):
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=320, n_embd=64, n_layer=2, n_head=4, n_positions=64, bos_token_id=1, eos_token_id=1)
    GPT2LMHeadModel(config).save_pretrained(tmp_path / "gpt2")

    def as_on_the_hub(weights):  # OpenAI's: no prefix, and the causal mask among the weights
        weights.update({name.removeprefix("transformer."): weights.pop(name) for name in list(weights)})
        weights["h.0.attn.bias"] = torch.ones(64, 64).tril()[None, None]

    folders = [tiny["opt"], tiny["llama"], tmp_path / "gpt2"]
    folders.append(changed(tmp_path / "gpt2", tmp_path / "hub", as_on_the_hub))
    assert "lm_head.weight" not in load_file(tiny["opt"] / "model.safetensors"), "tied"
    inverse = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8)}
    folders.append(changed(tiny["llama"], tmp_path / "old", lambda weights: weights.update(inverse)))
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*do not fit its config")
        for folder in folders:
            for bits in (32, 16, 8, 4):
                ff.load(folder, bits=bits, device="cpu")


def test_a_buffer_that_the_model_computes_is_no_weight():
    """With the model's prefix and without, as the hub's GPT-2 has its masks; one that is saved is a weight."""
    model, body = torch.nn.Module(), torch.nn.Module()
    model.base_model_prefix, model.body = "body", body
    body.register_buffer("mask", torch.ones(2), persistent=False)
    body.register_buffer("saved", torch.ones(2))
    info = {"mismatched_keys": [], "missing_keys": [], "unexpected_keys": ["mask", "body.mask"]}
    check_weights("m", model, info, allow_missing=False)
    with pytest.raises(ff.FastforgetError, match=r"1 is no weights of this model: saved\."):
        check_weights("m", model, info | {"unexpected_keys": ["mask", "saved"]}, allow_missing=False)


@pytest.mark.skipif(not has_avx512bf16(), reason="bitsandbytes warns on CPUs with AVX-512-BF16 alone")
def test_no_warning_of_bitsandbytes_about_a_package_kernels(tiny):
    """It names `get_kernel` where the working directory has a folder `kernels`, as this repository does."""
    code = f"import fastforget; fastforget.load({str(tiny['opt'])!r}, bits=8, device='cpu')"
    root = Path(__file__).parents[1]
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=root, check=True)
    assert "kernel" not in result.stderr


def test_the_command_line_says_so_in_one_line(run, tiny, tmp_path):
    change, _ = CHANGES["gone"]
    folder, out = changed(tiny["opt"], tmp_path / "m", lambda weights: change(NAME["opt"], weights)), tmp_path / "out"
    command = ["unlearn", "--model", str(folder), "--forget", "FORGET", "--out", str(out), "--preset", "grad_ascent"]
    command += ["--max-steps", "1", "--max-length", "48", "--bits", "32"]
    code, _, errors = run(*command)
    assert code == 2 and len(errors) == 1 and "--allow-missing-weights" in errors[0], errors
    assert not out.exists()
    with pytest.warns(UserWarning, match="1 is missing"):
        assert run(*command, "--allow-missing-weights")[0] == 0
    assert (out / "adapter_model.safetensors").exists()
    assert "allow_missing_weights: true" in (out / "config.yaml").read_text()
