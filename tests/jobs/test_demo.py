"""The demo at a small scale: memorise, cache, load in 8 bit, unlearn, measure, save, draw; from Python too.

Its base recites what it was trained on, also in 8 bit, and says so when it cannot.
"""

import io
import json
import math
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from helpers import same
from rich.console import Console
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

import fastforget as ff
from fastforget.data import topics
from fastforget.evaluate.leakage import leakage
from fastforget.jobs import demo as demo_module
from fastforget.jobs import memorise, subjects
from fastforget.jobs.checkpoints import Checkpoints
from fastforget.jobs.demo import draw_curves, run_demo
from fastforget.jobs.loop import JobResult
from fastforget.jobs.options import DemoOptions, JobSettings
from fastforget.jobs.subjects import DemoScale

SMALL = DemoScale(topic_counts=(1, 2, 1), passages_per_topic=2, hidden_size=128)
QUICK = JobSettings(max_steps=100, learning_rate=5e-3, until="gone")


@pytest.fixture(scope="module")
def corpus():
    return topics.load_corpus(topic_counts=(1, 2, 1), passages_per_topic=2)


@pytest.fixture(scope="module")
def first(tmp_path_factory):
    """A run: its folder, report and printed text, and the base as it was trained, the result and progress of that."""
    folder, text, seen, base = tmp_path_factory.mktemp("demo"), io.StringIO(), [], []

    def watched(model, *arguments, progress, **options):
        def told(*args):
            seen.append(args)
            progress(*args)

        base.extend((model, memorise.memorise(model, *arguments, progress=told, **options), seen))
        return base[1]

    options = DemoOptions(folder / "out", cache=folder / "cache", console=Console(file=text, width=300))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(subjects, "memorise", watched)
        report = run_demo(options, SMALL, QUICK)
    return SimpleNamespace(folder=folder, report=report, text=text.getvalue(), base=base)


@pytest.fixture
def small(monkeypatch):
    """`ff.demo` has no options for its scale: here it takes the tests'."""
    monkeypatch.setattr(demo_module, "DemoScale", lambda: SMALL)
    monkeypatch.setattr(demo_module, "JobSettings", lambda **given: QUICK)


def test_report_holds_every_figure(first):
    folder, report, text = first.folder, first.report, first.text
    assert report == json.loads((folder / "out" / "report.json").read_text())
    names = "forget_leak_before forget_leak_after retain_leak_before retain_leak_after forget_rouge_after unseen_rouge"
    names += " retain_nll_before retain_nll_after degenerate_share forget_passages retain_passages seconds peak_rss_mb"
    names += " forget_memorisation_before forget_memorisation_after retain_memorisation_after unseen_memorisation"
    names += " forget_extraction_before forget_extraction_after unseen_extraction forget_fluency_after"
    for name in (*names.split(), "seed"):
        assert isinstance(report[name], int | float), name
    assert report["preset"] == "other_tokens" and report["forget_passages"] == 2 and report["retain_passages"] == 4
    assert report["forget_leak_before"] == report["retain_leak_before"] == 1.0
    assert "What the model still knows" in text and "Continuations" in text and str(folder / "out") in text


def test_it_forgets_and_keeps(first):
    report = first.report
    assert report["forget_memorisation_before"] == report["forget_extraction_before"] == 1.0
    assert report["forget_memorisation_after"] < 0.5 and "exact memorisation of each at most" in report["stopped"]
    assert report["retain_leak_after"] >= 0.75


def test_what_lasts_is_in_the_report(first):
    rows = first.report["robustness"]
    treatments = "as it was trained, merged 16 bit, merged then 8 bit, merged then 4 bit, half learned again 20 steps"
    assert [row["treatment"].replace(",", "") for row in rows] == treatments.split(", ")
    assert rows[0]["forget_memorisation"] == pytest.approx(first.report["forget_memorisation_after"])
    assert all(0.0 <= value <= 1.0 for row in rows for name, value in row.items() if name != "treatment")
    assert "Does it last?" in first.text


def test_curves_are_drawn(first):
    pytest.importorskip("matplotlib")
    assert f"drawn in {first.folder / 'out' / 'curves.png'}" in first.text


