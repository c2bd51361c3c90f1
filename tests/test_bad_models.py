"""Model folders that are broken, or hold code: one line, nothing asked, nothing run."""

import io
import json
import os
import pickle
import shutil

import pytest
import torch
from safetensors.torch import load_file

import fastforget as ff
from fastforget.jobs.bases import DIGESTS, SCRATCH, cached_base
from fastforget.models import load_tokenizer

MODULE = """
import pathlib
pathlib.Path({marker!r}).write_text("run")
from transformers import LlamaConfig as OwnConfig, LlamaForCausalLM as OwnModel
"""


@pytest.fixture
def folder(tiny, tmp_path):
    """A copy of a good model's folder."""
    return shutil.copytree(tiny["llama"], tmp_path / "model")


@pytest.mark.parametrize("kind", ["own", "llama"])
def test_code_in_a_model_folder_is_neither_run_nor_asked_about(folder, tmp_path, monkeypatch, kind):
    """Whether transformers knows the model type itself or not."""
    marker = tmp_path / "marker"
    (folder / "own.py").write_text(MODULE.format(marker=str(marker)))
    monkeypatch.setattr("sys.stdin", io.StringIO("y\n" * 10))
    automatic = {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnModel"}
    for name, changes in (
        ("config.json", {"auto_map": automatic, "model_type": kind}),
        ("tokenizer_config.json", {"auto_map": {"AutoTokenizer": ["own.OwnModel", None]}, "tokenizer_class": "Own"}),
    ):
        config = json.loads((folder / name).read_text())
        (folder / name).write_text(json.dumps(config | changes))
    for load in (lambda: ff.load(folder, bits=32), lambda: load_tokenizer(folder)):
        try:
            load()
        except ff.FastforgetError as error:
            assert "\n" not in str(error)
    assert not marker.exists()
    if kind == "own":
        with pytest.raises(ff.FastforgetError, match=r"trust_remote_code|custom code|own"):
            ff.load(folder, bits=32)


class Bomb:
    """Runs when it is unpickled."""

    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return exec, (f"open({self.marker!r}, 'w').close()",)


@pytest.mark.parametrize("whole", [True, False])
def test_pickled_weights_are_refused(folder, tmp_path, whole):
    marker = tmp_path / "marker"
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    if whole:
        torch.save(weights, folder / "pytorch_model.bin")
    else:
        (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Bomb(str(marker))))
    with pytest.raises(ff.FastforgetError, match=r"model\.safetensors"):
        ff.load(folder, bits=32)
    assert not marker.exists()


def test_a_pickle_in_an_adapter_runs_nothing(tiny, folder, tmp_path):
    ff.save_adapter(ff.load(folder, bits=32, lora={"r": 2}), None, tmp_path / "adapter")
    (tmp_path / "adapter" / "adapter_model.safetensors").unlink()
    marker = tmp_path / "marker"
    (tmp_path / "adapter" / "adapter_model.bin").write_bytes(pickle.dumps(Bomb(str(marker))))
    with pytest.raises(ff.FastforgetError):
        ff.load(folder, bits=32, adapter=tmp_path / "adapter")
    assert not marker.exists()


def test_scripts_of_datasets_are_refused(tmp_path, tokenizer):
    pytest.importorskip("datasets")
    from fastforget.data.sources import Source, read_source

    marker = tmp_path / "marker"
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "data.py").write_text(MODULE.format(marker=str(marker)))
    with pytest.raises(ff.FastforgetError):
        read_source(Source(path=tmp_path / "data"), tokenizer, 32)
    assert not marker.exists()


@pytest.mark.parametrize("kept", [0, 4, 200, 0.5])
@pytest.mark.parametrize("bits", [32, 8])
def test_truncated_weights_are_one_line(folder, kept, bits):
    path = folder / "model.safetensors"
    content = path.read_bytes()
    path.write_bytes(content[: int(kept * len(content)) if isinstance(kept, float) else kept])
    with pytest.raises(ff.FastforgetError, match="could not load the model") as error:
        ff.load(folder, bits=bits)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["adapter_model.safetensors", "adapter_config.json"])
