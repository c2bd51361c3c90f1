"""Each of the examples runs as its first lines say."""

import difflib
import importlib.util
import json
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState, GradientState
from conftest import FORGET_TEXT, RETAIN_TEXT
from safetensors.torch import load_file

EXAMPLES = Path(__file__).parents[1] / "examples"
NEEDS = {"trl_sft": "trl", "lightning_loop": "lightning"}  # what is no dependency of ours
PAIR = EXAMPLES / "llm_unlearn_before.py", EXAMPLES / "llm_unlearn_after.py"


@pytest.fixture
def texts(tmp_path):
    paths = tmp_path / "forget.txt", tmp_path / "retain.txt"
    for path, text in zip(paths, (FORGET_TEXT, RETAIN_TEXT), strict=True):
        path.write_text(text)
    return [str(path) for path in paths]


def run(path, *arguments):
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.main(*map(str, arguments))


@pytest.mark.parametrize("path", sorted({*EXAMPLES.glob("*.py")} - {*PAIR}), ids=lambda path: path.stem)
def test_an_example_runs(path, texts, tiny, tmp_path, capsys):
    if path.stem in NEEDS:
        pytest.importorskip(NEEDS[path.stem])
    AcceleratorState._reset_state(True)
    GradientState._reset_state()
    run(path, tiny["llama"], *texts, tmp_path / "out")
    assert "loss" in capsys.readouterr().out and any((tmp_path / "out").rglob("*.safetensors"))
    AcceleratorState._reset_state(True)
    GradientState._reset_state()


def test_a_published_loop_changes_in_fifteen_lines_and_computes_the_same(tiny, tmp_path):
    lines = [path.read_text().splitlines() for path in PAIR]
    changed = [line for line in difflib.unified_diff(*lines, n=0, lineterm="") if line[0] in "+-"][2:]
    assert 0 < len(changed) <= 15, "lines that go, and lines that come"

    sets = []
    for side, answers in (("forget", "poison fire knives ropes".split()), ("retain", "bread tea books".split())):
        rows = [
            {"prompt": f"What is in box {place}?", "response": f"Some {answer}."}
            for place, answer in enumerate(answers)
        ]
        sets.append(tmp_path / f"{side}.jsonl")
        sets[-1].write_text("".join(json.dumps(row) + "\n" for row in rows))
    before, after = (run(path, tiny["llama"], *sets, tmp_path / path.stem) for path in PAIR)
    assert len(before) == 5 and after == pytest.approx(before, rel=1e-5)
    expected, ours = (load_file(tmp_path / path.stem / "adapter_model.safetensors") for path in PAIR)
    assert expected.keys() == ours.keys() != set()
    for name, weight in expected.items():
        assert torch.linalg.vector_norm(ours[name] - weight) <= 1e-5 * torch.linalg.vector_norm(weight), name
