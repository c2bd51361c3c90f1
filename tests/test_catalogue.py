"""`fastforget presets`: what it says of each preset is what a step of it does."""

import inspect
import json

import pytest
import torch

import fastforget as ff
from fastforget import catalogue
from fastforget.backends import sweep
from fastforget.head import base_causal_lm
from fastforget.objectives import PRESETS


def small(name):
    """The preset's terms for a model of two layers."""
    options = {"layer": 1} if name == "rmu" else {}
    if "centres" in inspect.signature(PRESETS[name]).parameters:
        options["centres"] = torch.randn(3, 64)
    return ff.preset(name, **options)


def with_companions(batch, rows, seed):
    """Each stream with texts of its own: of equal ones the reference would be cached."""
    return batch(rows, seed) | {"refusal": batch(rows, seed + 10), "mismatch": batch(rows, seed + 20)}


@pytest.mark.parametrize("name", PRESETS)
def test_a_step_costs_what_its_card_says(model, batch, monkeypatch, name):
    terms, rows = small(name), 4
    seen = {"products": 0, "rows": 0, "reference rows": 0}
    tokens = ff.count_labels([(batch(rows, 1), None)]).forget_tokens  # as many in each stream
    for function in ("product", "accumulate"):  # both begin with a row for each token; the vocabulary is one tile
        real = getattr(sweep, function)

        def counted(rows, *arguments, real=real, **options):
            seen["products"] += len(rows)
            return real(rows, *arguments, **options)

        monkeypatch.setattr(sweep, function, counted)
    layer = base_causal_lm(model).model.layers[0]
    layer.register_forward_hook(
        lambda _module, _inputs, out: seen.update(
            {key: seen[key] + len(out) for key in [("rows" if torch.is_grad_enabled() else "reference rows")]}
        )
    )
    step = ff.UnlearnStep(model, torch.optim.SGD, terms=terms, lr=0.0, backend="torch")
    step.loss.backbone.checked = True
    counts = []
    for _ in range(2):  # the second epoch has no reference forward
        seen.update(dict.fromkeys(seen, 0))
        step(with_companions(batch, rows, 1), with_companions(batch, rows, 2))
        counts.append(dict(seen))
    cost = catalogue.cost(terms)
    without_grad = sum(term.baseline_stream is not None for term in terms)
    assert counts[0] == {
        "products": tokens * (cost.gemms + cost.reference_gemms),
        "rows": rows * (cost.forwards - without_grad),
        "reference rows": rows * (cost.reference_forwards + without_grad),
    }
    assert counts[1]["products"] == tokens * cost.gemms and counts[1]["reference rows"] == rows * without_grad


def test_entropy_costs_a_recompute():
    assert catalogue.cost(ff.preset("me", direction="reverse", retain=None)).gemms == 4


def test_cards_tell_papers_needs_and_layers():
    assert catalogue.card("rmu").papers == ("2403.03218",) and catalogue.card("wga").papers == ("2502.19301",)
    assert catalogue.card("grad_ascent").needs == () and catalogue.card("grad_ascent").cost.to_layer is None
    assert catalogue.card("distance_cluster").needs == ("reference", "retain data", "centres")
    assert catalogue.card("rmu").cost == catalogue.Cost(2, 1, 0, 0, 7)
    assert catalogue.card("rmu").options["alpha"] == 1200.0
    assert all(each.papers for each in catalogue.cards()), "every preset has a paper behind it"


def test_the_command_lists_every_preset_also_a_new_one(run, monkeypatch):
    monkeypatch.setitem(PRESETS, "mine", lambda *, gamma=2.0: [ff.CE(on="forget")])
    code, text, errors = run("presets")
    assert code == 0 and not errors and all(name in text for name in PRESETS)
    code, text, _ = run("presets", "--json")
    listed = json.loads(text)
    assert code == 0 and [each["name"] for each in listed] == list(PRESETS)
    assert listed[-1]["options"] == {"gamma": 2.0} and listed[-1]["cost"]["gemms"] == 2 and listed[-1]["papers"] == []
