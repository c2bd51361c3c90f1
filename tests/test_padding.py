"""Left padding changes nothing: not the reference and its cache, not training, whatever the positions are made of."""

import pytest
import torch
import torch.nn.functional as F
from helpers import prepared
from transformers import BloomConfig, BloomForCausalLM, GPT2Config, GPT2LMHeadModel

import fastforget as ff
from fastforget import backbone as backbones
from fastforget.backbone import Backbone
from fastforget.batch import check_batch, count_labels
from fastforget.head import base_causal_lm
from fastforget.layouts import MOVED, moved_by_padding
from fastforget.objectives import REFERENCE_LOGP
from fastforget.reference import LayerStates

VOCABULARY = 320
PADDINGS = (0, 5, 20)
WANTED = frozenset({REFERENCE_LOGP, LayerStates(None)})


@pytest.fixture(scope="module")
def folders(tiny, tmp_path_factory):
    """`tiny`, and one with absolute positions that it does not find by itself under padding."""
    torch.manual_seed(0)
    sizes = {"vocab_size": VOCABULARY, "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 256}
    model = GPT2LMHeadModel(GPT2Config(**sizes, initializer_range=0.2, bos_token_id=1, eos_token_id=1))
    folder = tmp_path_factory.mktemp("gpt2")
    model.save_pretrained(folder)
    return {**tiny, "gpt2": folder}


def example(seed, length=14):
    """One sequence, its first token labelled too."""
    ids = torch.randint(5, VOCABULARY, (length,), generator=torch.Generator().manual_seed(seed))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids.clone()}


def collate(examples, paddings):
    """A batch of examples, each with its own padding on the left, and what it then lacks on the right."""
    width = max(left + len(one["labels"]) for one, left in zip(examples, paddings, strict=True))
    empty = {"input_ids": 0, "attention_mask": 0, "labels": -100}
    return {
        key: torch.stack(
            [
                F.pad(one[key], (left, width - left - len(one[key])), value=value)
                for one, left in zip(examples, paddings, strict=True)
            ]
        )
        for key, value in empty.items()
    }


def batches():
    """Epochs over four examples, padded and mixed otherwise each time."""
    examples = [example(seed, 12 + seed) for seed in range(4)]
    mixes = (((0, 1), (0, 5)), ((2, 3), (20, 0)), ((3, 1), (5, 20)), ((0, 2), (20, 20)), ((2, 1, 3, 0), (0, 0, 0, 0)))
    return [collate([examples[i] for i in rows], paddings) for rows, paddings in mixes]


@pytest.mark.parametrize("cache_bytes", [2 * 10**9, 0])
@pytest.mark.parametrize(("kind", "bits"), [("opt", 32), ("opt", 8), ("llama", 32), ("gpt2", 32), ("llama", 8)])
def test_kl_to_the_reference_is_0_before_training(folders, kind, bits, cache_bytes):
    model = ff.load(folders[kind], bits=bits, lora={"r": 4}).train()
    terms = [ff.KL(on="forget"), ff.KL(on="retain"), ff.preset("npo")[0]]
    loss = ff.UnlearnLoss(model, terms, reference_cache_bytes=cache_bytes)
    for number, batch in enumerate(batches()):
        if number == 2 and cache_bytes:
            assert loss.reference.forwards == 2, "these four are known, padded otherwise"
        out = loss(batch, batch)
        for name in ("kl", "kl_2"):
            assert 0 <= float(out.terms[name].detach()) < 1e-10, number
        assert float(out.terms["npo"]) == pytest.approx(2 * 0.6931472 / 0.1, rel=1e-5), number


@pytest.mark.parametrize(("kind", "bits"), [("opt", 32), ("llama", 32), ("gpt2", 32), ("llama", 8)])
def test_three_epochs_with_a_cache_are_three_epochs_without(folders, kind, bits):
    found = []
    for cache_bytes in (2 * 10**9, 0):
        torch.manual_seed(0)
        model = ff.load(folders[kind], bits=bits, lora={"r": 4}).train()
        terms = [ff.NegatedCE(weight=0.1), ff.KL()]
        step = ff.UnlearnStep(model, torch.optim.SGD, terms=terms, lr=0.05, reference_cache_bytes=cache_bytes)
        for _ in range(3):
            losses = [step(batch, batch).loss for batch in batches()]
        found.append(torch.stack(losses))
        forwards = step.loss.reference.forwards
    assert torch.allclose(*found, rtol=1e-3 if bits == 8 else 1e-5), found
    assert forwards == 15 and float(found[0].abs().min()) > 0


@pytest.mark.parametrize("kind", ["opt", "llama", "gpt2"])
def test_loss_and_gradients_do_not_know_of_padding(folders, kind):
    torch.manual_seed(0)
    model = ff.load(folders[kind], bits=32, lora={"r": 4, "init_lora_weights": False}).train()
    loss = ff.UnlearnLoss(model, "npo_mean", reference_cache_bytes=0)
    examples, found = [example(1), example(2, 9)], []
    for paddings in ((0, 0), (5, 20), (20, 0)):
        batch = collate(examples, paddings)
        assert count_labels([(batch, None)]).totals("forget") == (13 + 8, 2), "the first token is never predicted"
        model.zero_grad()
        out = loss(batch, batch)
        out.loss.backward()
        found.append(torch.cat([out.loss.detach()[None], *(p.grad.flatten() for p in loss_parameters(model))]))
    for other in found[1:]:
        assert torch.allclose(other, found[0], rtol=1e-4, atol=1e-5 * float(found[0].abs().max()))


