"""Leakage: the prompt's cut, greedy continuation against a plain loop, the score, the NLL, degenerate text."""

import doctest
from collections.abc import Sequence

import pytest
import torch
from helpers import tiny_model
from peft import LoraConfig, get_peft_model

from fastforget.backbone import CHECK_TOKENS
from fastforget.data import topics
from fastforget.data.examples import Example
from fastforget.errors import FastforgetError
from fastforget.evaluate import leakage as leak


@pytest.fixture(scope="module")
def corpus():
    return topics.load_corpus(topic_counts=(1, 2, 1), passages_per_topic=3)


@pytest.fixture(scope="module")
def tokenizer(corpus):
    return corpus.tokenizer


def tiny(family, tokenizer, context=512):
    """A random model with weights large enough that its next token depends on the prompt, in training mode."""
    ids = {"pad_token_id": tokenizer.pad_token_id, "bos_token_id": 1, "eos_token_id": tokenizer.eos_token_id}
    size = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2, "num_key_value_heads": 2}
    size |= {"vocab_size": len(tokenizer), "max_position_embeddings": context, "initializer_range": 0.3}
    return tiny_model(family, **size, **ids).train()


def with_lora(model):
    wrapped = get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"))
    for name, parameter in wrapped.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.5)
    return wrapped.train()


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


def test_prompt_is_the_shortest_prefix_of_enough_characters(corpus, tokenizer):
    for passage in corpus.forget + corpus.retain:
        length = leak.prompt_tokens(passage, tokenizer)
        lengths = [
            len(tokenizer.decode(passage.input_ids[:end], skip_special_tokens=True)) for end in (length - 1, length)
        ]
        assert lengths[0] < 200 <= lengths[1]


def test_prompt_of_a_response_and_of_a_short_text(corpus, tokenizer):
    ids = corpus.forget[0].input_ids
    assert leak.prompt_tokens(Example(ids, prompt_length=7), tokenizer) == 7
    assert leak.prompt_tokens(Example(ids[:20]), tokenizer) == 10
    just_long_enough = leak.prompt_tokens(Example(ids), tokenizer) + 1
    assert leak.prompt_tokens(Example(ids[:just_long_enough]), tokenizer) == just_long_enough // 2
    assert leak.prompt_tokens(Example(ids[:1]), tokenizer) == 1


@pytest.mark.parametrize("family", ["opt", "llama"])
@pytest.mark.parametrize("lora", [False, True])
def test_batches_with_padding_continue_as_a_plain_loop_does(family, lora, corpus, tokenizer):
    model = tiny(family, tokenizer)
    before = leak.continue_greedily(model, tokenizer, prompts_of_many_lengths(corpus), batch_size=4)
    if lora:
        model = with_lora(model)
    outputs = leak.continue_greedily(model, tokenizer, prompts_of_many_lengths(corpus), batch_size=4)
    model.eval()
    assert outputs == [plain_loop(model, tokenizer, prompt) for prompt in prompts_of_many_lengths(corpus)]
    assert len(set(outputs)) > 1  # the prompts do matter
    assert (outputs != before) == lora


def test_settings_that_come_with_the_model_change_nothing(corpus, tokenizer):
    model = tiny("opt", tokenizer)
    prompts = prompts_of_many_lengths(corpus)[:2]
    plain = leak.continue_greedily(model, tokenizer, prompts)
    own = model.generation_config
    own.do_sample, own.temperature, own.repetition_penalty, own.no_repeat_ngram_size = True, 3.0, 5.0, 1
    own.suppress_tokens = list(range(10, len(tokenizer), 2))
    own.max_length = 20
    for wrapped in (model, with_lora(model)):
        for parameter in (parameter for name, parameter in wrapped.named_parameters() if "lora_B" in name):
            torch.nn.init.zeros_(parameter)
        assert leak.continue_greedily(wrapped, tokenizer, prompts) == plain
        assert model.generation_config is own and own.repetition_penalty == 5.0


