"""Greedy continuations against a plain loop: padding, settings that come with a model, ends, the context."""

from collections.abc import Sequence

import pytest
import torch
from helpers import random_model, with_lora

from fastforget.errors import FastforgetError
from fastforget.evaluate import generation


@pytest.fixture(scope="module")
def tokenizer(corpus):
    return corpus.tokenizer


@torch.no_grad()
def plain_loop(model, tokenizer, prompt, characters=200):
    """One prompt, no cache, no padding, no `generate`."""
    ids = list(prompt)
    while len(tokenizer.decode(ids[len(prompt) :], skip_special_tokens=True)) < characters:
        following = model(input_ids=torch.tensor([ids])).logits[0, -1].argmax().item()
        if following == tokenizer.eos_token_id or len(ids) - len(prompt) == characters:
            break
        ids.append(following)
    return tokenizer.decode(ids[len(prompt) :], skip_special_tokens=True)[:characters]


def prompts_of_many_lengths(corpus) -> list[Sequence[int]]:
    return [passage.input_ids[: 10 + 13 * index] for index, passage in enumerate(corpus.retain)]


@pytest.mark.parametrize("family", ["opt", "llama"])
@pytest.mark.parametrize("lora", [False, True])
def test_batches_with_padding_continue_as_a_plain_loop_does(family, lora, corpus, tokenizer):
    model = random_model(family, tokenizer)
    before = generation.continue_greedily(model, tokenizer, prompts_of_many_lengths(corpus), batch_size=4)
    if lora:
        model = with_lora(model)
    outputs = generation.continue_greedily(model, tokenizer, prompts_of_many_lengths(corpus), batch_size=4)
    model.eval()
    assert outputs == [plain_loop(model, tokenizer, prompt) for prompt in prompts_of_many_lengths(corpus)]
    assert len(set(outputs)) > 1  # the prompts do matter
    assert (outputs != before) == lora


def test_settings_that_come_with_the_model_change_nothing(corpus, tokenizer):
    model = random_model("opt", tokenizer)
    prompts = prompts_of_many_lengths(corpus)[:2]
    plain = generation.continue_greedily(model, tokenizer, prompts)
    own = model.generation_config
    own.do_sample, own.temperature, own.repetition_penalty, own.no_repeat_ngram_size = True, 3.0, 5.0, 1
    own.suppress_tokens = list(range(10, len(tokenizer), 2))
    own.max_length = 20
    for wrapped in (model, with_lora(model)):
        for parameter in (parameter for name, parameter in wrapped.named_parameters() if "lora_B" in name):
            torch.nn.init.zeros_(parameter)
        assert generation.continue_greedily(wrapped, tokenizer, prompts) == plain
        assert model.generation_config is own and own.repetition_penalty == 5.0


def test_the_models_own_end_tokens_end_a_row(corpus, tokenizer):
    model = random_model("opt", tokenizer)
    prompt = corpus.forget[0].input_ids[:40]
    model.eval()
    first = model(input_ids=torch.tensor([prompt])).logits[0, -1].argmax().item()
    model.generation_config.eos_token_id = [first, 5]
    # The end token is kept by `generate`; it is a word of this vocabulary, so it shows, and nothing follows it.
    assert generation.continue_greedily(model, tokenizer, [prompt]) == [tokenizer.decode([first])]


def test_no_step_beyond_enough_characters(corpus, tokenizer):
    model = random_model("llama", tokenizer)
    calls = []
    model.register_forward_hook(lambda *_: calls.append(1))
    (output,) = generation.continue_greedily(model, tokenizer, [corpus.forget[0].input_ids[:40]], characters=30)
    model.eval()
    assert output == plain_loop(model, tokenizer, corpus.forget[0].input_ids[:40], characters=30)
    tokens = len(calls)
    calls.clear()
    generation.continue_greedily(model, tokenizer, [corpus.forget[0].input_ids[:40]], characters=120)
    assert len(output) == 30 and tokens < 30 and len(calls) > tokens


def test_ends_are_those_of_whole_rows_decoded_but_only_tails_are(tokenizer, monkeypatch):
    """Characters of several bytes are cut by tokens, and by the ends of tails."""
    text = "x = 1, naïve – “quoted” ☃☂☁★☄ été; " * 9
    rows = [tokenizer.encode(text[start:], add_special_tokens=False)[:150] for start in range(3)]
    decoded = []
    own = generation.decode
    monkeypatch.setattr(generation, "decode", lambda tokenizer, ids: decoded.append(len(ids)) or own(tokenizer, ids))
    for characters in (1, 40, 41, 42, 43, 200):
        enough = generation.EnoughCharacters(tokenizer, len(rows), characters)
        for step in range(1, 151):
            found = enough(torch.tensor([[7, *row[:step]] for row in rows]), None).tolist()
            assert found == [len(own(tokenizer, row[:step])) >= characters for row in rows], step
    assert max(decoded) <= generation.TAIL_TOKENS + 4


def test_context_bounds_the_continuation(corpus, tokenizer):
    model = random_model("opt", tokenizer, context=44)
    prompt = corpus.forget[0].input_ids[:40]
    (output,) = generation.continue_greedily(model, tokenizer, [prompt])
    assert output and plain_loop(model.eval(), tokenizer, prompt, characters=len(output)) == output
    with pytest.raises(FastforgetError, match="no room"):
        generation.continue_greedily(model, tokenizer, [corpus.forget[0].input_ids[:44]])
