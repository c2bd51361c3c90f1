"""The step's benchmark as a dry run; that a wrong loop is seen; scaling, tile passes and `make bench` in the small."""

import dataclasses
import json
import math
import sys
import time
from types import SimpleNamespace

import pytest
import torch
from transformers import LlamaForCausalLM

from benchmarks import bench, scaling, step, step_loops, step_measure, step_problem
from benchmarks.bench_table import BEGIN, END, with_block
from benchmarks.head_measure import MEASURED, RAN
from benchmarks.step_loops import LOOPS, METHODS, MaterialisedLoop, OurLoop
from benchmarks.step_measure import Answer, compare
from benchmarks.step_problem import Shape, StepSetting, build_base, epoch, load_policy
from benchmarks.step_table import goals, markdown
from fastforget.backends import passes_of, why_not_native

TINY = StepSetting(shape="tiny", sequences=3, length=24, ragged=True)
DRY = ["--device", "cpu", "--tiny", "--here"]


def test_the_dry_run_of_make_test(tmp_path, capsys):
    path = tmp_path / "results" / "step.json"
    assert step.main([*DRY, "--json", str(path)]) == 0
    results = json.loads(path.read_text())
    assert results["dry_run"] and results["commit"] and results["date"] and results["machine"]["device"] == "cpu"
    assert [row["method"] for row in results["rows"]] == list(METHODS)
    for row in results["rows"]:
        assert row["setting"]["ragged"] and row["goals"] == [] and row["backend"]
        assert row["contestants"] == {name: {"status": RAN} for name in LOOPS}, "no figure of speed"
        check = row["check"]
        assert check["flags"] == [] and check["weights"] == 8, "r=8 on q and k of two layers, A and B"
        assert 0 < check["peer_error"] < 1e-5 and 0 < check["ours_later"]["error"] < 1e-5
        assert check["ours_first"]["difference"] < 1e-4
        assert set(check["losses"]) == {*step_measure.CHECKED, "float64"}
    printed = capsys.readouterr().out
    assert path.with_suffix(".md").read_text() in printed and "A dry run" in printed
    assert step.main(["--table", str(path)]) == 0 and "A dry run" in capsys.readouterr().out


def test_in_eight_bit(capsys):
    assert step.main([*DRY, "--bits", "8", "--methods", "grad_diff"]) == 0
    assert "8 bit" in capsys.readouterr().out


def peer_that(change):
    """A peer whose KL is changed."""
    right = MaterialisedLoop.kl
    return ("kl", lambda self, batch: change(self, right(self, batch), batch))


def ours_that(change):
    """Ours with something done after its backward."""
    right = OurLoop.backward

    def backward(self, batches):
        loss = right(self, batches)
        return change(self, loss)

    return ("backward", backward)


def scale_gradient(loop, loss, factor=1 + 1e-4):
    for group in loop.optimizer.param_groups:
        group["params"][0].grad.mul_(factor)
    return loss


def over_all_tokens(self, right, batch):
    labelled = (batch["labels"][:, 1:] != -100).sum()
    return right * labelled / batch["input_ids"].numel()


@pytest.mark.parametrize(
    "owner, change, flag",
    [
        (OurLoop, ours_that(lambda loop, loss: loss * (1 + 1e-4)), "loss"),
        (OurLoop, ours_that(lambda loop, loss: loss * math.nan), "loss"),
        (OurLoop, ours_that(scale_gradient), "lora_A"),
        (MaterialisedLoop, peer_that(over_all_tokens), "loss"),
    ],
)
def test_a_wrong_loop_is_seen(monkeypatch, tmp_path, capsys, owner, change, flag):
    monkeypatch.setattr(owner, *change)
    path = tmp_path / "step.json"
    assert step.main([*DRY, "--methods", "mismatch", "--json", str(path)]) == 1
    flags = json.loads(path.read_text())["rows"][0]["check"]["flags"]
    assert any(each.startswith("ours_first: ") and flag in each for each in flags)
    assert f"does not compute the same: {flags[0]}" in capsys.readouterr().out