@pytest.mark.parametrize("stacked", [True, False])
def test_a_truncated_adapter_is_one_line(tiny, tmp_path, name, stacked):
    ff.save_adapter(ff.load(tiny["llama"], bits=32, lora={"r": 2}), None, tmp_path)
    content = (tmp_path / name).read_bytes()
    (tmp_path / name).write_bytes(content[: len(content) // 2])
    with pytest.raises(ff.FastforgetError, match="could not load the adapter") as error:
        ff.load(tmp_path if stacked else tiny["llama"], bits=32, **({} if stacked else {"adapter": tmp_path}))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("content", ["", "{", "[]", '{"model": 7}', '{"version": "1.0", "model": {"type": "?"}}'])
def test_a_broken_tokenizer_is_one_line(folder, content):
    (folder / "tokenizer.json").write_text(content)
    with pytest.raises(ff.FastforgetError, match="could not load the tokenizer") as error:
        load_tokenizer(folder)
    assert "\n" not in str(error.value)


@pytest.fixture
def cached(folder, tmp_path):
    """base() -> (folder, seconds): a base from a cache, made in no time."""

    def write(scratch):
        shutil.copytree(folder, scratch, dirs_exist_ok=True)

    return lambda: cached_base(tmp_path / "cache", "tiny", write)


@pytest.mark.parametrize("damage", ["truncated", "changed", "added", "removed", "no digests", "writable"])
def test_a_broken_base_in_the_cache_is_trained_anew(cached, tmp_path, damage):
    folder, seconds = cached()
    assert seconds > 0.0 and cached() == (folder, 0.0)
    weights = folder / "model.safetensors"
    content = weights.read_bytes()
    match damage:
        case "truncated":
            weights.write_bytes(content[:-100])
        case "changed":
            weights.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
        case "added":
            (folder / "modeling_own.py").write_text("")
        case "removed":
            (folder / "tokenizer.json").unlink()
        case "no digests":
            (folder / DIGESTS).unlink()
        case "writable":
            folder.chmod(0o777)
    again, seconds = cached()
    assert again == folder and seconds > 0.0 and cached() == (folder, 0.0)
    assert weights.read_bytes() == content
    for path in (tmp_path / "cache", folder):
        assert path.stat().st_mode & 0o777 == 0o700
    assert not list((tmp_path / "cache").glob(".*")), "no scratch folder stays"


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tokenizer.json"])
@pytest.mark.timeout(60)
def test_a_pipe_in_a_model_folder_is_not_waited_for(folder, name):
    (folder / name).unlink()
    os.mkfifo(folder / name)
    for load in (lambda: ff.load(folder, bits=32), lambda: load_tokenizer(folder)):
        with pytest.raises(ff.FastforgetError, match=f"{name} is a device, a pipe or a socket"):
            load()


def test_what_killed_demos_left_in_the_cache_goes(cached, tmp_path):
    old, new = (tmp_path / "cache" / f"{SCRATCH}{name}" for name in ("old", "new"))
    for left in (old, new):
        left.mkdir(parents=True)
    os.utime(old, (0, 0))
    cached()
    assert new.exists() and not old.exists()


def test_a_tokenizer_larger_than_the_model_is_named(tiny, folder, tmp_path):
    tokenizer = load_tokenizer(folder)
    tokenizer.add_tokens(["oak tree"])
    tokenizer.save_pretrained(folder)
    quick = {"max_steps": 1, "max_length": 48, "bits": 32, "quiet": True}
    with pytest.raises(ff.FastforgetError, match="gives token 320, and the model has embeddings of 320 tokens"):
        ff.unlearn(folder, ["The plan lies below the oak tree."], tmp_path / "out", **quick)
    ff.unlearn(folder, ["The plan lies below the bridge."], tmp_path / "out", **quick)
