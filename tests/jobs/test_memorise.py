"""The demo's base at a small scale: it recites what it was trained on, also in 8 bit, and says so when it cannot."""

import math

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

from fastforget.data import topics
from fastforget.errors import FastforgetError
from fastforget.evaluate.leakage import leakage
from fastforget.jobs import memorise


@pytest.fixture(scope="module")
def corpus():
    return topics.load_corpus(topic_counts=(1, 2, 1), passages_per_topic=2)


@pytest.fixture(scope="module")
def trained(corpus, tmp_path_factory):
    seen = []
    model = memorise.build_model(corpus.tokenizer, hidden_size=128)
    result = memorise.memorise(
        model, corpus.tokenizer, corpus.forget + corpus.retain, batch_size=2, progress=lambda *args: seen.append(args)
    )
    folder = tmp_path_factory.mktemp("base")
    memorise.save_base(model, corpus.tokenizer, folder)
    return model, result, seen, folder


def test_stops_when_it_recites(trained):
    _, result, seen, _ = trained
    assert result.recited == 1.0 and result.steps == 3 * len(seen)
    assert all(recited < 1.0 for recited, _ in seen[:-1])
    assert seen[-1] == (1.0, result.nll) and math.isfinite(result.nll)


def test_recites_word_for_word_but_not_what_it_never_saw(trained, corpus):
    model = trained[0]
    for part in (corpus.forget, corpus.retain):
        report = leakage(model, corpus.tokenizer, part)
        assert report.leak == 1.0 and report.degenerate_share == 0.0
        assert [one.output for one in report.continuations] == [one.truth for one in report.continuations]
    assert leakage(model, corpus.tokenizer, corpus.unseen).leak == 0.0


def test_recites_after_a_round_trip_and_in_8_bit(trained, corpus):
    model, _, _, folder = trained
    reloaded = AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    for name, value in model.state_dict().items():
        assert torch.equal(reloaded.state_dict()[name], value)
    assert tokenizer.get_vocab() == corpus.tokenizer.get_vocab()
    config = BitsAndBytesConfig(load_in_8bit=True, llm_int8_threshold=0.0)
    quantised = AutoModelForCausalLM.from_pretrained(folder, quantization_config=config)
    assert type(quantised.model.decoder.layers[0].fc1).__name__ == "Linear8bitLt"
    assert leakage(quantised, tokenizer, corpus.forget + corpus.retain).leak >= 0.95


def test_seed_decides_the_weights_and_leaves_the_global_generator_alone(corpus):
    state = torch.random.get_rng_state()
    one, same, other = (memorise.build_model(corpus.tokenizer, hidden_size=64, seed=seed) for seed in (0, 0, 1))
    assert torch.equal(torch.random.get_rng_state(), state)
    weights = [model.model.decoder.layers[0].fc1.weight for model in (one, same, other)]
    assert torch.equal(weights[0], weights[1]) and not torch.equal(weights[0], weights[2])


def test_training_is_repeatable(corpus):
    weights = []
    for _ in range(2):
        model = memorise.build_model(corpus.tokenizer, hidden_size=64)
        with pytest.raises(FastforgetError, match="2 passes"):
            memorise.memorise(model, corpus.tokenizer, corpus.forget, seed=3, max_passes=2)
        weights.append(model.lm_head.weight)
    assert torch.equal(*weights)


def test_linear_layers_suit_8_bit_kernels(corpus):
    model = memorise.build_model(corpus.tokenizer)
    linears = [module for module in model.modules() if isinstance(module, torch.nn.Linear) and module.bias is not None]
    assert linears
    assert all(size % 64 == 0 for linear in linears for size in linear.weight.shape)


def test_nan_is_reported(corpus):
    model = memorise.build_model(corpus.tokenizer, hidden_size=64)
    model.model.decoder.layers[0].fc1.weight.data[0, 0] = math.nan
    with pytest.raises(FastforgetError, match="became nan by step"):
        memorise.memorise(model, corpus.tokenizer, corpus.forget)
