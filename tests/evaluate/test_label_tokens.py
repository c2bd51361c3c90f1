"""Figures of label tokens against those of full logits in float64."""

import doctest
import math
from dataclasses import replace

import pytest
import torch
from helpers import VOCABULARY, load_perturbed, tiny_model

from fastforget.data.examples import Example
from fastforget.evaluate import libraries
from fastforget.evaluate.label_tokens import LabelTokens, label_tokens


@torch.no_grad()
def from_logits(model, example):
    """(log p, E[log p], Var[log p]) of each label token, from all logits."""
    log_probs = model(input_ids=torch.tensor([example.input_ids])).logits[0].double().log_softmax(-1)
    triples = []
    for place in range(max(example.prompt_length, 1), len(example.input_ids)):
        row = log_probs[place - 1]
        mean = float((row.exp() * row).sum())
        variance = float((row.exp() * (row - mean) ** 2).sum())
        triples.append((float(row[example.input_ids[place]]), mean, variance))
    return triples


EXAMPLES = [
    Example(tuple(range(20, 50)), prompt_length=4),
    Example((8, 9, 10), prompt_length=2),  # one label
    Example((1, 2, 3), prompt_length=3),  # none
    Example((40,) * 11),
    Example((8, 9, 10), prompt_length=2),  # the same once more
    Example((7,)),  # one token, never predicted
]


@pytest.mark.parametrize("family", ["opt", "llama"])
@pytest.mark.parametrize("batch_size", [1, 4])
def test_statistics_equal_those_of_full_logits(family, batch_size):
    model = tiny_model(family).eval()
    done = []
    found = label_tokens(model, EXAMPLES, moments=True, batch_size=batch_size, progress=lambda *each: done.append(each))
    assert [each is None for each in found] == [False, False, True, False, False, True]
    assert done[-1] == (len(EXAMPLES), len(EXAMPLES))
    for example, tokens in zip(EXAMPLES, found, strict=True):
        if tokens is None:
            continue
        logp, mean, variance = zip(*from_logits(model, example), strict=True)
        assert tokens.logp == pytest.approx(logp, abs=1e-5)
        assert tokens.logp_mean == pytest.approx(mean, abs=1e-5)
        assert tokens.logp_var == pytest.approx(variance, rel=1e-4, abs=1e-5)
        assert tokens.nll == pytest.approx(-sum(logp) / len(logp), abs=1e-5)
        assert tokens.probability == pytest.approx(math.exp(sum(logp) / len(logp)), abs=1e-5)


def test_moments_only_where_asked_for_and_an_adapter_counts(tiny):
    model = load_perturbed(tiny["llama"])
    example = [Example(tuple(range(20, 40)), prompt_length=2)]
    (adapted,) = label_tokens(model, example)
    assert adapted.logp_mean == adapted.logp_var == () and len(adapted.logp) == 18
    with model.disable_adapter():
        assert label_tokens(model, example)[0].nll != adapted.nll
    assert model.training and label_tokens(model, []) == []


def test_a_broken_model_has_no_figures():
    model = tiny_model("opt").eval()
    with torch.no_grad():
        model.get_input_embeddings().weight.fill_(torch.nan)
    found = label_tokens(model, [Example(tuple(range(3, 12))), Example((5,))], moments=True)
    assert len(found[0].logp) == 8 and math.isnan(found[0].nll) and found[1] is None


def test_no_tensor_of_logits_is_formed(monkeypatch):
    """Neither the head nor the loss of the model runs on all positions: only the check's few tokens."""
    model = tiny_model("llama").eval()
    rows = []
    model.lm_head.register_forward_hook(lambda module, inputs, output: rows.append(tuple(output.shape)))
    label_tokens(model, [Example(tuple(range(100, 200)))] * 4)
    of_logits = [rows_of for *rows_of, width in rows if width == VOCABULARY]  # others are states, handed through
    assert of_logits and max(math.prod(each) for each in of_logits) < 99 and model.config.hidden_size != VOCABULARY


def test_probability_and_nll_of_hand_made_tokens():
    tokens = LabelTokens((math.log(0.5), math.log(0.125)))
    assert tokens.probability == pytest.approx(0.25) and tokens.nll == pytest.approx(math.log(4))


def test_a_missing_library_is_named():
    assert doctest.testmod(libraries).failed == 0
    with pytest.raises(libraries.FastforgetError, match=r"a thing needs no_such_thing: pip install"):
        libraries.library("no_such_thing.part", "a thing")


def test_an_alternative_answer_is_not_measured():
    plain = tiny_model("llama")
    first, *others = EXAMPLES
    assert label_tokens(plain, [replace(first, alternative=(1, 2)), *others]) == label_tokens(plain, EXAMPLES)