def test_a_second_run_uses_the_cache_and_replaces_the_first(first, small, monkeypatch):
    folder, before = first.folder, first.report
    monkeypatch.setattr(demo_module, "plot_curves", lambda *_, **__: None)  # as where matplotlib is not installed
    random_state = torch.get_rng_state()
    output = io.StringIO()
    console = Console(file=output, width=300)
    again = ff.demo(str(folder / "out"), cache=str(folder / "cache"), console=console, robust=False)
    assert torch.equal(torch.get_rng_state(), random_state)
    assert again == json.loads((folder / "out" / "report.json").read_text()) and {*again, "robustness"} == {*before}
    assert "pip install 'fastforget[plot]'" in output.getvalue()
    assert not (folder / "out" / "curves.png").exists(), "the first run's picture would be taken for this one's"
    assert again["base_trained_seconds"] == 0 and before["base_trained_seconds"] > 0
    for name in ("forget_leak_after", "forget_nll_after", "retain_nll_after"):
        assert again[name] == pytest.approx(before[name], rel=1e-3), name


def test_another_adapter_is_not_replaced(first, tmp_path):
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(ff.FastforgetError, match="already holds an adapter"):
        ff.demo(tmp_path, cache=first.folder / "cache")
    with pytest.raises(ff.FastforgetError, match="unknown preset"):
        ff.demo(tmp_path / "new", preset="nothing")
    assert not (tmp_path / "new").exists()


def test_quiet_prints_nothing(first, small, short_continuations, monkeypatch, tmp_path, capfd):
    monkeypatch.setattr(demo_module, "JobSettings", lambda **given: JobSettings(max_steps=3))
    report = ff.demo(tmp_path / "out", cache=first.folder / "cache", preset="grad_ascent", robust=False, quiet=True)
    assert capfd.readouterr().out == ""
    assert report["preset"] == "grad_ascent" and (tmp_path / "out" / "adapter_model.safetensors").is_file()


def test_a_demo_that_was_killed_goes_on(first, small, short_continuations, monkeypatch, tmp_path):
    """Its adapter and its curves are those of one that was not, and no checkpoint is left."""
    monkeypatch.setattr(demo_module, "JobSettings", partial(JobSettings, max_steps=9, decay=0.4))
    options = {"cache": first.folder / "cache", "robust": False, "quiet": True, "save_steps": 3}
    whole = ff.demo(tmp_path / "whole", **options)
    write, steps = Checkpoints.write, []

    def write_and_end(self, number, *given):
        write(self, number, *given)
        steps.append(number)
        if number == 6:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Checkpoints, "write", write_and_end)
        ff.demo(tmp_path / "out", **options)
    assert [folder.name for folder in Checkpoints(tmp_path / "out").folders()] == ["checkpoint-6"]
    with pytest.raises(ff.FastforgetError, match="holds checkpoints of an earlier job: --resume"):
        ff.demo(tmp_path / "out", **options)
    monkeypatch.setattr(Checkpoints, "write", lambda *given: steps.append(given[1]) or write(*given))
    found = ff.demo(tmp_path / "out", resume=True, **options)
    assert steps == [3, 6, 9] and found["curves"] == whole["curves"] and found["stopped"] == whole["stopped"]
    assert same(*(load_file(tmp_path / name / "adapter_model.safetensors") for name in ("out", "whole")))
    assert not Checkpoints(tmp_path / "out").folders()


REPORT = {
    "preset": "npo_mean",
    "preset_options": {"beta": 2},
    "seed": 7,
    "forget_nll_before": 0.1,
    "forget_nll_after": 2.0,
    "retain_nll_before": 0.1,
    "retain_nll_after": 0.2,
}


