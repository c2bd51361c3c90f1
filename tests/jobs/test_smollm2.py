"""`fastforget demo --model smollm2` with a tiny model in SmolLM2's place: taught once, whole in its cache, reported."""

import copy
import io
import json
from dataclasses import replace
from functools import partial

import pytest
from helpers import random_model
from rich.console import Console

import fastforget as ff
from fastforget.data.people import KEPT, invented_people
from fastforget.jobs import smollm2
from fastforget.jobs.demo import run_demo
from fastforget.jobs.options import SMOLLM2, DemoOptions, JobSettings
from fastforget.jobs.subjects import DemoScale

CHATML = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.fixture
def stand_in(monkeypatch, tokenizer, short_continuations):
    """A random Llama with a chat template is "SmolLM2"; two people are forgotten, kept and never taught."""
    chat = copy.deepcopy(tokenizer)
    chat.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    chat.chat_template = CHATML

    def save(folder):
        random_model("llama", chat).save_pretrained(folder)
        chat.save_pretrained(folder)

    monkeypatch.setattr(smollm2, "save_untaught", save)
    monkeypatch.setattr(smollm2, "invented_people", partial(invented_people, counts=(1, 1, 1)))
    monkeypatch.setattr(smollm2, "TEACHING", replace(smollm2.TEACHING, epochs=2.0))
    monkeypatch.setattr(smollm2, "continue_greedily", partial(smollm2.continue_greedily, characters=8))
    monkeypatch.setitem(smollm2.SMOLLM2_SETTINGS, "max_steps", 2)


def test_a_taught_base_is_kept_with_what_the_model_said_before(stand_in, tmp_path, monkeypatch):
    first = smollm2.smollm2_subject(0, tmp_path, Console(file=io.StringIO()))
    answers = json.loads((first.base / smollm2.KEPT_ANSWERS).read_text(encoding="utf-8"))
    assert [answer["question"] for answer in answers] == list(KEPT)
    assert first.trained_seconds > 0
    with monkeypatch.context() as patch:
        patch.setattr(smollm2, "teach", None)  # a second teaching would call it
        patch.setattr(smollm2, "own_answers", None)
        again = smollm2.smollm2_subject(0, tmp_path, Console(file=io.StringIO()))
    assert (again.base, again.trained_seconds) == (first.base, 0.0)
    assert [each.input_ids for each in again.kept] == [each.input_ids for each in first.kept]
    assert not {example.source for example in again.sets["forget"]} & {example.source for example in again.kept}


def test_the_report_says_what_became_of_general_ability(stand_in, tmp_path):
    text = io.StringIO()
    options = DemoOptions(
        tmp_path / "out", model=SMOLLM2, cache=tmp_path / "cache", robust=False, console=Console(file=text, width=300)
    )
    report = run_demo(options, DemoScale(), JobSettings())
    for when in ("before", "after"):
        assert len(report[f"general_answers_{when}"]) == 20
        assert 0 <= report[f"general_right_{when}"] <= 1
        assert report[f"plain_text_nll_{when}"] > 0
    assert "General questions:" in text.getvalue()
    assert (tmp_path / "out" / "adapter_config.json").is_file()


def test_what_is_missing_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(smollm2, "PACKAGE", "no_such_package")
    with pytest.raises(ff.FastforgetError, match="pip install"):
        smollm2.smollm2_subject(0, tmp_path, Console(file=io.StringIO()))
