"""The step's benchmark as a dry run; that a wrong loop is seen; its batches and memory; `make bench` in the small."""

import dataclasses
import json
import math
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from benchmarks import bench, harness, head, loops, step
from benchmarks.harness import RAN
from benchmarks.loops import StepSetting, epoch
from benchmarks.tables import MEASURED

DRY = ["--device", "cpu", "--tiny"]


def rows_of(path):
    return json.loads(path.read_text())["rows"]


@pytest.mark.parametrize("bits", ["32", "8"])
def test_the_dry_run(tmp_path, bits):
    path = tmp_path / "step.json"
    assert step.main([*DRY, "--bits", bits, "--json", str(path)]) == 0
    assert [row["setting"]["method"] for row in rows_of(path)] == ["mismatch", "grad_diff"]
    for row in rows_of(path):
        records = row["contestants"]
        assert {name: record["status"] for name, record in records.items()} == dict.fromkeys(records, RAN)
        assert records["ours_first"]["flags"] == records["ours_later"]["flags"] == []
        assert 0 < records["ours_later"]["worst_row"] < 1e-5 and records["floor"]["role"] == "floor"


def test_a_forward_that_ends_early(tmp_path, monkeypatch):
    monkeypatch.setitem(step.TERMS, "rmu", lambda: step.ff.preset("rmu", layer=0))
    path = tmp_path / "step.json"
    assert step.main([*DRY, "--methods", "rmu", "--json", str(path)]) == 0
    (row,) = rows_of(path)
    assert list(row["contestants"]) == ["full", "ours_first", "ours_later"]


@pytest.mark.slow
def test_rmu_at_layer_7_of_24_costs_at_most_0_4_of_a_full_step(tmp_path):
    """Of first epochs the benchmark tells: at 0.387 to 0.396 they are too near the goal for a test of time."""
    path = tmp_path / "step.json"
    step.main(["--methods", "rmu", "--device", "cpu", "--rounds", "5", "--no-memory", "--json", str(path)])
    (goal,) = [goal for goal in rows_of(path)[0]["goals"] if goal["goal"] == "ours_later / full"]
    assert goal["met"]


def scaled(backward, factor):
    def wrong(batches):
        return backward(batches) * factor

    return wrong


def test_a_wrong_loop_is_seen(monkeypatch, tmp_path, capsys):
    right, path = loops.ours, tmp_path / "step.json"

    def wrong_gradient(unlearn, cached):
        backward = right(unlearn, cached=cached)

        def wrong(batches):
            loss = backward(batches)
            unlearn.param_groups[0]["params"][0].grad.mul_(1 + 1e-4)
            return loss

        return wrong

    for wrong, flag in (
        (lambda unlearn, cached: scaled(right(unlearn, cached=cached), 1 + 1e-4), "loss"),
        (lambda unlearn, cached: scaled(right(unlearn, cached=cached), math.nan), "loss"),
        (wrong_gradient, "gradient of weight 0"),
    ):
        monkeypatch.setattr(loops, "ours", wrong)
        assert step.main([*DRY, "--methods", "mismatch", "--json", str(path)]) == 1
        assert rows_of(path)[0]["contestants"]["ours_first"]["flags"] == [flag]
        assert f"ours_first: wrong: {flag}" in capsys.readouterr().out


def test_batches():
    first, second = epoch(StepSetting(shape="tiny", sequences=3, length=24, ragged=True, labelled=0.5))
    assert not first["forget"]["input_ids"].equal(second["forget"]["input_ids"])
    assert first["mismatch"]["input_ids"][:, :12].equal(first["forget"]["input_ids"][:, :12])
    answers = {tuple(row) for row in first["retain"]["input_ids"][:, 12:18].tolist()}
    assert {tuple(row) for row in first["mismatch"]["input_ids"][:, 12:18].tolist()} == answers
    for batch in first.values():
        assert (batch["labels"] != -100).sum(dim=1).tolist() == [12, 6, 12]
        assert batch["attention_mask"].sum(dim=1).tolist() == [24, 18, 24]


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_loop_that_holds_all_logits_has_the_higher_peak(tmp_path):
    setting = dataclasses.asdict(StepSetting(shape="tiny", sequences=16, length=256, folder=str(tmp_path)))
    loops.make_base(setting)
    tasks = {name: harness.measure_peak("benchmarks.step", name, setting) for name in ("loop", "ours_later")}
    found = {name: record["peak_mb"] for name, record in tasks.items()}
    if None in found.values():
        pytest.skip("this kernel lets no process forget its peak")
    assert found["loop"] > found["ours_later"] + 2 * 16 * 256 * 320 * 4 / 1e6


def test_goals_are_set_against_both_loops():
    def goals_of(**medians):
        records = {
            name: {"role": step.LOOPS[name][1], "median_ms": 1e3 * each, "peak_mb": 1.0}
            for name, each in medians.items()
        }
        row = {"setting": dataclasses.asdict(StepSetting()), "contestants": records, "goals": []}
        step.finish(row)
        return [goal["met"] for goal in row["goals"]]

    assert goals_of(loop=2.9, loop_selected=2.6, ours_first=1.3, ours_later=1.0) == [True, True, True, True, False]
    assert goals_of(loop=2.9, loop_selected=2.4, ours_later=1.0) == [True, None, False, None, False]


def test_bench(tmp_path, monkeypatch, capsys):
    commands = []
    wrong = {"step": 1, "rows": 4}

    def run(command, cwd, timeout):
        commands.append(command)
        file = next(Path(word) for word in command if word.endswith(".json"))
        part = file.stem.split("-")[3]
        timed = {"status": MEASURED, "median_ms": 10.0, "about": "fastforget", "role": "ours", "peak_mb": 80.0}
        records = {"ours": timed, "trl": {"status": "not installed", "about": "TRL", "role": "peer"}}
        results = {"form": harness.FORM, "date": "D", "commit": "C", "machine": {"cpu": "X", "torch threads": "2"}}
        file.write_text(
            json.dumps(results | {"rows": [{"name": f"{part} | N", "ours": "ours", "contestants": records}]})
        )
        return SimpleNamespace(returncode=wrong.get(part, 0))

    monkeypatch.setattr(bench.subprocess, "run", run)
    arguments, readme = ["--out", str(tmp_path), "--date", "2026-01-02"], tmp_path / "README.md"
    assert bench.main(arguments) == 1 and "rows: failed to run" in capsys.readouterr().out, "a missed goal is none"
    assert bench.main([*arguments, "--only", "head", "--full"]) == 0 and len(commands) == 6
    for words in commands[:4]:
        module, options = words[2], words[3:]
        assert {"benchmarks.head": head, "benchmarks.step": step}[module].parse(options).limit < harness.A_DAY
    readme.write_text(f"before\n{bench.BEGIN}\nold\n{bench.END}\nafter\n")
    assert bench.write_readme(tmp_path, readme) == 0
    written = readme.read_text()
    assert "| step / N | fastforget | 10 | 1.00 | 80 |" in written and "old" not in written and "TRL" not in written
    assert "2026-01-02-head-full.md" in written and written.endswith(f"{bench.END}\nafter\n")
    readme.write_text("no markers\n")
    assert bench.write_readme(tmp_path, readme) == 2 and "needs these two lines" in capsys.readouterr().err
    (tmp_path / "2026-01-02-step.json").write_text('{"rows": []}')
    assert bench.write_readme(tmp_path, readme) == 2 and "no results of step" in capsys.readouterr().err
