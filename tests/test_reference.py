"""The frozen reference: one model in memory, never changed by training, cached by content within a byte limit."""

import pytest
import torch
import torch.nn.functional as F
from helpers import prepared
from transformers import AutoModelForCausalLM

import fastforget as ff
from fastforget.objectives import REFERENCE_LOGP
from fastforget.reference import LayerStates
from fastforget.reference_modes import reference_mode

LOGP = frozenset({REFERENCE_LOGP})
STATES = LayerStates(None)


def logp_of(reference, side):
    return reference.answers(side, LOGP)[REFERENCE_LOGP]


def flags(model):
    return [module.training for module in model.modules()], [p.requires_grad for p in model.parameters()]


@pytest.mark.parametrize("bits", [32, 8])
def test_training_does_not_change_the_reference(tiny, batch, bits):
    model = ff.load(tiny["opt"], bits=bits, lora={"r": 4}).train()
    step = ff.UnlearnStep(model, torch.optim.AdamW, terms="npo_mean", lr=1e-2, reference_cache_bytes=0)
    side = prepared(batch(4, 1))
    before = step.loss.reference.answers(side, LOGP | {STATES})
    weights = {name: p.clone() for name, p in model.named_parameters() if not p.requires_grad}
    for seed in range(5):
        step(batch(4, 1), batch(4, seed))
    after = step.loss.reference.answers(side, LOGP | {STATES})
    assert torch.equal(before[STATES], after[STATES]) and torch.equal(before[REFERENCE_LOGP], after[REFERENCE_LOGP])
    for name, parameter in model.named_parameters():
        assert name not in weights or torch.equal(parameter, weights[name]), name
    policy = step.loss.backbone.states(side.inputs, side.positions)[None]
    assert not torch.equal(policy, after[STATES]), "the adapter itself did learn"


def test_flags_are_restored_also_after_an_exception(tiny):
    model = ff.load(tiny["opt"], bits=8, lora={"r": 4, "target_modules": ["q_proj", "k_proj"]}).train()
    frozen = next(p for name, p in model.named_parameters() if "lora_A" in name)
    frozen.requires_grad_(False)
    model.base_model.model.model.decoder.layers[1].eval()
    before = flags(model)
    with pytest.raises(KeyError), reference_mode(model):
        decoder = model.base_model.model.model.decoder
        assert not decoder.layers[0].training, "functional dropout looks at this flag"
        assert decoder.layers[0].fc1.training, "bitsandbytes layers stay in the policy's mode"
        raise KeyError
    assert flags(model) == before


def test_dropout_is_off_in_the_reference_only(tiny, batch):
    model = ff.load(tiny["opt"], bits=32, lora={"r": 4}).train()
    decoder = model.base_model.model.model.decoder
    for layer in decoder.layers:
        layer.dropout = 0.5
    loss = ff.UnlearnLoss(model, [ff.KL(on="forget")], reference_cache_bytes=0)
    side = prepared(batch(3, 1))
    first, second = (logp_of(loss.reference, side) for _ in range(2))
    assert torch.equal(first, second)
    assert float(loss(batch(3, 1)).loss.detach()) > 0, "the policy drops out"


def test_cache_is_keyed_by_content_within_its_limit(tiny, batch):
    model = ff.load(tiny["llama"], bits=32, lora={"r": 4})
    reference = ff.UnlearnLoss(model, "npo").reference
    one = batch(3, 1)
    truth = logp_of(reference, prepared(one))
    padded = {key: F.pad(value, (0, 5), value=-100 if key == "labels" else 0) for key, value in one.items()}
    assert torch.equal(logp_of(reference, prepared(padded)), truth)
    assert reference.forwards == 1, "padding is not content"
    fewer = one | {"labels": one["labels"].clone()}
    fewer["labels"][1, :10] = -100
    kept = prepared(fewer)
    assert logp_of(reference, kept).shape == kept.labels.shape and reference.forwards == 2
    other = one | {"labels": torch.where(one["labels"] == -100, -100, (one["labels"] + 7) % 320)}
    uncached = ff.UnlearnLoss(model, "npo", reference_cache_bytes=0).reference
    side = prepared(other)
    assert torch.equal(logp_of(reference, side), logp_of(uncached, side)), "labels may be any ids"

    # partly cached: rows 1 and 2 are known, row 0 is new
    mixed = {key: torch.cat([batch(1, 7)[key], one[key][1:]]) for key in one}
    side = prepared(mixed)
    ours = logp_of(reference, side)
    assert torch.allclose(ours, logp_of(uncached, side), rtol=1e-5, atol=1e-6)
    assert torch.equal(ours[-len(truth) + 9 :], truth[9:])


def test_rows_without_labels_do_not_shift_what_is_recomputed(tiny, batch):
    model = ff.load(tiny["llama"], bits=32, lora={"r": 4})
    loss = ff.UnlearnLoss(model, "npo")
    uncached = ff.UnlearnLoss(model, "npo", reference_cache_bytes=0).reference
    one = batch(4, 1)
    one["labels"][[0, 2]] = -100
    loss.reference.answers(prepared({key: value[1:2] for key, value in one.items()}), LOGP)
    side = prepared(one)
    ours, truth = logp_of(loss.reference, side), logp_of(uncached, side)
    assert torch.allclose(ours, truth, rtol=1e-5, atol=1e-6) and loss.reference.forwards == 2


