"""Cluster centres: of which states, how many, and their file."""

import json
from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from safetensors import safe_open

import fastforget as ff
from fastforget import clusters
from fastforget.clusters import CENTRES_FILE, cluster_centres, fit_centres, k_means, save_centres
from fastforget.jobs.checkpoints import Checkpoints
from fastforget.jobs.loop import JobSettings, run_job
from fastforget.objectives import CentreRequest, StateRequest


def frozen_states(model, batch):
    """(n, D): the frozen model's last states of tokens whose next one is labelled."""
    with torch.no_grad(), model.disable_adapter():
        out = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], output_hidden_states=True)
    return out.hidden_states[-1][:, :-1][batch["labels"][:, 1:] != -100]


def test_one_centre_is_the_mean_of_the_frozen_models_states(model, batch):
    batches = [batch(4, 1), batch(3, 2)]
    states = torch.cat([frozen_states(model, each) for each in batches])
    modes = [module.training for module in model.modules()]
    assert torch.allclose(cluster_centres(model, batches, k=1), states.mean(0, keepdim=True), atol=1e-5)
    unit = states / states.norm(dim=1, keepdim=True)
    assert torch.allclose(cluster_centres(model, batches, k=1, metric="cosine"), unit.mean(0, keepdim=True), atol=1e-6)
    assert [module.training for module in model.modules()] == modes
    assert all(parameter.requires_grad for name, parameter in model.named_parameters() if "lora_" in name)
    few = cluster_centres(model, batches, k=1, max_states=10)
    assert torch.allclose(few, states[:10].mean(0, keepdim=True), atol=1e-5)
    answers = cluster_centres(model, batches[:1], k=1, level="sequence")
    kept = (batches[0]["labels"][:, 1:] != -100).sum(1).tolist()
    means = torch.stack([part.mean(0) for part in frozen_states(model, batches[0]).split(kept)])
    assert torch.allclose(answers, means.mean(0, keepdim=True), atol=1e-5)


def test_centres_lie_where_the_states_are(model, batch):
    batches = [batch(6, seed) for seed in range(3)]
    centres = cluster_centres(model, batches, k=5)
    states = torch.cat([frozen_states(model, each) for each in batches])
    assert centres.shape == (5, 64) and centres.dtype == torch.float32
    _, pull = ff.hidden_stats(states, centres=centres)
    _, from_mean = ff.hidden_stats(states, centres=states.mean(0, keepdim=True))
    assert pull.square().mean() < 0.95 * from_mean.square().mean()
    assert torch.equal(centres, cluster_centres(model, batches, k=5)), "the seed decides"


@pytest.mark.parametrize("blobs", [2, 8])
def test_silhouette_finds_the_number_of_blobs(model, batch, monkeypatch, blobs):
    generator = torch.Generator().manual_seed(blobs)
    places = 20 * torch.randn(blobs, 16, generator=generator)
    states = places[torch.randint(0, blobs, (600,), generator=generator)] + torch.randn(600, 16, generator=generator)
    monkeypatch.setattr(clusters, "collect_states", lambda *_: states)
    centres = cluster_centres(model, [])
    assert len(centres) == blobs
    assert ff.hidden_stats(places, centres=centres)[1].max() < 2.0
    assert k_means(states, blobs, 0)[1].bincount().min() > 0


def test_errors_say_what_is_wrong(model, batch):
    unlabelled = batch(2, 1)
    unlabelled["labels"][:] = -100
    with pytest.raises(ff.FastforgetError, match="no label token"):
        cluster_centres(model, [unlabelled])
    with pytest.raises(ff.FastforgetError, match="k must be at least 1"):
        cluster_centres(model, [batch(2, 1)], k=0)
    with pytest.raises(ff.FastforgetError, match="500 clusters need as many distinct states"):
        cluster_centres(model, [batch(2, 1)], k=500)
    with pytest.raises(ff.FastforgetError, match="does not exist: this adapter was trained without a cluster pull"):
        ff.load_centres("/nowhere")


@dataclass(kw_only=True, eq=False)
class Gather(ff.Term):
    """A user's own term that a job finds one centre for."""

    name: ClassVar[str] = "gather"
    request: StateRequest | None = None

    @property
    def requests(self):
        return () if self.request is None else (self.request,)

    @property
    def centre_request(self):
        return CentreRequest(1, layer=0, metric="l2", level="token") if self.request is None else None

    def fit(self, centres):
        self.request = StateRequest(layer=0, centres=centres)

    def value(self, stats):
        return stats.token_mean(stats[self.request].pull)


def test_any_term_may_ask_for_centres(model, batch, tmp_path):
    term = Gather()
    fit_centres([ff.CE(), term], model, [batch(2, 1)])
    expected = cluster_centres(model, [batch(2, 1)], 1, layer=0)
    assert torch.equal(term.request.centres, expected)
    assert ff.UnlearnLoss(model, [term])(batch(2, 1)).loss > 0
    save_centres([ff.CE(), term], tmp_path)
    assert torch.equal(ff.load_centres(tmp_path)[0], expected)


def test_a_job_finds_saves_and_returns_its_centres(model, tokenizer, passages, tmp_path):
    forget, retain = passages
    terms = ff.preset("distance_cluster", k=3)
    with pytest.raises(ff.FastforgetError, match="needs expected outputs"):
        run_job(model, tokenizer, forget, None, terms[:2], JobSettings(max_steps=2))
    run_job(
        model,
        tokenizer,
        forget,
        retain,
        terms,
        JobSettings(max_steps=2, save_steps=2),
        checkpoints=Checkpoints(tmp_path),
    )
    saved = ff.load_centres(tmp_path / "checkpoint-2")
    assert len(saved) == 1 and saved[0].shape == (3, 64) and torch.equal(saved[0], terms[1].centres)
    with safe_open(tmp_path / "checkpoint-2" / CENTRES_FILE, framework="pt") as file:
        assert file.metadata() == {"cluster_pull_1": "layer=None metric=cosine level=sequence"}
    again = ff.preset("distance_cluster", centres=saved[0])
    run_job(model, tokenizer, forget, retain, again, JobSettings(max_steps=1))
    assert torch.equal(again[1].centres, saved[0]), "centres that were given stay"
    save_centres([ff.CE()], tmp_path)
    assert not (tmp_path / CENTRES_FILE).exists()
    assert json.loads((tmp_path / "checkpoint-2" / "adapter_config.json").read_text())["peft_type"] == "LORA"
