"""What a job shows of its steps, and logs of them."""

import io
import json
import sys
import types

import pytest
import torch
from helpers import FORGET, QUICK, RETAIN
from rich.console import Console

import fastforget as ff
from fastforget.jobs import progress as progress_module
from fastforget.jobs import step_logs
from fastforget.jobs.progress import Clock, described, duration, figures_of, shown_steps
from fastforget.loss import UnlearnOutput


def output_of(loss=2.0, terms=(), **stats):
    tensors = {name: torch.tensor(value) for name, value in stats.items()}
    return UnlearnOutput(torch.tensor(loss), {name: torch.tensor(value) for name, value in terms}, tensors)


def test_figures_of_a_step_and_their_words():
    found = figures_of(output_of(forget_nll=1.5, retain_nll=0.25, terms=[("greedy_share", 0.5), ("ce", 0.25)]))
    assert found == {"loss": 2.0, "forget_nll": 1.5, "retain_nll": 0.25, "term/greedy_share": 0.5, "term/ce": 0.25}
    assert described(found) == ["forget NLL 1.50", "retain NLL 0.25", "memorised 50%"]
    assert described(figures_of(output_of(terms=[("rmu", 2.0)]))) == ["loss 2"]


def test_clock_leaves_the_first_step_out(monkeypatch):
    times = iter([0.0, 9.0, 11.0])
    monkeypatch.setattr(progress_module.time, "perf_counter", lambda: next(times))
    monkeypatch.setattr(progress_module, "peak_gb", lambda: 1.25)
    clock = Clock()
    assert clock.described(1, 10) == ["1.25 GB"]
    assert clock.described(5, 10) == ["2 it/s", "2 s left", "1.25 GB"]


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.4, "0 s"), (59.4, "59 s"), (60, "1 min"), (3569, "59 min"), (7300, "2 h 2 min")]
)
def test_duration(seconds, text):
    assert duration(seconds) == text


@pytest.mark.parametrize(("total", "steps"), [(3, [1, 2, 3]), (40, list(range(4, 41, 4)))])
def test_lines_where_there_is_no_terminal(tmp_path, total, steps):
    for quiet in (False, True):
        file = io.StringIO()
        with shown_steps("npo", Console(file=file, width=200, quiet=quiet), log_to=None, out=tmp_path) as progress:
            for step in range(1, total + 1):
                progress(step, total, output_of(forget_nll=1.0))
        lines = file.getvalue().splitlines()
        assert [line.partition(",")[0] for line in lines] == (
            [] if quiet else [f"step {step} of {total}: forget NLL 1.00" for step in steps]
        )
        assert quiet or ("it/s" in lines[-1] and " left" in lines[-1] and " GB" in lines[-1])
    assert not [*tmp_path.iterdir()]


def test_a_bar_on_a_terminal(tmp_path, monkeypatch):
    screen, lines = io.StringIO(), io.StringIO()
    terminal = Console(file=screen, force_terminal=True, width=140)
    monkeypatch.setattr(progress_module, "Console", lambda stderr: terminal)
    with shown_steps("npo", Console(file=lines), log_to=None, out=tmp_path) as progress:
        for step in range(1, 9):
            progress(step, 8, output_of(forget_nll=1.0))
    assert "npo" in screen.getvalue() and "8/8" in screen.getvalue() and "forget NLL 1.00" in screen.getvalue()
    assert lines.getvalue() == ""


def test_a_jobs_log_has_a_line_a_step(tiny, tmp_path, short_continuations):
    out = tmp_path / "out"
    options = {"retain": RETAIN, "preset": "grad_diff", "log_to": "jsonl", **QUICK}
    report = ff.unlearn(tiny["llama"], FORGET, out, **options)
    lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3] and report["steps"] == 3
    for line in lines:
        assert line["loss"] == pytest.approx(line["term/ce"] + line["term/negated_ce"], rel=1e-5)
        assert line["forget_nll"] == pytest.approx(-line["term/negated_ce"], rel=1e-5) and line["seconds"] > 0
    ff.unlearn(tiny["llama"], FORGET, out, resume=True, overwrite=True, **options)
    assert len((out / "log.jsonl").read_text().splitlines()) == 6, "a job that goes on adds its lines"
    assert "log_to" not in (out / "config.yaml").read_text(), "another run of the options may be shown elsewhere"


def test_tensorboard_and_wandb_get_the_same(tmp_path, monkeypatch):
    written = []

    class Writer:
        def __init__(self, folder):
            written.append(folder)

        def __enter__(self):
            return self

        def __exit__(self, *error):
            written.append("closed")

        def add_scalar(self, name, value, step):
            written.append((step, name, value))

        def log(self, figures, step):
            written.extend((step, name, value) for name, value in figures.items())

    tensorboard = types.SimpleNamespace(SummaryWriter=Writer)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", tensorboard)
    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(init=lambda dir: Writer(dir)))
    for kind, folder in (("tensorboard", tmp_path / "tensorboard"), ("wandb", tmp_path)):
        written.clear()
        with step_logs.step_log(kind, tmp_path) as log:
            log(3, {"loss": 1.0, "forget_nll": 2.0})
        assert written == [folder, (3, "loss", 1.0), (3, "forget_nll", 2.0), "closed"]


def test_a_log_that_cannot_be_is_found_before_any_work(run, tmp_path, monkeypatch):
    monkeypatch.setattr(step_logs.importlib.util, "find_spec", lambda name: None)
    job = ["unlearn", "--model", "nowhere", "--forget", "FORGET", "--out", str(tmp_path / "out"), "--log-to"]
    code, _, errors = run(*job, "wandb")
    assert (code, errors) == (2, ["fastforget: --log-to wandb needs the library wandb: pip install wandb"])
    code, _, errors = run(*job, "paper")
    assert code == 2 and "must be one of jsonl, tensorboard, wandb, not 'paper'" in errors[0]
    assert not (tmp_path / "out").exists()


def test_json_is_the_report_and_nothing_else(run, tmp_path):
    out = tmp_path / "out"
    quick = ["--max-steps", "3", "--max-length", "48", "--bits", "32", "--lora-r", "4"]
    data = ["--model", "MODEL", "--forget", "FORGET", "--retain", "RETAIN"]
    code, text, errors = run("unlearn", *data, "--out", str(out), *quick, "--json")
    assert (code, errors) == (0, []) and json.loads(text) == json.loads((out / "report.json").read_text())
    code, text, errors = run(
        "evaluate", *data, "--adapter", str(out), "--out", str(tmp_path / "e"), "--bits", "32", "--json"
    )
    assert (code, errors) == (0, []) and json.loads(text) == json.loads((tmp_path / "e" / "report.json").read_text())
    code, text, errors = run("doctor", "--json")
    assert (code, errors) == (0, []) and json.loads(text)["fastforget"] == ff.__version__
