"""The presets' benchmark in the small: two real jobs, steps' memory, the rules, the tables, and rows that fail."""

import json
import sys
from pathlib import Path

import pytest

from benchmarks import objectives, proof
from benchmarks.head_measure import MEASURED
from benchmarks.head_worker import Died
from benchmarks.objectives import NAME, Plan, Pool, main
from benchmarks.objectives_measure import FACTS, Scale, StepSize, converge, step_peak
from benchmarks.objectives_table import markdown, problems_of, verdict
from benchmarks.step import here
from fastforget.errors import NonFiniteLossError
from fastforget.objectives.presets import PRESETS

DATE = "2026-12-01"
SMALL = Scale(topic_counts=(1, 1, 1), passages_per_topic=2, prompt_tokens=8, answer_tokens=16, hidden_size=64, steps=30)
SMALL_STEP = StepSize(sequences=2, length=9, vocabulary=600, hidden_size=32)
KEPT = {
    "forget_nll_before": 0.08,
    "forget_nll_after": 2.5,
    "retain_nll_before": 0.06,
    "retain_nll_after": 0.07,
    "forget_leak_before": 1.0,
    "forget_leak_after": 0.0,
    "retain_leak_before": 1.0,
    "retain_leak_after": 1.0,
    "degenerate_share": 0.25,
    "unlearn_seconds": 3.4,
}
SETS = {"parameters": 986880, "forget_rows": 12, "retain_rows": 24, "unseen_rows": 6, "unseen_nll": 9.159}


def runner_that(answer):
    """Stands for the processes: `answer(preset)` is each row's record, or raises."""

    def run(task, first, *arguments, seconds):
        if task in (converge, step_peak):
            return {first: answer(first)}
        return {FACTS: SETS}

    return run


@pytest.fixture
def measure(tmp_path):
    """Runs main() with results in `tmp_path`; returns its exit code."""
    plan = Plan(tmp_path, DATE, scale=SMALL, step=SMALL_STEP)

    def run(runner, *arguments):
        return main([*arguments, "--out", str(tmp_path), "--date", DATE], runner=runner, plan=plan)

    return run


@pytest.fixture
def rows(tmp_path):
    """Reads {(suite, preset): row} off the results file."""
    return lambda: {(row["suite"], row["preset"]): row for row in json.loads((tmp_path / NAME).read_text())["rows"]}


def cells(text, preset):
    """All table rows of a preset."""
    return [line[2:-2].split(" | ") for line in text.splitlines() if line.startswith(f"| `{preset}` |")]


def test_real_jobs_and_steps(measure, rows, tmp_path, capsys):
    assert measure(here, "--presets", "grad_diff,idk forget_weight=2", "--only", "convergence") == 0
    found = rows()
    for preset in ("grad_diff", "idk forget_weight=2"):
        row = found["convergence", preset]
        assert row["status"] == MEASURED and row["commit"] and row["report"]["steps"] == SMALL.steps
        assert row["report"]["forget_leak_before"] == row["report"]["retain_leak_before"] == 1.0, "learned by heart"
        assert row["report"]["forget_nll_after"] > row["report"]["forget_nll_before"] + 0.1
    assert found["convergence", "idk forget_weight=2"]["report"]["preset_options"] == {"forget_weight": 2}
    values = json.loads((tmp_path / NAME).read_text())
    assert values["sets"]["forget_rows"] == values["sets"]["retain_rows"] == 2 and values["sets"]["unseen_nll"] > 3
    assert str(tmp_path) not in (tmp_path / NAME).read_text()
    assert "Every preset ran" in capsys.readouterr().out


needs_proc = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="a peak is read off /proc")


@needs_proc
def test_real_steps(measure, rows, tmp_path):
    """What so small a step allocates drowns in what the heap does, so its ratio says nothing."""
    assert measure(here, "--presets", "dpo,distance_cluster k=2", "--only", "memory") in (0, 1)
    found = rows()
    assert [preset for _, preset in found] == ["grad_diff", "dpo", "distance_cluster k=2"], "the baseline comes first"
    for row in found.values():
        assert row["status"] == MEASURED and row["rise_mb"] >= 0 and isinstance(row["peak_mb"], float)
    assert found["memory", "dpo"]["companions"] == ["forget refusal"] and found["memory", "dpo"]["together"]
    assert found["memory", "grad_diff"]["companions"] == [] and not found["memory", "grad_diff"]["together"]
    text = (tmp_path / "objectives.md").read_text()
    assert cells(text, "dpo")[0][1] == "forget refusal; two answers together"
    assert "N = 16 label tokens" in text and "V 600" in text


