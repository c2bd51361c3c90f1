"""The benchmarks of steps and presets in the small, and `make bench`: what runs, what is wrong, what is kept."""

import dataclasses
import json
import math
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from benchmarks import bench, harness, head, loops, presets, step
from benchmarks.harness import RAN
from benchmarks.presets import ALL, DEFAULT_PRESET
from benchmarks.tables import MEASURED
from fastforget.objectives.presets import PRESETS

DRY = ["--device", "cpu", "--tiny"]
FIGURES = {"forget_nll": (0.08, 2.5), "retain_nll": (0.06, 0.07), "forget_leak": (1.0, 0.0), "retain_leak": (1.0, 1.0)}
FIGURES |= {"forget_memorisation": (1.0, 0.03), "retain_memorisation": (1.0, 1.0), "forget_extraction": (1.0, 0.01)}
REPORT = {f"{name}_{when}": pair[when == "after"] for name, pair in FIGURES.items() for when in ("before", "after")}
REPORT |= {"forget_rouge_after": 0.18, "unseen_rouge": 0.11, "degenerate_share": 0.05}
REPORT |= {"unseen_memorisation": 0.08, "unseen_extraction": 0.0, "forget_fluency_after": 2.9}
REPORT |= {"unseen_fluency_before": 2.5, "unlearn_seconds": 3.4, "peak_rss_mb": 931, "seconds": 100.0}
GOOD = {"status": MEASURED, "report": REPORT, "peak_mb": 150.0, "rise_mb": 140.0}
on_linux = pytest.mark.skipif(sys.platform != "linux", reason="a peak is read off /proc")


def rows_of(path):
    return json.loads(path.read_text())["rows"]


@pytest.fixture
def no_collecting(monkeypatch):
    """Of garbage, between contestants: in a dry run no memory is measured, and it takes most of the time."""
    monkeypatch.setattr(harness, "free_memory", lambda device: None)


@pytest.mark.parametrize("bits, more", [("32", []), ("8", ["--alone"])])
def test_the_dry_run(tmp_path, monkeypatch, no_collecting, bits, more):
    monkeypatch.setitem(step.TERMS, "rmu", lambda: step.ff.preset("rmu", layer=0))
    path = tmp_path / "step.json"
    arguments = [*DRY, *more, "--bits", bits, "--methods", "mismatch,grad_diff,rmu", "--json", str(path)]
    assert step.main(arguments) == 0
    early = [row for row in rows_of(path) if "full" in row["contestants"]]
    compared = [row for row in rows_of(path) if row not in early]
    assert len(compared) == 2 * len(early) == 4
    assert list(early[0]["contestants"]) == ["full", "ours_first", "ours_later"]
    for row in rows_of(path):
        assert {record["status"] for record in row["contestants"].values()} == {RAN}
    for row in compared:
        peers = ("loop", "loop_selected") if bits == "32" else ()  # bitsandbytes' own products round the activations
        for name in (*peers, "ours_first", "ours_later", "ours_joint", "ours_checkpointed"):
            assert row["contestants"][name]["flags"] == []
        assert 0 < row["contestants"]["ours_later"]["worst_row"] < 1e-5


@pytest.mark.slow
def test_rmu_at_layer_7_of_24_costs_at_most_0_4_of_a_full_step(tmp_path):
    """Of first epochs the benchmark tells: at 0.387 to 0.396 they are too near the goal for a test of time."""
    path = tmp_path / "step.json"
    step.main(["--methods", "rmu", "--device", "cpu", "--rounds", "5", "--no-memory", "--json", str(path)])
    assert [goal["met"] for goal in rows_of(path)[0]["goals"] if goal["goal"] == "ours_later / full"] == [True]


@pytest.mark.parametrize(
    "loss_factor, gradient_factor, flag",
    [(1 + 1e-4, 1.0, "loss"), (math.nan, 1.0, "loss"), (1.0, 1 + 1e-4, "gradient of weight 0")],
)
def test_a_wrong_loop_is_seen(monkeypatch, tmp_path, no_collecting, loss_factor, gradient_factor, flag):
    right, path = loops.ours, tmp_path / "step.json"

    def wrong(unlearn, **options):
        def backward(batches):
            loss = right(unlearn, **options)(batches)
            unlearn.param_groups[0]["params"][0].grad.mul_(gradient_factor)
            return loss * loss_factor

        return backward

    monkeypatch.setattr(loops, "ours", wrong)
    assert step.main([*DRY, "--methods", "mismatch", "--loops", "ours_first", "--json", str(path)]) == 1
    assert all(row["contestants"]["ours_first"]["flags"] == [flag] for row in rows_of(path))


