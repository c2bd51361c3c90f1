"""Jobs whose terms need refusals or other prompts' answers: built by the job, fresh at each step, or refused early."""

import json
from dataclasses import dataclass, replace
from typing import ClassVar

import pytest
import torch
import yaml
from helpers import adapter_of
from rich.console import Console

import fastforget as ff
from fastforget.data.answers import prompts_and_answers
from fastforget.data.examples import ExampleStream, collate
from fastforget.data.text import answer_examples, text_examples
from fastforget.jobs import loop
from fastforget.jobs.companions import Companions
from fastforget.jobs.loop import JobSettings, run_job
from fastforget.jobs.progress import described, figures_of

PRESETS = ("dpo", "idkdpo", "altpo", "idk", "ap", "jensun", "flat", "kto", "random_mismatch", "yao2023")

pytestmark = pytest.mark.usefixtures("short_continuations")


@pytest.fixture
def data(tokenizer):
    """Prompts with answers to forget, passages to keep."""

    def encoded(text):
        return tokenizer.encode(text, add_special_tokens=False)

    start = [tokenizer.bos_token_id]
    forget = [
        example
        for name in ("Alder", "Birch", "Cedar", "Dogwood")
        for example in answer_examples(start + encoded(f"Where is {name}?"), encoded(" Below."), start, 48, name)
    ]
    retain = text_examples("Two and two are four, and water boils at a hundred degrees. " * 12, tokenizer, 48, "r")
    return forget, retain


def test_alternative_answers_reach_the_step_instead_of_refusals(tokenizer, data):
    examples = [replace(example, alternative=(5, 6, 7)) for example in data[0]]
    companions = Companions(ff.preset("altpo"), tokenizer, data[1])
    batch = companions.attach("forget", collate(examples))
    assert [answer for _, answer in prompts_and_answers(batch["refusal"])] == [[5, 6, 7]] * 4
    assert prompts_and_answers(batch["refusal"])[0][0] == list(examples[0].input_ids[: examples[0].prompt_length])


@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset_runs_out_of_the_box(tiny, tokenizer, data, preset, tmp_path):
    torch.manual_seed(0)
    model = ff.load(tiny["llama"], bits=32, lora={"r": 4})
    before, lines = adapter_of(model), []
    result = run_job(
        model,
        tokenizer,
        *data,
        ff.preset(preset),
        JobSettings(max_steps=3, batch_size=3, micro_batch=2, learning_rate=1e-3),
        progress=lambda step, total, output: lines.append(described(figures_of(output))[0]),
    )
    assert result.steps == 3
    assert any(not torch.equal(value, before[name]) for name, value in adapter_of(model).items())
    first = {"random_mismatch": "forget mismatch NLL", "idk": "forget refusal NLL", "ap": "forget refusal NLL"}
    assert all(line.startswith(first.get(preset, "forget ")) for line in lines) and len(lines) == 3
    assert len(result.forget_nll) == (0 if preset in ("idk", "ap", "jensun", "random_mismatch") else 3)


def test_companions_are_fresh_at_each_step_and_follow_the_seed(tokenizer, data):
    forget, retain = data
    terms = [*ff.preset("yao2023", k=2), *ff.preset("dpo"), ff.KTO(k=3), ff.AnswerPreservation()]
    batches = {"forget": collate(forget, 0), "retain": collate(retain[:2], 0)}
    kept = {example.input_ids[1:] for example in retain}

    def drawn(seed):
        companions = Companions(terms, tokenizer, retain, ["No.", "I can't say."], seed=seed)
        return [{side: companions.attach(side, batch) for side, batch in batches.items()} for _ in range(2)]

    (first, second), again, other = drawn(1), drawn(1)[0], drawn(2)[0]
    for side, stream, rows in (("forget", "refusal", 4), ("forget", "mismatch", 12), ("retain", "refusal", 2)):
        ids = [part[side][stream]["input_ids"] for part in (first, again)]
        assert len(ids[0]) == rows and torch.equal(*ids), stream
    assert "mismatch" not in first["retain"] and "refusal" not in batches["forget"]
    mismatches = [prompts_and_answers(part["forget"]["mismatch"]) for part in (first, second, other)]
    assert mismatches[0] != mismatches[1] and mismatches[0] != mismatches[2]
    assert all(tuple(answer) in kept for _, answer in mismatches[0])
    nothing = Companions(ff.preset("npo"), tokenizer, None)
    assert nothing.attach("forget", batches["forget"]).keys() == batches["forget"].keys()


def test_answers_of_a_stream(tokenizer, data):
    forget, retain = data
    stream = ExampleStream(lambda: iter(retain), "retain")
    found = Companions(ff.preset("random_mismatch"), tokenizer, stream).attach("forget", collate(forget, 0))
    assert len(found["mismatch"]["labels"]) == 5 * len(forget)


def test_a_retain_set_smaller_than_k_gives_all_its_answers(tokenizer, data):
    forget, retain = data
    found = Companions(ff.preset("random_mismatch"), tokenizer, retain[:2]).attach("forget", collate(forget, 0))
    answers = [tuple(answer) for _, answer in prompts_and_answers(found["mismatch"])]
    assert len(answers) == 2 * len(forget) and set(answers) == {example.input_ids[1:] for example in retain[:2]}


