"""Memorisation: each measure against full logits, passages that hold little or nothing, the logit lens."""

import doctest
import math

import pytest
import torch
from helpers import load_perturbed
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, OPTConfig, OPTForCausalLM

from fastforget.data.examples import Example
from fastforget.errors import FastforgetError
from fastforget.evaluate import memorisation as measures

VOCABULARY = 320
SIZE = {"vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2}
FAMILIES = {
    "opt": lambda: OPTForCausalLM(OPTConfig(**SIZE, ffn_dim=64, word_embed_proj_dim=32, init_std=0.3)),
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SIZE, intermediate_size=64, initializer_range=0.3)),
    "gpt2": lambda: GPT2LMHeadModel(GPT2Config(vocab_size=VOCABULARY, n_embd=32, n_layer=3, n_head=2)),
}
LAST = {"opt": lambda m: m.model.decoder, "llama": lambda m: m.model, "gpt2": lambda m: m.transformer}
NORM = {"opt": "final_layer_norm", "llama": "norm", "gpt2": "ln_f"}


def built(family):
    torch.manual_seed(0)
    return FAMILIES[family]().eval()


@torch.no_grad()
def recited(model, prompt, count):
    """The prompt and `count` tokens that the model writes greedily behind it."""
    ids = list(prompt)
    for _ in range(count):
        ids.append(int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
    return ids


def nll_of(log_probs, example):
    """The sum over a passage's labels, from the log-probs of all its logits."""
    ids = example.input_ids
    return -sum(float(log_probs[place - 1, ids[place]]) for place in range(example.prompt_length, len(ids)))


@torch.no_grad()
def log_probs_of(model, example):
    return model(input_ids=torch.tensor([example.input_ids])).logits[0].double().log_softmax(-1)


@torch.no_grad()
def from_logits(model, example):
    """Exact memorisation, extraction strength and probability of one passage, from all of its logits, and its NLL."""
    ids, prompt, log_probs = example.input_ids, example.prompt_length, log_probs_of(model, example)
    right = [int(log_probs[place - 1].argmax()) == ids[place] for place in range(prompt, len(ids))]
    # the definition, with decoding for each prefix: how many tokens must be given?
    for given in range(len(right) + 1):
        if tuple(recited(model, ids[: prompt + given], len(right) - given)) == ids:
            break
    nll = nll_of(log_probs, example)
    return sum(right) / len(right), 1 - given / len(right), math.exp(-nll / len(right)), nll


@pytest.mark.parametrize("family", FAMILIES)
def test_measures_equal_those_of_full_logits(family, tokenizer):
    model = built(family)
    known = recited(model, [5, 6, 7], 12)
    wrong = [
        *known[:9],
        (known[9] + 1) % VOCABULARY,
        *recited(model, [*known[:9], (known[9] + 1) % VOCABULARY], 4)[10:],
    ]
    examples = [
        Example(tuple(known), prompt_length=3),  # all of it
        Example(tuple(wrong), prompt_length=3),  # all but one token
        Example(tuple(range(20, 50)), prompt_length=4),
        Example((8, 9, 10), prompt_length=2),  # one token
        Example((*known[:3], known[3]), prompt_length=3),  # one token, known
        Example((40,) * 11, prompt_length=1),  # all equal
    ]
    expected = [from_logits(model, example) for example in examples]
    for batch_size in (1, 4):
        report = measures.memorisation(model, tokenizer, examples, batch_size=batch_size)
        for found, (exact, extraction, probability, _) in zip(report.passages, expected, strict=True):
            assert (found.exact, found.extraction) == pytest.approx((exact, extraction), abs=1e-6)
            assert found.probability == pytest.approx(probability, rel=1e-4)
        tokens = sum(example.label_count for example in examples)
        assert report.nll == pytest.approx(sum(nll for *_, nll in expected) / tokens, rel=1e-5)
        assert report.exact == pytest.approx(sum(one[0] for one in expected) / len(expected))
        assert report.extraction == pytest.approx(sum(one[1] for one in expected) / len(expected))
    assert expected[0][:2] == (1.0, 1.0) and expected[1][1] < 1.0 and expected[3][0] in (0.0, 1.0)


def test_passages_with_nothing_behind_their_prompt_do_not_count(tokenizer):
    model = built("llama")
    whole, empty = Example(tuple(range(5, 25)), prompt_length=5), Example((1, 2, 3), prompt_length=3)
    report = measures.memorisation(model, tokenizer, [empty, whole, Example((7,))])
    alone = measures.memorisation(model, tokenizer, [whole])
    assert report.passages[0] is None and report.passages[2] is None
    assert report.exact == alone.exact and report.nll == pytest.approx(alone.nll, rel=1e-5)
    with pytest.raises(FastforgetError, match="no example has a label"):
        measures.memorisation(model, tokenizer, [empty])


def test_of_plain_text_what_is_behind_the_prompt_counts(tokenizer):
    """The NLL is of all labels; the measures are of those behind the first 200 characters."""
    model = built("opt")
    ids = tuple(tokenizer.encode("It is a long text about the names of things and what they are bound to. " * 5))
    split = measures.prompt_tokens(Example(ids), tokenizer)
    assert 1 < split < len(ids)
    plain = measures.memorisation(model, tokenizer, [Example(ids)])
    answer = measures.memorisation(model, tokenizer, [Example(ids, prompt_length=split)])
    assert (plain.exact, plain.extraction) == (answer.exact, answer.extraction)
    assert plain.probability == pytest.approx(answer.probability, rel=1e-5)
    whole = Example(ids, prompt_length=1)
    assert plain.nll == pytest.approx(nll_of(log_probs_of(model, whole), whole) / (len(ids) - 1), rel=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_logit_lens_is_each_layers_states_through_norm_and_head(family, tokenizer):
    model = built(family)
    examples = [Example(tuple(recited(model, [start, 6, 7], 9)), prompt_length=3) for start in (5, 50)]
    report = measures.memorisation(model, tokenizer, examples, lens=True)
    norm = getattr(LAST[family](model), NORM[family])
    for example, found in zip(examples, report.passages, strict=True):
        states = model(input_ids=torch.tensor([example.input_ids]), output_hidden_states=True).hidden_states[1:]
        # the last of transformers' states is behind the norm already
        through = [*(norm(state) for state in states[:-1]), states[-1]]
        labels = torch.tensor(example.input_ids[3:])
        shares = [float((model.lm_head(state)[0, 2:-1].argmax(-1) == labels).float().mean()) for state in through]
        assert found.lens == pytest.approx(shares, abs=1e-6) and found.lens[-1] == found.exact == 1.0
    assert report.lens == pytest.approx(
        [sum(each) / 2 for each in zip(*(p.lens for p in report.passages), strict=True)]
    )


def test_no_lens_where_no_norm_gives_the_final_states(tokenizer, monkeypatch):
    monkeypatch.setattr(measures, "final_norm", lambda backbone: torch.nn.LayerNorm(32).eval())
    report = measures.memorisation(built("llama"), tokenizer, [Example((5, 6, 7, 8), prompt_length=1)], lens=True)
    assert report.lens == [] and report.exact is not None


def test_an_adapter_counts_and_modes_are_restored(tiny, tokenizer):
    model = load_perturbed(tiny["llama"])
    example = [Example(tuple(range(20, 60)), prompt_length=2)]
    modes = [module.training for module in model.modules()]
    adapted = measures.memorisation(model, tokenizer, example)
    with model.disable_adapter():
        assert measures.memorisation(model, tokenizer, example).nll != adapted.nll
    assert [module.training for module in model.modules()] == modes and any(modes)


def test_a_broken_model_has_no_figures(tokenizer):
    model = built("opt")
    with torch.no_grad():
        model.get_input_embeddings().weight.fill_(torch.nan)
    report = measures.memorisation(model, tokenizer, [Example(tuple(range(3, 12)))])
    assert math.isnan(report.nll) and math.isnan(report.exact)


def test_reproduced_counts_from_the_last_error_on():
    assert doctest.testmod(measures).failed == 0
    assert measures.reproduced([True] * 4) == (1.0, 1.0)
    assert measures.reproduced([False]) == (0.0, 0.0)
    assert measures.reproduced([True, True, False]) == (2 / 3, 0.0)
    assert measures.reproduced([False, True, True, True]) == (0.75, 0.75)