def loss_parameters(model):
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def test_a_companion_may_be_padded_on_the_other_side(folders):
    model = ff.load(folders["gpt2"], bits=32, lora={"r": 4}).train()
    loss = ff.UnlearnLoss(model, "dpo")
    for left, right in ((0, 0), (20, 0), (0, 5)):
        refusal = collate([example(3), example(4, 9)], (right, 0))
        forget = {**collate([example(1), example(2, 9)], (left, 5)), "refusal": refusal}
        out = loss(forget, collate([example(5)], (left,)))
        assert float(out.terms["dpo"]) == pytest.approx(2 * 0.6931472 / 0.1, rel=1e-5)


def prepared_for(batch, model):
    backbone = Backbone(model)
    return backbone.prepare(check_batch(batch, "the forget batch", backbone.vocabulary))


def keys_of(batch, model):
    return prepared_for(batch, model).keys


def test_padding_is_in_the_key_where_the_result_depends_on_it(folders, monkeypatch):
    one = example(1)
    plain, padded, more = (collate([one], (left,)) for left in (0, 5, 6))
    other = {**padded, "input_ids": padded["input_ids"].clone()}
    other["input_ids"][0, 0] = 9  # on padding
    gpt2 = ff.load(folders["gpt2"], bits=32)
    assert keys_of(plain, gpt2) == keys_of(padded, gpt2) == keys_of(other, gpt2) == keys_of(more, gpt2)

    torch.manual_seed(0)
    without_positions = BloomForCausalLM(BloomConfig(vocab_size=VOCABULARY, hidden_size=64, n_layer=1, n_head=4))
    monkeypatch.setattr(backbones, "moved_by_padding", lambda *_: 0.5)  # as a convolution over padding would
    for model in (without_positions, gpt2):
        keys = [keys_of(batch, model)[0] for batch in (plain, padded, other, more)]
        assert len(set(keys)) == 4
        assert keys_of(collate([one, example(2, 20)], (0, 0)), model)[0] == keys[0], "what is on the right is not"
        assert "position_ids" not in prepared_for(padded, model).inputs


def test_a_mask_with_holes_is_keyed_by_all_of_it(folders):
    gpt2 = ff.load(folders["gpt2"], bits=32)
    plain, padded = (collate([example(1)], (left,)) for left in (0, 5))
    for batch, hole in ((plain, 4), (padded, 9)):
        batch["attention_mask"][0, hole] = 0
    assert keys_of(plain, gpt2) != keys_of(padded, gpt2)
    side = prepared(padded)
    assert "position_ids" not in side.inputs and 9 not in side.positions[1].tolist(), "and a hole predicts nothing"


def test_given_positions_stay(folders):
    gpt2 = ff.load(folders["gpt2"], bits=32)
    padded = collate([example(1)], (5,))
    given = {**padded, "position_ids": torch.arange(19)[None]}
    side = prepared_for(given, gpt2)
    assert torch.equal(side.inputs["position_ids"], given["position_ids"])
    assert side.keys != keys_of(padded, gpt2)


def test_equal_inputs_that_stand_elsewhere_have_other_keys(folders):
    gpt2 = ff.load(folders["gpt2"], bits=32)
    left, right = collate([example(1)], (1,)), collate([example(1), example(2, 15)], (0, 0))
    right = {key: value[:1] for key, value in right.items()}
    for name in ("position_ids", "token_type_ids"):
        given = {name: (torch.arange(15)[None] * 7) % 4}
        assert keys_of(left | given, gpt2) != keys_of(right | given, gpt2), name
    places = torch.arange(15)[None]
    own = [keys_of(batch | {"position_ids": ids}, gpt2) for batch, ids in ((left, places - 1), (right, places))]
    assert own[0] == own[1], "the same tokens at the same positions"


def test_one_position_counts_as_moved_and_rounding_does_not(folders):
    for kind, bits in (("opt", 32), ("llama", 32), ("gpt2", 32), ("opt", 8), ("llama", 16)):
        backbone = Backbone(ff.load(folders[kind], bits=bits, device="cpu"))
        assert moved_by_padding(backbone.trial, base_causal_lm(backbone.model)) < MOVED / 2, (kind, bits)
    ids = torch.arange(1, 17)[None]
    with torch.no_grad():
        states = [backbone_states(folders["gpt2"], ids, torch.arange(16) + shift) for shift in (0, 1)]
    assert float((states[0] - states[1]).norm() / states[0].norm()) > MOVED


def backbone_states(folder, ids, positions):
    return GPT2LMHeadModel.from_pretrained(folder).transformer(ids, position_ids=positions[None]).last_hidden_state


def test_an_entry_of_another_length_is_a_miss(folders):
    reference = ff.UnlearnLoss(ff.load(folders["llama"], bits=32), "npo").reference
    side = prepared(collate([example(1)], (0,)))
    truth = reference.answers(side, WANTED)
    (entry,) = reference._cache.values()
    entry[REFERENCE_LOGP] = entry[REFERENCE_LOGP][1:]
    assert all(torch.equal(value, truth[name]) for name, value in reference.answers(side, WANTED).items())
    assert reference.forwards == 2