@needs_proc
def test_a_step_that_holds_the_logits_is_seen(measure, monkeypatch, rows):
    """The measurement itself: 64 MB that a step holds for a moment are in its peak."""
    right = objectives.objectives_measure.ff.UnlearnStep.__call__

    def wasteful(self, forget, retain):
        waste = bytearray(b"x") * 64_000_000
        del waste
        return right(self, forget, retain)

    monkeypatch.setattr(objectives.objectives_measure.ff.UnlearnStep, "__call__", wasteful)
    measure(here, "--presets", "grad_diff", "--only", "memory")
    assert rows()["memory", "grad_diff"]["rise_mb"] >= 60


@pytest.mark.parametrize(
    "change, word",
    [
        ({}, "forgets, keeps the rest"),
        ({"retain_nll_after": 0.17}, "forgets"),
        ({"retain_leak_after": 0.8}, "forgets"),
        ({"retain_nll_after": 1.07}, "collapses"),
        ({"retain_nll_after": 1.07, "forget_leak_after": 1.0}, "collapses"),
        ({"forget_leak_after": 0.5}, "forgets, keeps the rest"),
        ({"forget_leak_after": 0.6}, "forgets in part"),
        ({"forget_leak_after": 0.6, "forget_nll_after": 0.1}, "does not act"),
        ({"forget_leak_before": 0.0, "forget_nll_after": 0.1}, "does not act"),
        ({"retain_nll_after": float("nan")}, "NaN"),
        ({"forget_nll_after": float("inf")}, "NaN"),
    ],
)
def test_the_verdict(change, word):
    assert verdict(KEPT | change) == word


def test_what_is_missed():
    def job(**change):
        return {"status": MEASURED, "report": KEPT | change}

    kept, collapsed = job(), job(retain_nll_after=4.0)
    assert problems_of("convergence", {"npo": kept, "grad_ascent": collapsed, "flat": collapsed}) == []
    assert problems_of("convergence", {"grad_ascent": kept}) == ["convergence, grad_ascent: forgets, keeps the rest"]
    assert problems_of("convergence", {"npo": job(forget_nll_after=float("nan"))}) == ["convergence, npo: NaN"]
    steps = {
        name: {
            "status": MEASURED,
            "peak_mb": peak,
            "companions": ["forget refusal"] * (name == "dpo"),
            "together": name == "dpo",
        }
        for name, peak in (("grad_diff", 100.0), ("npo", 130.0), ("dpo", 131.0))
    }
    missed = "memory, dpo: peak / grad_diff's 1.31, asked ≤ 1.3 (forget refusal; two answers together)"
    assert problems_of("memory", steps) == [missed]
    del steps["grad_diff"]
    assert len(problems_of("memory", steps)) == 2, "without the baseline nothing is known to be met"


def test_the_tables(measure, rows, tmp_path):
    def answer(preset):
        if preset == "npo":
            return {"status": "failed: FastforgetError: no | luck"}
        if preset == "simnpo":
            raise Died("killed by SIGKILL", preset)
        return {
            "status": MEASURED,
            "report": KEPT,
            "peak_mb": 150.0,
            "rise_mb": 140.0,
            "companions": [],
            "together": False,
        }

    assert measure(runner_that(answer), "--presets", "grad_diff,npo,simnpo", "--jobs", "2") == 1
    text = (tmp_path / "objectives.md").read_text()
    moves = ["0.080 → 2.500", "100.0 % → 0.0 %", "0.060 → 0.070", "100.0 % → 100.0 %"]
    job, step = cells(text, "grad_diff")
    assert job == ["`grad_diff`", "forgets, keeps the rest", *moves, "25.0 %", "no", "3"]
    assert step == ["`grad_diff`", "", "150", "140", "1.00", "met"]
    assert [line[1] for line in cells(text, "npo")] == ["failed: FastforgetError: no / luck"] * 2
    assert [line[1] for line in cells(text, "simnpo")] == ["failed: killed by SIGKILL"] * 2
    assert "12 prompts" in text and "9.16" in text and "known to collapse" in text.lower() and DATE in text
    assert rows()["memory", "simnpo"]["status"] == "failed: killed by SIGKILL"
    values = json.loads((tmp_path / NAME).read_text())
    unmeasured = markdown(values, {"convergence": ["wga"], "memory": ["wga"]}, ["`x` runs otherwise."])
    assert [line[1] for line in cells(unmeasured, "wga")] == [
        "not measured"
    ] * 2 and "`x` runs otherwise." in unmeasured


