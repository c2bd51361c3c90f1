"""The demo at a small scale: memorise, cache, load in 8 bit, unlearn, measure, save, draw; from Python too."""

import io
import json

import pytest
import torch
from rich.console import Console

import fastforget as ff
from fastforget.jobs import demo as demo_module
from fastforget.jobs.demo import DemoScale, draw_curves, run_demo
from fastforget.jobs.loop import JobResult
from fastforget.jobs.options import DemoOptions, JobSettings

SMALL = DemoScale(topic_counts=(1, 2, 1), passages_per_topic=2, hidden_size=128)
QUICK = JobSettings(max_steps=60, learning_rate=5e-3)


@pytest.fixture(scope="module")
def first(tmp_path_factory):
    folder = tmp_path_factory.mktemp("demo")
    text = io.StringIO()
    options = DemoOptions(folder / "out", cache=folder / "cache", console=Console(file=text, width=300))
    report = run_demo(options, SMALL, QUICK)
    return folder, report, text.getvalue()


@pytest.fixture
def small(monkeypatch):
    """`ff.demo` has no options for its scale: here it takes the tests'."""
    monkeypatch.setattr(demo_module, "DemoScale", lambda: SMALL)
    monkeypatch.setattr(demo_module, "JobSettings", lambda: QUICK)


def test_report_holds_every_figure(first):
    folder, report, text = first
    assert report == json.loads((folder / "out" / "report.json").read_text())
    names = "forget_leak_before forget_leak_after retain_leak_before retain_leak_after forget_rouge_after unseen_rouge"
    names += " retain_nll_before retain_nll_after degenerate_share forget_passages retain_passages seconds peak_rss_mb"
    for name in (*names.split(), "seed"):
        assert isinstance(report[name], int | float), name
    assert report["preset"] == "npo_mean" and report["forget_passages"] == 2 and report["retain_passages"] == 4
    assert report["forget_leak_before"] == report["retain_leak_before"] == 1.0
    assert "What the model still recites" in text and "Continuations" in text and str(folder / "out") in text


def test_it_forgets_and_keeps(first):
    report = first[1]
    assert report["forget_nll_after"] > report["forget_nll_before"] + 0.5
    assert report["retain_leak_after"] >= 0.75


def test_curves_are_drawn(first):
    pytest.importorskip("matplotlib")
    folder, _, text = first
    assert f"drawn in {folder / 'out' / 'curves.png'}" in text


def test_second_run_takes_the_base_from_the_cache_and_may_replace_itself(first, small, monkeypatch):
    folder, before, _ = first
    monkeypatch.setattr(demo_module, "plot_curves", lambda *_, **__: None)  # as where matplotlib is not installed
    random_state = torch.get_rng_state()
    output = io.StringIO()
    console = Console(file=output, width=300)
    again = ff.demo(str(folder / "out"), cache=str(folder / "cache"), console=console)
    assert torch.equal(torch.get_rng_state(), random_state)
    assert again == json.loads((folder / "out" / "report.json").read_text()) and again.keys() == before.keys()
    assert "pip install 'fastforget[plot]'" in output.getvalue()
    assert not (folder / "out" / "curves.png").exists(), "the first run's picture would be taken for this one's"
    assert again["base_trained_seconds"] == 0 and before["base_trained_seconds"] > 0
    for name in ("forget_leak_after", "forget_nll_after", "retain_nll_after"):
        assert again[name] == pytest.approx(before[name], rel=1e-3), name


def test_another_adapter_is_not_replaced(first, tmp_path):
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(ff.FastforgetError, match="already holds an adapter"):
        ff.demo(tmp_path, cache=first[0] / "cache")
    with pytest.raises(ff.FastforgetError, match="unknown preset"):
        ff.demo(tmp_path / "new", preset="nothing")
    assert not (tmp_path / "new").exists()


def test_quiet_prints_nothing(first, small, tmp_path, capfd):
    report = ff.demo(tmp_path / "out", cache=first[0] / "cache", preset="grad_ascent", quiet=True)
    assert capfd.readouterr().out == ""
    assert report["preset"] == "grad_ascent" and (tmp_path / "out" / "adapter_model.safetensors").is_file()


REPORT = {
    "preset": "npo_mean",
    "preset_options": {"beta": 2},
    "seed": 7,
    "forget_nll_before": 0.1,
    "forget_nll_after": 2.0,
    "retain_nll_before": 0.1,
    "retain_nll_after": 0.2,
}


def test_curves_name_preset_and_seed_and_take_what_the_report_measured(tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr(demo_module, "plot_curves", lambda *given, **named: calls.append((given, named)) or given[0])
    line = draw_curves(tmp_path / "curves.png", JobResult("", 2, 1.0, [0.1, 1.0, 2.0], [0.1, 0.2, 0.2]), REPORT)
    assert str(tmp_path / "curves.png") in line
    (given, named) = calls[0]
    assert given == (tmp_path / "curves.png", [0.1, 1.0, 2.0], [0.1, 0.2, 0.2]) and named["steps"] == 2
    assert "npo_mean" in named["title"] and "beta 2, seed 7" in named["title"]
    assert named["measured"] == {"forget": (0.1, 2.0), "retain": (0.1, 0.2)}


def test_curves_that_cannot_be_drawn_are_one_line_and_leave_no_old_picture(tmp_path):
    path = tmp_path / "curves.png"
    path.write_bytes(b"old")
    line = draw_curves(path, JobResult(), REPORT)
    assert "no curve to draw" in line and "\n" not in line and not path.exists()


@pytest.mark.parametrize("seed", [-1, 2**32])
def test_a_seed_out_of_range_is_refused_before_anything_is_written(tmp_path, seed):
    with pytest.raises(ff.FastforgetError, match="seed must be from 0"):
        ff.demo(tmp_path / "new", seed=seed)
    assert not (tmp_path / "new").exists()
