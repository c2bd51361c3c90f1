"""What UnlearnLoss computes for the requests of its terms."""

from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from helpers import reference_of, token_log_probs

import fastforget as ff
from fastforget.loss_plan import plan_loss
from fastforget.objectives import LOGP, Divergence, Field


def test_constants_are_kept_by_tensor_not_by_address(model, monkeypatch):
    """The tensor is held, so that no other one can come to lie where it lay."""
    loss = ff.UnlearnLoss(model, "grad_ascent")
    monkeypatch.setattr(ff.loss.Backbone, "device", torch.device("meta"))  # so that it is copied
    for size in range(1, 50):
        assert loss.distances.constant(torch.zeros(size)).shape == (size,)


@dataclass(kw_only=True)
class AboveReference(ff.TokenTerm):
    """A term whose only request beside logp is of the reference."""

    name: ClassVar[str] = "above_reference"
    field: Field
    reads_logp: bool = True

    @property
    def requests(self):
        return (LOGP, self.field) if self.reads_logp else (self.field,)

    def per_token(self, stats):
        return stats[self.field] - stats.logp if self.reads_logp else stats[self.field]


@pytest.mark.parametrize("reads_logp", [True, False])
def test_one_statistic_of_the_reference_alone(model, batch, reads_logp):
    forget, reference = batch(2, 1), reference_of(model)
    with torch.no_grad():
        _, logp, kept = token_log_probs(model, forget)
        log_probs, _, _ = token_log_probs(reference, forget)
    entropy = -(log_probs.exp() * log_probs).sum(-1)[kept]
    expected = (entropy - reads_logp * logp[kept]).mean()
    loss = ff.UnlearnLoss(model, [AboveReference(field=Field("entropy", of="reference"), reads_logp=reads_logp)])
    for _ in range(2):  # computed, and cached
        assert float(loss(forget).loss.detach()) == pytest.approx(float(expected), rel=1e-5)
    assert loss.reference.forwards == 1


def plans_of(*terms):
    """The plan of each stream of each forward, baselines first."""
    plan = plan_loss({term.name: term for term in terms})
    return [
        (forward.side, stream, each)
        for forward in (*plan.baselines, *plan.forwards)
        for stream, each in forward.streams.items()
    ]


def test_the_plan_merges_what_terms_request():
    ((side, stream, plan),) = plans_of(ff.SatImp(), ff.KL(on="forget"), ff.UNDIAL(beta=0.0), ff.NPO())
    assert (side, stream) == ("forget", "answer")
    assert plan.fields == ("logp", "log_not_label") and plan.learns
    assert plan.divergences == (Divergence("forward_kl"),), "no shift is the same request"
    known = {request.name for request in plan.reference_requests(known=True) if isinstance(request, Field)}
    assert known == {"logp", "log_not_label", "others_entropy", "others_embedding", "others_argmax"}


def test_the_plan_computes_no_more_than_is_requested():
    assert [plan.fields for _, _, plan in plans_of(ff.KL())] == [()], "log p comes with the divergence"
    assert [plan.fields for _, _, plan in plans_of(ff.RMU(layer=0))] == [()], "the forward ends at the layer"
    spread = AboveReference(field=Field("logp_var"), reads_logp=False)
    assert [(plan.fields, plan.learns) for _, _, plan in plans_of(spread)] == [(("logp", "logp_var"), False)]
    baseline, answer = plans_of(ff.KTO())
    assert baseline[1] == "mismatch" and not baseline[2].learns and answer[2].learns