def test_every_preset_is_a_row_of_both_suites(measure, rows, monkeypatch):
    monkeypatch.setitem(objectives.OVERRIDES, "npo", "beta=0.2")
    good = {"status": MEASURED, "report": KEPT | {"retain_nll_after": 4.0}, "peak_mb": 1.0, "rise_mb": 1.0}
    assert measure(runner_that(lambda preset: good | {"companions": [], "together": False})) == 0
    names = {preset.partition(" ")[0] for _, preset in rows()}
    assert names == set(PRESETS) and len(rows()) == 2 * (len(PRESETS) + 1), "simnpo twice"
    assert ("memory", "npo beta=0.2") in rows() and ("memory", "npo") not in rows()


def test_rows_of_other_runs_are_kept(measure, rows, tmp_path, monkeypatch, capsys):
    def good(peak):
        record = {
            "status": MEASURED,
            "report": KEPT,
            "peak_mb": peak,
            "rise_mb": peak,
            "companions": [],
            "together": False,
        }
        return runner_that(lambda preset: record)

    assert measure(good(100.0), "--presets", "npo") == 0
    assert measure(good(120.0), "--presets", "wga", "--only", "memory") == 0
    found = rows()
    assert set(found) == {("convergence", "npo"), ("memory", "grad_diff"), ("memory", "npo"), ("memory", "wga")}
    assert found["memory", "npo"]["peak_mb"] == 100.0 and found["memory", "grad_diff"]["peak_mb"] == 120.0
    monkeypatch.setattr(objectives, "versions", lambda: {"torch": "another"})
    assert measure(good(1.0), "--presets", "wga") == 2
    assert "measured with another versions" in capsys.readouterr().err and rows() == found
    (tmp_path / NAME).write_text("[]")
    assert measure(good(1.0)) == 2 and "is not a results file" in capsys.readouterr().err


def test_a_job_that_is_not_finite_or_refused_is_a_row(tmp_path, monkeypatch):
    def not_finite(*_, **__):
        raise NonFiniteLossError("the loss became nan at step 3 of 12")

    bad = here(converge, "npo beta=-1", tmp_path, 12, seconds=1.0)["npo beta=-1"]
    assert bad["status"].startswith("failed: FastforgetError:") and "beta" in bad["status"]
    assert here(step_peak, "npo beta=-1", tmp_path, SMALL_STEP, seconds=1.0)["npo beta=-1"] == bad
    monkeypatch.setattr(objectives.objectives_measure.ff, "unlearn", not_finite)
    record = here(converge, "npo", tmp_path, 12, seconds=1.0)["npo"]
    assert record == {"status": "not finite: the loss became nan at step 3 of 12"}
    values = {"date": DATE, "machine": objectives.machine(), "versions": {}, "sets": None, "step": None}
    row = {"suite": "convergence", "preset": "npo", "commit": None, **record}
    assert cells(markdown({**values, "rows": [row]}, {}), "npo")[0][-2] == "yes"
    assert problems_of("convergence", {"npo": record}) == [f"convergence, npo: {record['status']}"]


def test_a_base_that_cannot_be_made(measure, capsys):
    def run(task, *arguments, seconds):
        raise Died("killed by SIGKILL", None)

    assert measure(run, "--presets", "npo") == 1
    printed = capsys.readouterr().out
    assert "convergence: the model could not be made: killed by SIGKILL" in printed and "memory: the model" in printed


def test_a_worker_that_died_is_given_back():
    pool = Pool(1)
    try:
        assert pool.run(tell, "a", seconds=100.0) == {"a": {"is": "a"}}
        with pytest.raises(Died, match="no luck"):
            pool.run(tell, "no luck", seconds=100.0)
        assert pool.free.qsize() == 1
    finally:
        pool.stop()
    assert [worker.process for worker in pool.workers] == [None]


def tell(name, say):
    """A worker's task."""
    if name == "no luck":
        raise ValueError(name)
    say(name, {"is": name})


def test_the_proof_runs_it(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(objectives, "measure", lambda plan: asked.append(plan) or ["memory, dpo: too much"])
    arguments = ["--only", "objectives", "--presets", "npo", "--out", str(tmp_path), "--date", DATE]
    assert proof.main(arguments, runner=lambda preset, seed: pytest.fail("no demo was asked for")) == 1
    assert asked == [Plan(Path(tmp_path), DATE, presets=("npo",))]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "arguments, complaint",
    [(["--only", "speed"], "unknown suite"), (["--presets", "simpno"], "did you mean"), (["--jobs", "0"], "from 1 on")],
)
def test_bad_arguments(tmp_path, capsys, arguments, complaint):
    with pytest.raises(SystemExit) as ended:
        main([*arguments, "--out", str(tmp_path / "new")])
    assert ended.value.code == 2 and complaint in " ".join(capsys.readouterr().err.split())