def test_batches():
    first, second = loops.epoch(loops.StepSetting(shape="tiny", sequences=3, length=24, ragged=True, labelled=0.5))
    assert not first["forget"]["input_ids"].equal(second["forget"]["input_ids"])
    assert first["mismatch"]["input_ids"][:, :12].equal(first["forget"]["input_ids"][:, :12])
    answers = {tuple(row) for row in first["retain"]["input_ids"][:, 12:18].tolist()}
    assert {tuple(row) for row in first["mismatch"]["input_ids"][:, 12:18].tolist()} == answers
    for batch in first.values():
        assert (batch["labels"] != -100).sum(dim=1).tolist() == [12, 6, 12]
        assert batch["attention_mask"].sum(dim=1).tolist() == [24, 18, 24]


@on_linux
def test_a_loop_that_holds_all_logits_has_the_higher_peak():
    setting = dataclasses.asdict(loops.StepSetting(shape="tiny", sequences=16, length=256))
    found = [harness.measure_peak("benchmarks.step", name, setting)["peak_mb"] for name in ("loop", "ours_later")]
    if None in found:
        pytest.skip("this kernel lets no process forget its peak")
    assert found[0] > found[1] + 2 * 16 * 256 * 320 * 4 / 1e6


def test_bench(tmp_path, monkeypatch, capsys):
    commands = []

    def run(command, cwd, timeout):
        commands.append(command)
        file = next(Path(word) for word in command if word.endswith(".json"))
        timed = {"status": MEASURED, "median_ms": 10.0, "about": "fastforget", "role": "ours", "peak_mb": 80.0}
        records = {"ours": timed, "trl": {"status": "not installed", "about": "TRL", "role": "peer"}}
        results = {"form": harness.FORM, "date": "D", "commit": "C", "machine": {"cpu": "X", "torch threads": "2"}}
        results["rows"] = [{"name": f"{file.stem} | N", "ours": "ours", "contestants": records}]
        file.write_text(json.dumps(results))
        return SimpleNamespace(returncode=4 if "pytest" in command else 1)

    monkeypatch.setattr(bench.subprocess, "run", run)
    arguments, page = ["--out", str(tmp_path), "--date", "2026-01-02"], tmp_path / "page.md"
    assert bench.main(arguments) == 1 and "rows: failed to run" in capsys.readouterr().out, "a missed goal is none"
    assert bench.main([*arguments, "--only", "head", "--full"]) == 0 and len(commands) == 6
    for words in commands[:4]:
        module = {"benchmarks.head": head, "benchmarks.step": step}[words[2]]
        assert module.parse(words[3:]).limit < harness.A_DAY
    page.write_text(f"before\n{bench.BEGIN}\nold\n{bench.END}\nafter\n")
    assert bench.write_page(tmp_path, page) == 0
    written = page.read_text()
    assert "| 2026-01-02-step / N | fastforget | 10 | 1.00 | 80 |" in written and "TRL" not in written
    assert "2026-01-02-head-full.md" in written and "old" not in written and written.endswith(f"{bench.END}\nafter\n")
    (tmp_path / "2026-01-02-step.json").write_text('{"rows": []}')
    assert bench.write_page(tmp_path, page) == 2 and "no results of step" in capsys.readouterr().err


@pytest.fixture
def proof(tmp_path):
    """Runs the presets with tasks that give GOOD, changed by `answers`; returns the exit code and what was asked."""

    def run(*arguments, **answers):
        asked = []

        def runner(task, first, *rest, seconds):
            asked.extend([(task.__name__, first, rest[0])] if rest else [])
            return GOOD | answers.get(first.partition(" ")[0], {})

        return presets.main([*arguments, "--out", str(tmp_path), "--date", "2026-12-01"], runner=runner), asked

    return run