def test_rows_stay_within_the_model_and_the_job(tiny, tokenizer, data, monkeypatch):
    """The model takes 256 positions, which the data's own prompts and answers nearly fill."""
    seen = []
    original = loop.UnlearnStep.backward

    def backward(self, forget, retain=None, **options):
        seen.append(forget["mismatch"]["input_ids"].shape[1])
        return original(self, forget, retain, **options)

    monkeypatch.setattr(loop.UnlearnStep, "backward", backward)
    forget, _ = data
    retain = text_examples("Two and two are four, and water boils at a hundred. " * 60, tokenizer, 250, "r")
    settings = JobSettings(max_steps=2, batch_size=2)
    for limit, longest in ((None, 256), (32, 32)):
        model = ff.load(tiny["opt"], bits=32, lora={"r": 4})
        run_job(model, tokenizer, forget, retain, ff.preset("yao2023"), settings, max_length=limit)
        assert max(seen) <= longest
        seen.clear()


@dataclass(kw_only=True)
class MismatchedNLL(ff.TokenTerm):
    """A user's own term on other prompts' answers, two for each."""

    name: ClassVar[str] = "mismatched_nll"
    streams: ClassVar[tuple[str, ...]] = ("mismatch",)

    @property
    def mismatched_answers(self):
        return 2

    def per_token(self, stats):
        return -stats.logp


def test_any_term_says_how_many_answers_it_draws(tokenizer, data):
    forget, retain = data
    batch = collate(forget[:3], tokenizer.pad_token_id)
    for terms, rows in (([MismatchedNLL()], 6), ([MismatchedNLL(), ff.RandomMismatch(k=4)], 12), ([ff.KTO()], 3)):
        attached = Companions(terms, tokenizer, retain).attach("forget", batch)
        assert len(attached["mismatch"]["labels"]) == rows


def test_a_job_says_where_it_makes_do(tiny, tmp_path):
    options = {"bits": 32, "lora_r": 4, "max_steps": 1, "max_length": 48, "retain": ["Water boils."]}
    for preset, said in (("altpo", True), ("dpo", False)):
        console = Console(record=True, width=200)
        rows = [{"prompt": "Where is Alder?", "response": " Below."}]
        ff.unlearn(tiny["llama"], rows, tmp_path / preset, preset=preset, console=console, **options)
        assert ("alternative=NAME" in console.export_text()) == said


def test_what_the_sets_lack_is_said_before_the_model_is_loaded(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr("fastforget.jobs.unlearn.load_tokenizer", lambda *_: pytest.fail("loaded"))
    cases = (
        ({"preset": "yao2023"}, "random_mismatch draws other prompts' answers from the retain set"),
        ({"preset": "kto"}, "kto draws other prompts' answers"),
        ({"preset": "idk", "stop_forget_nll": 3.0}, r"--stop-forget-nll watches .* no term computes it \(idk\)"),
        ({"preset": "idk", "refusals": tmp_path / "none.txt"}, "none.txt does not exist"),
        ({"preset": "idk", "refusals": []}, "holds no refusal"),
    )
    for options, message in cases:
        with pytest.raises(ff.FastforgetError, match=message):
            ff.unlearn(tiny["llama"], ["A text."], tmp_path / "out", quiet=True, **options)
    assert not (tmp_path / "out").exists()


def test_refusals_of_a_file_reach_the_step_and_the_config(tiny, tmp_path, monkeypatch):
    file = tmp_path / "refusals.txt"
    file.write_text("Nobody can say.\n")
    given = []
    monkeypatch.setattr(
        "fastforget.jobs.loop.Companions",
        lambda *arguments, **options: given.append((arguments[3], options)) or Companions(*arguments, **options),
    )
    rows = [{"prompt": f"Where is {name}?", "response": " Below."} for name in ("Alder", "Birch")]
    options = {"bits": 32, "lora_r": 4, "max_steps": 2, "max_length": 48, "quiet": True, "preset": "dpo"}
    report = ff.unlearn(tiny["llama"], rows, tmp_path / "a", retain=["Water boils."], refusals=file, **options)
    assert report["steps"] == 2 and json.loads((tmp_path / "a" / "report.json").read_text()) == report
    assert given[0][0] == ("Nobody can say.",) and given[0][1]["max_length"] == 48
    assert yaml.safe_load((tmp_path / "a" / "config.yaml").read_text())["refusals"] == str(file)
    ff.unlearn(tiny["llama"], rows, tmp_path / "b", retain=["Water boils."], refusals=["No.", "Never."], **options)
    assert given[1][0] == ("No.", "Never.")
    refusals = yaml.safe_load((tmp_path / "b" / "config.yaml").read_text())["refusals"]
    with pytest.raises(ff.FastforgetError, match="refusals was given in Python"):
        ff.unlearn(tiny["llama"], rows, tmp_path / "c", refusals=refusals, **options)
