"""`fastforget unlearn` in two processes ends as in one, the first alone writes, and an error of one ends both."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
import torch.distributed as dist
from conftest import FORGET_TEXT, RETAIN_TEXT
from helpers import QUICK, adapter_of, assert_gradients, same
from processes import in_processes
from rich.console import Console
from safetensors.torch import load_file

import fastforget as ff
from fastforget.jobs import unlearn as job
from fastforget.jobs.launched import terminated_in_order

OPTIONS = {**QUICK, "batch_size": 3, "micro_batch": 1, "measured_passages": 2, "retain": [RETAIN_TEXT]}
JOBS = {  # presets, the last two with companions in their batches, and options
    "npo": {"bits": 8, "until": "em=0.0", "combine": "pcgrad"},
    "yao2023": {},
    "kto": {"auto_micro_batch": True, "micro_batch": None},
}


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
    return [run(out / preset, model, preset=preset, **options) for preset, options in JOBS.items()]


@pytest.mark.skipif(torch.cuda.is_available(), reason="forks, which autograd's threads for GPUs forbid")
def test_two_processes_end_with_the_adapter_of_one(tiny, tmp_path, short_continuations):
    first, second = in_processes(tmp_path, 2, run_in_both, tmp_path, tiny["llama"])
    for (report, text, adapter), (other, silence, same_adapter) in zip(first, second, strict=True):
        name = report["preset"]
        expected, _, weights = run(tmp_path / f"{name}-alone", tiny["llama"], preset=name, **JOBS[name])
        assert "step 3 of 3" in text and silence == ""
        assert same(adapter, same_adapter) and other["curves"] == report["curves"]
        assert report["stopped"] == other["stopped"] == expected["stopped"]
        assert report["curves"]["forget"] == pytest.approx(expected["curves"]["forget"], abs=1e-4)
        saved = load_file(tmp_path / name / "adapter_model.safetensors")
        assert saved and {value.shape for value in saved.values()} == {value.shape for value in adapter.values()}
        assert_gradients(adapter, weights)
        tokens, expected_tokens = (
            each["tokens_a_second"] * each["seconds_a_step"] * each["steps"] for each in (report, expected)
        )
        assert tokens == pytest.approx(expected_tokens, rel=0.1), "those of all processes"


def stop_and_go_on(rank, out, model):
    """The adapter of a job, and of the same one that went on from its checkpoint of the first step."""
    whole = run(out / "job", model, save_steps=1, keep_checkpoints=3)[-1]
    if rank == 0:
        for name in ("checkpoint-2", "checkpoint-3"):
            shutil.rmtree(out / "job" / name)
    dist.barrier()
    return whole, run(out / "job", model, save_steps=1, resume=True)[-1]


@pytest.mark.skipif(torch.cuda.is_available(), reason="forks, which autograd's threads for GPUs forbid")
def test_processes_go_on_from_a_checkpoint(tiny, tmp_path, short_continuations):
    for whole, resumed in in_processes(tmp_path, 2, stop_and_go_on, tmp_path, tiny["llama"]):
        assert_gradients(resumed, whole)
    assert sorted(path.name for path in (tmp_path / "job").glob("checkpoint-*")) == [
        f"checkpoint-{n}" for n in (1, 2, 3)
    ]


def fail(rank, out, model):
    if rank == 1:
        job.load = lambda *arguments, **named: 1 / 0
    messages = []
    for options in ({"preset": "no_preset"}, {}):
        with pytest.raises((ff.FastforgetError, ZeroDivisionError)) as error:
            run(out / "broken", model, **options)
        messages.append(str(error.value))
    return messages


@pytest.mark.skipif(torch.cuda.is_available(), reason="forks, which autograd's threads for GPUs forbid")
def test_an_error_of_one_process_ends_both(tiny, tmp_path, short_continuations):
    first, second = in_processes(tmp_path, 2, fail, tmp_path, tiny["llama"])
    assert "no_preset" in first[0] and "no_preset" in second[0]
    assert second[1] == "division by zero"
    assert first[1] == "process 1 failed, so this one stops too: ZeroDivisionError: division by zero"
    assert not (tmp_path / "broken").exists()


def test_a_launcher_ends_a_process_in_order():
    before = signal.getsignal(signal.SIGTERM)
    left = []
    with pytest.raises(SystemExit) as stop, terminated_in_order():
        try:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(5)
        finally:
            left.append("in order")
    assert stop.value.code == 128 + signal.SIGTERM and left and signal.getsignal(signal.SIGTERM) == before


FLAGS = ["--max-steps=1", "--max-length=48", "--bits=32", "--lora-r=4", "--batch-size=3", "--measured-passages=1"]
BROKEN = """
import os
from fastforget import cli
from fastforget.jobs import unlearn
if os.environ["RANK"] == "1":
    unlearn.load = lambda *arguments, **named: 1 / 0
cli.main()
"""


@pytest.fixture
def launched(tiny, tmp_path):
    """launched(launcher, what to run) -> `fastforget unlearn`, whole, in the processes that a launcher starts."""
    texts = {"forget": FORGET_TEXT, "retain": RETAIN_TEXT}
    for name, text in texts.items():
        (tmp_path / name).write_text(text)
    files = [f"--{name}={tmp_path / name}" for name in ("forget", "retain", "out")]

    def run(*command):
        command = [*command, "unlearn", f"--model={tiny['llama']}", *files, *FLAGS, "--json"]
        return subprocess.run(command, capture_output=True, text=True, timeout=120)

    return run


TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]


def test_torchrun_starts_the_command(launched, tmp_path):
    done = launched(*TORCHRUN, "-m", "fastforget")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["steps"] == 1
    assert (tmp_path / "out" / "adapter_model.safetensors").exists()


@pytest.mark.slow
def test_torchrun_ends_where_a_process_fails(launched, tmp_path):
    script = tmp_path / "broken.py"
    script.write_text(BROKEN)
    done = launched(*TORCHRUN, script)
    assert done.returncode != 0 and "ZeroDivisionError: division by zero" in done.stderr
    assert not [*(tmp_path / "out").glob("*")]  # the launcher may have ended the first one before it removed the folder


@pytest.mark.slow
def test_accelerate_starts_the_command(launched, tmp_path):
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes=2", "--num_machines=1"]
    done = launched(*launcher, "--multi_gpu", "--mixed_precision=no", "--dynamo_backend=no", "-m", "fastforget")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["steps"] == 1
