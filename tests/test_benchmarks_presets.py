"""The presets' benchmark in the small: two real jobs, real steps, the rules, and rows that fail."""

import dataclasses
import json
import sys

import pytest

from benchmarks import presets
from benchmarks.harness import here
from benchmarks.presets import ALL, DEFAULT_PRESET, main, run_demo, verdict
from benchmarks.tables import MEASURED
from fastforget.objectives.presets import PRESETS

SMALL = {"forget": 1, "retain": 1, "unseen": 1, "passages": 2, "prompt": 8, "answer": 16, "hidden": 64, "steps": 30}
REPORT = {
    "forget_nll_before": 0.08,
    "forget_nll_after": 2.5,
    "retain_nll_before": 0.06,
    "retain_nll_after": 0.07,
    "forget_leak_before": 1.0,
    "forget_leak_after": 0.0,
    "retain_leak_before": 1.0,
    "retain_leak_after": 1.0,
    "forget_rouge_after": 0.18,
    "unseen_rouge": 0.11,
    "degenerate_share": 0.05,
    "unlearn_seconds": 3.4,
    "peak_rss_mb": 931,
    "seconds": 100.0,
}
GOOD = {"status": MEASURED, "report": REPORT, "peak_mb": 150.0, "rise_mb": 140.0}


@pytest.fixture
def proof(tmp_path):
    """Runs main() with stand-ins that give GOOD, changed by what `answers` holds for a preset."""

    def run(*arguments, **answers):
        asked = []

        def answer(preset, suite):
            asked.append((suite, preset))
            return GOOD | answers.get(preset.partition(" ")[0], {})

        def runner(task, first, *rest, seconds):
            return answer(first, task.__name__) if task in (presets.converge, presets.step_memory) else {}

        code = main(
            [*arguments, "--out", str(tmp_path), "--date", "2026-12-01"],
            runner=runner,
            demo=lambda preset, seed, folder: answer(preset, seed),
        )
        return code, asked

    return run


@pytest.fixture
def results(tmp_path):
    return lambda: json.loads((tmp_path / "2026-12-01-presets.json").read_text())


def test_real_jobs(tmp_path, monkeypatch):
    monkeypatch.setattr(presets, "SMALL", SMALL)
    arguments = ["--out", str(tmp_path), "--only", "convergence", "--presets", "grad_diff,idk forget_weight=2"]
    assert main([*arguments, "--date", "2026-12-01"], runner=here) == 0
    text = (tmp_path / "2026-12-01-presets.json").read_text()
    assert str(tmp_path) not in text
    for record in json.loads(text)["records"]["convergence"].values():
        report = record["report"]
        assert report["forget_leak_before"] == report["retain_leak_before"] == 1.0, "learned by heart"
        assert report["forget_nll_after"] > report["forget_nll_before"] + 0.1 and report["steps"] == 30


@pytest.mark.skipif(sys.platform != "linux", reason="a peak is read off /proc")
def test_a_step_that_holds_the_logits_is_seen(monkeypatch, tmp_path):
    setting = dataclasses.replace(presets.STEP, shape="tiny-wide", sequences=2, length=9, folder=str(tmp_path))
    monkeypatch.setattr(presets, "STEP", setting)
    given = dataclasses.asdict(setting)
    presets.loops.make_base(given)
    for preset in ("dpo", "distance_cluster k=2", "jensun"):
        record = presets.step_memory(preset, given)
        assert record["status"] == MEASURED and record["rise_mb"] < 60
    right = presets.loops.ours

    def wasteful(step, cached):
        backward = right(step, cached=cached)
        return lambda batches: (len(bytearray(b"x") * 64_000_000), backward(batches))[1]

    monkeypatch.setattr(presets.loops, "ours", wasteful)
    assert presets.step_memory("grad_diff", given)["rise_mb"] >= 60


@pytest.mark.parametrize(
    "change, word",
    [
        ({}, "forgets, keeps the rest"),
        ({"retain_nll_after": 0.17}, "forgets"),
        ({"retain_leak_after": 0.8}, "forgets"),
        ({"retain_nll_after": 1.07, "forget_leak_after": 1.0}, "collapses"),
        ({"forget_leak_after": 0.6}, "forgets in part"),
        ({"forget_leak_after": 0.6, "forget_nll_after": 0.1}, "does not act"),
        ({"forget_leak_before": 0.0, "forget_nll_after": 0.1}, "does not act"),
        ({"forget_nll_after": float("inf")}, "NaN"),
    ],
)
def test_the_verdict(change, word):
    assert verdict(REPORT | change) == word


