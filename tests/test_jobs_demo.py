"""The demo at a small scale: memorise, cache, load in 8 bit, unlearn, measure, save."""

import io
import json

import pytest
from rich.console import Console

import fastforget as ff
from fastforget.jobs.demo import DemoScale, run_demo
from fastforget.jobs.loop import JobSettings

SMALL = DemoScale(topic_counts=(1, 2, 1), passages_per_topic=2, hidden_size=128)


@pytest.fixture(scope="module")
def first(tmp_path_factory):
    folder = tmp_path_factory.mktemp("demo")
    text = io.StringIO()
    report = run_demo(
        folder / "out",
        cache=folder / "cache",
        scale=SMALL,
        settings=JobSettings(max_steps=60, learning_rate=5e-3),
        console=Console(file=text, width=160),
    )
    return folder, report, text.getvalue()


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


def test_second_run_takes_the_base_from_the_cache_and_may_replace_itself(first):
    folder, before, _ = first
    again = run_demo(
        folder / "out",
        cache=folder / "cache",
        scale=SMALL,
        settings=JobSettings(max_steps=60, learning_rate=5e-3),
        console=Console(file=io.StringIO()),
    )
    assert again["base_trained_seconds"] == 0 and before["base_trained_seconds"] > 0
    for name in ("forget_leak_after", "forget_nll_after", "retain_nll_after"):
        assert again[name] == pytest.approx(before[name], rel=1e-3), name


def test_another_adapter_is_not_replaced(first, tmp_path):
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(ff.FastforgetError, match="already holds an adapter"):
        run_demo(tmp_path, cache=first[0] / "cache", scale=SMALL)
    with pytest.raises(ff.FastforgetError, match="unknown preset"):
        run_demo(tmp_path / "new", preset_name="nothing")
    assert not (tmp_path / "new").exists()
