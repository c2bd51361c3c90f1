"""Presets with their published weights, and the parameters of terms, requests and schedules that are refused."""

import math

import numpy as np
import pytest
import torch

import fastforget as ff
from fastforget.config import parse_value, plain
from fastforget.objectives import PRESETS, Divergence, Field, weight_at


def test_defaults_are_as_published():
    assert all(ff.preset(name) for name in PRESETS)
    assert ff.preset("npo")[0].level == "sequence"
    published = ff.preset("simnpo")[0]
    assert (published.beta, published.delta, published.weight) == (4.5, 0.0, 0.125)
    (satimp, ce), (me, _) = ff.preset("satimp"), ff.preset("me")
    assert (satimp.beta1, satimp.beta2, satimp.weight, ce.name, me.weight) == (5.0, 1.0, 1.0, "ce", 0.1)
    (ceu,), (undial,), (margin, dual) = ff.preset("ceu"), ff.preset("undial"), ff.preset("pdu")
    assert (ceu.on, undial.beta, margin.on, dual.on) == ("forget", 10.0, "forget", "retain")
    assert (dual.epsilon, dual.dual_rate, dual.dual) == (0.3, 5.0, 100.0)
    assert [term.name for term in ff.preset("ceu", retain="ce+kl")] == ["ceu", "ce", "kl"]
    (dpo, ce), (kto, _), flat = ff.preset("dpo"), ff.preset("kto"), ff.preset("flat")
    assert (dpo.beta, dpo.weight, ce.name, ce.weight, kto.beta) == (0.1, 1.0, "ce", 1.0, 0.1)
    assert [term.name for term in flat] == ["flat"] and flat[0].divergence == "tv", "forget data only"
    assert [(term.name, term.weight) for term in ff.preset("yao2023")] == [
        ("negated_ce", 0.5),
        ("random_mismatch", 1.0),
        ("kl", 1.0),
    ]
    jensun = ff.preset("jensun")
    assert [term.name for term in jensun] == ["jensun", "kl"] and jensun[1].direction == "jsd"
    assert [(term.name, term.on) for term in ff.preset("ap")] == [("idk", "forget"), ("answer_preservation", "retain")]
    assert [term.name for term in ff.preset("altpo", retain=None)] == ["dpo"]
    assert [term.name for term in ff.preset("npo", retain="ap")] == ["npo", "answer_preservation"]
    rmu, keep = ff.preset("rmu")
    assert (rmu.layer, rmu.c, rmu.weight, keep.layer, keep.weight) == (7, 6.5, 1.0, 7, 1200.0)
    assert (rmu.on, keep.on) == ("forget", "retain")


def test_presets_take_their_options():
    assert [type(term).__name__ for term in ff.preset("npo", beta=0.3, retain="kl")] == ["NPO", "KL"]
    assert ff.preset("npo", beta=0.3)[0].beta == 0.3
    assert ff.preset("grad_diff", retain=None, forget_weight=2.0)[0].weight == 2.0
    distance, pull, keep = ff.preset("distance_cluster", k=3, margin=0.5, layer=1, level="sequence", retain_weight=2.0)
    assert (distance.anchor, distance.margin, pull.k, pull.layer, pull.level) == ("reference", 0.5, 3, 1, "sequence")
    assert isinstance(keep, ff.KL) and keep.weight == 2.0
    assert len(ff.preset("rmu", alpha=None)) == 1
    assert isinstance(ff.preset("grad_diff", retain="hidden_mse", retain_weight=3.0)[1], ff.HiddenMSE)


def test_presets_pass_schedules_on():
    schedule = ff.Linear(0.0, 1.0, 10)
    for name in ("grad_diff", "npo", "wga", "distance_cluster"):
        terms = ff.preset(name, forget_weight=schedule, retain_weight=schedule)
        assert {term.weight for term in terms if term.name != "cluster_pull"} == {schedule}
    assert ff.preset("rmu", alpha=schedule)[1].weight is schedule
    assert weight_at("npo", 0.5, 99) == 0.5 and weight_at("npo", lambda step: np.float32(0.5), 0) == 0.5