def test_real_jobs(tmp_path, monkeypatch):
    small = {"forget": 1, "retain": 1, "passages": 2, "prompt": 8, "answer": 16, "hidden": 64, "steps": 30}
    monkeypatch.setattr(presets, "SMALL", presets.SMALL | small)
    arguments = ["--out", str(tmp_path), "--only", "convergence", "--presets", "grad_diff,idk forget_weight=2"]
    assert presets.main([*arguments, "--date", "2026-12-01"], runner=harness.here) == 0
    text = (tmp_path / "2026-12-01-presets.json").read_text()
    assert str(tmp_path) not in text
    for record in json.loads(text)["records"]["convergence"].values():
        report = record["report"]
        assert report["forget_leak_before"] == report["retain_leak_before"] == 1.0, "learned by heart"
        assert report["forget_nll_after"] > report["forget_nll_before"] + 0.1 and report["steps"] == 30


@on_linux
def test_a_step_that_holds_the_logits_is_seen(monkeypatch, tmp_path):
    setting = dataclasses.replace(presets.STEP, shape="tiny-wide", sequences=2, length=9)
    monkeypatch.setattr(presets, "STEP", setting)
    for preset in ("dpo", "distance_cluster k=2", "jensun"):
        assert presets.step_memory(preset, 0, str(tmp_path))["rise_mb"] < 60
    right = loops.ours
    waste = lambda step, cached: lambda batches: (bytearray(b"x") * 64_000_000, right(step, cached=cached)(batches))[1]  # noqa: E731
    monkeypatch.setattr(loops, "ours", waste)
    assert presets.step_memory("grad_diff", 0, str(tmp_path))["rise_mb"] >= 60


def test_the_verdict():
    for change, word in (
        ({}, "forgets, keeps the rest"),
        ({"retain_nll_after": 0.17}, "forgets"),
        ({"retain_leak_after": 0.8}, "forgets"),
        ({"retain_nll_after": 1.07, "forget_leak_after": 1.0}, "collapses"),
        ({"forget_leak_after": 0.6}, "forgets in part"),
        ({"forget_leak_before": 0.0, "forget_nll_after": 0.1}, "does not act"),
        ({"forget_nll_after": float("inf")}, "NaN"),
    ):
        assert presets.verdict(REPORT | change) == word


def test_everything_is_measured_once_and_what_is_missed_is_told(proof, capsys):
    collapsed = {"report": REPORT | {"retain_nll_after": 4.0}}
    code, asked = proof(grad_ascent=collapsed, ceu=collapsed)
    assert code == 0 and {name.partition(" ")[0] for name in ALL} == set(PRESETS) and len(asked) == 5 + 3 * len(ALL)
    default = {DEFAULT_PRESET: {"report": REPORT | {"forget_leak_after": 0.25}, "peak_mb": 196.0}}
    assert proof("--seeds", "1", npo={"status": "failed: no luck", "report": None}, **default)[0] == 1
    printed = capsys.readouterr().out
    for line in (
        f"seeds: {DEFAULT_PRESET}, seed 1: forget leak after: 0.250, asked ≤ 0.050, **missed**",
        f"memory: {DEFAULT_PRESET}, seed 0: peak / grad_diff's: 1.307, asked ≤ 1.300, **missed**",
        "convergence: npo, seed 0: failed: no luck",
        "convergence: grad_ascent, seed 0: wrong: forgets, keeps the rest",
        "| `grad_diff, seed 0` |  | 150 |  | forgets, keeps the rest | 0.080 → 2.500 | 100.0% → 0.0% |",
    ):
        assert line in printed


def test_resume_keeps_what_was_measured_and_tries_failures_again(proof, monkeypatch, capsys):
    only = ["--only", "presets", "--presets"]
    assert proof(*only, "npo,simnpo", npo={"status": "failed: no luck", "report": None})[0] == 1
    code, asked = proof(*only, "npo,simnpo,grad_diff", "--resume")
    assert code == 0 and asked == [("run_demo", "npo", 0), ("run_demo", "grad_diff", 0)]
    assert len(proof(*only, "npo")[1]) == 1
    assert proof("--only", "seeds", "--limit", "0") == (0, [])
    assert f"cut by the limit: seeds: {DEFAULT_PRESET}, seed 0" in capsys.readouterr().out
    monkeypatch.setattr(harness, "PEERS", ())
    with pytest.raises(SystemExit, match="measured elsewhere, or with other versions"):
        proof(*only, "npo")
    with pytest.raises(SystemExit):
        proof(*only, "npo,simnpo weight=1")
    assert "has no parameter 'weight'" in capsys.readouterr().err