def test_labels_on_padding_are_part_of_an_example(tiny, batch):
    """labels = input_ids.clone() with padding unmasked: wider padding has more label tokens."""
    model = ff.load(tiny["llama"], bits=32, lora={"r": 4})
    loss = ff.UnlearnLoss(model, "npo")
    one = batch(2, 1) | {"labels": batch(2, 1)["input_ids"]}
    for right in (0, 3):
        wide = {key: F.pad(value, (0, right)) for key, value in one.items()}
        assert float(loss(wide, batch(2, 2)).terms["npo"]) == pytest.approx(2 * 0.6931472 / 0.1, rel=1e-6)


def test_least_recently_used_goes_and_a_miss_is_recomputed(tiny, batch):
    model = ff.load(tiny["llama"], bits=32, lora={"r": 4})
    row_bytes = 4 * 15
    reference = ff.UnlearnLoss(model, "npo", reference_cache_bytes=2 * row_bytes).reference
    rows = [{key: value[1:] for key, value in batch(2, seed).items()} for seed in range(3)]
    sides = [prepared(row) for row in rows]
    first = logp_of(reference, sides[0])
    reference.answers(sides[1], LOGP)
    reference.answers(sides[0], LOGP)  # used again: the second is now the oldest
    reference.answers(sides[2], LOGP)
    assert reference.forwards == 3 and reference.bytes_used == 2 * row_bytes
    reference.answers(sides[0], LOGP)
    assert reference.forwards == 3
    reference.answers(sides[1], LOGP)
    assert reference.forwards == 4
    assert torch.allclose(logp_of(reference, sides[0]), first, rtol=1e-6)


@pytest.mark.parametrize(
    ("lora", "message"),
    [
        ({"bias": "all"}, "trains biases"),
        ({"target_modules": ["lm_head"]}, "adapter on the output head"),
        ({"modules_to_save": ["lm_head"]}, "adapter on the output head"),
    ],
)
def test_refuses_what_would_make_the_reference_wrong(tiny, lora, message):
    model = ff.load(tiny["llama"], bits=32, lora=lora)
    with pytest.raises(ff.FastforgetError, match=message):
        ff.UnlearnLoss(model, "npo")


def test_refuses_models_without_adapter_and_weights_outside_it(tiny):
    bare = AutoModelForCausalLM.from_pretrained(tiny["llama"])
    with pytest.raises(ff.FastforgetError, match="no PEFT adapter"):
        ff.UnlearnLoss(bare, "npo")
    ff.UnlearnLoss(bare, "grad_diff")
    model = ff.load(tiny["llama"], bits=32)
    model.base_model.model.model.norm.weight.requires_grad_(True)
    with pytest.raises(ff.FastforgetError, match=r"norm\.weight trains but belongs to no adapter"):
        ff.UnlearnLoss(model, "npo")


def test_the_reference_of_a_stacked_adapter_is_the_adapter_below(tiny, batch, tmp_path):
    first = ff.load(tiny["llama"], bits=32, lora={"r": 4})
    for name, parameter in first.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.2)
    ff.save_adapter(first, None, tmp_path / "first")
    expected = first.eval()(input_ids=batch(2, 1)["input_ids"]).logits

    model = ff.load(tmp_path / "first", bits=32, lora={"r": 4}).train()
    assert torch.allclose(model(input_ids=batch(2, 1)["input_ids"]).logits, expected, atol=1e-5)
    step = ff.UnlearnStep(model, torch.optim.AdamW, terms=[ff.KL(on="forget"), ff.NegatedCE()], lr=1e-2)
    assert float(step(batch(2, 1)).terms["kl"]) == 0.0
    for _ in range(3):
        out = step(batch(2, 1))
    assert float(out.terms["kl"]) > 0
    with reference_mode(model):
        assert torch.allclose(model(input_ids=batch(2, 1)["input_ids"]).logits, expected, atol=1e-5)
    assert list(model.active_adapters) == ["default", "unlearn"]
    with pytest.raises(ff.FastforgetError, match="is itself an adapter"):
        ff.load(tmp_path / "first", bits=32, adapter=tmp_path / "first")


def test_embeddings_leave_the_cache_before_examples_do(tiny, batch):
    """Where states and embeddings do not fit together, the states stay, and nobody asks for embeddings again."""
    model = ff.load(tiny["llama"], bits=32, lora={"r": 2})
    batches = [batch(2, seed) for seed in range(6)]
    whole = ff.UnlearnLoss(model, [ff.KL(on="forget")])
    for each in batches:
        whole(each)
    tight = ff.UnlearnLoss(model, [ff.KL(on="forget")], reference_cache_bytes=int(0.7 * whole.reference.bytes_used))
    for _ in range(3):
        for each in batches:
            tight(each)
    assert whole.reference.keeps_embeddings and not tight.reference.keeps_embeddings
    assert tight.reference.forwards == len(batches) and tight.reference.bytes_used <= tight.reference.cache_bytes


def test_a_known_example_beside_the_one_that_fills_the_cache(tiny, batch):
    """The embeddings leave the cache in the middle of a batch whose other example is answered from it."""
    model = ff.load(tiny["llama"], bits=32, lora={"r": 2})
    first, second = batch(1, 0), batch(1, 1)
    both = {name: torch.cat((first[name], second[name])) for name in first}
    whole = ff.UnlearnLoss(model, [ff.KL(on="forget")])
    expected = whole(both).loss
    tight = ff.UnlearnLoss(model, [ff.KL(on="forget")], reference_cache_bytes=int(0.9 * whole.reference.bytes_used))
    tight(first)
    assert torch.allclose(tight(both).loss, expected) and not tight.reference.keeps_embeddings