def test_without_float64_only_rounding_may_differ():
    def answer(loss=1.0, value=1.0):
        return Answer(loss, {"weight": torch.tensor([3.0, 4.0]).double() * value})

    answers = dict.fromkeys(step_measure.CHECKED, answer())
    assert compare(answers, None, torch.float32)["flags"] == []
    close = compare({**answers, "ours_later": answer(value=1 + 1e-4)}, None, torch.float32)
    assert close["flags"] == [] and close["ours_later"]["difference"] == pytest.approx(1e-4)
    assert compare({**answers, "ours_later": answer(value=1.01)}, None, torch.float32)["flags"] == [
        "ours_later: weight"
    ]
    assert compare({**answers, "ours_first": answer(math.nan)}, None, torch.float32)["flags"] == ["ours_first: loss"]
    missing = compare({**answers, "ours_first": Answer(1.0, {})}, None, torch.float32)
    assert missing["flags"] == ["ours_first: weight"]


def test_batches():
    first, second = epoch(dataclasses.replace(TINY, labelled=0.5))
    assert not torch.equal(first.forget["input_ids"], second.forget["input_ids"])
    assert torch.equal(first.mismatch["input_ids"][:, :12], first.forget["input_ids"][:, :12])
    answers = {tuple(row) for row in first.retain["input_ids"][:, 12:18].tolist()}
    assert {tuple(row) for row in first.mismatch["input_ids"][:, 12:18].tolist()} == answers
    for batch in (first.forget, first.retain, first.mismatch):
        assert (batch["labels"] != -100).sum(dim=1).tolist() == [12, 6, 12]
        assert batch["attention_mask"].sum(dim=1).tolist() == [24, 18, 24]
    (whole,) = epoch(StepSetting(batches=1))
    assert (whole.forget["labels"] != -100).float().mean() == pytest.approx(0.4, abs=0.01)


def test_a_llama_can_be_built(monkeypatch, tmp_path):
    monkeypatch.setitem(step_problem.SHAPES, "tiny", Shape("llama", 64, 2, 4, 128, 320, kv_heads=2))
    build_base(TINY, tmp_path)
    model = load_policy(TINY, tmp_path)
    assert isinstance(model.get_base_model(), LlamaForCausalLM) and model.training
    (answer, *_) = epoch(TINY)
    loop = step_loops.build_loop("ours_later", "grad_diff", TINY, model, lambda: None)
    assert loop.backward(answer).isfinite()


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_peaks(tmp_path):
    setting = dataclasses.replace(TINY, sequences=16, length=256)
    build_base(setting, tmp_path)
    found = {
        name: step.here(step_measure.peak_of, setting, tmp_path, "grad_diff", name, seconds=60)[name]["peak_mb"]
        for name in ("loop", "ours_later")
    }
    if None in found.values():
        pytest.skip("this kernel lets no process forget its peak")
    logits = 16 * 256 * 320 * 4 / 1e6
    assert found["loop"] > found["ours_later"] + 2 * logits


def measured(median, peak):
    return {"status": MEASURED, "median_ms": median, "peak_mb": peak}


def row_with(**seconds):
    records = {
        name: {"status": MEASURED, "median_ms": 1e3 * value, "peak_mb": 1000.0} for name, value in seconds.items()
    }
    check = {"weights": 8, "flags": []} | {name: {"difference": 1e-6} for name in ("ours_first", "ours_later")}
    row = {"name": "a row", "about": "X", "backend": "torch", "contestants": records, "check": check}
    return row | {"goals": goals(row)}


