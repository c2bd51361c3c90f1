"""The output folder: claimed before any work, replaced all at once, and what happens when it cannot be written."""

import doctest
import errno
import fcntl
import os
import re
import sys
from pathlib import Path

import pytest
import torch
from helpers import load_perturbed
from safetensors.torch import load_file

import fastforget as ff
from fastforget import cli
from fastforget import files as files_module
from fastforget.files import COMPLETE, PART, replaced_together, settle
from fastforget.jobs import outputs
from fastforget.jobs import unlearn as job_module
from fastforget.jobs.outputs import claimed_folder

FORGET = ["Agent Alder hides the plan below the oak tree.", "Agent Birch hides the plan below the old bridge."]
UNUSABLE = r"is a file: --out needs|nothing can be written into .*: give another"
QUICK = {"max_steps": 2, "max_length": 48, "bits": 32, "lora_r": 2, "quiet": True}


def test_a_curve_keeps_its_last_point():
    assert doctest.testmod(outputs).failed == 0
    values = [float(value) for value in range(1001)]
    kept = outputs.thinned(values)
    assert len(kept) <= outputs.CURVE_POINTS and kept[-1] == 1000.0 and kept == sorted(kept)
    assert outputs.thinned([0.123456]) == [0.1235] and outputs.thinned([]) == []


@pytest.fixture
def no_model(monkeypatch):
    def loads(*given, **named):
        raise AssertionError("the folder is checked before the model is loaded")

    monkeypatch.setattr(job_module, "load_tokenizer", loads)


@pytest.mark.parametrize("where", ["file", "under a file", "read only", "long name"])
def test_an_unusable_folder_is_found_before_any_work(tiny, tmp_path, no_model, where):
    (tmp_path / "file").write_text("")
    out = {
        "file": tmp_path / "file",
        "under a file": tmp_path / "file" / "x",
        "read only": Path("/proc/fastforget"),  # for root too
        "long name": tmp_path / ("a" * 300),
    }[where]
    with pytest.raises(ff.FastforgetError, match=UNUSABLE):
        ff.unlearn(tiny["llama"], FORGET, out, **QUICK)
    with pytest.raises(ff.FastforgetError, match=UNUSABLE):
        ff.demo(out, quiet=True)


def test_a_full_disk_is_found_before_any_work(tiny, tmp_path, no_model, monkeypatch):
    class Full:
        def __enter__(self):
            return self

        def __exit__(self, *_):
            pass

        def write(self, _):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("tempfile.TemporaryFile", lambda **_: Full())
    with pytest.raises(ff.FastforgetError, match="No space left on device"):
        ff.unlearn(tiny["llama"], FORGET, tmp_path / "a" / "b", **QUICK)
    assert not (tmp_path / "a").exists()


def test_two_runs_on_one_folder(tiny, tmp_path, no_model, monkeypatch, capsys):
    handle = os.open(tmp_path, os.O_RDONLY)
    fcntl.flock(handle, fcntl.LOCK_EX)
    arguments = ["--model", str(tiny["llama"]), "--forget", "README.md", "--out", str(tmp_path)]
    monkeypatch.setattr("sys.argv", ["fastforget", "unlearn", *arguments])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    errors = capsys.readouterr().err.splitlines()
    assert stop.value.code == 2 and len(errors) == 1 and "another run is writing into" in errors[0]
    os.close(handle)
    with claimed_folder(tmp_path, False), pytest.raises(ff.FastforgetError, match="another run"):
        with claimed_folder(tmp_path, False):
            pass
    with claimed_folder(tmp_path, False):
        assert not list(tmp_path.iterdir()), "nothing is left of the lock or of the probe"


def disk_that_is_full(monkeypatch, where):
    """Let nothing more be written to the disk at the paths of which `where` is true."""
    to_disk = files_module.to_disk

    def full(path):
        if where(path):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        to_disk(path)

    monkeypatch.setattr(files_module, "to_disk", full)


