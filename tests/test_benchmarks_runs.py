"""What all benchmarks share: processes that die, contestants in turn, limits, tables, and the script for a GPU."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from benchmarks import harness, runs, tables
from benchmarks.harness import OUT_OF_TIME, Effort
from benchmarks.tables import MEASURED, goal

GPU_SCRIPT = Path(runs.__file__).with_name("gpu.sh")


def obey(say, names, orders):
    """A task: says, dies, hangs or raises, as it is told."""
    for name in names:
        say(name, None)
        if orders[name] == "die":
            os.kill(os.getpid(), signal.SIGKILL)
        if orders[name] == "hang":
            time.sleep(600)
        if orders[name] == "raise":
            raise RuntimeError("the device is lost")
        print("this is not for the parent")
        say(name, {"status": orders[name]})


def test_a_worker_outlives_its_process():
    worker = runs.Worker()
    try:
        for order, reason, seconds in (
            ("die", "ended with code -9", 60),
            ("raise", "RuntimeError: the device is lost", 60),
            ("hang", "had not ended after 10 s", 10),
        ):
            with pytest.raises(runs.Died, match=reason) as death:
                worker.run(obey, ["eager", "ours"], {"eager": "fine", "ours": order}, seconds=seconds)
            assert death.value.turn == "ours" and death.value.records == {"eager": {"status": "fine"}}
        assert worker.run(obey, ["eager"], {"eager": "fine"}, seconds=60) == {"eager": {"status": "fine"}}
    finally:
        worker.stop()


def test_whose_turn_it_was_is_left_out():
    asked = []

    def runner(task, names, seconds):
        asked.append(list(names))
        for name in names:
            if name in ("cce", "quack"):
                raise runs.Died("ended with code -11", name, {})
        return {name: {"status": MEASURED} for name in names}

    found = runs.without_the_dead(runner, obey, ["ours", "cce", "eager", "quack"], seconds=60)
    assert asked == [["ours", "cce", "eager", "quack"], ["ours", "eager", "quack"], ["ours", "eager"]]
    assert [name for name, record in found.items() if record["status"] == MEASURED] == ["ours", "eager"]
    assert found["quack"] == {"status": "failed: ended with code -11"}


def test_contestants_take_turns_until_the_limit():
    turns, records = [], {}

    def contestant(name, fails_at=None):
        def step():
            turns.append(name)
            time.sleep(0.02)
            if turns.count(name) == fails_at:
                raise RuntimeError(f"no\n  luck in {harness.ROOT}/x/y.py, see https://a.b/c/d")
            return torch.zeros(()), torch.zeros(1)

        return lambda: step

    def missing():
        raise harness.NotMeasured("not installed")

    builds = {"a": contestant("a"), "b": contestant("b", fails_at=3), "c": missing}
    effort = Effort(rounds=1000, warmup=1, limit=1.0)
    told = []
    harness.in_turn(
        builds, effort, "cpu", lambda *said: told.append(said), lambda answer: {"flags": []}, time.monotonic()
    )
    records = {name: record for name, record in told if record is not None}
    assert turns[:6] == ["a", "b", "a", "b", "a", "b"] and 3 < turns.count("a") < 60
    assert records["a"]["status"] == MEASURED and len(records["a"]["runs_ms"]) == turns.count("a") - 2
    assert min(records["a"]["runs_ms"]) <= records["a"]["median_ms"] <= max(records["a"]["runs_ms"])
    assert records["b"] == {"status": "failed: RuntimeError: no luck in x/y.py, see https://a.b/c/d"}
    assert records["c"] == {"status": "not installed"}
    late = []
    harness.in_turn(builds, effort, "cpu", lambda *said: late.append(said), dict, time.monotonic() - 1.0)
    assert all(record == {"status": OUT_OF_TIME} for _, record in late if record is not None)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_peak_holds_what_an_action_held_for_a_moment():
    found = harness.peak(lambda: bytearray(b"x") * 64_000_000, "cpu")
    if found["peak_mb"] is None:
        pytest.skip(found["peak_note"])
    assert 60 < found["peak_mb"] < 90 and found["rise_mb"] == found["peak_mb"]


def row(**records):
    return {"name": "a | row", "ours": "ours", "contestants": records, "goals": [goal("x", 1.2, "≤", 1.0)]}


def timed(median, **rest):
    return {"status": MEASURED, "median_ms": median, **rest}


def test_tables_and_what_is_wrong(capsys, tmp_path):
    ours = timed(2.0, role="ours", floor="floor", flags=["value"], figures={"own": "7 %"})
    first = row(ours=ours, floor=timed(1.0, role="floor"), trl={"status": "not installed", "role": "peer", "flags": []})
    second = row(ours={"status": "failed: no luck", "role": "ours"}, cce={"status": OUT_OF_TIME})
    second["goals"] = [goal("y", None, "≥", 1.0), goal("z", 3.0, "≥", 1.0)]
    results = runs.header("A title", ["about"], SimpleNamespace(date="2026-01-02", dry=False, device="cpu"))
    results["rows"] = [first, second]
    runs.publish(results, tmp_path / "new" / "x.json")
    assert runs.conclude(results) == 1
    printed = capsys.readouterr().out
    assert (tmp_path / "new" / "x.md").read_text() in printed and results["machine"]["cpu"] in printed
    assert "| contestant | status | ms | × floor | × ours | wrong | own |" in printed
    assert "| `ours` |  | 2.00 | 2.00 | 1.00 | **value** | 7 % |" in printed
    assert "* y: not measured, asked ≥ 1.000" in printed and "* z: 3.000, asked ≥ 1.000, met" in printed
    problems = printed[printed.index("cut by the limit") :].splitlines()
    assert problems == [
        "cut by the limit: a | row: cce",
        "a | row: x: 1.200, asked ≤ 1.000, **missed**",
        "a | row: ours: wrong: value",
        "a | row: ours: failed: no luck",
    ]
    results["rows"] = [row(ours=timed(1.0, role="ours")) | {"goals": []}]
    assert runs.conclude(results) == 0


def test_a_block_between_markers_is_replaced():
    assert tables.replace_block("a\nBEGIN\nold\nEND\nb\n", "BEGIN", "END", "new") == "a\nBEGIN\nnew\nEND\nb\n"
    for text in ("BEGIN\n", "END\nBEGIN\n", "BEGIN\nBEGIN\nEND", "BEGIN\nEND\nEND"):
        with pytest.raises(ValueError, match="needs these two lines"):
            tables.replace_block(text, "BEGIN", "END", "new")


@pytest.mark.parametrize("failing", ["", "pytest", "benchmarks.head"])
def test_gpu_script(tmp_path, failing):
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\necho "asked: $*"\nif [ "$2" = "{failing}" ]; then exit 5; fi\n')
    python.chmod(0o755)
    out = tmp_path / "out"
    environment = {**os.environ, "OUT": str(out), "PYTHON": str(python), "LIMIT": "100", "PARTS": "tests tiles head"}
    done = subprocess.run(["bash", GPU_SCRIPT, "--p", "flat"], env=environment, capture_output=True, text=True)
    assert done.returncode == (1 if failing else 0), done.stdout + done.stderr
    assert "asked: -m benchmarks.head --device cuda --losses nll,kl" in (out / "head.log").read_text(), "in any case"
    assert "--limit 28" in (out / "tiles.log").read_text() and "--p flat" in (out / "head.log").read_text()
    assert "test_kernels_gpu.py" in (out / "tests.log").read_text()
    if failing:
        assert "== failed: " in done.stdout and "exit code 5" in done.stdout