def test_goals_are_set_against_both_loops():
    good = row_with(loop=2.9, loop_selected=2.6, ours_first=1.3, ours_later=1.0)
    assert [goal["met"] for goal in good["goals"]] == [True, True, True, True, False]
    assert step.problems_of(good) == ["peak memory, ours / loop: 1.00, asked ≤ 0.35, **missed**"]
    bad = row_with(loop=2.9, loop_selected=2.4, ours_first=1.4, ours_later=1.0)
    assert step.problems_of(bad)[0] == "loop_selected / ours, later epochs: 2.40, asked ≥ 2.50, **missed**"
    bad["contestants"]["ours_first"] = {"status": "failed: no luck"}
    assert [goal["met"] for goal in goals(bad)] == [True, None, False, None, False]
    assert step.problems_of(bad)[0] == "ours_first: failed: no luck"
    here = {"device": "X", "cpu": "Y", "torch_threads": 1}
    text = markdown(
        {"date": "D", "machine": here, "commit": "C", "versions": {}, "dry_run": False, "rows": [good, bad]}
    )
    assert "| `loop_selected` | the same, label tokens selected before the KL | 2.600 | 2.60 | 1000 |" in text
    assert "| `ours_first` | UnlearnStep, first epoch | failed: no luck |" in text


@pytest.mark.parametrize(
    "arguments, complaint",
    [
        (["--shape", "opt-175b"], "unknown shape 'opt-175b'"),
        (["--bits", "3"], "unknown number of bits '3'"),
        (["--labelled", "1"], "a share between 0 and 1"),
        (["--methods", "npo"], "unknown method 'npo'"),
    ],
)
def test_bad_arguments(capsys, arguments, complaint):
    with pytest.raises(SystemExit) as ended:
        step.main(arguments)
    assert ended.value.code == 2 and complaint in capsys.readouterr().err


def test_scaling(tmp_path):
    rows = []
    for sweep, tokens, vocabulary in (("N", 8, 64), ("N", 16, 64), ("V", 8, 64), ("V", 8, 128)):
        point = scaling.Point(sweep, tokens, vocabulary, 8)
        records = step.here(scaling.measure_point, point, 1, seconds=60)
        assert {record["status"] for record in records.values()} == {MEASURED}
        rows.append({"point": dataclasses.asdict(point), "contestants": records})
    assert scaling.slope([(1, 5.0), (2, 10.0), (4, 20.0)]) == pytest.approx(1.0)
    for row in rows:
        point = row["point"]
        row["contestants"]["ours"] = {"median_ms": 1.0 * point["tokens"] * point["vocabulary"], "peak_mb": 100.0}
    assert all(goal["met"] for goal in scaling.goals(rows))
    rows[-1]["contestants"]["ours"] = {"median_ms": 9e5, "peak_mb": 200.0}
    assert [goal["met"] for goal in scaling.goals(rows)] == [True, True, True, False, False]
    del rows[-1]["contestants"]["ours"]["peak_mb"]
    assert scaling.goals(rows)[-1]["met"] is None
    pytest.importorskip("matplotlib")
    picture = scaling.plot({"rows": rows, "machine": {"cpu": "X", "torch_threads": 1}, "date": "D"}, tmp_path / "x.png")
    assert picture.read_bytes().startswith(b"\x89PNG")


class Benchmark:
    """In place of pytest-benchmark's fixture: runs once."""

    def __init__(self):
        self.extra_info = {}
        self.stats = SimpleNamespace(stats=SimpleNamespace(median=1e-3))

    def pedantic(self, action, *, setup, **rounds):
        arguments, options = setup()
        action(*arguments, **options)


def test_tile_passes_of_every_backend(monkeypatch):
    pytest.importorskip("pytest_benchmark")
    from benchmarks import test_rows as rows

    for name, size in {"ROWS": 2, "COLUMNS": 128, "STATES": 3, "HIDDEN": 8}.items():
        monkeypatch.setattr(rows, name, size)
    for name in ("torch", "native") if why_not_native(torch.device("cpu")) is None else ("torch",):
        calls = [(rows.test_label_tile, kinds) for kinds in (4, 10)] + [(rows.test_gradient_tile,)]
        calls += [(rows.test_paired_tile, known) for known in (False, True)]
        calls += [(rows.test_coupled_tile, kind) for kind in ("reverse_kl", "jsd")]
        calls += [(rows.test_state_pass, metric) for metric in ("l2", "cosine")]
        for function, *parameters in calls:
            benchmark = Benchmark()
            function(benchmark, passes_of(name, torch.float32), 1e9, *parameters)
            assert benchmark.extra_info["nanoseconds_per_element"] > 0
        assert benchmark.extra_info["bytes_moved"] == 2 * 3 * 8 * 4


