"""The head's benchmark as a dry run, its truth, its floor, its goals, tile passes and host time in the small."""

import dataclasses
import json
import sys
from types import SimpleNamespace

import pytest
import torch

from benchmarks import head, host_time, peers, rows, tables
from benchmarks.harness import RAN
from benchmarks.peers import CONTESTANTS, Problem, taking_part
from benchmarks.problem import Setting
from benchmarks.tables import MEASURED
from fastforget.backends import why_not_native

SMALL = Setting(tokens=12, hidden=32, vocabulary=300, ignored=0.5, dtype="float32", device="cpu")
DRY = ["--device", "cpu", "--tiny"]


def contestants_of(path):
    return [found["contestants"] for found in json.loads(path.read_text())["rows"]]


def test_the_dry_run_of_interpreted_kernels(tmp_path, capsys):
    path = tmp_path / "head.json"
    arguments = [*DRY, "--interpret", "--ignored", "0.5", "--p", "flat", "--contestants", "floor_together,ours,compile"]
    assert head.main([*arguments, "--json", str(path)]) == 0
    (records,) = contestants_of(path)
    assert records["ours"]["status"] == records["floor_together"]["status"] == RAN
    assert records["ours"]["gradient_error"] < 1e-3 and "dry run" in records["compile"]["status"]
    assert not {"median_ms", "peak_mb", "first_call_s"} & {key for record in records.values() for key in record}
    assert tables.DRY in capsys.readouterr().out


@pytest.mark.parametrize("part", head.PARTS)
def test_every_part_runs_and_ours_is_right(part, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "trl", None)  # as if it were not installed
    path = tmp_path / "head.json"
    assert head.main([part, *DRY, "--json", str(path)]) == 0
    for records in contestants_of(path):
        assert {record["status"] for record in records.values() if record["role"] != "peer"} == {RAN}
        assert [name for name, record in records.items() if record.get("flags")] == []
        assert records["ours"]["gradient_error"] < 1e-3 and (part == "tiles") == ("tile_1024x8192" in records)
        assert part != "nll" or records["trl"]["status"] == "not installed"
        assert part != "kl" or records["ours_known"]["gradient_error"] < 1e-5


def problem_of(**changes):
    return Problem(dataclasses.asdict(SMALL) | changes)


def test_the_truth_is_float64_autograd_on_full_logits():
    problem = problem_of(p="memorised")
    hidden = problem.hidden.detach().double().requires_grad_()
    loss = torch.nn.functional.cross_entropy(hidden @ problem.weight.double().T, problem.labels)
    loss.backward()
    value, kept, gradient = problem.truth
    assert value == pytest.approx(loss.item(), rel=1e-12) and 0 < value < 0.01, "memorised"
    torch.testing.assert_close(gradient, hidden.grad[kept], rtol=1e-9, atol=1e-12)
    assert kept.tolist() == problem.positions.tolist() and len(kept) == 6


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
def test_a_wrong_contestant_is_seen(monkeypatch, tmp_path, capsys, wrong, flags):
    eager, path = CONTESTANTS["eager"].build, tmp_path / "head.json"
    for name in ("ours", "eager"):
        contestant = dataclasses.replace(CONTESTANTS[name], build=lambda problem: lambda: wrong(*eager(problem)()))
        monkeypatch.setitem(CONTESTANTS, name, contestant)
    arguments = [*DRY, "--ignored", "0.5", "--p", "flat", "--json", str(path)]
    assert head.main([*arguments, "--contestants", "ours"]) == 1
    assert contestants_of(path)[0]["ours"]["flags"] == flags and f"wrong: {flags[0]}" in capsys.readouterr().out
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


def goals_of(setting, peak_mb, **times):
    """(value, limit, met) of a row's goals."""
    records = {name: {"status": MEASURED, "median_ms": time, "peak_mb": peak_mb} for name, time in times.items()}
    records = {name: {"role": CONTESTANTS[name].role, **record} for name, record in records.items()}
    row = {"setting": dataclasses.asdict(setting), "contestants": records, "goals": []}
    head.finish(row)
    return [(goal["value"] and round(goal["value"], 3), round(goal["limit"], 3), goal["met"]) for goal in row["goals"]]


