"""Hundreds of odd batches and arguments to the step: only FastforgetError, or a finite loss and finite weights."""

import contextlib
import random

import pytest
import torch
from helpers import VOCABULARY, adapter_of, load_perturbed, make_batch

import fastforget as ff

TERMS = ("npo", "grad_diff", "simnpo", "undial", "pdu", "me", "unlikelihood", "other_tokens", "kto", "idk")
ODD_VALUES = (None, 7, "text", [1, 2], torch.ones(3), torch.ones(2, 3, 4), torch.tensor(1), torch.zeros(0, 0))


def holes(mask, draw):
    mask[torch.rand(mask.shape) < draw.choice((0.1, 0.5, 1.0))] = 0


def left_padding(batch, draw):
    cut = draw.randrange(1, batch["input_ids"].shape[1] + 1)
    batch["attention_mask"][0, :cut] = 0


def label_some(batch, draw):
    batch["labels"][draw.randrange(len(batch["labels"]))] = draw.choice((-100, 0, VOCABULARY - 1))


CHANGES = {
    "holes in the mask": lambda batch, draw: holes(batch["attention_mask"], draw),
    "left padding": left_padding,
    "a mask of another kind": lambda batch, draw: batch.update(
        attention_mask=batch["attention_mask"].to(draw.choice((torch.float32, torch.bool, torch.int32, torch.uint8)))
    ),
    "a mask of other numbers": lambda batch, draw: batch["attention_mask"].mul_(draw.choice((2, -1, 1000))),
    "labels of a row": label_some,
    "labels beyond": lambda batch, draw: batch["labels"][0].fill_(draw.choice((VOCABULARY, 2**40, -1, -101))),
    "ids beyond": lambda batch, draw: batch["input_ids"][0].fill_(draw.choice((VOCABULARY, 2**40, -1))),
    "ids of another kind": lambda batch, draw: batch.update(
        input_ids=batch["input_ids"].to(draw.choice((torch.int32, torch.int16, torch.float32, torch.bool)))
    ),
    "labels of another kind": lambda batch, draw: batch.update(
        labels=batch["labels"].to(draw.choice((torch.int32, torch.float64)))
    ),
    "fewer rows of one": lambda batch, draw: batch.update(
        {key: batch[key][:1] for key in [draw.choice(("labels", "input_ids", "attention_mask"))]}
    ),
    "fewer columns of one": lambda batch, draw: batch.update(
        {key: batch[key][:, 1:] for key in [draw.choice(("labels", "input_ids", "attention_mask"))]}
    ),
    "no rows": lambda batch, draw: batch.update({key: value[:0] for key, value in batch.items()}),
    "no columns": lambda batch, draw: batch.update({key: value[:, :0] for key, value in batch.items()}),
    "one column": lambda batch, draw: batch.update({key: value[:, :1] for key, value in batch.items()}),
    "expanded": lambda batch, draw: batch.update({key: value[:1].expand(value.shape) for key, value in batch.items()}),
    "transposed": lambda batch, draw: batch.update({key: value.T.contiguous().T for key, value in batch.items()}),
    "a key gone": lambda batch, draw: batch.pop(draw.choice(list(batch))),
    "an odd value": lambda batch, draw: batch.update(
        {draw.choice(("labels", "input_ids", "attention_mask", "position_ids", "extra")): draw.choice(ODD_VALUES)}
    ),
    "positions": lambda batch, draw: batch.update(
        position_ids=torch.randint(0, 200, batch["input_ids"].shape) * draw.choice((1, 0))
    ),
    "a role": lambda batch, draw: batch.update(role=torch.tensor(draw.choices(range(-1, 6), k=len(batch["labels"])))),
    "a companion": lambda batch, draw: batch.update(
        refusal=draw.choice((make_batch(2, 3), make_batch(3, 3), *ODD_VALUES))
    ),
}
MICRO_BATCHES = (None, None, None, 1, 2, 100, "auto", "auto", 1.5, "x")
COUNTS = (*[None] * 8, ff.LabelCounts(100, 10, 100, 10), ff.LabelCounts(), ff.LabelCounts(-5, 1, 3, 0), "x")


def side(draw, seed):
    """A batch with some changes; or none, or none that is one."""
    if draw.random() < 0.05:
        return draw.choice((None, {}, [], "batch", torch.ones(2, 3)))
    batch = make_batch(draw.choice((1, 2, 3)), seed, width=draw.choice((8, 20)))
    for name in draw.sample(list(CHANGES), draw.choice((0, 0, 1, 2))):
        # of two changes the first one may have left nothing to change
        with contextlib.suppress(AttributeError, TypeError, KeyError, IndexError, RuntimeError, ValueError):
            CHANGES[name](batch, draw)
    return batch


def run_many(model, seeds):
    """Take a step of each; the share of those that were computed."""
    steps = {}
    computed = 0
    for seed in seeds:
        draw = random.Random(seed)
        torch.manual_seed(seed)
        terms = draw.choice(TERMS)
        if terms not in steps:
            steps[terms] = ff.UnlearnStep(model, torch.optim.SGD, terms=terms, lr=1e-4)
        step = steps[terms]
        forget, retain = side(draw, seed), side(draw, seed + 1)
        counts, micro_batch = draw.choice(COUNTS), draw.choice(MICRO_BATCHES)
        before = adapter_of(model)
        try:
            out = step.backward(forget, retain, counts=counts, micro_batch=micro_batch)
            step.step()
            step.zero_grad()
        except ff.FastforgetError as error:
            assert "\n" not in str(error), seed
            assert all(parameter.grad is None for parameter in model.parameters()), seed
            after = adapter_of(model)
            assert all(torch.equal(value, after[name]) for name, value in before.items()), seed
            continue
        except Exception as error:
            raise AssertionError(f"{seed}: {terms}, {forget}, {retain}, {counts}, {micro_batch}") from error
        assert out.loss.isfinite(), (seed, out)
        assert all(value.isfinite().all() for value in adapter_of(model).values()), seed
        computed += 1
    return computed / len(seeds)


@pytest.mark.parametrize("kind", ["llama", "opt"])
def test_odd_batches(tiny, kind):
    assert 0.1 < run_many(load_perturbed(tiny[kind]), range(500)) < 0.9