def test_the_models_own_end_tokens_end_a_row(corpus, tokenizer):
    model = tiny("opt", tokenizer)
    prompt = corpus.forget[0].input_ids[:40]
    model.eval()
    first = model(input_ids=torch.tensor([prompt])).logits[0, -1].argmax().item()
    model.generation_config.eos_token_id = [first, 5]
    # The end token is kept by `generate`; it is a word of this vocabulary, so it shows, and nothing follows it.
    assert leak.continue_greedily(model, tokenizer, [prompt]) == [tokenizer.decode([first])]


def test_no_step_beyond_enough_characters(corpus, tokenizer):
    model = tiny("llama", tokenizer)
    calls = []
    model.register_forward_hook(lambda *_: calls.append(1))
    (output,) = leak.continue_greedily(model, tokenizer, [corpus.forget[0].input_ids[:40]], characters=30)
    model.eval()
    assert output == plain_loop(model, tokenizer, corpus.forget[0].input_ids[:40], characters=30)
    tokens = len(calls)
    calls.clear()
    leak.continue_greedily(model, tokenizer, [corpus.forget[0].input_ids[:40]], characters=120)
    assert len(output) == 30 and tokens < 30 and len(calls) > tokens


def test_ends_are_those_of_whole_rows_decoded_but_only_tails_are(tokenizer, monkeypatch):
    """Characters of several bytes are cut by tokens, and by the ends of tails."""
    text = "x = 1, naïve – “quoted” ☃☂☁★☄ été; " * 9
    rows = [tokenizer.encode(text[start:], add_special_tokens=False)[:150] for start in range(3)]
    decoded = []
    own = leak.decode
    monkeypatch.setattr(leak, "decode", lambda tokenizer, ids: decoded.append(len(ids)) or own(tokenizer, ids))
    for characters in (1, 40, 41, 42, 43, 200):
        enough = leak.EnoughCharacters(tokenizer, len(rows), characters)
        for step in range(1, 151):
            found = enough(torch.tensor([[7, *row[:step]] for row in rows]), None).tolist()
            assert found == [len(own(tokenizer, row[:step])) >= characters for row in rows], step
    assert max(decoded) <= leak.TAIL_TOKENS + 4


def test_context_bounds_the_continuation(corpus, tokenizer):
    model = tiny("opt", tokenizer, context=44)
    prompt = corpus.forget[0].input_ids[:40]
    (output,) = leak.continue_greedily(model, tokenizer, [prompt])
    assert output and plain_loop(model.eval(), tokenizer, prompt, characters=len(output)) == output
    with pytest.raises(FastforgetError, match="no room"):
        leak.continue_greedily(model, tokenizer, [corpus.forget[0].input_ids[:44]])


def test_every_modules_mode_is_restored_also_after_an_exception(corpus, tokenizer):
    model = with_lora(tiny("opt", tokenizer))
    frozen = next(module for name, module in model.named_modules() if name.endswith("layers.1"))
    frozen.eval()
    modes = [module.training for module in model.modules()]
    assert True in modes and False in modes
    during = []
    model.get_base_model().register_forward_hook(
        lambda module, *_: during.append(any(m.training for m in module.modules()))
    )
    leak.leakage(model, tokenizer, corpus.forget)
    assert during and not any(during)
    assert [module.training for module in model.modules()] == modes

    def fail(done, total):
        raise KeyboardInterrupt

    own = model.get_base_model().generation_config
    with pytest.raises(KeyboardInterrupt):
        leak.leakage(model, tokenizer, corpus.forget, progress=fail)
    assert [module.training for module in model.modules()] == modes
    assert model.get_base_model().generation_config is own


@torch.no_grad()
def test_nll_is_the_mean_over_all_label_tokens(corpus, tokenizer):
    model = tiny("llama", tokenizer)
    examples = [Example(corpus.forget[0].input_ids[:50]), Example(corpus.forget[1].input_ids, prompt_length=100)]
    model.eval()
    total = 0.0
    for example in examples:
        log_probs = model(input_ids=torch.tensor([example.input_ids])).logits[0].log_softmax(-1)
        for place in range(max(example.prompt_length, 1), len(example.input_ids)):
            total -= log_probs[place - 1, example.input_ids[place]].item()
    expected = total / sum(example.label_count for example in examples)
    for batch_size in (1, 2):
        assert leak.mean_nll(model, examples, batch_size=batch_size) == pytest.approx(expected, rel=1e-5)
    with pytest.raises(FastforgetError, match="label"):
        leak.mean_nll(model, [Example((1, 2), prompt_length=2)])
    rows = []
    model.lm_head.register_forward_hook(lambda _module, _inputs, logits: rows.append(logits[..., 0].numel()))
    leak.mean_nll(model, examples)
    assert rows == [CHECK_TOKENS], "the head's check alone forms logits"