def fake_results(name):
    """What a part's command writes."""
    if name == "rows":
        found = {
            "name": "test_label_tile[x]",
            "stats": {"median": 0.01, "rounds": 9},
            "extra_info": {"share_of_copy": 0.6},
        }
        return {"benchmarks": [found], "machine_info": {"node": "somebody's"}}
    if name == "scaling":
        point = dataclasses.asdict(scaling.Point("N", 8, 64, 8))
        return {"rows": [{"point": point, "contestants": {"ours": measured(5.0, 1.0)}}], "goals": []}
    if name in ("head", "losses"):
        records = {
            "ours": {"status": MEASURED, "median_ms": 900.0, "peak_mb": 80.0},
            "trl": {"status": "not installed"},
        }
        return {"rows": [{"name": "nll | N", "contestants": records, "goals": []}]}
    return {"rows": [row_with(loop=2.5, ours_later=1.0, ours_first=1.2)]}


def test_bench(tmp_path, monkeypatch, capsys):
    def runner(command, seconds):
        path = bench.Path(command[-1])
        if path.stem == "scaling":
            path.with_suffix(".png").write_bytes(b"a picture")
        if path.stem != "head" or "--full" not in command:
            path.write_text(json.dumps(fake_results(path.stem)))
        return (1 if path.stem == "step" else 0), "said"

    arguments = ["--out", str(tmp_path), "--date", "2026-01-02"]
    assert bench.main(arguments, runner) == 0, "a missed goal is no failure"
    results = json.loads((tmp_path / "2026-01-02-bench.json").read_text())
    assert {name: part["status"] for name, part in results["parts"].items()} == dict.fromkeys(bench.PARTS, MEASURED)
    assert "somebody" not in json.dumps(results)
    assert (tmp_path / "2026-01-02-bench.png").read_bytes() == b"a picture"
    text = (tmp_path / "2026-01-02-bench.md").read_text()
    assert (
        "| `ours` | fastforget | 900 | 1.00 | 80 |" in text and "| `trl` | TRL's fused head | not installed |" in text
    )
    assert "label_tile[x]` | 10.0 |" in text and "60 %" in text
    readme = tmp_path / "README.md"
    readme.write_text(f"before\n{BEGIN}\nold\n{END}\nafter\n")
    assert bench.write_readme(tmp_path / "2026-01-02-bench.json", readme) == 0
    written = readme.read_text()
    assert written.startswith("before\n") and written.endswith(f"{END}\nafter\n") and "old" not in written
    assert "| nll / N | fastforget | 900 | 1.00 | 80 |" in written and "not installed" not in written
    assert with_block(written, "new") == f"before\n{BEGIN}\nnew\n{END}\nafter\n"
    readme.write_text("no markers\n")
    assert bench.write_readme(tmp_path / "2026-01-02-bench.json", readme) == 2
    assert "needs these two lines" in capsys.readouterr().err
    assert bench.main([*arguments, "--only", "rows"], lambda command, seconds: (4, "no luck")) == 1
    assert json.loads((tmp_path / "2026-01-02-bench.json").read_text())["parts"]["rows"]["said"] == "no luck"


def test_a_part_that_hangs_is_ended():
    began = time.monotonic()
    code, said = bench.run_command([sys.executable, "-c", "print('x', flush=True); import time; time.sleep(60)"], 1.0)
    assert code == 124 and said.startswith("x") and "had not ended" in said and time.monotonic() - began < 30
