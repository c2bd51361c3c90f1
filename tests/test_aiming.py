"""An adapter that is aimed moves the forget set, and next to nothing of what is kept."""

import pytest
import torch
from helpers import random_model

import fastforget as ff
from fastforget.aiming import aim_adapter, distinct_directions
from fastforget.data.examples import Example, in_batches
from fastforget.head import base_causal_lm


def rows(seed, count, low, high):
    """Return examples of random tokens from `low` to `high`, behind a beginning that all share."""
    draw = torch.Generator().manual_seed(seed)
    return [
        Example((1, 5, 9, *torch.randint(low, high, (12,), generator=draw).tolist()), prompt_length=3)
        for _ in range(count)
    ]


@pytest.fixture
def model(tokenizer, tmp_path):
    random_model("llama", tokenizer).save_pretrained(tmp_path)
    torch.manual_seed(0)
    return ff.load(tmp_path, bits=32, lora={"r": 4, "target_modules": ["down_proj"]}, device="cpu")


def moved(model, examples):
    """Return how far the adapter moves the logits of these rows: mean square over all tokens."""
    with torch.no_grad():
        batch = next(in_batches(examples, 0, len(examples)))
        on = base_causal_lm(model)(batch["input_ids"]).logits
        with model.disable_adapter():
            off = base_causal_lm(model)(batch["input_ids"]).logits
    return float((on - off).square().mean())


def test_what_is_learned_moves_the_forget_set_and_not_the_kept(model):
    forget, kept = rows(0, 2, 200, 300), rows(1, 24, 20, 150)

    def spread():
        torch.manual_seed(1)
        for name, weight in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(weight)
        return moved(model, kept) / moved(model, forget)

    drawn = spread()
    aim_adapter(model, in_batches(forget, 0), in_batches(kept, 0))
    trains = {name.split(".")[-3] for name, weight in model.named_parameters() if weight.requires_grad}
    assert trains == {"lora_B"}
    aimed = spread()
    assert aimed < drawn / 3, (aimed, drawn)


def test_a_single_input_is_written_along_its_own_direction_in_the_kept_metric():
    draw = torch.Generator().manual_seed(0)
    kept, key = torch.randn(40, 6, generator=draw), torch.randn(1, 6, generator=draw)
    moments = kept.T @ kept / 40
    found = distinct_directions(key, moments, 1e-3, 2)
    expected = torch.linalg.solve(moments + 1e-3 * moments.diagonal().mean() * torch.eye(6), key[0])
    assert torch.cosine_similarity(found[0], expected, dim=0).abs() > 1 - 1e-5
    assert found[1].count_nonzero() == 0, "one input has one direction"
    assert float((key @ found[0]).square()) == pytest.approx(1.0, rel=1e-4)


def test_what_cannot_be_aimed_is_refused(model):
    with pytest.raises(ff.FastforgetError, match="no token"):
        aim_adapter(model, in_batches([], 0), in_batches(rows(0, 1, 20, 30), 0))
    with pytest.raises(ff.FastforgetError, match="no token"):
        aim_adapter(model, in_batches(rows(0, 1, 20, 30), 0), in_batches([], 0))
    with pytest.raises(ff.FastforgetError, match="ridge"):
        aim_adapter(model, [], [], ridge=0.0)