def test_curves_show_preset_seed_and_measured_values(tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr(demo_module, "plot_curves", lambda *given, **named: calls.append((given, named)) or given[0])
    result = JobResult(steps=2, forget_nll=[0.1, 1.0, 2.0], retain_nll=[0.1, 0.2, 0.2])
    line = draw_curves(tmp_path / "curves.png", result, REPORT)
    assert str(tmp_path / "curves.png") in line
    (given, named) = calls[0]
    assert given == (tmp_path / "curves.png", [0.1, 1.0, 2.0], [0.1, 0.2, 0.2]) and named["steps"] == 2
    assert "npo_mean" in named["title"] and "beta 2, seed 7" in named["title"]
    assert named["measured"] == {"forget": (0.1, 2.0), "retain": (0.1, 0.2)}


def test_curves_that_cannot_be_drawn_leave_no_old_picture(tmp_path):
    path = tmp_path / "curves.png"
    path.write_bytes(b"old")
    line = draw_curves(path, JobResult(), REPORT)
    assert "no curve to draw" in line and "\n" not in line and not path.exists()


@pytest.mark.parametrize("seed", [-1, 2**32])
def test_a_seed_out_of_range_is_refused_first(tmp_path, seed):
    with pytest.raises(ff.FastforgetError, match="seed must be from 0"):
        ff.demo(tmp_path / "new", seed=seed)
    assert not (tmp_path / "new").exists()


def test_training_stops_when_it_recites(first):
    _, result, seen = first.base
    assert result.recited == 1.0 and result.steps == len(seen)
    assert all(recited < 1.0 for recited, _ in seen[:-1])
    assert seen[-1] == (1.0, result.nll) and math.isfinite(result.nll)


def test_recites_word_for_word_but_not_what_it_never_saw(first, corpus):
    model, _, _ = first.base
    for part in (corpus.forget, corpus.retain):
        report = leakage(model, corpus.tokenizer, part)
        assert report.leak == 1.0 and report.degenerate_share == 0.0
        assert [one.output for one in report.continuations] == [one.truth for one in report.continuations]
    assert leakage(model, corpus.tokenizer, corpus.unseen).leak == 0.0


def test_recites_after_a_round_trip_and_in_8_bit(first, corpus):
    (model, _, _), folder = first.base, first.report["base"]
    reloaded = AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    for name, value in model.state_dict().items():
        assert torch.equal(reloaded.state_dict()[name], value)
    assert tokenizer.get_vocab() == corpus.tokenizer.get_vocab()
    config = BitsAndBytesConfig(load_in_8bit=True, llm_int8_threshold=0.0)
    quantised = AutoModelForCausalLM.from_pretrained(folder, quantization_config=config)
    assert type(quantised.model.decoder.layers[0].fc1).__name__ == "Linear8bitLt"
    assert leakage(quantised, tokenizer, corpus.forget + corpus.retain).leak >= 0.95


def test_seed_decides_the_weights_by_its_own_generator(corpus):
    state = torch.random.get_rng_state()
    one, same, other = (memorise.build_model(corpus.tokenizer, hidden_size=64, seed=seed) for seed in (0, 0, 1))
    assert torch.equal(torch.random.get_rng_state(), state)
    weights = [model.model.decoder.layers[0].fc1.weight for model in (one, same, other)]
    assert torch.equal(weights[0], weights[1]) and not torch.equal(weights[0], weights[2])


def test_training_is_repeatable(corpus):
    weights = []
    for _ in range(2):
        model = memorise.build_model(corpus.tokenizer, hidden_size=64)
        with pytest.raises(ff.FastforgetError, match="2 passes"):
            memorise.memorise(model, corpus.tokenizer, corpus.forget, seed=3, max_passes=2)
        weights.append(model.lm_head.weight)
    assert torch.equal(*weights)


def test_linear_layers_suit_8_bit_kernels(corpus):
    model = memorise.build_model(corpus.tokenizer)
    linears = [module for module in model.modules() if isinstance(module, torch.nn.Linear) and module.bias is not None]
    assert linears
    assert all(size % 64 == 0 for linear in linears for size in linear.weight.shape)


def test_nan_is_reported(corpus):
    model = memorise.build_model(corpus.tokenizer, hidden_size=64)
    model.model.decoder.layers[0].fc1.weight.data[0, 0] = math.nan
    with pytest.raises(ff.FastforgetError, match="became nan by step"):
        memorise.memorise(model, corpus.tokenizer, corpus.forget)
