"""Terms against their formulas in plain Python, presets, and what is refused."""

import math
from types import MappingProxyType

import pytest
import torch

import fastforget as ff
from fastforget.objectives import LOGP, REFERENCE_LOGP, Divergence, SideStats

ANSWERS = [[-0.1, -2.0, -0.5], [-3.0]]  # two answers of three tokens and of one
REF = [[-0.2, -0.1, -0.4], [-1.0]]
FLAT = [value for row in ANSWERS for value in row]
REF_FLAT = [value for row in REF for value in row]


def side(extra=MappingProxyType({})):
    return SideStats(
        sequence=torch.tensor([0, 0, 0, 1]),
        sequence_count=2,
        token_total=4,
        sequence_total=2,
        tensors={
            LOGP: torch.tensor(FLAT, dtype=torch.float64),
            REFERENCE_LOGP: torch.tensor(REF_FLAT, dtype=torch.float64),
            **extra,
        },
    )


def log_sigmoid(value):
    return -math.log1p(math.exp(-value))


def npo(ratios, beta):
    return -(2 / beta) * sum(log_sigmoid(-beta * ratio) for ratio in ratios) / len(ratios)


def test_values_follow_the_formulas():
    assert float(ff.NegatedCE().value(side())) == pytest.approx(sum(FLAT) / 4)
    assert float(ff.CE().value(side())) == pytest.approx(-sum(FLAT) / 4)
    kl = side({Divergence("jsd"): torch.tensor([1.0, 2.0, 3.0, 4.0])})
    assert float(ff.KL(direction="jsd").value(kl)) == pytest.approx(2.5)
    per_token = [one - other for one, other in zip(FLAT, REF_FLAT, strict=True)]
    sums = [sum(per_token[:3]), per_token[3]]
    for level, ratios in (("sequence", sums), ("mean", [sums[0] / 3, sums[1]]), ("token", per_token)):
        assert float(ff.NPO(beta=0.7, level=level).value(side())) == pytest.approx(npo(ratios, 0.7)), level


@pytest.mark.parametrize(("beta", "delta"), [(4.5, 0.0), (0.7, 0.3)])
def test_simnpo_follows_its_formula(beta, delta):
    nll = [-sum(row) / len(row) for row in ANSWERS]
    expected = -(2 / beta) * sum(log_sigmoid(beta * (value - delta)) for value in nll) / 2
    assert float(ff.SimNPO(beta=beta, delta=delta).value(side())) == pytest.approx(expected)
    assert ff.SimNPO().requests == (LOGP,), "no reference"
