"""Leakage: the prompt's cut, the score, fluency, the NLL."""

import pytest
import torch
from helpers import random_model, with_lora

from fastforget.backbone import CHECK_TOKENS
from fastforget.data.examples import Example
from fastforget.errors import FastforgetError
from fastforget.evaluate import leakage as leak


@pytest.fixture(scope="module")
def tokenizer(corpus):
    return corpus.tokenizer


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


def test_every_modules_mode_is_restored_also_after_an_exception(corpus, tokenizer):
    model = with_lora(random_model("opt", tokenizer))
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
    model = random_model("llama", tokenizer)
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

    def count(head, _inputs, output):  # which hands its input through where only states are wanted
        rows.extend([output[..., 0].numel()] if output.shape[-1] == head.out_features else [])

    model.lm_head.register_forward_hook(count)
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
    report = leak.leakage(random_model("opt", tokenizer), tokenizer, [example] * 5)
    assert [one.rouge for one in report.continuations] == [1.0, 0.5, 0.375, 0.0, 0.0]
    assert [one.leaked for one in report.continuations] == [True, True, False, False, False]
    assert [one.degenerate for one in report.continuations] == [False, False, False, True, True]
    assert (report.leak, report.rouge, report.degenerate_share) == (0.4, pytest.approx(0.375), 0.4)
    assert report.blank_share == 0.2 and report.fluency is None, "without an adapter nothing is untouched"
    assert report.continuations[0].truth == outputs[0] and report.continuations[0].source == "somewhere"
    assert report.nll == pytest.approx(leak.mean_nll(random_model("opt", tokenizer), [example]))


def test_progress_reaches_its_total_and_order_is_kept(corpus, tokenizer):
    seen = []
    examples = [Example(passage.input_ids[: 100 - 7 * index]) for index, passage in enumerate(corpus.retain)]
    report = leak.leakage(
        random_model("opt", tokenizer), tokenizer, examples, batch_size=4, progress=lambda *args: seen.append(args)
    )
    assert seen == [(4, 12), (6, 12), (10, 12), (12, 12)]
    for example, one in zip(examples, report.continuations, strict=True):
        whole = tokenizer.decode(example.input_ids, skip_special_tokens=True)
        assert (one.prompt + one.truth) == whole[: len(one.prompt) + 200]
    with pytest.raises(FastforgetError, match="empty"):
        leak.leakage(random_model("opt", tokenizer), tokenizer, [])


def test_nll_of_a_broken_model_is_nan(tokenizer):
    """The jobs say what that means; the head's own check would say only that the model is broken."""
    model = random_model("opt", tokenizer)
    with torch.no_grad():
        model.get_input_embeddings().weight.fill_(torch.nan)
    assert str(leak.mean_nll(model, [Example(tuple(range(3, 12)))])) == "nan"


@torch.no_grad()
def test_fluency_is_the_nll_under_the_untouched_model(corpus, tokenizer):
    model = with_lora(random_model("llama", tokenizer)).eval()
    prompts = [passage.input_ids[:20] for passage in corpus.retain[:3]]
    outputs = ["some words", "", "and other ones"]
    total, tokens = 0.0, 0
    for prompt, output in zip(prompts, outputs, strict=True):
        ids = tokenizer.encode(output, add_special_tokens=False)
        with model.disable_adapter():
            log_probs = model(input_ids=torch.tensor([[*prompt, *ids]])).logits[0].log_softmax(-1)
        total -= sum(float(log_probs[len(prompt) + place - 1, token]) for place, token in enumerate(ids))
        tokens += len(ids)
    assert leak.fluency(model, tokenizer, prompts, outputs) == pytest.approx(total / tokens, rel=1e-5)
    other = random_model("opt", tokenizer).eval()
    examples = [
        Example((*prompt, *tokenizer.encode(output, add_special_tokens=False)), prompt_length=20)
        for prompt, output in zip(prompts, outputs, strict=True)
    ]
    expected = leak.mean_nll(other, examples)
    assert leak.fluency(model, tokenizer, prompts, outputs, untouched=other) == pytest.approx(expected)
    assert leak.fluency(model, tokenizer, prompts, ["", "", ""]) is None
