"""MUSE's figures: greedy outputs against ROUGE written out, Min-K's AUC against full logits."""

import json

import pytest
import torch
from helpers import random_model

from fastforget.data.examples import Example
from fastforget.data.questions import Question
from fastforget.errors import FastforgetError
from fastforget.evaluate import muse


@pytest.fixture
def model(tokenizer):
    return random_model("llama", tokenizer).eval()


def saying(monkeypatch, *outputs):
    """Let the model say this; returns the prompts that it was given."""
    seen = []

    def continued(model, tokenizer, prompts, **options):
        seen.extend(prompts)
        return list(outputs)[: len(prompts)]

    monkeypatch.setattr(muse, "continue_greedily", continued)
    return seen


def test_verbmem_is_mean_f1_of_the_continuation(model, tokenizer, monkeypatch):
    seen = saying(monkeypatch, "the old oak fell and more words", "")
    found = muse.verbmem(model, tokenizer, [("Below ", "the old oak tree"), ("Behind ", "the river")])
    # the output is cut to 16 characters, "the old oak fell": three of four words, so F1 3/4; and 0
    assert found == pytest.approx((3 / 4 + 0.0) / 2)
    assert tokenizer.decode(seen[0]) == "<s>Below " and muse.verbmem(model, tokenizer, []) is None


def test_knowmem_is_mean_f1_of_the_answers_first_line(model, tokenizer, monkeypatch):
    seen = saying(monkeypatch, " Port Calder\nin the north", " a map")
    found = muse.knowmem(model, tokenizer, [Question("Where?", "Port Calder"), Question("What?", "a clock of rain")])
    assert found == pytest.approx((1.0 + 2 * (1 / 2) * (1 / 4) / (3 / 4)) / 2)
    assert tokenizer.decode(seen[0]) == "<s>Where?" and muse.knowmem(model, tokenizer, []) is None


@torch.no_grad()
def test_auc_is_of_min_k_from_full_logits(model):
    sides = [[Example(tuple(range(start, start + 15))) for start in part] for part in ((10, 40, 70), (100, 130))]

    def score(example):
        log_probs = model(input_ids=torch.tensor([example.input_ids])).logits[0, :-1].double().log_softmax(-1)
        logp = sorted(float(row[token]) for row, token in zip(log_probs, example.input_ids[1:], strict=True))
        return sum(logp[:5]) / 5  # 40 % of 14 tokens

    members, others = ([score(example) for example in side] for side in sides)
    expected = sum(member > other for member in members for other in others) / 6
    assert muse.min_k_auc(model, *sides) == pytest.approx(expected)
    assert muse.min_k_auc(model, sides[0], []) is None


def test_reports_say_what_is_missing(tmp_path):
    report = muse.muse_report(0.5, (0.4, None), 1.0, None)
    assert report.privleak is None and "no log" in report.privleak_reason and report.forget_knowmem == 0.4
    assert muse.muse_report(None, (None, None), 0.9, 0.5).privleak == pytest.approx(-80.0)
    path = tmp_path / "log.json"
    for log in ({"auc": 0.6}, {"mia_min_k": {"agg_value": 0.6}}, {"mia_min_k": {"auc": 0.6}}):
        path.write_text(json.dumps(log))
        assert muse.read_retain_auc(path) == 0.6
    for log in ({"other": 1}, {"auc": None}, {"auc": True}, {"mia_min_k": {}}):
        path.write_text(json.dumps(log))
        with pytest.raises(FastforgetError, match="holds no AUC"):
            muse.read_retain_auc(path)
