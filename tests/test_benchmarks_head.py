"""The head's benchmark as a dry run, and its bookkeeping: missing, wrong, failing and crashing contestants are rows."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from benchmarks import floors, head, head_measure, host_time, peers, tiles
from benchmarks.head_measure import MEASURED, OUT_OF_TIME, RAN, Effort
from benchmarks.head_problem import LOSSES, P, Problem, Setting
from benchmarks.head_table import markdown
from benchmarks.head_worker import Died, Worker, measure_here, measure_isolated
from benchmarks.peers import CONTESTANTS, taking_part

SMALL = Setting(tokens=12, hidden=32, vocabulary=300, ignored=0.5, dtype="float32", device="cpu")
QUICK = Effort(rounds=3, warmup=1, memory=False)
GPU_SCRIPT = Path(head.__file__).with_name("gpu.sh")


@pytest.fixture
def contestant(monkeypatch):
    """Makes a function of (problem, step number) a contestant's step."""

    def install(name, step):
        def build(problem):
            calls = iter(range(1000))
            return lambda: step(problem, next(calls))

        monkeypatch.setitem(CONTESTANTS, name, dataclasses.replace(CONTESTANTS[name], build=build))

    return install


def eager_answer(problem):
    return peers.eager(problem)()


def test_the_dry_run_of_make_test(tmp_path, capsys):
    path = tmp_path / "results" / "head.json"
    assert head.main(["--device", "cpu", "--interpret", "--tiny", "--json", str(path)]) == 0
    results = json.loads(path.read_text())
    assert results["dry_run"] and results["commit"] and results["date"] and results["measured"]
    assert results["machine"]["device"] == "cpu" and {"torch", "triton", "trl"} <= set(results["versions"])
    assert [(row["setting"]["ignored"], row["setting"]["p"]) for row in results["rows"]] == [
        (ignored, p) for ignored in (0.0, 0.5) for p in P[:2]
    ]
    for row in results["rows"]:
        records = row["contestants"]
        assert row["setting"]["backend"] == "triton" and row["goals"] == []
        assert not {"median_ms", "peak_mb", "first_call_s"} & {key for record in records.values() for key in record}
        for name in ("ours", "ours_torch", "eager"):
            assert records[name]["status"] == RAN and records[name]["flags"] == []
            assert records[name]["gradient_error"] < 1e-3
        assert records["floor"] == {"status": RAN}
        assert "dry run" in records["compile"]["status"]
    printed = capsys.readouterr().out
    assert path.with_suffix(".md").read_text() in printed and "A dry run" in printed
    assert head.main(["--table", str(path)]) == 0
    assert "A dry run" in capsys.readouterr().out


@pytest.mark.parametrize("loss", LOSSES)
def test_ours_and_eager_are_right_and_timed(loss):
    setting = dataclasses.replace(SMALL, loss=loss)
    names = [name for name in taking_part(setting) if not CONTESTANTS[name].slow_start]
    records = measure_here(setting, names, QUICK)
    for name in ("floor", "floor_unchunked", "ours", "eager"):
        assert records[name]["status"] == MEASURED and len(records[name]["runs_ms"]) == 3
        assert min(records[name]["runs_ms"]) <= records[name]["median_ms"] <= max(records[name]["runs_ms"])
    assert {name for name in names if records[name].get("flags")} == set()
    assert ("ours_known" in names) == ("floor_known" in names) == (loss == "kl")


def test_the_truth_is_float64_autograd_on_full_logits():
    problem = Problem(dataclasses.replace(SMALL, p="memorised"))
    hidden = problem.hidden.detach().double().requires_grad_()
    loss = torch.nn.functional.cross_entropy(hidden @ problem.weight.double().T, problem.labels)
    loss.backward()
    value, rows, gradient = problem.truth
    assert value == pytest.approx(loss.item(), rel=1e-12)
    torch.testing.assert_close(gradient, hidden.grad[rows], rtol=1e-9, atol=1e-12)
    assert rows.tolist() == problem.positions.tolist() and len(rows) == 6
    assert 0 < value < 0.01, "memorised"


