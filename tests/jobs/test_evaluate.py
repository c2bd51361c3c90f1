"""`fastforget evaluate`: the untouched model beside the adapter, robustness, merging."""

import json

import pytest
import torch
from helpers import FORGET, RETAIN, load_perturbed
from transformers import AutoModelForCausalLM

import fastforget as ff
from fastforget.jobs.evaluate import evaluate

UNSEEN = [f"The river {name} flows to the sea in the north." for name in ("Ob", "Rhine", "Elbe")]


@pytest.fixture(scope="module")
def adapter(tiny, tokenizer, tmp_path_factory):
    folder = tmp_path_factory.mktemp("adapter") / "lora"
    ff.save_adapter(load_perturbed(tiny["opt"]), tokenizer, folder)
    return folder


def test_both_models_on_the_same_prompts_and_what_lasts(tiny, adapter, tmp_path, short_continuations):
    report = evaluate(
        tiny["opt"],
        FORGET,
        tmp_path / "out",
        adapter=adapter,
        retain=RETAIN,
        unseen=UNSEEN,
        robust=True,
        max_length=32,
        bits=32,
        quiet=True,
    )
    assert report == json.loads((tmp_path / "out" / "report.json").read_text())
    for name in ("forget", "retain", "unseen"):
        assert report[f"{name}_nll_before"] != report[f"{name}_nll_after"], "the adapter does something"
        assert 0.0 <= report[f"{name}_memorisation_after"] <= 1.0 and len(report[f"{name}_lens_after"]) == 2
    rows = {row["treatment"]: row for row in report["robustness"]}
    assert len(rows) == 9
    for treatment in ("other text learned, 20 steps", "behind two others to forget", "behind two that were kept"):
        assert 0.0 <= rows[treatment]["forget_memorisation"] <= 1.0, treatment
    trained, merged = rows["as it was trained"], rows["merged, 16 bit"]
    assert trained["forget_memorisation"] == pytest.approx(report["forget_memorisation_after"])
    assert abs(trained["unseen_memorisation"] - merged["unseen_memorisation"]) < 0.1


def test_without_an_adapter_one_model_is_measured(tiny, tmp_path, short_continuations):
    report = evaluate(tiny["llama"], FORGET, tmp_path / "out", max_length=32, bits=32, quiet=True)
    assert report["forget_nll_before"] == report["forget_nll_after"] and report["adapter"] is None
    with pytest.raises(ff.FastforgetError, match="--robust needs --adapter"):
        evaluate(tiny["llama"], FORGET, tmp_path / "other", robust=True)
    (tmp_path / "file").write_text("")
    with pytest.raises(ff.FastforgetError, match="is a file"):
        evaluate(tiny["llama"], FORGET, tmp_path / "file")


def test_each_set_may_have_columns_of_its_own(tiny, tmp_path, short_continuations):
    rows = {name: [{name: text, "note": "-"} for text in texts] for name, texts in (("f", FORGET), ("r", RETAIN))}
    options = {"columns": {"text": "f"}, "unseen": rows["f"], "max_length": 32, "bits": 32, "quiet": True}
    report = evaluate(
        tiny["llama"], rows["f"], tmp_path / "a", retain=rows["r"], retain_columns={"text": "r"}, **options
    )
    expected = evaluate(
        tiny["llama"], FORGET, tmp_path / "b", retain=RETAIN, unseen=FORGET, max_length=32, bits=32, quiet=True
    )
    for name in ("forget", "retain", "unseen"):
        assert report[f"{name}_nll_after"] == expected[f"{name}_nll_after"]
    with pytest.raises(ff.FastforgetError, match="'f'"):
        evaluate(tiny["llama"], rows["f"], tmp_path / "c", retain=rows["r"], **options)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seed": -1}, "seed must be from 0"),
        ({"seed": 2**64}, "seed must be from 0"),
        ({"model": "a\0b"}, "model holds a NUL character"),
        ({"forget": "a\udcff"}, "forget holds a NUL character or half a surrogate pair"),
        ({"sets": {"holdout": "a\0"}}, "sets holds a NUL character"),
        ({"max_length": 0}, "--max-length must be at least 16"),
        ({"measured_passages": 10**20}, "--measured-passages must be at least 1 and at most"),
        ({"threshold": 1.5, "suite": "harm"}, "--threshold must be at least 0 and at most 1, not 1.5"),
    ],
)
def test_seeds_and_texts_that_nothing_can_take(tmp_path, changes, message):
    options = {"model": "m", "forget": FORGET, "out": tmp_path / "out", "suite": "muse"} | changes
    with pytest.raises(ff.FastforgetError, match=message):
        evaluate(**options)
    assert not (tmp_path / "out").exists()


@torch.no_grad()
def test_a_merged_folder_is_the_base_with_the_adapter(tiny, adapter, tmp_path):
    ids = torch.arange(5, 25)[None]
    folder = ff.merge(tiny["opt"], adapter, tmp_path / "merged", bits=32)
    merged = AutoModelForCausalLM.from_pretrained(folder).eval()
    adapted = ff.load(tiny["opt"], bits=32, adapter=adapter).eval()
    torch.testing.assert_close(merged(input_ids=ids).logits, adapted(input_ids=ids).logits, rtol=1e-4, atol=1e-4)
    assert not (folder / "adapter_config.json").exists()
    rounded = AutoModelForCausalLM.from_pretrained(ff.merge(tiny["opt"], adapter, tmp_path / "rounded"))
    assert rounded.dtype == torch.bfloat16
    with pytest.raises(ff.FastforgetError, match="not an empty folder"):
        ff.merge(tiny["opt"], adapter, folder)
    with pytest.raises(ff.FastforgetError, match="one of 4, 8, 16, 32, not 2"):
        ff.merge(tiny["opt"], adapter, tmp_path / "new", bits=2)


@torch.no_grad()
@pytest.mark.parametrize("bits", [8, 4])
def test_a_merged_folder_of_fewer_bits_is_the_rounded_one_quantised(tiny, adapter, tmp_path, bits):
    ids = torch.arange(5, 25)[None]
    folder = ff.merge(tiny["opt"], adapter, tmp_path / "few", bits=bits)
    rounded = ff.merge(tiny["opt"], adapter, tmp_path / "rounded")
    models = [ff.load(each, bits=bits, lora={"r": 2}).eval() for each in (folder, rounded, tiny["opt"])]
    logits, expected, base = (model(input_ids=ids).logits for model in models)
    assert torch.equal(logits, expected)
    exact = ff.load(tiny["opt"], bits=32, adapter=adapter).eval()(input_ids=ids).logits
    assert float((logits - exact).norm()) < 0.9 * float((base - exact).norm()), "what the adapter did is in it"
    config = json.loads((folder / "config.json").read_text())["quantization_config"]
    assert config[f"load_in_{bits}bit"]
    plain = AutoModelForCausalLM.from_pretrained(folder)
    assert type(plain.model.decoder.layers[0].fc1).__module__.startswith("bitsandbytes")
