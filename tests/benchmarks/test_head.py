"""What all benchmarks share, and the head's in the small: every part runs, what is wrong or late is said."""

import argparse
import dataclasses
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from benchmarks import harness, head, host_time, peers, rows, tables
from benchmarks.harness import OUT_OF_TIME, RAN
from benchmarks.peers import CONTESTANTS, Problem, taking_part
from benchmarks.problem import Setting
from benchmarks.tables import MEASURED, goal
from fastforget.backends import why_not_native

SMALL = Setting(tokens=12, hidden=32, vocabulary=300, ignored=0.5, dtype="float32", device="cpu")
DRY = ["--device", "cpu", "--tiny"]


def contestants_of(path):
    return [found["contestants"] for found in json.loads(path.read_text())["rows"]]


def problem_of(**changes):
    return Problem(dataclasses.asdict(SMALL) | changes)


class Turns:
    """Contestants that note their turns, of 1/64 s: "b" fails at its third, "hangs" does not end, "c" is missing.

    now: the time, in seconds, which only they make pass, so that a busy machine changes nothing.
    """

    device_name, whole_peak = "cpu", False

    def __init__(self):
        self.turns, self.now = [], 0.0

    def step_of(self, name, dry):
        def step():
            self.turns.append(name)
            self.now += 1 / 64
            if name == "hangs":
                self.now += 60
                time.sleep(60)
            if name == "b" and self.turns.count(name) == 3:
                raise RuntimeError(f"no\n  luck in {harness.ROOT}/x.py or /data/y.py, see https://a.b/c/d")

        if name == "c":
            raise harness.NotMeasured("not installed")
        return step


def test_contestants_take_turns_until_the_limit(monkeypatch):
    options, problem = argparse.Namespace(rounds=1000, warmup=1, dry=False, no_memory=True, alone=False), Turns()
    monkeypatch.setattr(harness, "time", SimpleNamespace(monotonic=lambda: problem.now, perf_counter=time.perf_counter))
    found = harness.in_turn(problem, ["a", "b", "c"], options, problem.now, 1.0)
    # no round begins after 0.8 s, which is past at the 52nd turn; "b" has three of them
    assert problem.turns[:6] == ["a", "b", "a", "b", "a", "b"] and problem.turns.count("a") == 52 - 3
    assert found["a"]["status"] == MEASURED and len(found["a"]["runs_ms"]) == problem.turns.count("a") - 2
    assert found["b"] == {"status": "failed: RuntimeError: no luck in x.py or y.py, see https://a.b/c/d"}
    assert found["c"] == {"status": "not installed"}
    found = harness.in_turn(problem, ["a", "hangs", "b"], options, problem.now, 1.0)
    assert found["hangs"]["status"].startswith("failed: TimeoutError") and found["b"] == {"status": OUT_OF_TIME}


def test_a_process_of_its_own():
    assert harness.isolated(os._exit, 3, seconds=60) == {"status": "failed: the process ended with code 3"}
    assert harness.isolated(harness.one_line, 7, seconds=60)["status"].startswith("failed: AttributeError")
    assert harness.isolated(time.sleep, 60, seconds=1)["status"] == "failed: had not ended after 1 s"
    assert harness.isolated(tables.goal, "x", 1.0, "≤", 2.0, seconds=60)["met"] is True


def test_tables_and_what_is_wrong(capsys, tmp_path):
    ours = {"status": MEASURED, "median_ms": 2.0, "role": "ours", "floor": "floor", "flags": ["value"]}
    floor, cce = {"status": MEASURED, "median_ms": 1.0, "role": "floor"}, {"status": OUT_OF_TIME, "role": "peer"}
    row = {"name": "a | row", "ours": "ours", "contestants": {"ours": ours, "floor": floor, "cce": cce}}
    row["goals"] = [goal("x", 1.2, "≤", 1.0), goal("y", None, "≥", 1.0), goal("z", 3.0, "≥", 1.0)]
    results = harness.header("A title", ["about"], argparse.Namespace(date="2026-01-02", dry=False, device="cpu"))
    results["rows"] = [row]
    harness.publish(results, tmp_path / "new" / "x.json")
    assert harness.conclude(results) == 1
    printed = capsys.readouterr().out
    assert (tmp_path / "new" / "x.md").read_text() in printed
    assert "| contestant | status | ms | × floor | × ours | wrong |" in printed
    assert "| `ours` |  | 2.00 | 2.00 | 1.00 | **value** |" in printed
    assert "* y: not measured, asked ≥ 1.000\n* z: 3.000, asked ≥ 1.000, met" in printed
    assert printed.endswith(
        "cut by the limit: a | row: cce\na | row: x: 1.200, asked ≤ 1.000, **missed**\na | row: ours: wrong: value\n"
    )