@pytest.mark.parametrize(
    "wrong, flags",
    [
        (lambda loss, gradient: (loss, gradient * 1.01), ["gradient"]),
        (lambda loss, gradient: (loss * 1.01, gradient), ["value"]),
        (lambda loss, gradient: (loss, gradient * float("nan")), ["gradient", "gradient of ignored tokens"]),
        (lambda loss, gradient: (loss, gradient + 1e-9), ["gradient of ignored tokens"]),
        (lambda loss, gradient: (loss, gradient[:1]), ["the gradient is (1, 32), not (8, 32)"]),
    ],
)
def test_a_wrong_contestant_is_seen(contestant, tmp_path, capsys, wrong, flags):
    contestant("ours", lambda problem, turn: wrong(*eager_answer(problem)))
    contestant("eager", lambda problem, turn: wrong(*eager_answer(problem)))
    path = tmp_path / "head.json"
    arguments = ["--device", "cpu", "--here", "--tiny", "--ignored", "0.5", "--p", "flat", "--json", str(path)]
    assert head.main([*arguments, "--contestants", "ours,floor"]) == 1
    assert json.loads(path.read_text())["rows"][0]["contestants"]["ours"]["flags"] == flags
    printed = capsys.readouterr().out
    assert all(f"ours: too far from float64: {flag}" in printed for flag in flags)
    assert "**" in next(line for line in printed.splitlines() if line.startswith("| `ours`")), "bold in the table"
    assert head.main([*arguments, "--contestants", "eager"]) == 0, "a wrong peer is a finding, no failure"
    assert json.loads(path.read_text())["rows"][0]["contestants"]["eager"]["flags"] == flags


def test_missing_and_failing_peers_are_rows(contestant, monkeypatch):
    for name in ("trl", "cut_cross_entropy"):
        monkeypatch.setitem(sys.modules, name, None)  # as if it were not installed
    monkeypatch.delattr(torch.nn.functional, "linear_cross_entropy", raising=False)

    def fails(at):
        def step(problem, turn):
            if turn == at:
                raise RuntimeError("no\n  luck")
            return eager_answer(problem)

        return step

    contestant("torch_lce_chunked", fails(0))
    contestant("eager", fails(2))
    names = ["eager", "torch_lce", "torch_lce_chunked", "trl", "cce", "cce_compile", "trl_divergence", "ours"]
    records = measure_here(SMALL, names, QUICK)
    assert {name: record["status"] for name, record in records.items()} == {
        "eager": "failed: RuntimeError: no luck",
        "torch_lce": f"not in torch {torch.__version__}",
        "torch_lce_chunked": "failed: RuntimeError: no luck",
        "trl": "not installed",
        "cce": "does not run on cpu",
        "cce_compile": "not installed",
        "trl_divergence": "does not compute nll",
        "ours": MEASURED,
    }


