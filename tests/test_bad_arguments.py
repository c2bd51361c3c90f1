"""Arguments of the tensor-level functions and of batches that are no tensors, empty, or overlap: one clear error."""

import math

import numpy as np
import pytest
import torch
from kernel_device import OURS, device_of

import fastforget as ff
from fastforget.batch import check_batch

EVERY = pytest.mark.parametrize("backend", ["eager", *OURS])
SWEEPS = pytest.mark.parametrize("backend", OURS)
LABELS = torch.tensor([1, 2, -100, 3])


def problem(backend):
    """(hidden (4, 8), weight (10, 8)), seeded."""
    generator = torch.Generator().manual_seed(0)
    return tuple(torch.randn(shape, generator=generator).to(device_of(backend)) for shape in ((4, 8), (10, 8)))


@SWEEPS
@pytest.mark.parametrize("strides", [(0, 1), (3, 1), (9, 1), (1, 1)])
def test_in_place_on_rows_that_overlap_is_refused(backend, strides):
    logits = torch.randn(60, device=device_of(backend)).as_strided((4, 10), strides)
    with pytest.raises(ff.FastforgetError, match="rows overlap in memory"):
        ff.token_stats_from_logits(logits, LABELS, backend=backend, in_place=True)
    ff.token_stats_from_logits(logits, LABELS, backend=backend)
    apart = torch.randn(60, device=device_of(backend)).as_strided((4, 10), (12, 1))
    ff.token_stats_from_logits(apart, LABELS, backend=backend, in_place=True)


@EVERY
def test_a_vocabulary_or_states_of_nothing_are_refused(backend):
    hidden, weight = problem(backend)
    ignored = torch.full((4,), -100)
    for empty in (weight[:0], weight[:, :0]):
        with pytest.raises(ff.FastforgetError, match="V and D must be at least 1"):
            ff.LMHead(empty)
    for call in (
        lambda: ff.token_stats_from_logits(hidden[:, :0], ignored, backend=backend),
        lambda: ff.hidden_stats(hidden[:, :0], hidden[0, :0], backend=backend),
        lambda: ff.divergence(hidden[:, :0], hidden[:, :0], ff.LMHead(weight), backend=backend),
    ):
        with pytest.raises(ff.FastforgetError, match="D >= 1"):
            call()


@EVERY
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden": np.ones((4, 8))}, "hidden must be a floating-point .*not a ndarray"),
        ({"hidden": torch.ones(4, 8).to_sparse()}, "hidden must be .*sparse"),
        ({"hidden": torch.ones(4, 8, device="meta")}, "hidden must be .*on meta"),
        ({"head": torch.nn.Linear(8, 10)}, "head must be an LMHead .*not a Linear"),
        ({"labels": [1, 2, 3, 4]}, "labels must be int64 .*not a list"),
        ({"labels": np.ones(4)}, "labels must be int64 .*not a ndarray"),
        ({"labels": torch.ones(4)}, "labels must be int64 .*not float32"),
        ({"labels": LABELS.to_sparse()}, "labels must be int64 .*sparse"),
        ({"labels": torch.tensor([1, 2, 10, 3])}, "label 10 is outside the vocabulary of 10"),
        ({"labels": torch.tensor([1, 2, 10, 3]), "anchor": "label"}, "label 10 is outside the vocabulary of 10"),
        ({"labels": torch.tensor([1, 2, -1, 3]), "anchor": "label"}, "label -1 is outside the vocabulary of 10"),
        ({"positions": [0]}, "positions must be an int64 tensor"),
        ({"positions": torch.tensor([4])}, "position 4 is none of the 4 rows"),
        ({"positions": torch.tensor([-1])}, "position -1 is none of the 4 rows"),
        ({"positions": torch.tensor([0, 0])}, "positions must be distinct"),
        ({"positions": torch.tensor([2])}, "label -100 is outside"),
        ({"anchor": [1.0] * 8}, "anchor must be .*not a list"),
        ({"anchor": np.ones(8)}, "anchor must be .*not a ndarray"),
        ({"anchor": torch.ones(8, dtype=torch.complex64)}, "anchor must be .*not complex64"),
        ({"centres": [[1.0] * 8]}, "centres must be .*not a list"),
        ({"centres": torch.ones(0, 8)}, r"centres must be .*not float32 \(0, 8\)"),
    ],
)
def test_arguments_that_are_no_tensors_or_wrong_ones(backend, changes, message):
    hidden, weight = problem("eager")
    given = {"hidden": hidden, "head": ff.LMHead(weight), "labels": LABELS, **changes}
    with pytest.raises(ff.FastforgetError, match=message):
        ff.token_stats(**given, backend=backend)


