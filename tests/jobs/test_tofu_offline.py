"""The offline TOFU in seconds: data, both models, unlearning, figures; and that it refuses to show what it cannot."""

import io
import json

import pytest
from rich.console import Console

import fastforget as ff
from fastforget.evaluate.tofu import TofuReport
from fastforget.jobs import tofu_offline as job
from fastforget.jobs.tofu_models import TofuScale
from fastforget.jobs.tofu_offline import MAIN_PRESETS, TofuOfflineOptions, TofuTrial, check_power, tofu_offline

TINY = TofuScale(
    authors=2,
    known_authors=1,
    countries=2,
    unseen_authors=1,
    vocabulary=512,
    hidden_size=128,
    passes=50,
    retain_asked=10,
)
TRIALS = [TofuTrial("npo", {"beta": 0.1}, 3e-3, 30)]


@pytest.fixture(scope="module")
def first(tmp_path_factory):
    """A run: its folder, report and printed text."""
    folder, text = tmp_path_factory.mktemp("tofu"), io.StringIO()
    console = Console(file=text, width=200)
    options = TofuOfflineOptions(folder / "out", split="10", cache=folder / "cache", console=console)
    return folder, tofu_offline(options, TINY, TRIALS), text.getvalue()


def test_the_report_holds_every_model(first):
    folder, report, text = first
    assert report == json.loads((folder / "out" / "report.json").read_text())
    assert list(report["models"]) == ["retain-only", "full", "npo"] and report["questions"]["forget"] == 20
    full, retained, unlearned = (report["models"][name] for name in ("full", "retain-only", "npo"))
    assert full["forget_quality"] < 0.01 and retained["forget_quality"] == 1.0
    assert full["figures"]["forget_probability"] > 0.9 > retained["figures"]["forget_probability"]
    assert unlearned["figures"]["forget_probability"] < full["figures"]["forget_probability"]
    assert retained["utility_share"] == 1.0 and 0 < unlearned["utility"] <= 1
    assert report["robustness"]["npo"][0]["treatment"] == "as it was trained"
    assert (
        "forget quality" in text
        and "Does it last?" in text
        and (folder / "out" / "npo" / "adapter_config.json").exists()
    )
    assert (folder / "out" / "report.html").exists() and not (folder / "out" / ".stages").exists()


def test_an_interrupted_run_goes_on_and_ends_alike(first, tmp_path, monkeypatch):
    folder, report, _ = first
    options = TofuOfflineOptions(tmp_path / "out", split="10", cache=folder / "cache", quiet=True)
    with monkeypatch.context() as patch:
        patch.setattr(job, "robust_rows", lambda *given, **named: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            tofu_offline(options, TINY, TRIALS)
    monkeypatch.setattr(job, "run_job", lambda *given, **named: pytest.fail("unlearned already"))
    found = tofu_offline(options, TINY, TRIALS)
    assert found["models"] == report["models"] and found["robustness"] == report["robustness"]


def test_alternative_answers_are_what_is_preferred(first, tmp_path, monkeypatch):
    given = []

    def stops(model, tokenizer, forget, *others, **named):
        given.extend(forget)
        raise KeyboardInterrupt

    monkeypatch.setattr(job, "run_job", stops)
    options = TofuOfflineOptions(tmp_path, split="10", cache=first[0] / "cache", quiet=True)
    with pytest.raises(KeyboardInterrupt):
        tofu_offline(options, TINY, [TofuTrial("altpo", {}, 1e-3, 3, alternatives=True)])
    assert given and all(each.alternative for each in given)
    assert sum(each.alternative != each.answer for each in given) > len(given) / 2


def test_nothing_is_shown_where_the_test_has_no_power():
    for quality in (None, 0.01, 0.5):
        with pytest.raises(ff.FastforgetError, match="nothing could be shown"):
            check_power(TofuReport(quality, None, 0.5, None, {}))
    check_power(TofuReport(0.009, None, 0.5, None, {}))


def test_options_that_are_wrong(tmp_path):
    for wrong, words in (({"split": "20"}, "01, 05 or 10"), ({"presets": ["none"]}, "no settings for 'none'")):
        with pytest.raises(ff.FastforgetError, match=words):
            TofuOfflineOptions(tmp_path, **wrong)
    assert len(MAIN_PRESETS) >= 4
    assert [each.preset for each in TofuOfflineOptions(tmp_path, presets=["npo"]).trials] == ["npo"]