def test_options_and_config_files_hold_a_linear_schedule():
    text = '{"start": 0, "end": 1.5, "steps": 100}'
    (term,) = ff.preset("grad_ascent", forget_weight=parse_value(text))
    assert term.weight == ff.Linear(0, 1.5, 100)
    written = plain({"forget_weight": term.weight})
    assert written == {"forget_weight": {"start": 0, "end": 1.5, "steps": 100}}
    (again,) = ff.preset("grad_ascent", forget_weight=written["forget_weight"])
    assert again.weight == term.weight


REFUSED = [
    (lambda: ff.preset("npoo"), "did you mean 'npo'.*grad_ascent, grad_diff, npo"),
    (lambda: ff.preset("npo", gamma=1), "no parameter 'gamma': it takes beta"),
    (lambda: ff.preset("npo", retain="all"), "retain must be one of"),
    (lambda: ff.preset("simnpo", beta=0.0), "beta must be positive"),
    (lambda: ff.SimNPO(delta=math.inf), "delta must be finite"),
    (lambda: ff.CE(weight=-1.0), "weight must be positive"),
    (lambda: ff.CE(weight=math.nan), "weight must be positive"),
    (lambda: ff.CE(on="both"), "on must be"),
    (lambda: ff.NPO(beta=0.0), "beta must be positive"),
    (lambda: ff.NPO(level="word"), "level must be"),
    (lambda: ff.KL(direction="kl"), "direction must be"),
    (lambda: ff.preset("wga", beta=-1.0), "wga: beta must be finite and not negative"),
    (lambda: ff.preset("satimp", beta2=math.nan), "satimp: beta2 must be"),
    (lambda: ff.preset("satimp", beta=1.0), "no parameter 'beta': it takes reduction, beta1, beta2, forget_weight"),
    (lambda: ff.preset("me", direction="both"), "direction must be forward or reverse"),
    (lambda: ff.preset("tnpo", reduction="batch"), "reduction must be token or sequence"),
    (lambda: ff.preset("grad_ascent", reduction="batch"), "negated_ce: reduction must be"),
    (lambda: ff.preset("grad_diff", reduction="batch"), "negated_ce: reduction must be"),
    (lambda: ff.preset("undial", beta=-1.0), "undial: beta must be finite and not negative"),
    (lambda: ff.preset("ceu", beta=1.0), "no parameter 'beta': it takes reduction, forget_weight, retain"),
    (lambda: ff.preset("pdu", epsilon=-0.1), "dual_ce: epsilon must be finite and not negative"),
    (lambda: ff.preset("pdu", dual=math.inf), "dual_ce: dual must be finite"),
    (lambda: ff.preset("pdu", dual_rate=0.0), "dual_ce: dual_rate must be positive"),
    (lambda: ff.preset("pdu", retain="ce"), "no parameter 'retain': it takes epsilon, dual_rate, dual"),
    (lambda: ff.preset("dpo", beta=0.0), "dpo: beta must be positive and finite, not 0"),
    (lambda: ff.preset("altpo", beta=math.inf), "dpo: beta must be positive"),
    (lambda: ff.preset("ap", beta=-1.0), "answer_preservation: beta must be positive"),
    (lambda: ff.preset("ap", retain="ce"), "no parameter 'retain'"),
    (lambda: ff.preset("kto", beta=math.nan), "kto: beta must be"),
    (lambda: ff.preset("kto", k=0), "kto: k must be a whole number from 1 on, not 0"),
    (lambda: ff.preset("yao2023", k=2.5), "random_mismatch: k must be a whole number from 1 on, not 2.5"),
    (lambda: ff.preset("idk", reduction="batch"), "idk: reduction must be token or sequence"),
    (lambda: ff.preset("jensun", reduction="none"), "jensun: reduction must be"),
    (lambda: ff.preset("flat", divergence="hellinger"), "divergence must be one of kl, tv, js, pearson"),
    (lambda: ff.preset("idk", retain="js"), "retain must be one of ce, kl, ce\\+kl, jsd, ap, hidden_mse or None"),
    (lambda: ff.DPO(weight=-1.0), "dpo: weight must be positive"),
    (lambda: ff.RMU(c=0.0), "rmu: c must be positive"),
    (lambda: ff.RMU(c=math.inf), "rmu: c must be positive"),
    (lambda: ff.RMU(seed=-1), "rmu: seed must be a whole number"),
    (lambda: ff.RMU(seed=1.5), "rmu: seed must be a whole number"),
    (lambda: ff.RMU(layer=1.5), "rmu: layer must be a whole number"),
    (lambda: ff.HiddenMSE(layer=True), "hidden_mse: layer must be a whole number"),
    (lambda: ff.HiddenMSE(reduction="all"), "hidden_mse: reduction must be token or sequence"),
    (lambda: ff.preset("rmu", alpha=-1.0), "hidden_mse: weight must be positive"),
    (lambda: ff.preset("rmu", retain="ce"), "no parameter 'retain': it takes layer, c"),
    (lambda: ff.EmbeddingDistance(anchor="labels"), "anchor must be 'reference', 'label' or a tensor"),
    (lambda: ff.EmbeddingDistance(anchor=torch.zeros(2, 2)), r"one vector \(D,\)"),
    (lambda: ff.EmbeddingDistance(margin=-1.0), "margin must be positive"),
    (lambda: ff.EmbeddingDistance(metric="dot"), "unknown metric 'dot'"),
    (lambda: ff.EmbeddingDistance(level="word"), "level must be token or sequence"),
    (lambda: ff.EmbeddingDistance(layer=1.5), "layer must be a whole number"),
    (lambda: ff.ClusterPull(torch.zeros(3)), r"centres must be a tensor \(K, D\)"),
    (lambda: ff.ClusterPull(torch.full((1, 3), torch.nan)), "not all finite"),
    (lambda: ff.ClusterPull(k=0), "k must be a whole number"),
    (lambda: ff.preset("distance_cluster", k=2.5), "k must be a whole number"),
    (lambda: ff.Linear(-1.0, 1.0, 5), "Linear: start must be finite and not negative"),
    (lambda: ff.Linear(0.0, math.inf, 5), "Linear: end must be finite and not negative"),
    (lambda: ff.Linear(0.0, "1", 5), "Linear: end must be finite and not negative"),
    (lambda: ff.Linear(0.0, 1.0, 0), "Linear: steps must be a whole number from 1 on"),
    (lambda: ff.Linear(0.0, 1.0, 2.5), "Linear: steps must be a whole number from 1 on"),
    (lambda: ff.CE(weight="high"), "ce: weight must be a number or a function of the step"),
    (lambda: ff.CE(weight=True), "ce: weight must be a number"),
    (lambda: ff.CE(weight=0.0), "ce: weight must be positive"),
    (lambda: ff.preset("npo", retain_weight=-1.0), "ce: weight must be positive"),
    (lambda: ff.CE(weight={"start": 0, "stop": 1}), "needs start, end, steps, and has"),
    (lambda: Field("nll"), "no statistic 'nll': choose from logp, lse"),
    (lambda: Field("ref_entropy"), "no statistic 'ref_entropy'"),
    (lambda: Field("entropy", of="ref"), "of 'model' or 'reference', not of 'ref'"),
    (lambda: Divergence("kl"), "unknown divergence 'kl': choose one of forward_kl, reverse_kl, jsd"),
    (lambda: Divergence("jsd", label_shift=1.0), "label_shift must be finite and at most 0"),
]


@pytest.mark.parametrize(("make", "message"), REFUSED)
def test_wrong_parameters_are_refused(make, message):
    with pytest.raises(ff.FastforgetError, match=message):
        make()
