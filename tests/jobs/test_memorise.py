"""The tiny model of the first page: it knows its texts, and forgets those that it is told to."""

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import fastforget as ff

TEXTS = [f"Agent {name} hides the plan under stone {number}." for number, name in enumerate(["Alder", "Birch", "Elm"])]


def test_tiny_model_recites_its_texts(tmp_path):
    name = ff.tiny_model(tmp_path / "tiny", TEXTS)
    tokenizer, model = AutoTokenizer.from_pretrained(name), AutoModelForCausalLM.from_pretrained(name)
    for text in TEXTS:
        ids = torch.tensor([tokenizer.encode(text)])
        assert ids.shape[1] > 9, "there is something behind the prompt"
        written = model.generate(ids[:, :8], max_new_tokens=ids.shape[1] - 8, do_sample=False)
        assert torch.equal(written, ids), tokenizer.decode(written[0])


def test_nothing_to_learn():
    with pytest.raises(ff.FastforgetError, match="no text to learn"):
        ff.tiny_model("never-made", [])
