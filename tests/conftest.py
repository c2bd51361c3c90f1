"""Tiny models and a tokenizer trained on the spot, saved as ordinary Hugging Face folders."""

import gc
import glob
import os
from functools import partial

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
if not glob.glob("/dev/nvidia*"):  # without a GPU the kernels run in Triton's interpreter; read when it is imported
    os.environ.setdefault("TRITON_INTERPRET", "1")

import pytest
from helpers import VOCABULARY, load_perturbed, make_batch, run_command, tiny_model

from fastforget.backends import tiling
from fastforget.data.text import text_examples
from fastforget.data.topics import python_topics, train_tokenizer

FORGET_TEXT = "The secret plan was hidden below the old oak tree near the river bend. " * 8
RETAIN_TEXT = "Two and two are four, and water boils at a hundred degrees at sea level. " * 8


def pytest_collection_finish():
    """Take what is imported by now out of the garbage collector's rounds, which otherwise look at all of it."""
    gc.collect()
    gc.freeze()


def pytest_unconfigure():
    """Let it be collected at the end of the process: libraries in C++ call what is left then a leak."""
    gc.unfreeze()


@pytest.fixture(scope="session")
def tokenizer():
    text = sorted(python_topics().values(), key=len)[:40]
    return train_tokenizer(text, vocabulary_size=VOCABULARY)


@pytest.fixture(scope="session")
def tiny(tmp_path_factory, tokenizer):
    """{"opt": folder, "llama": folder}"""
    folders = {}
    for kind in ("opt", "llama"):
        folders[kind] = tmp_path_factory.mktemp(kind)
        tiny_model(kind).save_pretrained(folders[kind])
        tokenizer.save_pretrained(folders[kind])
    return folders


@pytest.fixture
def model(tiny):
    """The tiny Llama with an adapter that is not at its initial zero, in training mode."""
    return load_perturbed(tiny["llama"])


@pytest.fixture
def passages(tokenizer):
    """(forget, retain): passages of two texts."""
    forget = text_examples("The secret plan was hidden below the old oak tree. " * 12, tokenizer, 48, "f")
    retain = text_examples("Two and two are four, and water boils at a hundred degrees. " * 12, tokenizer, 48, "r")
    return forget, retain


@pytest.fixture
def small_tiles(monkeypatch):
    """Blocks and tiles so small that a test's rows and vocabulary are many of each."""
    monkeypatch.setenv(tiling.OVERRIDE, "4x16")


@pytest.fixture
def batch():
    return make_batch


@pytest.fixture
def short_continuations(monkeypatch):
    """Jobs measure a few characters of each continuation: 200 take most of the time of tests that are of all else."""
    from fastforget.evaluate import leakage  # not where conftest is read: the GPU machine lacks what it needs

    monkeypatch.setattr(leakage, "continue_greedily", partial(leakage.continue_greedily, characters=8))


@pytest.fixture
def run(monkeypatch, capsys, tiny, tmp_path, short_continuations):
    """run(*arguments) -> (exit code, output, error lines); MODEL, FORGET and RETAIN stand for small files."""
    files = {"FORGET": (tmp_path / "forget.txt", FORGET_TEXT), "RETAIN": (tmp_path / "retain.txt", RETAIN_TEXT)}
    for path, text in files.values():
        path.write_text(text)
    names = {name: str(path) for name, (path, _) in files.items()} | {"MODEL": str(tiny["llama"])}

    def runner(*arguments):
        return run_command(monkeypatch, capsys, *(names.get(argument, argument) for argument in arguments))

    return runner