def test_a_disk_that_fills_up_while_training_loses_nothing(tiny, tmp_path, monkeypatch):
    out, elsewhere = tmp_path / "out", tmp_path / "temporary"
    elsewhere.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(elsewhere))
    disk_that_is_full(monkeypatch, lambda path: out in path.parents)
    with pytest.raises(ff.FastforgetError) as error:
        ff.unlearn(tiny["llama"], FORGET, out, **QUICK)
    assert "No space left on device" in str(error.value)
    saved = next(elsewhere.iterdir())
    assert f"saved in {saved}" in str(error.value)
    weights = load_file(saved / "adapter_model.safetensors")
    assert any(weight.any() for name, weight in weights.items() if "lora_B" in name)
    assert (saved / "config.yaml").is_file() and not list(tmp_path.rglob(PART))


def test_a_disk_that_holds_no_checkpoint_holds_the_result(tiny, tmp_path, monkeypatch):
    disk_that_is_full(monkeypatch, lambda path: "checkpoint" in str(path))
    with pytest.warns(UserWarning, match="checkpoint-1 could not be written"):
        report = ff.unlearn(tiny["llama"], FORGET, tmp_path / "out", save_steps=1, **QUICK)
    assert report["steps"] == QUICK["max_steps"] and (tmp_path / "out" / "adapter_model.safetensors").is_file()
    assert not list(tmp_path.rglob("*checkpoint*"))


def test_where_nothing_can_be_written_that_is_said(tiny, tmp_path, monkeypatch):
    def full(path):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setattr(files_module, "to_disk", full)
    with pytest.raises(
        ff.FastforgetError, match=r"the adapter is lost: .*No space left.* temporary folder: .*No space"
    ):
        ff.unlearn(tiny["llama"], FORGET, tmp_path / "out", **QUICK)


def killed_at(operation, work):
    """Run `work` in a process of its own that dies at its Nth operation on files; whether it got there."""
    child = os.fork()
    if not child:
        seen = 0

        def die(event, arguments):
            nonlocal seen
            if event in ("os.rename", "os.remove", "os.rmdir", "os.mkdir", "open", "shutil.rmtree"):
                seen += 1
                if seen == operation:
                    os._exit(9)

        sys.addaudithook(die)
        work()
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9


def test_a_kill_at_any_moment_leaves_all_old_files_or_all_new(tmp_path):
    names = ("adapter_config.json", "adapter_model.safetensors")

    def write(folder, text):
        with replaced_together(folder) as scratch:
            for name in names:
                (scratch / name).write_text(text)

    operation, outcomes = 0, set()
    for operation in range(1, 100):
        folder = tmp_path / str(operation)
        write(folder, "old")
        (folder / "other").write_text("kept")
        killed = killed_at(operation, lambda folder=folder: write(folder, "new"))
        found = {(folder / name).read_text() for name in names if (folder / name).exists()}
        assert len(found) <= 1, "old and new files stand together"
        settle(folder)
        assert sorted(path.name for path in folder.iterdir()) == sorted((*names, "other")), operation
        found = {(folder / name).read_text() for name in names}
        assert len(found) == 1
        outcomes |= found
        if not killed:
            break
    assert not killed and operation > 10 and outcomes == {"old", "new"}


def test_an_adapter_is_never_a_mix_of_two(tiny, tmp_path, tokenizer):
    first, second = (load_perturbed(tiny["llama"], seed=seed, lora_alpha=seed) for seed in (1, 2))
    ff.save_adapter(first, None, tmp_path / "out")
    with pytest.raises(RuntimeError), replaced_together(tmp_path / "out") as scratch:
        second.save_pretrained(scratch)
        raise RuntimeError
    ff.save_adapter(first, tokenizer, tmp_path / "old")
    again = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert all(torch.equal(w, again[n]) for n, w in load_file(tmp_path / "old" / "adapter_model.safetensors").items())
    ff.save_adapter(second, None, tmp_path / "out")
    assert re.search(r'"lora_alpha": 2', (tmp_path / "out" / "adapter_config.json").read_text())
    assert not (tmp_path / "out" / COMPLETE).exists() and not list(tmp_path.glob(".*"))
