"""NaN and infinity in a row's logits: every statistic of every backend is what the documentation says it is."""

import math

import pytest
import torch
from kernel_device import OURS, device_of

import fastforget as ff
from fastforget.backends.fields import NAMES

EVERY = pytest.mark.parametrize("backend", ["eager", *OURS])
STATISTICS = [name for name in NAMES if not name.endswith("_embedding")]
PLAIN = ("label_logit", "max_logit", "logit_mean", "logp_top2_margin", "argmax", "others_argmax")


def odd_rows(vocabulary):
    """(logits (n, V) float32, labels (n,)): each kind of odd number at the label, at another token, at many, at all."""
    generator = torch.Generator().manual_seed(0)
    label = vocabulary // 2
    others = [token for token in range(vocabulary) if token != label]
    places = [[label], others[:1], others[-1:], others[::2], others, [*others, label]]
    rows = []
    for places_of_row in places:
        for number in (math.nan, math.inf, -math.inf, 1e36, -1e36):
            row = torch.randn(vocabulary, generator=generator)
            row[places_of_row] = number
            rows.append(row)
    for at_label, elsewhere in (
        (math.nan, math.inf),
        (-math.inf, math.inf),
        (math.inf, math.nan),
        (math.inf, -math.inf),
    ):
        row = torch.randn(vocabulary, generator=generator)
        row[others[:1]], row[label] = elsewhere, at_label
        rows.append(row)
    return torch.stack(rows), torch.full((len(rows),), label)


def documented(logits, label):
    """Each statistic of one row (V,), by its definition, in float64; None where it is the index of a tie."""
    z = logits.double()
    others = torch.cat((z[:label], z[label + 1 :]))
    broken = bool((z.isnan() | (z == math.inf)).any())
    others_broken = bool((others.isnan() | (others == math.inf)).any())
    found = {"label_logit": float(z[label]), "max_logit": float(z.max()), "logit_mean": float(z.mean())}
    log_p = z.log_softmax(0)
    p = log_p.exp()
    known = log_p.where(p > 0, 0.0)
    found |= {"lse": float(z.logsumexp(0)), "logp": float(log_p[label]), "entropy": float(-(p * known).sum())}
    found["log_not_label"] = float(torch.cat((log_p[:label], log_p[label + 1 :])).logsumexp(0))
    if not len(others):
        found["log_not_label"] = -math.inf - found["lse"]
    found["logp_mean"] = -found["entropy"]
    spread = (known + found["entropy"]).where(p > 0, 0.0)
    found["logp_var"] = float((p * spread.square()).sum())
    if broken:
        found |= dict.fromkeys(found.keys() - set(PLAIN), math.nan)
    q = others.softmax(0)
    entropy = float(-(q * q.log().where(q > 0, 0.0)).sum()) if bool((others > -math.inf).any()) else 0.0
    found["others_entropy"] = math.nan if others_broken else entropy
    return found


@EVERY
@pytest.mark.parametrize("tile", ["2x16", "64x4096"])
@pytest.mark.parametrize("vocabulary", [1, 2, 40])
def test_statistics_of_odd_rows_are_as_documented(backend, tile, vocabulary, monkeypatch):
    monkeypatch.setenv("FASTFORGET_TILE", tile)
    logits, labels = odd_rows(vocabulary)
    place = device_of(backend)
    stats = ff.token_stats_from_logits(logits.to(place), labels.to(place), outputs=STATISTICS, backend=backend)
    for row, label in enumerate(labels.tolist()):
        size = float(logits[row].abs().nan_to_num(0.0, 0.0, 0.0).max())  # what differences of logits are rounded at
        for name, expected in documented(logits[row], label).items():
            value = float(getattr(stats, name)[row])
            same = value == expected or (math.isnan(value) and math.isnan(expected))
            same = same or math.isclose(value, expected, rel_tol=1e-5, abs_tol=1e-5 * max(1.0, size))
            assert same, (name, row, logits[row], value, expected)
        assert int(stats.argmax[row]) == int(logits[row].argmax())


@EVERY
@pytest.mark.parametrize("number", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("at_label", [True, False])
def test_gradients_of_odd_rows_stay_in_their_row(backend, number, at_label):
    generator = torch.Generator().manual_seed(0)
    logits, labels = torch.randn(3, 40, generator=generator), torch.tensor([5, 6, 7])
    upstream = torch.randn(2, 3, generator=generator)
    found = []
    for odd in (False, True):
        given = logits.clone()
        if odd:
            given[1, 6 if at_label else 9] = number
        given = given.to(device_of(backend)).requires_grad_()
        stats = ff.token_stats_from_logits(given, labels, outputs=("entropy",), backend=backend)
        (stats.logp * upstream[0].to(given.device) + stats.entropy * upstream[1].to(given.device)).sum().backward()
        found.append(given.grad.cpu())
    torch.testing.assert_close(found[1][[0, 2]], found[0][[0, 2]], rtol=0, atol=0)
    if number != -math.inf:
        assert found[1][1].isnan().any()
    elif not at_label:
        assert found[1][1].isfinite().all() and found[1][1, 9] == 0
