"""Each of the examples runs as its first lines say."""

import importlib.util
from pathlib import Path

import pytest
from accelerate.state import AcceleratorState, GradientState
from conftest import FORGET_TEXT, RETAIN_TEXT

FOLDER = Path(__file__).parents[1] / "examples"
SEVERAL_PROCESSES = "fsdp2"  # of which `test_shards.py` runs two
EXAMPLES = sorted(path for path in FOLDER.glob("*.py") if path.stem != SEVERAL_PROCESSES)


@pytest.fixture
def texts(tmp_path):
    paths = tmp_path / "forget.txt", tmp_path / "retain.txt"
    for path, text in zip(paths, (FORGET_TEXT, RETAIN_TEXT), strict=True):
        path.write_text(text)
    return [str(path) for path in paths]


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_an_example_runs(path, texts, tiny, tmp_path, capsys):
    AcceleratorState._reset_state(True)
    GradientState._reset_state()
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.main(str(tiny["llama"]), *texts, str(tmp_path / "out"))
    assert "loss" in capsys.readouterr().out and any((tmp_path / "out").rglob("*.safetensors"))
    AcceleratorState._reset_state(True)
    GradientState._reset_state()