@EVERY
@pytest.mark.parametrize("trains", ["weight", "bias", "logits"])
def test_frozen_states_with_distances_and_a_head_or_logits_that_train(backend, trains):
    hidden, weight = problem(backend)
    found = []
    for name in ("eager", backend):
        shapes = {"weight": weight, "bias": weight[:, 0], "logits": hidden @ weight.T}
        part = shapes[trains].clone().requires_grad_()
        targets = {"anchor": hidden[0], "centres": weight[:3], "backend": name}
        if trains == "logits":
            stats = ff.token_stats_from_logits(part, LABELS, hidden, **targets)
        else:
            head = ff.LMHead(part) if trains == "weight" else ff.LMHead(weight, part)
            stats = ff.token_stats(hidden, head, LABELS, **targets)
        (stats.logp.sum() + stats.distance.sum() + stats.pull.sum()).backward()
        found.append(part.grad)
    torch.testing.assert_close(*found)


@EVERY
@pytest.mark.parametrize("kind", ["forward_kl", "reverse_kl", "jsd"])
def test_a_divergence_of_float16_under_autocast(backend, kind):
    hidden, weight = (each.half() for each in problem(backend))
    found = []
    for enabled in (False, True):
        given = hidden.clone().requires_grad_()
        with torch.autocast(hidden.device.type, torch.bfloat16, enabled=enabled):
            value = ff.divergence(given, hidden.flip(0), ff.LMHead(weight), kind, backend=backend)
        value.sum().backward()
        found += [(value.detach(), given.grad)]
    torch.testing.assert_close(*found)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"bias": [0.0] * 10}, "bias must be floating point .*not a list"),
        ({"bias": np.zeros(10)}, "bias must be floating point .*not a ndarray"),
        ({"bias": torch.zeros(10, dtype=torch.int64)}, "bias must be floating point .*not torch.int64"),
        ({"scale": math.nan}, "scale must be finite"),
        ({"softcap": math.inf}, "softcap must be positive and finite"),
        ({"softcap": math.nan}, "softcap must be positive and finite"),
    ],
)
def test_heads_that_are_none(arguments, message):
    with pytest.raises(ff.FastforgetError, match=message):
        ff.LMHead(torch.ones(10, 8), **arguments)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"input_ids": [[1, 2], [3, 4]]}, "its 'input_ids' is a list"),
        ({"labels": np.ones((2, 2))}, "its 'labels' is a ndarray"),
        ({"attention_mask": [[1, 1], [1, 1]]}, "its 'attention_mask' is a list"),
        ({"labels": torch.ones(2, 2)}, r"its 'labels' are torch.float32, and must be torch.int64"),
        ({"labels": torch.ones(2, 2, dtype=torch.int32)}, r"its 'labels' are torch.int32, and must be torch.int64"),
        ({"input_ids": torch.ones(2, 2)}, r"its 'input_ids' are torch.float32"),
        ({"position_ids": np.ones((2, 2))}, "its 'position_ids' is a ndarray: models take tensors"),
        ({"text": ["a", "b"]}, "its 'text' is a list: models take tensors; make it one, or leave it out"),
    ],
)
def test_batches_that_hold_no_tensors(changes, message):
    ids = torch.ones(2, 2, dtype=torch.int64)
    with pytest.raises(ff.FastforgetError, match=message):
        check_batch({"input_ids": ids, "labels": ids, **changes}, "the forget batch")
