"""`tail_mass` on the CPU: what is left out is at most that, is told, is never a label's tile, and memory is bounded."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_device import needs_native
from test_stats import DRAWS

import fastforget as ff
from fastforget.backends import live_tiles, native
from fastforget.backends.library import TILE

pytestmark = needs_native
VOCABULARY = 40 * TILE + TILE // 2  # the last tile is short


def probabilities(kinds, generator):
    """(rows, V) distributions, each row of one of the kinds, and the labels."""
    rows = len(kinds)
    labels = torch.randint(0, VOCABULARY, (rows,), generator=generator)
    power = {"flat": 0.0, "zipf": 1.0, "peaked": 1.0, "peaked anywhere": 3.0, "unlikely": 4.0}
    label_probability = {"flat": 1 / VOCABULARY, "zipf": 0.3, "peaked": 0.9999, "peaked anywhere": 0.9999}
    others = torch.empty(rows, VOCABULARY)
    for row, kind in enumerate(kinds):
        ranks = torch.arange(1.0, VOCABULARY + 1)  # by token id: the first tiles hold most
        if kind in ("peaked anywhere", "unlikely"):
            ranks = torch.randperm(VOCABULARY, generator=generator) + 1.0
        others[row] = ranks ** -power[kind]
    others.scatter_(1, labels[:, None], 0.0)
    others /= others.sum(1, keepdim=True)
    of_label = torch.tensor([label_probability.get(kind, 1e-12) for kind in kinds])[:, None]
    return (1 - of_label) * others + of_label * torch.nn.functional.one_hot(labels, VOCABULARY), labels


def row_gradients(logits, labels, tail_mass, outputs=("logp",), backend="native", dtype=torch.float32):
    """(gradient of each output over the logits, the mass that is said to be dropped): the head is the identity."""
    hidden = logits.to(dtype).requires_grad_()
    head = ff.LMHead(torch.eye(VOCABULARY, dtype=dtype))
    stats = ff.token_stats(hidden, head, labels, outputs=outputs, backend=backend, tail_mass=tail_mass)
    grads = [torch.autograd.grad(getattr(stats, name).sum(), hidden, retain_graph=True)[0] for name in outputs]
    return [grad.double() for grad in grads], None if tail_mass == 0 else stats.dropped_mass.detach()


KINDS = ["flat", "zipf", "peaked", "peaked anywhere", "unlikely"]


@given(
    kinds=st.lists(st.sampled_from(KINDS), min_size=1, max_size=20),
    seed=st.integers(0, 1000),
    tail_mass=st.sampled_from([1e-4, 1e-3, 1e-2, 0.3]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
)
@settings(DRAWS, max_examples=25)
def test_what_is_dropped_is_at_most_tail_mass_and_is_told(kinds, seed, tail_mass, dtype):
    probs, labels = probabilities(kinds, torch.Generator().manual_seed(seed))
    logits = probs.log().clamp_min(-80.0)
    (exact,), nothing = row_gradients(logits, labels, 0.0, dtype=dtype)
    (ours,), dropped = row_gradients(logits, labels, tail_mass, dtype=dtype)
    assert nothing is None and (dropped <= tail_mass).all()
    missing = ours == 0  # a tile that was left out leaves zeros
    assert torch.allclose(ours[~missing], exact[~missing], rtol=1e-6)
    lost = (exact.abs() * missing).sum(1)
    assert (lost - dropped.double()).abs().max() <= 1e-2 * tail_mass + 1e-6, (lost, dropped)
    tile = labels[:, None] // TILE == torch.arange(VOCABULARY) // TILE
    # exact rows are summed in tiles with tops of their own, and z - top of up to 80 is rounded by 4e-6
    assert torch.allclose(ours[tile], exact[tile], rtol=1e-5, atol=0.0), "a label's tile was left out"
    for row, kind in enumerate(kinds):
        assert kind != "flat" or dropped[row] == 0


def test_memorised_text_drops_tiles_and_unlikelihood_none_that_it_needs():
    probs, labels = probabilities(["peaked"] * 10 + ["zipf"] * 2, torch.Generator().manual_seed(0))
    (ours,), dropped = row_gradients(probs.log(), labels, 1e-3)
    assert (dropped[:10] > 0).all() and (ours[:10] == 0).float().mean() > 0.2
    # the gradient of log(1 - p_y) is the unit row times p_y, here almost 1: what may be dropped is measured on that
    names = ("logp", "log_not_label")
    exact, _ = row_gradients(probs.log(), labels, 0.0, names)
    both, dropped = row_gradients(probs.log(), labels, 1e-3, names)
    for expected, found in zip(exact, both, strict=True):
        assert (expected - found).abs().sum(1).max() <= 1e-3
    assert (dropped <= 1e-3).all()


@pytest.mark.parametrize("dense_share", [1, 3, 1000])
def test_however_rows_are_grouped_the_product_is_the_same(monkeypatch, dense_share):
    """All rows by their tiles, some, or none; runs of tiles longer than what is gathered at a time."""
    monkeypatch.setattr(live_tiles, "DENSE_SHARE", dense_share)
    monkeypatch.setattr(live_tiles, "GATHERED", 3 * TILE)
    generator = torch.Generator().manual_seed(3)
    probs, labels = probabilities(KINDS * 4, generator)
    weight = torch.randn(VOCABULARY, 24, generator=generator)
    found = native.label_pass(
        probs.log().clamp_min(-80.0), labels, ff.LMHead(None), (), torch.empty_like(probs), masses=True
    )
    head = ff.LMHead(weight, scale=0.5)
    out = torch.empty(len(labels), 24)
    factor = found.fields["log_not_label"].exp()
    dropped = native.skipping_product(found, labels, head, factor, 1e-3, out)
    needed = (found.masses * factor[:, None] >= 1e-3 / found.masses.shape[1]).scatter_(1, labels[:, None] // TILE, True)
    whole = needed.sum(1) > needed.shape[1] // dense_share
    whole &= int(whole.sum()) >= len(labels) // dense_share
    kept = (needed | whole[:, None]).repeat_interleave(TILE, dim=1)[:, :VOCABULARY]
    expected = (found.row.double() * kept) @ weight.double() * 0.5
    assert torch.allclose(out.double(), expected, atol=1e-6)
    masses = torch.where(needed | whole[:, None], 0.0, found.masses * factor[:, None]).sum(1)
    assert torch.allclose(dropped, masses, rtol=1e-5)


def test_nan_is_never_left_out():
    probs, labels = probabilities(["peaked"] * 3, torch.Generator().manual_seed(0))
    logits = probs.log()
    logits[1, 5] = torch.nan
    (ours,), dropped = row_gradients(logits, labels, 1e-3)
    assert ours[1].isnan().any() and ours[[0, 2]].isfinite().all() and dropped[1] == 0
