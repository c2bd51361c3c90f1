"""`fastforget merge`: the folder that it writes, what it says of it, and what it refuses."""

import json
import re

import pytest
import torch
from helpers import load_perturbed
from transformers import AutoModelForCausalLM, AutoTokenizer

import fastforget as ff
from fastforget import merging


@pytest.fixture(scope="module")
def adapter(tiny, tmp_path_factory, tokenizer):
    folder = tmp_path_factory.mktemp("adapter")
    ff.save_adapter(load_perturbed(tiny["llama"]), tokenizer, folder)
    return str(folder)


@torch.no_grad()
def test_a_model_without_an_adapter_that_computes_the_same(run, tiny, adapter, tmp_path):
    code, text, errors = run("merge", "MODEL", adapter, str(tmp_path / "merged"), "--bits", "32")
    assert (code, errors) == (0, []) and "The merged model, 32 bit," in text.replace("\n", " ")
    ids = torch.arange(5, 25)[None]
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    expected = ff.load(tiny["llama"], bits=32, adapter=adapter).eval()
    torch.testing.assert_close(model(input_ids=ids).logits, expected(input_ids=ids).logits, rtol=1e-4, atol=1e-4)
    assert not (tmp_path / "merged" / "adapter_config.json").exists()
    assert AutoTokenizer.from_pretrained(tmp_path / "merged").pad_token_id is not None


def test_json_says_what_lies_where_in_16_bit_unless_asked(run, tiny, adapter, tmp_path):
    code, text, errors = run("merge", "MODEL", adapter, str(tmp_path / "merged"), "--json")
    report = json.loads(text)
    assert (code, errors) == (0, []) and report["bits"] == 16 and report["out"] == str(tmp_path / "merged")
    assert report["model"] == str(tiny["llama"]) and report["adapter"] == adapter
    assert report["bytes"] == sum(path.stat().st_size for path in (tmp_path / "merged").iterdir())
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "merged").dtype == torch.bfloat16


def test_what_is_refused_is_one_line_and_leaves_nothing(run, tiny, adapter, tmp_path):
    out = tmp_path / "merged"
    for words, message in (
        ([adapter, adapter], f"itself an adapter, and the base must be a whole model: .* trained on, {tiny['llama']}"),
        (["MODEL", "MODEL"], f"could not load the adapter {tiny['llama']}: .*adapter_config.json"),
        (["MODEL", adapter, "--bits", "2"], "bits of a merged model must be one of 4, 8, 16, 32, not 2"),
    ):
        code, text, errors = run("merge", *words[:2], str(out), *words[2:])
        assert (code, text, len(errors)) == (2, "", 1), errors
        assert re.search(message, errors[0]), errors
    assert not [*tmp_path.glob("*merged*")]
    code, _, errors = run("merge", "MODEL", adapter, str(tmp_path))
    assert code == 2 and "exists already and is not an empty folder" in errors[0]


def test_what_breaks_on_the_way_leaves_nothing(run, adapter, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(merging, "load_tokenizer", full)  # the last of it: the weights are written
    code, _, errors = run("merge", "MODEL", adapter, str(tmp_path / "merged"))
    assert code == 2 and len(errors) == 1 and "merged cannot be written ([Errno 28] No space" in errors[0]
    assert not [*tmp_path.glob("*merged*")]