def test_everything_is_measured_once_and_what_is_missed_is_told(proof, results, capsys):
    collapsed = {"report": REPORT | {"retain_nll_after": 4.0}}
    code, asked = proof(grad_ascent=collapsed, ceu=collapsed)
    assert code == 0 and {name.partition(" ")[0] for name in ALL} == set(PRESETS)
    assert len(asked) == 3 + 3 * len(ALL) and {row["name"] for row in results()["rows"]} == set(presets.SUITES)
    default = {DEFAULT_PRESET: {"report": REPORT | {"forget_leak_after": 0.25}, "peak_mb": 196.0}}
    code, _ = proof("--seeds", "1", npo={"status": "failed: ended with code -9", "report": None}, **default)
    printed = capsys.readouterr().out
    assert code == 1
    for line in (
        f"seeds: {DEFAULT_PRESET}, seed 1: forget leak after: 0.250, asked ≤ 0.050, **missed**",
        f"memory: {DEFAULT_PRESET}, seed 0: peak / grad_diff's: 1.307, asked ≤ 1.300, **missed**",
        "convergence: npo, seed 0: failed: ended with code -9",
        "convergence: grad_ascent, seed 0: wrong: forgets, keeps the rest",
    ):
        assert line in printed
    assert "| `grad_diff, seed 0` |  | 150 | forgets, keeps the rest | 0.080 → 2.500 | 100.0% → 0.0% |" in printed


def test_resume_keeps_what_was_measured_and_tries_failures_again(proof, results, monkeypatch):
    only = ["--only", "presets", "--presets"]
    assert proof(*only, "npo,simnpo", npo={"status": "failed: no luck", "report": None})[0] == 1
    code, asked = proof(*only, "npo,simnpo,grad_diff", "--resume")
    assert code == 0 and asked == [(0, "npo"), (0, "grad_diff")]
    assert proof(*only, "npo")[1] == [(0, "npo")] and set(results()["records"]["presets"]) == {
        f"{name}, seed 0" for name in ("npo", "simnpo", "grad_diff")
    }, "runs that were not asked for are kept"
    monkeypatch.setattr(presets.harness, "PEERS", ())
    with pytest.raises(SystemExit, match="measured elsewhere, or with other versions"):
        proof(*only, "npo")


def test_a_limit_says_what_it_cut(proof, capsys):
    assert proof("--only", "seeds", "--limit", "0") == (0, [])
    assert f"cut by the limit: seeds: {DEFAULT_PRESET}, seed 0" in capsys.readouterr().out


@pytest.mark.parametrize(
    "arguments, complaint",
    [
        (["--only", "everything"], "unknown suite 'everything'"),
        (["--presets", "simpno"], "did you mean 'simnpo'"),
        (["--presets", "npo,simnpo weight=1"], "has no parameter 'weight'"),
        (["--seeds", "0,x"], "argument --seeds"),
    ],
)
def test_bad_arguments(capsys, arguments, complaint):
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert ended.value.code == 2 and complaint in capsys.readouterr().err


@pytest.mark.parametrize(
    "script, status",
    [
        ('echo "{\\"seconds\\": 3, \\"adapter\\": \\"$*\\"}" > "$out/report.json"', MEASURED),
        ("printf '│ No such option │\\n╰────╯\\n' >&2; exit 2", "failed: No such option (exit code 2)"),
        ("kill -9 $$", "failed:  (exit code -9)"),
        ("exit 0", "failed: FileNotFoundError"),
    ],
)
def test_a_demo_without_a_report_says_why(tmp_path, monkeypatch, script, status):
    python = tmp_path / "python"
    python.write_text(
        f'#!/bin/sh\nfor last; do [ "$before" = --out ] && out=$last; before=$last; done\nmkdir "$out"\n{script}\n'
    )
    python.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(python))
    record = run_demo("npo beta=2", 3, tmp_path)
    assert record["status"].startswith(status)
    assert status != MEASURED or record["report"] == {"seconds": 3}, "numbers alone"