def test_goals():
    gpu = Setting(hidden=3584, vocabulary=152064)
    memory = (300.0, 432.161, True)
    assert goals_of(gpu, 300.0, floor_unchunked=10.0, ours=10.9, liger=20.0) == [
        (1.09, 1.1, True),
        (0.545, 1.0, True),
        memory,
    ]
    assert goals_of(gpu, 300.0, ours=11.1) == [(None, 1.1, None), (None, 1.0, None), memory]
    cpu, states = dataclasses.replace(SMALL, tokens=10**6), 3 * SMALL.hidden * 4
    times = {"floor_rows": 12.0, "floor_together": 11.0, "floor_unchunked": 10.0, "ours": 12.0}
    assert goals_of(cpu, 200.0, **times, eager=20.0, trl=11.9) == [
        (1.2, 1.05, False),  # over any floor
        (1.091, 1.05, False),  # over those within our memory
        (0.6, 0.5, False),  # over eager, half of the tokens ignored
        (1.008, 1.031, True),  # over the fastest peer
        (200.0, states + 128.0, True),
    ]
    times |= {"floor_together_known": 8.0, "ours_known": 8.4, "eager": 30.0}
    assert goals_of(dataclasses.replace(cpu, loss="kl"), 999.0, **times) == [
        (1.2, 1.05, False),  # four products
        (1.05, 1.05, True),  # three
        (0.4, 1.031, True),
        (999.0, states + 14.0, False),  # of ours, and with the embedding cached
        (999.0, states + 14.0, False),
    ]


def test_scaling_goals():
    def point(sweep, tokens, vocabulary):
        setting = {"sweep": sweep, "tokens": tokens, "vocabulary": vocabulary, "hidden": 8}
        return {"setting": setting, "contestants": {"ours": {"median_ms": 1.0 * tokens * vocabulary, "peak_mb": 100.0}}}

    lines = [point("N", 8, 64), point("N", 16, 64), point("V", 8, 64), point("V", 8, 128)]
    assert all(goal["met"] for goal in head.scaling_goals(lines))
    lines[-1]["contestants"]["ours"] = {"median_ms": 9e5, "peak_mb": 200.0}
    assert [goal["met"] for goal in head.scaling_goals(lines)] == [True, True, True, False, False]
    pytest.importorskip("matplotlib")
    assert head.plot({"rows": lines, "machine": {"cpu": "X"}, "date": "D"}).startswith(b"\x89PNG")


@pytest.mark.parametrize(
    "arguments, complaint",
    [
        (["--hidden", "64"], "--hidden and --vocab go together"),
        (["--contestants", "cce,kahan"], "unknown contestant 'kahan'"),
        (["--ignored", "0.5,1"], "invalid shares value"),
    ],
)
def test_bad_arguments(capsys, arguments, complaint):
    with pytest.raises(SystemExit) as ended:
        head.main(arguments)
    assert ended.value.code == 2 and complaint in capsys.readouterr().err


def test_rows_and_contestants_of_a_gpu():
    settings = head.settings_of(head.parse(["--device", "cuda"]))
    assert len(settings) == 16 and {(each.hidden, each.vocabulary) for each in settings[:4]} == set(head.GPU_SHAPES)
    assert {(each.tokens, each.dtype, each.backend) for each in settings} == {(8192, "bfloat16", "auto")}
    names = taking_part(settings[0])
    assert names[:5] == ["floor_unchunked", "ours", "liger", "trl", "quack"], "compilers come last"
    assert names[-2:] == ["cce", "cce_exact"] and names.index("compile") > names.index("eager")


class Benchmark:
    """In place of pytest-benchmark's fixture: runs once."""

    def __init__(self):
        self.extra_info, self.stats = {}, SimpleNamespace(stats=SimpleNamespace(median=1e-3))

    def pedantic(self, action, *, setup, **rounds):
        arguments, options = setup()
        action(*arguments, **options)


@pytest.mark.parametrize("name", rows.CASES)
def test_tile_passes_of_every_backend(monkeypatch, name):
    for size, value in {"ROWS": 2, "COLUMNS": 128, "STATES": 3, "HIDDEN": 8}.items():
        monkeypatch.setattr(rows, size, value)
    for backend in ("torch", "native") if why_not_native(torch.device("cpu")) is None else ("torch",):
        benchmark = Benchmark()
        rows.test_tile_pass(benchmark, backend, name)
        assert benchmark.extra_info["nanoseconds_per_element"] > 0


def test_host_time(tmp_path, monkeypatch):
    readme = tmp_path / "README.md"
    monkeypatch.setattr(host_time, "README", readme)
    monkeypatch.setattr(host_time, "WARMUP", 1)
    readme.write_text("no markers\n")
    assert host_time.main(["--readme", "--calls", "2"]) == 2
    readme.write_text(f"before\n{host_time.BEGIN}\nold\n{host_time.END}\nafter\n")
    assert host_time.main(["--readme", "--calls", "2"]) == 0
    written = readme.read_text()
    assert "| `triton` | stubbed |" in written and "old" not in written and written.endswith("after\n")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_gpu(tmp_path):
    path = tmp_path / "head.json"
    names = "floor_unchunked,ours,ours_known,eager"
    assert head.main(["losses", "--device", "cuda", "--tiny", "--contestants", names, "--json", str(path)]) == 0
    assert {record["status"] for records in contestants_of(path) for record in records.values()} == {RAN}