@pytest.mark.parametrize("failing", ["", "pytest", "benchmarks.head"])
def test_gpu_script(tmp_path, failing):
    python, out = tmp_path / "python", tmp_path / "out"
    python.write_text(f'#!/bin/sh\necho "asked: $*"\nif [ "$2" = "{failing}" ]; then exit 5; fi\n')
    python.chmod(0o755)
    environment = {**os.environ, "OUT": str(out), "PYTHON": str(python), "LIMIT": "100", "PARTS": "tests tiles head"}
    script = Path(harness.__file__).with_name("gpu.sh")
    done = subprocess.run(["bash", script, "--p", "flat"], env=environment, capture_output=True, text=True)
    assert done.returncode == (1 if failing else 0), done.stdout + done.stderr
    assert "asked: -m benchmarks.head --device cuda --losses nll,kl" in (out / "head.log").read_text(), "in any case"
    assert "--limit 28" in (out / "tiles.log").read_text() and "--p flat" in (out / "head.log").read_text()
    assert not failing or ("== failed: " in done.stdout and "exit code 5" in done.stdout)


@pytest.mark.parametrize("part", head.PARTS)
def test_every_part_runs_and_ours_is_right(part, tmp_path, monkeypatch, capsys):
    for name in ["trl", *(each for each in sys.modules if each.startswith("trl."))]:
        monkeypatch.setitem(sys.modules, name, None)  # as if it were not installed
    monkeypatch.setattr(harness, "free_memory", lambda device: None)  # collects garbage: nothing is measured here
    path = tmp_path / "head.json"
    interpreted = ["--interpret"] if part == "kl" and not torch.cuda.is_available() else []
    assert head.main([part, *DRY, *interpreted, "--json", str(path)]) == 0 and tables.DRY in capsys.readouterr().out
    for records in contestants_of(path):
        assert {record["status"] for record in records.values() if record["role"] != "peer"} == {RAN}
        assert [name for name, record in records.items() if record.get("flags")] == []
        assert records["ours"]["gradient_error"] < 1e-3 and (part == "tiles") == ("tile_1024x8192" in records)
        assert part != "nll" or records["trl"]["status"] == "not installed"
        assert part != "kl" or records["ours_known"]["gradient_error"] < 1e-5
        assert not {"median_ms", "peak_mb", "first_call_s"} & {key for record in records.values() for key in record}


def test_the_truth_is_float64_autograd_on_full_logits():
    problem = problem_of(p="memorised")
    hidden = problem.hidden.detach().double().requires_grad_()
    loss = torch.nn.functional.cross_entropy(hidden @ problem.weight.double().T, problem.labels)
    loss.backward()
    value, kept, gradient = problem.truth
    assert value == pytest.approx(loss.item(), rel=1e-12) and 0 < value < 0.01, "memorised"
    torch.testing.assert_close(gradient, hidden.grad[kept], rtol=1e-9, atol=1e-12)
    assert kept.tolist() == problem.positions.tolist() and len(kept) == 6


WRONG = {
    "gradient": lambda loss, gradient: (loss, gradient * 1.01),
    "value": lambda loss, gradient: (loss * float("nan"), gradient),
    "gradient of ignored tokens": lambda loss, gradient: (loss, gradient + 1e-9),
    "the gradient is (1, 32), not (8, 32)": lambda loss, gradient: (loss, gradient[:1]),
}


@pytest.mark.parametrize("flag, wrong", WRONG.items())
def test_a_wrong_contestant_is_seen(monkeypatch, tmp_path, wrong, flag):
    eager, path = CONTESTANTS["eager"].build, tmp_path / "head.json"
    for name in ("ours", "eager"):
        contestant = dataclasses.replace(CONTESTANTS[name], build=lambda problem: lambda: wrong(*eager(problem)()))
        monkeypatch.setitem(CONTESTANTS, name, contestant)
    arguments = [*DRY, "--ignored", "0.5", "--p", "flat", "--json", str(path)]
    assert head.main([*arguments, "--contestants", "ours"]) == 1
    assert contestants_of(path)[0]["ours"]["flags"] == [flag]
    assert head.main([*arguments, "--contestants", "eager"]) == 0, "a wrong peer is a finding, no failure"