def test_what_a_library_needs_is_named(tmp_path, monkeypatch):
    (tmp_path / "a_peer.py").write_text("import needed_by_it.part\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(peers.NotMeasured, match=r"^not installed: needed_by_it is missing$"):
        peers.library("a_peer")


def test_a_time_limit_ends_the_rounds(contestant, monkeypatch):
    def slow(problem, turn):
        time.sleep(0.05)
        return eager_answer(problem)

    contestant("eager", slow)
    names = ["eager", "ours"]
    late = measure_here(SMALL, names, dataclasses.replace(QUICK, rounds=1000, limit=1.0))
    assert 1 <= len(late["eager"]["runs_ms"]) < 20
    monkeypatch.setattr(head_measure, "FIRST_CALLS", 0.0)
    never = measure_here(SMALL, names, QUICK)
    assert {record["status"] for record in never.values()} == {OUT_OF_TIME}


def obey(orders, say):
    """A task for the worker: says, dies, hangs or raises, as it is told."""
    for contestant, order in orders:
        say(contestant, None)
        if order == "die":
            os.kill(os.getpid(), signal.SIGKILL)
        if order == "hang":
            time.sleep(600)
        if order == "raise":
            raise RuntimeError("the device is lost")
        say(contestant, {"status": order})


def test_a_worker_outlives_its_process():
    worker = Worker()
    try:
        for order, reason, seconds in (
            ("die", "killed by SIGKILL", 60),
            ("raise", "RuntimeError: the device is lost", 60),
            ("hang", "had not ended after 1 s", 1),
        ):
            with pytest.raises(Died, match=reason) as death:
                worker.run(obey, [("eager", "fine"), ("ours", order)], seconds=seconds)
            assert death.value.contestant == "ours"
        assert worker.run(obey, [("eager", "fine")], seconds=60) == {"eager": {"status": "fine"}}
    finally:
        worker.stop()


class MortalWorker:
    """In place of a process: dies at a contestant's turn."""

    def __init__(self, *fatal):
        self.fatal = fatal
        self.asked = []

    def collect(self, records, function, arguments, seconds):
        _, names, _ = arguments
        self.asked.append(list(names))
        for name in (None, *names):
            if name in self.fatal:
                raise Died("killed by SIGSEGV", name)
            if name is not None:
                records[name] = {"status": MEASURED}


def test_who_crashes_the_process_is_left_out():
    worker = MortalWorker("cce", "quack")
    records = measure_isolated(worker, SMALL, ["ours", "cce", "eager", "quack"], QUICK)
    assert worker.asked == [["ours", "cce", "eager", "quack"], ["ours", "eager", "quack"], ["ours", "eager"]]
    assert {name: record["status"] for name, record in records.items()} == {
        "ours": MEASURED,
        "cce": "failed: killed by SIGSEGV",
        "eager": MEASURED,
        "quack": "failed: killed by SIGSEGV",
    }
    (record,) = measure_isolated(MortalWorker(None), SMALL, ["ours"], QUICK).values()
    assert record["status"] == "failed: the whole setting: killed by SIGSEGV"


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_peak_memory_on_the_cpu():
    setting = Setting(tokens=512, hidden=64, vocabulary=20000, dtype="float32", device="cpu")
    record = head_measure.cpu_peak(setting, "eager")
    logits = 512 * 20000 * 4 / 1e6
    if record["peak_mb"] is None:
        pytest.skip(record["peak_note"])
    assert logits < record["peak_mb"] < 5 * logits


def gpu_row(**medians):
    """A row as a GPU would give it."""
    setting = Setting(hidden=3584, vocabulary=152064)
    records = {name: {"status": MEASURED, "median_ms": median, "peak_mb": 300.0} for name, median in medians.items()}
    return head.row_of(setting, records, dry=False)


def test_goals(capsys):
    good = gpu_row(floor_unchunked=10.0, ours=10.9, eager=30.0, liger=20.0)
    assert [goal["met"] for goal in good["goals"]] == [True, True, True] and head.problems_of(good) == []
    bad = gpu_row(floor_unchunked=10.0, ours=11.1, cce=11.0)
    assert head.problems_of(bad) == [
        "ours / the fastest floor (floor_unchunked): 1.11, asked ≤ 1.10, **missed**",
        "ours / the fastest peer (cce): 1.01, asked ≤ 1.00, **missed**",
    ]
    alone = gpu_row(ours=11.1)
    assert [goal["met"] for goal in alone["goals"]] == [None, None, True]
    assert head.row_of(SMALL, good["contestants"], dry=True)["goals"] == []
    here = {"device": "X", "cpu": "Y", "torch_threads": 1}
    text = markdown(
        {"date": "D", "machine": here, "commit": "C", "versions": {}, "dry_run": False, "rows": [good, bad, alone]}
    )
    assert "| 10.90 | 1.09 | liger | 1.83 |" in text
    assert "| `ours` | fastforget | 10.90 | 1.09 | 1.00 | 300 |" in text
    assert "* ours / the fastest floor (None): not measured, asked ≤ 1.10" in text


def test_goals_on_the_cpu():
    def goals_of(setting, peak_mb, **times):
        records = {name: {"status": MEASURED, "median_ms": time, "peak_mb": peak_mb} for name, time in times.items()}
        found = head.row_of(dataclasses.replace(SMALL, tokens=10**6, **setting), records, dry=False)["goals"]
        return [(round(goal["value"], 3), round(goal["limit"], 3), goal["met"]) for goal in found]

    times = {"floor": 12.0, "floor_tiled": 13.0, "floor_together": 11.0, "floor_unchunked": 10.0, "ours": 12.0}
    states = 3 * SMALL.hidden * 4
    assert goals_of({"ignored": 0.5}, 200.0, **times, eager=20.0, trl=11.9) == [
        (1.2, 1.05, False),  # over any floor
        (1.091, 1.05, False),  # over those within our memory
        (0.6, 0.5, False),  # over eager
        (1.008, 1.031, True),  # over the fastest peer
        (200.0, states + 128.0, True),
    ]
    times |= {"floor_known": 9.0, "floor_together_known": 8.0, "ours_known": 8.4, "eager": 30.0}
    assert goals_of({"loss": "kl"}, 999.0, **times) == [
        (1.2, 1.05, False),  # four products
        (1.05, 1.05, True),  # three
        (0.4, 1.031, True),
        (999.0, states + 14.0, False),  # of ours, and with the embedding cached
        (999.0, states + 14.0, False),
    ]


def test_the_floor_has_the_products_and_sizes_of_its_own(monkeypatch):
    called = []
    monkeypatch.setattr(floors, "mm_into", lambda left, right, out, add=False: called.append((*left.shape, add)))
    monkeypatch.setattr("fastforget.backends.tiling.CPU_COLUMNS", 64)  # tuning ours does not move it
    for loss, known, products in (("nll", False, 2), ("kl", False, 4), ("kl", True, 3)):
        problem = Problem(dataclasses.replace(SMALL, loss=loss))
        for build in (floors.floor, floors.floor_together, floors.floor_unchunked):
            step = build(problem, known)
            called.clear()
            step()
            assert len(called) == products, (loss, build)
    monkeypatch.setattr(floors, "COLUMNS", 100)
    step = floors.floor_together(Problem(SMALL))
    called.clear()
    step()
    assert called == [(6, 32, False), (6, 100, False), *[(6, 32, False), (6, 100, True)] * 2]


def test_the_budget_ends_between_two_rows(capsys):
    options = head.parse(["--device", "cpu", "--tiny", "--budget", "30"])
    asked = []

    def measure(setting, names, effort):
        asked.append(setting)
        options.budget = 0.5  # as if it were spent
        return {name: {"status": RAN} for name in names}

    options.budget = 30.0
    head.time, clock = type("Clock", (), {"monotonic": staticmethod(lambda: 100.0 * len(asked))}), head.time
    try:
        assert head.run(options, {"name": "cpu"}, measure) == 1
    finally:
        head.time = clock
    assert len(asked) == 1 and capsys.readouterr().out.count(f"ours: {OUT_OF_TIME}") == 3


@pytest.mark.parametrize(
    "arguments, complaint",
    [
        (["--hidden", "64"], "--hidden and --vocab go together"),
        (["--contestants", "cce,kahan"], "unknown contestant 'kahan'"),
        (["--losses", "dpo"], "unknown loss 'dpo'"),
        (["--ignored", "0.5,1"], "shares are numbers from 0 to less than 1"),
        (["--tokens", "0"], "must be a whole number from 1 on"),
    ],
)
def test_bad_arguments(capsys, arguments, complaint):
    with pytest.raises(SystemExit) as ended:
        head.main(arguments)
    assert ended.value.code == 2 and complaint in capsys.readouterr().err


def test_rows_of_a_gpu_and_of_the_cpu():
    shapes = {(2048, 50272), (4096, 128256), (3584, 152064), (2304, 256000)}
    rows = head.settings_of(head.parse(["--device", "cuda"]))
    assert len(rows) == 16 and {(row.hidden, row.vocabulary) for row in rows[:4]} == shapes
    assert {(row.tokens, row.dtype, row.backend) for row in rows} == {(8192, "bfloat16", "auto")}
    names = taking_part(rows[0])
    assert names[:5] == ["floor_unchunked", "ours", "liger", "trl", "quack"], "compilers come last"
    assert names[-2:] == ["cce", "cce_exact"] and names.index("compile") > names.index("eager")
    arguments = ["--tokens", "1024", "--hidden", "2048", "--vocab", "50272", "--ignored", "0.5", "--p", "flat"]
    (row,) = head.settings_of(head.parse(["--device", "cpu", *arguments]))
    assert row == Setting("nll", 1024, 2048, 50272, 0.5, "flat", "float32", "cpu", "auto", 0)
    assert {"cce_compile", "trl", "ours", "ours_torch", "floor_together"} < set(taking_part(row))


@pytest.mark.parametrize("failing", ["", "pytest", "benchmarks.head"])
def test_gpu_script(tmp_path, failing):
    subprocess.run(["bash", "-n", GPU_SCRIPT], check=True)
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\necho "asked: $*"\nif [ "$2" = "{failing}" ]; then exit 5; fi\n')
    python.chmod(0o755)
    out = tmp_path / "out"
    environment = {**os.environ, "OUT": str(out), "PYTHON": str(python), "PARTS": "tests tiles head", "LIMIT": "100"}
    done = subprocess.run(["bash", GPU_SCRIPT, "--p", "flat"], env=environment, capture_output=True, text=True)
    assert done.returncode == (1 if failing else 0), done.stdout + done.stderr
    assert "asked: -m benchmarks.head --device cuda" in (out / "head.log").read_text(), "whatever failed before it"
    assert "--p flat" in (out / "head.log").read_text()
    assert "asked: -m benchmarks.tiles --device cuda" in (out / "tiles.log").read_text()
    if failing:
        assert "== failed: " in done.stdout and "exit code 5" in done.stdout


def test_tile_shapes(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("FASTFORGET_TILE", "4x64")
    path = tmp_path / "tiles.json"
    assert tiles.main(["--device", "cpu", "--tiny", "--json", str(path)]) == 0
    rows = json.loads(path.read_text())["rows"]
    names = [tiles.PRODUCTS, tiles.DEFAULT, *tiles.TINY_TILES]
    assert len(rows) == 2 and all(list(row) == names for row in rows.values())
    assert all(value > 0 for row in rows.values() for value in row.values())
    assert path.with_suffix(".md").read_text() in capsys.readouterr().out
    assert os.environ["FASTFORGET_TILE"] == "4x64"
    assert tiles.main(["--device", "cpu", "--tiny", "--budget", "0"]) == 0
    assert f"| default | {OUT_OF_TIME} | {OUT_OF_TIME} |" in capsys.readouterr().out


def test_host_time(tmp_path, monkeypatch, capsys):
    readme = tmp_path / "README.md"
    monkeypatch.setattr(host_time, "README", readme)
    monkeypatch.setattr(host_time, "WARMUP", 1)
    readme.write_text("no markers\n")
    assert host_time.main(["--readme", "--calls", "2"]) == 2
    readme.write_text(f"before\n{host_time.BEGIN}\nold\n{host_time.END}\nafter\n")
    assert host_time.main(["--readme", "--calls", "2"]) == 0
    written = readme.read_text()
    assert written.startswith("before\n") and written.endswith("after\n") and "old" not in written
    assert "| `triton` | stubbed |" in written and all(about in written for _, _, about in host_time.COMPONENTS)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_gpu(tmp_path):
    path = tmp_path / "head.json"
    arguments = ["--device", "cuda", "--tiny", "--here", "--losses", ",".join(LOSSES), "--json", str(path)]
    names = ["floor_unchunked", "ours", "ours_known", "eager"]
    assert head.main([*arguments, "--contestants", ",".join(names)]) == 0
    for row in json.loads(path.read_text())["rows"]:
        assert {record["status"] for record in row["contestants"].values()} == {RAN}
