"""General ability through lm-eval: a task of the tests' own against a count by hand; and what cannot be run."""

import importlib.util
import json
import sys

import pytest
import torch
import yaml

import fastforget as ff
from fastforget.evaluate.ability import ability, task_manager
from fastforget.jobs.evaluate import evaluate

needs_lm_eval = pytest.mark.skipif(importlib.util.find_spec("lm_eval") is None, reason="lm-eval is not installed")
QUESTIONS = [
    {"question": "The Alder is a", "choices": [" tree", " stone by the river"], "answer": 0},
    {"question": "Water boils at a", "choices": [" hundred degrees", " river"], "answer": 0},
    {"question": "Two and two are", "choices": [" a stone", " four"], "answer": 1},
]


@pytest.fixture
def tasks(tmp_path):
    """A folder with a task of three questions."""
    rows = tmp_path / "questions.jsonl"
    rows.write_text("".join(json.dumps(each) + "\n" for each in QUESTIONS))
    task = {
        "task": "three",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(rows)}},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "{{question}}",
        "doc_to_choice": "choices",
        "doc_to_target": "answer",
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
    }
    folder = tmp_path / "tasks"
    folder.mkdir()
    (folder / "three.yaml").write_text(yaml.safe_dump(task))
    return folder


@torch.no_grad()
def right_by_hand(model, tokenizer):
    """The share of questions whose right choice has the higher log p, each choice by itself and without padding."""
    right = 0
    for each in QUESTIONS:
        scores = []
        for choice in each["choices"]:
            asked = tokenizer(each["question"], add_special_tokens=False)["input_ids"]
            whole = tokenizer(each["question"] + choice, add_special_tokens=False)["input_ids"]
            assert whole[: len(asked)] == asked
            start = [tokenizer.bos_token_id] if tokenizer("a")["input_ids"][0] == tokenizer.bos_token_id else []
            ids = torch.tensor([start + whole])
            logp = model(input_ids=ids).logits[0, :-1].double().log_softmax(1)
            own = logp.gather(1, ids[0, 1:, None])[:, 0]
            scores.append(float(own[len(start) + len(asked) - 1 :].sum()))
        right += scores.index(max(scores)) == each["answer"]
    return right / len(QUESTIONS)


@needs_lm_eval
def test_accuracy_is_the_share_counted_by_hand(tiny, tokenizer, tasks):
    model = ff.load(tiny["llama"], bits=32).train()
    found = ability(model, tokenizer, ["three"], task_manager(["three"], tasks))
    assert model.training
    assert found == {"three/acc": pytest.approx(right_by_hand(model.eval(), tokenizer))}
    assert ability(model, tokenizer, ["three"], task_manager(["three"], tasks), limit=1)["three/acc"] in (0.0, 1.0)


@needs_lm_eval
def test_evaluate_reports_it_beside_the_suite(tiny, tmp_path, tasks):
    options = {"bits": 32, "tasks": "three", "task_folder": tasks, "quiet": True, "max_length": 48}
    report = evaluate(tiny["llama"], ["Water boils at a hundred degrees. " * 9], tmp_path / "out", **options)
    assert report["ability"]["before"] == report["ability"]["after"]
    assert "General ability" in (tmp_path / "out" / "report.html").read_text()
    with pytest.raises(ff.FastforgetError, match="knows no task four"):
        evaluate(tiny["llama"], ["Water."], tmp_path / "other", **{**options, "tasks": ["three", "four"]})
    with pytest.raises(ff.FastforgetError, match="could not run three"):
        (tasks.parent / "questions.jsonl").unlink()
        evaluate(tiny["llama"], ["Water boils at a hundred degrees. " * 9], tmp_path / "third", **options)


def test_without_lm_eval_or_the_folder_it_says_so(tmp_path, monkeypatch):
    with pytest.raises(ff.FastforgetError, match="no folder of tasks"):
        task_manager(["three"], tmp_path / "none")
    monkeypatch.setitem(sys.modules, "lm_eval.tasks", None)
    with pytest.raises(ff.FastforgetError, match=r"--tasks needs lm_eval: pip install .fastforget\[ability\]"):
        task_manager(["three"])