def test_what_a_library_needs_is_named(tmp_path, monkeypatch):
    (tmp_path / "a_peer.py").write_text("import needed_by_it.part\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(peers.NotMeasured, match=r"^not installed: needed_by_it is missing$"):
        peers.library("a_peer")


def test_the_floor_has_the_products_and_sizes_of_its_own(monkeypatch):
    called = []
    monkeypatch.setattr(peers, "mm_into", lambda left, right, out, add=False: called.append((*left.shape, add)))
    monkeypatch.setattr("fastforget.backends.tiling.CPU_COLUMNS", 64)  # tuning ours does not move it
    for loss, known, products in (("nll", False, 2), ("kl", False, 4), ("kl", True, 3)):
        for kind in peers.HOW:
            step = peers.floor(problem_of(loss=loss), kind, known)
            called.clear()
            step()
            assert len(called) == products, (loss, kind)
    monkeypatch.setattr(peers, "COLUMNS", 100)
    step = peers.floor(problem_of(), "together")
    called.clear()
    step()
    assert called == [(6, 32, False), (6, 100, False), *[(6, 32, False), (6, 100, True)] * 2]


def test_goals():
    def goals_of(times, **changes):
        records = {name: {"role": CONTESTANTS[name].role, "median_ms": time} for name, time in times.items()}
        records["ours"]["peak_mb"] = 300.0
        row = {"setting": dataclasses.asdict(SMALL) | changes, "contestants": records, "goals": []}
        head.finish(row)
        return [(round(goal["value"] or 0.0, 3), round(goal["limit"], 2), goal["met"]) for goal in row["goals"]]

    gpu = {"device": "cuda", "hidden": 3584, "tokens": 8192, "dtype": "bfloat16"}
    found = goals_of({"floor_unchunked": 10.0, "ours": 10.9}, **gpu)
    assert found == [(1.09, 1.1, True), (0.0, 1.0, None), (300.0, 432.16, True)]
    times = {"floor_rows": 12.0, "floor_together": 11.0, "floor_unchunked": 10.0, "ours": 12.0, "eager": 20.0}
    found = goals_of(times | {"trl": 11.9})  # over any floor, those within our memory, eager, the fastest peer; MB
    assert found[:4] == [(1.2, 1.05, False), (1.091, 1.05, False), (0.6, 0.5, False), (1.008, 1.03, True)]
    found = goals_of(times | {"floor_together_known": 8.0, "ours_known": 8.4}, loss="kl")  # four products, three
    assert found[:2] == [(1.2, 1.05, False), (1.05, 1.05, True)] and found[3] == (300.0, 14.0, False)


def test_scaling_goals_and_plot():
    lines = []
    for sweep, count, size in (("N", 8, 64), ("N", 16, 64), ("V", 8, 64), ("V", 8, 128)):
        setting = {"sweep": sweep, "tokens": count, "vocabulary": size, "hidden": 8}
        lines += [{"setting": setting, "contestants": {"ours": {"median_ms": 1.0 * count * size, "peak_mb": 100.0}}}]
    assert all(goal["met"] for goal in head.scaling_goals(lines))
    lines[-1]["contestants"]["ours"] = {"median_ms": 9e5, "peak_mb": 200.0}
    assert [goal["met"] for goal in head.scaling_goals(lines)] == [True, True, True, False, False]
    pytest.importorskip("matplotlib")
    assert head.plot({"rows": lines, "machine": {"cpu": "X"}, "date": "D"}).startswith(b"\x89PNG")


def test_rows_and_contestants_of_a_gpu():
    settings = head.settings_of(head.parse(["--device", "cuda"]))
    assert len(settings) == 16 and {(each.hidden, each.vocabulary) for each in settings[:4]} == set(head.GPU_SHAPES)
    names = taking_part(settings[0])
    assert names[:5] == ["floor_unchunked", "ours", "liger", "trl", "quack"], "compilers come last"
    assert names[-2:] == ["cce", "cce_exact"] and names.index("compile") > names.index("eager")


@pytest.mark.parametrize("name", rows.CASES)
def test_tile_passes_of_every_backend(monkeypatch, name):
    for size, value in {"ROWS": 2, "COLUMNS": 128, "STATES": 3, "HIDDEN": 8}.items():
        monkeypatch.setattr(rows, size, value)
    for backend in ("torch", "native") if why_not_native(torch.device("cpu")) is None else ("torch",):
        benchmark = SimpleNamespace(extra_info={}, stats=SimpleNamespace(stats=SimpleNamespace(median=1e-3)))
        benchmark.pedantic = lambda action, *, setup, **rounds: action(*setup()[0])
        rows.test_tile_pass(benchmark, backend, name)
        assert benchmark.extra_info["nanoseconds_per_element"] > 0


def test_host_time(tmp_path, monkeypatch):
    readme = tmp_path / "README.md"
    monkeypatch.setattr(host_time, "README", readme)
    monkeypatch.setattr(host_time, "WARMUP", 1)
    readme.write_text(f"before\n{host_time.BEGIN}\nold\n{host_time.END}\nafter\n")
    assert host_time.main(["--readme", "--calls", "2"]) == 0
    written = readme.read_text()
    assert "| `triton` | stubbed |" in written and "old" not in written and written.endswith("after\n")
