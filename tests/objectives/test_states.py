"""EmbeddingDistance and ClusterPull: values against formulas, LoRA gradients against a loop with full hidden states."""

from functools import partial

import pytest
import torch
from helpers import assert_follows, gradients, load_perturbed, reference_of, token_log_probs

import fastforget as ff


def hidden_states(model, batch, layer):
    """(B, T-1, D) states of the tokens whose next token is predicted, as transformers itself returns them."""
    out = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], output_hidden_states=True)
    return out.hidden_states[-1 if layer is None else layer + 1][:, :-1]


def distance(states, points, metric):
    """By definition; states and points (n, D)."""
    if metric == "l2":
        return (states - points).square().sum(-1).sqrt()
    return 1 - (states * points).sum(-1) / (states.norm(dim=-1) * points.norm(dim=-1))


def loss_by_hand(model, reference, forget, retain, centres, anchor, *, metric, margin, level, layer):
    """2 distance terms + 3 pulls + cross-entropy on the retain set, written from the formulas."""
    labels = forget["labels"][:, 1:]
    kept = labels != -100
    states = hidden_states(model, forget, layer)
    with torch.no_grad():
        if anchor == "reference":
            points = hidden_states(reference, forget, layer)
        elif anchor == "label":
            points = model.get_output_embeddings().weight[labels.clamp(min=0)].detach()
        else:
            points = anchor.expand_as(states)
    if level == "sequence":
        counts = kept.sum(1, keepdim=True)
        states, points = ((value * kept[..., None]).sum(1) / counts for value in (states, points))
    else:
        states, points = states[kept], points[kept]
    away = distance(states, points, metric)
    push = -away.mean() if margin is None else (margin - away).clamp(min=0).mean()
    nearest = torch.stack([distance(states, centre.expand_as(states), metric) for centre in centres])
    _, retain_logp, retain_kept = token_log_probs(model, retain)
    return 2 * push + 3 * nearest.min(dim=0).values.mean() - retain_logp[retain_kept].mean()


def centres_for(model, count=5):
    return 0.5 * torch.randn(count, model.config.hidden_size, generator=torch.Generator().manual_seed(3))


def terms_for(centres, anchor, *, margin, **where):
    return [
        ff.EmbeddingDistance(weight=2.0, anchor=anchor, margin=margin, **where),
        ff.ClusterPull(centres, weight=3.0, **where),
        ff.CE(),
    ]


CASES = [
    ("reference", {"metric": "l2", "margin": None, "level": "token", "layer": None}),
    ("reference", {"metric": "cosine", "margin": 0.05, "level": "token", "layer": None}),
    ("reference", {"metric": "l2", "margin": 1.0, "level": "sequence", "layer": 0}),
    ("reference", {"metric": "cosine", "margin": None, "level": "sequence", "layer": None}),
    ("label", {"metric": "cosine", "margin": None, "level": "token", "layer": None}),
    ("label", {"metric": "l2", "margin": 20.0, "level": "sequence", "layer": None}),
    ("vector", {"metric": "l2", "margin": None, "level": "token", "layer": 0}),
]


@pytest.mark.parametrize("bits", [32, 8])
@pytest.mark.parametrize("kind", ["opt", "llama"])
def test_every_lora_gradient_equals_a_loop_with_all_states(tiny, batch, kind, bits):
    model = load_perturbed(tiny[kind], bits)
    sides, centres, reference = (batch(4, 1), batch(3, 2, width=17)), centres_for(model), reference_of(model)
    for anchor, options in CASES:
        anchor = torch.linspace(-1, 1, model.config.hidden_size) if anchor == "vector" else anchor
        formula = partial(loss_by_hand, model, reference, *sides, centres, anchor, **options)
        assert_follows(formula, model, terms_for(centres, anchor, **options), *sides, micro_batches=(None, 2))


def test_the_pull_moves_states_off_a_distance_of_zero(tiny, batch):
    model = ff.load(tiny["llama"], bits=8, lora={"r": 4, "target_modules": "all-linear"}).train()
    forget = batch(4, 1)
    for metric in ("l2", "cosine"):
        alone = ff.UnlearnStep(model, torch.optim.SGD, terms=[ff.EmbeddingDistance(metric=metric)], lr=0.1)
        assert float(alone.backward(forget).loss) == 0.0
        assert all(gradient.eq(0).all() for gradient in gradients(model).values()), "zero, and not NaN"
        model.zero_grad()
    terms = [ff.EmbeddingDistance(metric="cosine", margin=1.0), ff.ClusterPull(centres_for(model), metric="cosine")]
    step = ff.UnlearnStep(model, torch.optim.AdamW, terms=terms, lr=1e-2)
    first, *_, last = [step(forget).terms for _ in range(15)]
    assert float(first["embedding_distance"]) == 1.0 > float(last["embedding_distance"]) + 0.05
    assert float(last["cluster_pull"]) < float(first["cluster_pull"])


def test_heads_that_cannot_be_read_need_a_layer(model, batch):
    for terms, message in (
        ([ff.EmbeddingDistance()], "give the term a layer"),
        ([ff.EmbeddingDistance(anchor="label", layer=0)], "another anchor than 'label'"),
    ):
        loss = ff.UnlearnLoss(model, terms)
        loss.backbone.head, loss.backbone.checked = ff.LMHead(None), True
        with pytest.raises(ff.FastforgetError, match=message):
            loss(batch(2, 1))
    loss = ff.UnlearnLoss(model, [ff.EmbeddingDistance(layer=-1)])
    expected = loss(batch(2, 1)).loss
    loss.backbone.head = ff.LMHead(None)
    assert float(loss(batch(2, 1)).loss) == pytest.approx(float(expected), rel=1e-5)


def test_centres_that_a_loss_does_not_know_are_said(model, batch):
    pull = ff.ClusterPull(torch.zeros(2, 64))
    loss = ff.UnlearnLoss(model, [pull])
    loss(batch(2, 1))
    pull.fit(torch.ones(3, 64))
    with pytest.raises(ff.FastforgetError, match="cluster_pull has other centres than when the loss was made"):
        loss(batch(2, 1))
    assert ff.UnlearnLoss(model, [pull])(batch(2, 1)).loss.isfinite()


def test_what_is_missing_is_said_before_the_first_forward(model, batch):
    with pytest.raises(ff.FastforgetError, match=r"no centres yet: ClusterPull\(fastforget.cluster_centres"):
        ff.UnlearnStep(model, torch.optim.SGD, terms="distance_cluster", lr=0.1)
    with pytest.raises(ff.FastforgetError, match="no layer 2: its layers are 0 to 1"):
        ff.UnlearnLoss(model, [ff.EmbeddingDistance(layer=2)])(batch(2, 1))
    with pytest.raises(ff.FastforgetError, match=r"anchor must be .* not float32 \(3,\)"):
        ff.UnlearnLoss(model, [ff.EmbeddingDistance(anchor=torch.zeros(3))])(batch(2, 1))


def test_reference_states_are_cached_by_layer(model, batch):
    terms = [ff.EmbeddingDistance(layer=0, margin=1.0), ff.EmbeddingDistance(weight=0.5), ff.KL()]
    loss = ff.UnlearnLoss(model, terms)
    first = loss(batch(3, 1), batch(3, 2))
    count = loss.reference.forwards
    assert float(loss(batch(3, 1), batch(3, 2)).loss) == float(first.loss) and loss.reference.forwards == count == 2
