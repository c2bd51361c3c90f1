"""`fastforget unlearn` in two processes ends as in one, the first alone writes, and an error of one ends both."""

import json
import os
import subprocess
import sys

import pytest
import torch
from conftest import FORGET_TEXT, RETAIN_TEXT
from helpers import QUICK, adapter_of, same
from processes import in_processes
from rich.console import Console
from safetensors.torch import load_file

import fastforget as ff
from fastforget.jobs import unlearn as job

OPTIONS = {**QUICK, "batch_size": 3, "micro_batch": 1, "measured_passages": 2, "retain": [RETAIN_TEXT]}


def run(out, model, **options):
    """The report of a job, what it printed, and the adapter that it was left with."""
    console = Console(record=True, file=open(os.devnull, "w"))
    adapters = []
    save, job.save = job.save, lambda model, *rest: (adapters.append(adapter_of(model)), save(model, *rest))
    try:
        report = ff.unlearn(model, [FORGET_TEXT], out, console=console, **{**OPTIONS, "quiet": False, **options})
    finally:
        job.save = save
    return report, console.export_text(), adapters[-1]


def run_in_both(rank, out, model):
    return [run(out / preset, model, preset=preset) for preset in ("npo", "yao2023")]


@pytest.mark.skipif(torch.cuda.is_available(), reason="forks, which autograd's threads for GPUs forbid")
def test_two_processes_end_with_the_adapter_of_one(tiny, tmp_path, short_continuations):
    first, second = in_processes(tmp_path, 2, run_in_both, tmp_path, tiny["llama"])
    for (report, text, adapter), (other, silence, same_adapter) in zip(first, second, strict=True):
        name = report["preset"]
        expected, _, weights = run(tmp_path / f"{name}-alone", tiny["llama"], preset=name)
        assert "step 3 of 3" in text and silence == ""
        assert same(adapter, same_adapter) and other["curves"] == report["curves"]
        assert report["curves"]["forget"] == pytest.approx(expected["curves"]["forget"], abs=1e-4)
        saved = load_file(tmp_path / name / "adapter_model.safetensors")
        assert saved and {value.shape for value in saved.values()} == {value.shape for value in adapter.values()}
        for key, value in weights.items():
            assert float((adapter[key] - value).norm()) <= 1e-5 * float(value.norm()), (name, key)


def fail(rank, out, model):
    if rank == 1:
        job.load = lambda *arguments, **named: 1 / 0
    messages = []
    for options in ({"until": "gone"}, {}):
        with pytest.raises((ff.FastforgetError, ZeroDivisionError)) as error:
            run(out / "broken", model, **options)
        messages.append(str(error.value))
    return messages


@pytest.mark.skipif(torch.cuda.is_available(), reason="forks, which autograd's threads for GPUs forbid")
def test_an_error_of_one_process_ends_both(tiny, tmp_path, short_continuations):
    first, second = in_processes(tmp_path, 2, fail, tmp_path, tiny["llama"])
    assert "--until does not work over several processes" in first[0] and "--until does not work" in second[0]
    assert second[1] == "division by zero"
    assert first[1] == "process 1 failed, so this one stops too: ZeroDivisionError: division by zero"
    assert not (tmp_path / "broken").exists()


def test_torchrun_starts_the_command(tiny, tmp_path):
    files = {"forget": FORGET_TEXT, "retain": RETAIN_TEXT}
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    flags = [
        f"--{key}={value}"
        for key, value in {**OPTIONS, **{key: tmp_path / key for key in files}}.items()
        if key != "quiet"
    ]
    flags = [flag.replace("_", "-", flag.partition("=")[0].count("_")) for flag in flags]
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "fastforget"]
    command = [*launcher, "unlearn", "--json", f"--model={tiny['llama']}", f"--out={tmp_path / 'out'}", *flags]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["steps"] == 3
    assert (tmp_path / "out" / "adapter_model.safetensors").exists()