def test_report(corpus, tokenizer, monkeypatch):
    """Outputs put into the model's mouth: the truth, most of it, a little of it, nothing, and a loop."""
    response = tuple(tokenizer.encode("one two three four five six seven eight", add_special_tokens=False))
    example = Example((tokenizer.bos_token_id, *response), prompt_length=1, source="somewhere")
    outputs = [
        "one two three four five six seven eight",
        "One, two;\n3 four five nine",
        "eight one two three",
        "",
        "no " * 60,
    ]
    monkeypatch.setattr(leak, "continue_greedily", lambda *_, **__: outputs)
    report = leak.leakage(tiny("opt", tokenizer), tokenizer, [example] * 5)
    assert [one.rouge for one in report.continuations] == [1.0, 0.5, 0.375, 0.0, 0.0]
    assert [one.leaked for one in report.continuations] == [True, True, False, False, False]
    assert [one.degenerate for one in report.continuations] == [False, False, False, True, True]
    assert (report.leak, report.rouge, report.degenerate_share) == (0.4, pytest.approx(0.375), 0.4)
    assert report.continuations[0].truth == outputs[0] and report.continuations[0].source == "somewhere"
    assert report.nll == pytest.approx(leak.mean_nll(tiny("opt", tokenizer), [example]))


def test_progress_reaches_its_total_and_order_is_kept(corpus, tokenizer):
    seen = []
    examples = [Example(passage.input_ids[: 100 - 7 * index]) for index, passage in enumerate(corpus.retain)]
    report = leak.leakage(
        tiny("opt", tokenizer), tokenizer, examples, batch_size=4, progress=lambda *args: seen.append(args)
    )
    assert seen == [(4, 12), (6, 12), (10, 12), (12, 12)]
    for example, one in zip(examples, report.continuations, strict=True):
        whole = tokenizer.decode(example.input_ids, skip_special_tokens=True)
        assert (one.prompt + one.truth) == whole[: len(one.prompt) + 200]
    with pytest.raises(FastforgetError, match="empty"):
        leak.leakage(tiny("opt", tokenizer), tokenizer, [])


def test_degenerate_examples_of_the_docstring():
    result = doctest.testmod(leak)
    assert result.attempted > 0 and result.failed == 0


@pytest.mark.parametrize(
    "text",
    [
        "",
        " \n\t ",
        "?! ... --- ***",
        "_" * 200,
        "a" * 200,
        "the-" * 50,
        "and so it is\n" * 16,
        "The function returns " + "the value of " * 14,
        "Some text that makes sense before it sticks." + "\n" * 156,
        "x the y the z the w the the the the",
    ],
)
def test_degenerate(text):
    assert leak.is_degenerate(text)


@pytest.mark.parametrize(
    "text",
    [
        "42",
        "No, no.",
        "Я не знаю этого.",
        "=" * 60 + "\nThe following table lists the operators, from the tightest binding to the loosest one.",
        "1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17, 18, 19, 20, 21, 22, 23, 24, 25",
    ],
)
def test_not_degenerate(text):
    assert not leak.is_degenerate(text)


def test_real_text_is_hardly_ever_degenerate(tokenizer):
    """Every piece of the whole reference, tables and underlines too."""
    pieces = [
        text[start : start + 200]
        for text in topics.python_topics().values()
        for start in range(0, len(text) - 199, 1000)
    ]
    assert len(pieces) > 200
    assert sum(map(leak.is_degenerate, pieces)) < 0.01 * len(pieces)


def test_nll_of_a_broken_model_is_nan(tokenizer):
    """The jobs say what that means; the head's own check would say only that the model is broken."""
    model = tiny("opt", tokenizer)
    with torch.no_grad():
        model.get_input_embeddings().weight.fill_(torch.nan)
    assert str(leak.mean_nll(model, [Example(tuple(range(3, 12)))])) == "nan"
