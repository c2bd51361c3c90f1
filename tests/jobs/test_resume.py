"""A job that is killed goes on from its last checkpoint and ends, bit for bit, as one that was not.

Jobs run in forked processes with one thread, which are killed by a signal at some moment, or at their Nth operation on
files: inside a checkpoint, between two, or while the result is written.
"""

import json
import os
import random
import shutil
import signal
import sys
import time
from pathlib import Path

import pytest
import torch
from helpers import FORGET, RETAIN, adapter_of, same
from safetensors.torch import load_file

import fastforget as ff
from fastforget.data.examples import Example
from fastforget.jobs.checkpoints import STATE, Checkpoints
from fastforget.jobs.loop import run_job
from fastforget.jobs.options import JobSettings
from fastforget.state_file import read_state, write_state

pytestmark = pytest.mark.usefixtures("short_continuations")

JOB = {"max_steps": 9, "save_steps": 2, "max_length": 48, "bits": 32, "lora_r": 4, "batch_size": 2, "quiet": True}
JOB |= {"retain": RETAIN, "learning_rate": 2e-3}
FILE_EVENTS = ("os.rename", "os.remove", "os.rmdir", "os.mkdir", "open", "os.link", "shutil.rmtree", "os.listdir")
VARIETY = {  # each brings other state with it
    "npo with a reference": {"preset": "npo", "preset_options": {"retain": "kl"}},
    "a dual": {"preset": "pdu"},
    "refusals, drawn at each step": {"preset": "idk", "auto_micro_batch": True, "micro_batch": 2},
    "a task vector": {"preset": "task_vector"},
    "cluster centres": {"preset": "distance_cluster", "preset_options": {"k": 2}},
    "mgda, all checkpoints but one removed": {"preset": "grad_diff", "combine": "mgda", "keep_checkpoints": 1},
    "8 bit": {"preset": "npo", "bits": 8},
}


def weights(folder):
    return load_file(folder / "adapter_model.safetensors")


def in_a_process(work, *, kill_after=None, kill_at=None):
    """Run `work` in a fork, killed after some seconds or at its Nth operation on files; whether it ended by itself."""
    child = os.fork()
    if not child:
        code = 1
        try:
            torch.set_num_threads(1)
            seen = 0

            def die(event, arguments):
                nonlocal seen
                if event in FILE_EVENTS and "run" in str(arguments):
                    seen += 1
                    if seen == kill_at:
                        os.kill(os.getpid(), signal.SIGKILL)

            sys.addaudithook(die)
            work()
            code = 0
        finally:
            os._exit(code)
    deadline = time.monotonic() + (kill_after if kill_after is not None else 300)
    while time.monotonic() < deadline:
        pid, status = os.waitpid(child, os.WNOHANG)
        if pid:
            code = os.waitstatus_to_exitcode(status)
            assert code in (0, -signal.SIGKILL), "the job failed"
            return code == 0
        time.sleep(0.002)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return False


@pytest.fixture
def job(tiny):
    def run(out, **options):
        ff.unlearn(tiny["llama"], FORGET, out, **{**JOB, **options})

    return run


def resumed(job, out, **kill):
    """Run a job that may be killed, and let it go on; whether it was killed."""
    killed = not in_a_process(lambda: job(out), **kill)
    before = Checkpoints(out).folders()
    assert not before or Checkpoints(out).newest() is not None, "after the first checkpoint one can always be loaded"
    if killed:
        assert in_a_process(lambda: job(out, resume=True))
    return killed


def killed_after(steps, work):
    """Run `work`, and kill this process in the middle of its Nth step."""
    clip, seen = torch.nn.utils.clip_grad_norm_, []

    def clip_and_count(*given):
        seen.append(given)
        if len(seen) == steps:
            os.kill(os.getpid(), signal.SIGKILL)
        return clip(*given)

    torch.nn.utils.clip_grad_norm_ = clip_and_count
    work()


