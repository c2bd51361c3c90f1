"""What all benchmarks share: contestants in turn, limits, processes, peaks, tables, and the script for a GPU."""

import argparse
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from benchmarks import harness, tables
from benchmarks.harness import OUT_OF_TIME
from benchmarks.tables import MEASURED, goal


class Turns:
    """A problem whose contestants note their turns; "b" fails at its third, "hangs" does not end, "c" is missing."""

    device_name, whole_peak = "cpu", False

    def __init__(self):
        self.turns = []

    def step_of(self, name, dry):
        def step():
            self.turns.append(name)
            time.sleep(60 if name == "hangs" else 0.02)
            if name == "b" and self.turns.count(name) == 3:
                raise RuntimeError(f"no\n  luck in {harness.ROOT}/x.py or /data/y.py, see https://a.b/c/d")
            return torch.zeros(()), torch.zeros(1)

        if name == "c":
            raise harness.NotMeasured("not installed")
        return step

    def errors(self, answer):
        return {"flags": []}


OPTIONS = argparse.Namespace(rounds=1000, warmup=1, dry=False, no_memory=True)


def test_contestants_take_turns_until_the_limit():
    problem = Turns()
    found = harness.in_turn(problem, ["a", "b", "c"], OPTIONS, time.monotonic(), 1.0)
    turns = problem.turns
    assert turns[:6] == ["a", "b", "a", "b", "a", "b"] and 3 < turns.count("a") < 60
    assert found["a"]["status"] == MEASURED and len(found["a"]["runs_ms"]) == turns.count("a") - 2
    assert min(found["a"]["runs_ms"]) <= found["a"]["median_ms"] <= max(found["a"]["runs_ms"])
    assert found["b"] == {"status": "failed: RuntimeError: no luck in x.py or y.py, see https://a.b/c/d"}
    assert found["c"] == {"status": "not installed"}
    late = harness.in_turn(problem, ["a", "c"], OPTIONS, time.monotonic() - 1.0, 1.0)
    assert late == {name: {"status": OUT_OF_TIME} for name in ("a", "c")}
    found = harness.in_turn(Turns(), ["a", "hangs", "b"], OPTIONS, time.monotonic(), 1.0)
    assert found["hangs"]["status"].startswith("failed: TimeoutError") and found["b"] == {"status": OUT_OF_TIME}


def test_a_process_of_its_own():
    assert harness.isolated(os._exit, 3, seconds=60) == {"status": "failed: the process ended with code 3"}
    assert harness.isolated(harness.one_line, 7, seconds=60)["status"].startswith("failed: AttributeError")
    assert harness.isolated(time.sleep, 60, seconds=1)["status"] == "failed: had not ended after 1 s"
    assert harness.isolated(tables.goal, "x", 1.0, "≤", 2.0, seconds=60)["met"] is True


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_peak_holds_what_an_action_held_for_a_moment():
    found = harness.peak(lambda: bytearray(b"x") * 64_000_000, "cpu")
    if found["peak_mb"] is None:
        pytest.skip(found["peak_note"])
    assert 60 < found["peak_mb"] < 90 and found["rise_mb"] == found["peak_mb"]


def test_tables_and_what_is_wrong(capsys, tmp_path):
    ours = {
        "status": MEASURED,
        "median_ms": 2.0,
        "role": "ours",
        "floor": "floor",
        "flags": ["value"],
        "figures": {"own": "7"},
    }
    floor = {"status": MEASURED, "median_ms": 1.0, "role": "floor"}
    trl = {"status": "not installed", "role": "peer", "flags": []}
    first = {"name": "a | row", "ours": "ours", "contestants": {"ours": ours, "floor": floor, "trl": trl}}
    cut = {"ours": {"status": "failed: no luck", "role": "ours"}, "cce": {"status": OUT_OF_TIME, "role": "peer"}}
    second = {"name": "b", "contestants": cut, "goals": [goal("y", None, "≥", 1.0), goal("z", 3.0, "≥", 1.0)]}
    results = harness.header("A title", ["about"], argparse.Namespace(date="2026-01-02", dry=False, device="cpu"))
    results["rows"] = [first | {"goals": [goal("x", 1.2, "≤", 1.0)]}, second]
    harness.publish(results, tmp_path / "new" / "x.json")
    assert harness.conclude(results) == 1
    printed = capsys.readouterr().out
    assert (tmp_path / "new" / "x.md").read_text() in printed and results["machine"]["cpu"] in printed
    assert "| contestant | status | ms | × floor | × ours | wrong | own |" in printed
    assert "| `ours` |  | 2.00 | 2.00 | 1.00 | **value** | 7 |" in printed
    assert "* y: not measured, asked ≥ 1.000\n* z: 3.000, asked ≥ 1.000, met" in printed
    assert printed[printed.index("cut by the limit") :].splitlines() == [
        "cut by the limit: b: cce",
        "a | row: x: 1.200, asked ≤ 1.000, **missed**",
        "a | row: ours: wrong: value",
        "b: ours: failed: no luck",
    ]
    results["rows"] = [first | {"contestants": {"trl": trl}, "goals": []}]
    assert harness.conclude(results) == 0


def test_a_block_between_markers_is_replaced():
    assert tables.replace_block("a\nBEGIN\nold\nEND\nb\n", "BEGIN", "END", "new") == "a\nBEGIN\nnew\nEND\nb\n"
    for text in ("BEGIN\n", "END\nBEGIN\n", "BEGIN\nBEGIN\nEND", "BEGIN\nEND\nEND"):
        with pytest.raises(ValueError, match="needs these two lines"):
            tables.replace_block(text, "BEGIN", "END", "new")


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
    assert "test_kernels_gpu.py" in (out / "tests.log").read_text()
    assert not failing or ("== failed: " in done.stdout and "exit code 5" in done.stdout)
