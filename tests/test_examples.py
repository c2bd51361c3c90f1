"""Each of the examples runs as its first lines say."""

import difflib
import importlib.util
import json
import re
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState, GradientState
from conftest import FORGET_TEXT, RETAIN_TEXT
from helpers import load_perturbed
from integrations.loops import assert_same_weights
from safetensors.torch import load_file

import fastforget as ff

EXAMPLES = Path(__file__).parents[1] / "examples"
NEEDS = {"trl_sft": "trl", "lightning_loop": "lightning"}  # what is no dependency of ours
SEVERAL_PROCESSES = EXAMPLES / "fsdp2.py"  # of which `test_shards.py` runs two
PAIR = EXAMPLES / "llm_unlearn_before.py", EXAMPLES / "llm_unlearn_after.py"


@pytest.fixture
def texts(tmp_path):
    paths = tmp_path / "forget.txt", tmp_path / "retain.txt"
    for path, text in zip(paths, (FORGET_TEXT, RETAIN_TEXT), strict=True):
        path.write_text(text)
    return [str(path) for path in paths]


def loaded(path):
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def run(path, *arguments):
    return loaded(path).main(*map(str, arguments))


@pytest.mark.parametrize(
    "path", sorted({*EXAMPLES.glob("*.py")} - {*PAIR, SEVERAL_PROCESSES}), ids=lambda path: path.stem
)
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


def test_weights_after_five_steps_of_lightning_are_those_of_a_plain_loop(tiny, tmp_path, batch):
    lightning = pytest.importorskip("lightning")
    pairs = [(batch(2 + place % 2, place), batch(3, 50 + place)) for place in range(10)]
    loader = torch.utils.data.DataLoader(pairs, batch_size=2, collate_fn=list)
    options = {"accelerator": "cpu", "logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    trainer = lightning.Trainer(max_epochs=1, enable_model_summary=False, default_root_dir=tmp_path, **options)
    model, expected = (load_perturbed(tiny["llama"]) for _ in range(2))
    trainer.fit(loaded(EXAMPLES / "lightning_loop.py").Unlearning(model, "npo", lr=1e-3), loader)
    step = ff.UnlearnStep(expected, torch.optim.AdamW, terms="npo", lr=1e-3)
    for group in loader:
        counts = ff.count_labels(group)
        for pair in group:
            step.backward(*pair, counts=counts)
        torch.nn.utils.clip_grad_norm_(expected.parameters(), 1.0)
        step.step()
        step.zero_grad()
    assert step.param_groups[0]["unlearn_steps"] == 5
    assert_same_weights(model, expected)


@pytest.mark.slow
def test_the_notebook_runs(tmp_path, monkeypatch, capsys):
    """Its cells one after the other, without Jupyter: it forgets one set and keeps the other."""
    pytest.importorskip("matplotlib").use("agg")
    monkeypatch.chdir(tmp_path)
    names = {"__name__": "notebook"}
    for place, cell in enumerate(json.loads((EXAMPLES / "demo.ipynb").read_text())["cells"]):
        if cell["cell_type"] == "code":
            exec(compile("".join(cell["source"]), f"demo.ipynb, cell {place}", "exec"), names)
    (forget_before, retain_before), (forget_after, retain_after) = names["history"][0], names["history"][-1]
    assert forget_after > forget_before + 1.0 and retain_after < retain_before + 0.3
    written = capsys.readouterr().out
    assert written.count("hides the plan under stone 2") == 1 and written.count("leaf 2 of the guide shows it") == 2
    assert (tmp_path / "forgot" / "adapter_model.safetensors").is_file()


def test_each_example_is_on_the_page_of_loops():
    page = (EXAMPLES.parent / "docs" / "loop.md").read_text()
    assert set(re.findall(r"\(\.\./examples/([\w.]+)\)", page)) == {
        path.name for path in EXAMPLES.iterdir() if path.suffix in (".py", ".ipynb")
    }