@pytest.mark.parametrize("options", VARIETY.values(), ids=VARIETY.keys())
def test_what_goes_on_ends_as_what_never_stopped(job, tmp_path, options):
    whole, out = tmp_path / "run-whole", tmp_path / "run-killed"
    assert in_a_process(lambda: job(whole, **options))
    assert not in_a_process(lambda: killed_after(6, lambda: job(out, **options)))
    assert in_a_process(lambda: job(out, **options, resume=True))
    assert same(weights(out), weights(whole)) and any(value.any() for value in weights(out).values())
    reports = [json.loads((folder / "report.json").read_text()) for folder in (whole, out)]
    for name in ("steps", "stopped", "forget_nll_after", "retain_nll_after"):
        assert reports[0][name] == reports[1][name], name
    names = [sorted(path.name for path in folder.iterdir()) for folder in (whole, out)]
    assert names[0] == names[1] and not any(name.startswith(".") for name in names[1])


def recited(model, length=16):
    """Passages that the model continues by itself: it knows them by heart."""
    rows = []
    for start in (5, 60, 120, 180, 240):
        ids = [start, start + 1]
        with torch.no_grad():
            while len(ids) < length:
                ids.append(int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
        rows.append(Example(tuple(ids), prompt_length=2))
    return rows


def test_a_stopping_rule_goes_on_where_it_was(tiny, tokenizer, tmp_path):
    """Also where some of the passages are gone, and where all are and the learning rate falls."""
    settings = JobSettings(max_steps=120, learning_rate=3e-3, until="em=0.2", batch_size=2, save_steps=3)

    def run(steps):
        """Run the job from what it saved after so many steps; what it came to."""
        torch.manual_seed(0)
        model = ff.load(tiny["llama"], bits=32, lora={"r": 8}).eval()
        checkpoints = Checkpoints(tmp_path)
        for folder in checkpoints.folders()[steps // settings.save_steps :]:
            shutil.rmtree(folder)
        terms, rows = ff.preset("other_tokens", retain=None), recited(model)
        result = run_job(model, tokenizer, rows, None, terms, settings, checkpoints=checkpoints, resume=True)
        return (result.steps, result.stopped, result.forget_nll), adapter_of(model)

    figures, adapter = run(0)
    known = [len(read_state(folder / STATE)["job"]["until"]["known"]) for folder in Checkpoints(tmp_path).folders()]
    assert "all 5 passages are gone" in figures[1] and figures[0] < 120 and 0 < min(known) < 5
    for place in (known.index(min(known)) + 1, len(known) - 2):
        again, other = run(place * settings.save_steps)
        assert again == figures and same(other, adapter)


@pytest.fixture
def whole(job, tmp_path):
    """The adapter of a job that nothing stopped."""
    out = tmp_path / "run-whole"
    assert in_a_process(lambda: job(out))
    return weights(out)


def kill_at_random(job, whole, tmp_path, seeds):
    start = time.monotonic()
    assert in_a_process(lambda: job(tmp_path / "run-timed"))
    seconds, kills = time.monotonic() - start, 0
    for seed in seeds:
        chance, out = random.Random(seed), tmp_path / f"run-{seed}"
        if seed % 2:
            killed = resumed(job, out, kill_at=chance.randint(3, 260))
        else:
            killed = resumed(job, out, kill_after=chance.uniform(0.3, 1.0) * seconds)
        assert same(weights(out), whole), seed
        kills += killed
    return kills


def test_a_few_kills(job, whole, tmp_path):
    assert kill_at_random(job, whole, tmp_path, range(4)) >= 2


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_thirty_kills(job, whole, tmp_path):
    assert kill_at_random(job, whole, tmp_path, range(100, 130)) >= 20


def damage(path, how):
    content = bytearray(path.read_bytes())
    if how == "truncated":
        content = content[: len(content) // 2]
    elif how == "empty":
        content = b""
    else:
        content[int(how * (len(content) - 1))] ^= 4
    path.write_bytes(content)


@pytest.mark.parametrize("how", ["truncated", "empty", 0.0, 0.01, 0.5, 1.0, "missing"])
@pytest.mark.parametrize("name", [STATE, "reference-000000002.safetensors"])
def test_a_broken_checkpoint_is_not_used(job, tmp_path, tiny, name, how):
    out, lines = tmp_path / "run", []
    job(out, max_steps=4, preset="npo")
    path = out / "checkpoint-4" / name
    content = path.read_bytes()
    path.unlink()
    if how != "missing":
        path.write_bytes(content)  # a file of its own, where it was a link
        damage(path, how)
    newest = Checkpoints(out, say=lines.append).newest()
    assert newest is not None and newest.folder.name == "checkpoint-2"
    assert len(lines) == 1 and "checkpoint-4 is not used" in lines[0]


def test_resume_is_of_the_same_job(job, tmp_path, tiny):
    out = tmp_path / "run"
    job(out, max_steps=4)
    with pytest.raises(ff.FastforgetError, match="already holds an adapter"):
        job(out, max_steps=4)
    adapter = out / "adapter_model.safetensors"
    (out / "adapter_config.json").unlink()
    before = adapter.read_bytes()
    adapter.unlink()
    with pytest.raises(ff.FastforgetError, match="holds checkpoints of an earlier job: --resume"):
        job(out, max_steps=4)
    for changed, name in (
        ({"learning_rate": 1e-4}, "--learning-rate"),
        ({"retain": RETAIN[:2]}, "retain set"),
        ({"seed": 2}, "--seed"),
    ):
        with pytest.raises(ff.FastforgetError, match=f"is of a job with other .*{name}"):
            job(out, **{"max_steps": 4, **changed}, resume=True)
    job(out, max_steps=4, resume=True, save_steps=1, keep_checkpoints=1)
    assert adapter.read_bytes() == before, "nothing was left to do"
    job(out, max_steps=2, overwrite=True)
    assert [folder.name for folder in Checkpoints(out).folders()] == ["checkpoint-2"]


def test_resume_without_a_checkpoint_begins_at_the_beginning(job, tmp_path):
    job(tmp_path / "run1", max_steps=2, save_steps=None)
    job(tmp_path / "run2", max_steps=2, save_steps=None, resume=True)
    assert same(weights(tmp_path / "run1"), weights(tmp_path / "run2"))


def test_only_so_many_checkpoints_are_kept(job, tmp_path):
    job(tmp_path / "run", keep_checkpoints=2, preset="npo")
    folders = Checkpoints(tmp_path / "run").folders()
    assert [folder.name for folder in folders] == ["checkpoint-6", "checkpoint-8"]
    parts = [path.stat() for path in Path(folders[1]).glob("reference-*")]
    assert len(parts) == 4 and sum(each.st_nlink > 1 for each in parts) == 3, "what came before is linked"


@pytest.mark.parametrize("file", ["reference-", STATE])
def test_a_full_disk_at_a_checkpoint_leaves_the_one_before_and_the_job_goes_on(job, tmp_path, monkeypatch, file):
    """And the one after it is whole: what the one that failed was to hold of the reference's cache is in it."""

    def full(path, state):
        if "checkpoint-4" in str(path) and path.name.startswith(file):
            raise OSError(28, os.strerror(28))
        write_state(path, state)

    whole, out = tmp_path / "run-whole", tmp_path / "run"
    with monkeypatch.context() as patch, pytest.warns(UserWarning, match=r"checkpoint-4 could not .*No space left"):
        patch.setattr("fastforget.jobs.checkpoints.write_state", full)
        job(out, preset="npo")
    assert [folder.name for folder in Checkpoints(out).folders()] == ["checkpoint-2", "checkpoint-6", "checkpoint-8"]
    assert not list(out.glob(".*"))
    job(whole, preset="npo")
    assert same(weights(out), weights(whole))
    for name in ("checkpoint-8", "checkpoint-6"):
        job(out, preset="npo", resume=True)
        assert same(weights(out), weights(whole))
        shutil.rmtree(out / name)


def test_a_later_checkpoint_that_is_broken_pushes_out_none(tmp_path):
    Checkpoints(tmp_path, keep=1).write(2, {}, None, lambda folder: None)
    Checkpoints(tmp_path).write(9, {}, None, lambda folder: None)
    (tmp_path / "checkpoint-9" / STATE).write_bytes(b"broken")
    checkpoints = Checkpoints(tmp_path, keep=1)
    assert checkpoints.to_resume().folder.name == "checkpoint-2"
    checkpoints.write(4, {}, None, lambda folder: None)
    assert Checkpoints(tmp_path).newest().folder.name == "checkpoint-4"
    assert not (tmp_path / "checkpoint-2").exists()
