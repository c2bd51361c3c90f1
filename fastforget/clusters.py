"""Cluster means of expected outputs: the centres that `ClusterPull` pulls states to, and their file.

k-means (scikit-learn's mini-batch k-means) over the frozen model's states of label tokens; with k = 1 the plain mean.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from fastforget.arguments import check_metric
from fastforget.backbone import Backbone, without_dropout
from fastforget.backends.torch_passes import unit_vectors
from fastforget.batch import Batch, check_batch
from fastforget.errors import FastforgetError
from fastforget.files import written_whole
from fastforget.objectives import StateRequest, Term
from fastforget.reference_modes import reference_mode

CENTRES_FILE = "centres.safetensors"
CANDIDATES = (2, 4, 8, 16, 32)  # numbers of clusters that the silhouette chooses from
SILHOUETTE_STATES = 2000  # it takes the distances between all pairs of so many
MAX_STATES = 20_000
UNKNOWN_HEAD = (
    "this model's head cannot be read, so the states that enter it are not known: give a layer (layer=-1 is the last)"
)


def cluster_centres(
    model: Any,
    batches: Iterable[Batch],
    k: int | None = None,
    *,
    layer: int | None = None,
    metric: str = "l2",
    level: str = "token",
    seed: int = 0,
    max_states: int = MAX_STATES,
) -> Tensor:
    """Centres (K, D), float32 on the CPU, of the frozen model's states over expected outputs.

    Args:
        model: a causal LM; a PEFT adapter that trains is switched off meanwhile.
        batches: dicts of `input_ids`, `attention_mask`, `labels`; the states of label tokens are clustered. Reading
            ends when there are `max_states` of them, so shuffle first.
        k: the number of clusters; None lets the mean silhouette choose among 2, 4, 8, 16 and 32.
        layer, metric, level: as in `ClusterPull`; for "cosine" the directions of the states are clustered.

    Raises:
        FastforgetError: no label token, fewer distinct states than clusters, states that are not finite, or no
            scikit-learn.
    """
    check_metric(metric, None)
    if k is not None and k < 1:
        raise FastforgetError(f"k must be at least 1, or None, not {k}")
    states = collect_states(model, batches, layer, level, max_states)
    if metric == "cosine":
        states = unit_vectors(states)[0]
    if k == 1:
        return states.mean(dim=0, keepdim=True)
    distinct = len(torch.unique(states, dim=0))
    if k is not None and k > distinct:
        raise FastforgetError(f"{k} clusters need as many distinct states, and the expected outputs have {distinct}")
    if k is not None:
        return k_means(states, k, seed)[0]
    candidates = [number for number in CANDIDATES if number < distinct]
    if not candidates:
        return states.mean(dim=0, keepdim=True)
    fits = [k_means(states, number, seed) for number in candidates]
    return max(fits, key=lambda fit: silhouette(states, fit[1], seed))[0]


def collect_states(model: Any, batches: Iterable[Batch], layer: int | None, level: str, max_states: int) -> Tensor:
    """States (n, D), float32 on the CPU, of the frozen model: of label tokens, or their means over each answer."""
    backbone = Backbone(model)
    collected: list[Tensor] = []
    count = 0
    frozen = hasattr(model, "peft_config")
    with reference_mode(model) if frozen else contextlib.nullcontext(), torch.no_grad(), without_dropout(model):
        for batch in batches:
            side = backbone.prepare(check_batch(batch, "the batch of expected outputs", backbone.vocabulary))
            if side is None:
                continue
            states = backbone.states(side.inputs, side.positions, (layer,))[layer].float()
            if layer is None and backbone.head.is_identity:
                raise FastforgetError(UNKNOWN_HEAD)
            if level == "sequence":
                sums = states.new_zeros(side.sequence_count, states.shape[1]).index_add(0, side.sequence, states)
                states = sums / torch.tensor(side.lengths, device=sums.device)[:, None]
            collected.append(states.cpu())
            count += len(states)
            if count >= max_states:
                break
    if not collected:
        raise FastforgetError("the expected outputs have no label token, so there are no states to cluster")
    states = torch.cat(collected)[:max_states]
    if not states.isfinite().all():
        raise FastforgetError("the frozen model's states are not finite on the expected outputs: the model is broken")
    return states


def k_means(states: Tensor, k: int, seed: int) -> tuple[Tensor, Tensor]:
    """(centres (k, D), the cluster (n,) of each state)."""
    try:
        from sklearn.cluster import MiniBatchKMeans
    except ImportError:
        raise FastforgetError('clustering needs scikit-learn: pip install "fastforget[cluster]"') from None
    fit = MiniBatchKMeans(n_clusters=k, random_state=seed, n_init=3, batch_size=1024).fit(states.numpy())
    return torch.from_numpy(fit.cluster_centers_).float(), torch.from_numpy(fit.labels_)


def silhouette(states: Tensor, clusters: Tensor, seed: int) -> float:
    """Mean silhouette of a sample of the states, from -1 to 1; -1 where the sample lies in one cluster."""
    from sklearn.metrics import silhouette_score

    chosen = torch.randperm(len(states), generator=torch.Generator().manual_seed(seed))[:SILHOUETTE_STATES]
    sample, labels = states[chosen].numpy(), clusters[chosen].numpy()
    number = len(set(labels.tolist()))
    return float(silhouette_score(sample, labels)) if 1 < number < len(labels) else -1.0


def fit_centres(terms: Sequence[Term], model: Any, batches: Iterable[Batch] | None, seed: int = 0) -> None:
    """Give each term that asks for centres its own, in place; batches of expected outputs are read for each.

    Raises:
        FastforgetError: a term needs centres and there are no batches.
    """
    for term in terms:
        wanted = term.centre_request
        if wanted is None:
            continue
        if batches is None:
            raise FastforgetError(
                "the cluster pull needs expected outputs to find its centres in: give a retain set, or the centres"
            )
        where: dict[str, Any] = {"layer": wanted.layer, "metric": wanted.metric, "level": wanted.level}
        term.fit(cluster_centres(model, batches, wanted.k, seed=seed, **where))


def save_centres(terms: Sequence[Term], folder: str | os.PathLike[str]) -> None:
    """Write the centres that terms pull to beside the adapter, as `centres.safetensors`.

    Where there are none, no file is left either: an earlier run's centres would be taken for this one's.
    """
    tensors: dict[str, Tensor] = {}
    metadata: dict[str, str] = {}
    for request in (request for term in terms for request in term.requests):
        if isinstance(request, StateRequest) and request.centres is not None:
            name = f"cluster_pull_{len(tensors) + 1}"
            tensors[name] = request.centres.contiguous().cpu()
            metadata[name] = f"layer={request.layer} metric={request.metric} level={request.level}"
    path = Path(folder) / CENTRES_FILE
    if not tensors:
        path.unlink(missing_ok=True)
        return
    with written_whole(path) as scratch:
        save_file(tensors, scratch, metadata=metadata)


def load_centres(folder: str | os.PathLike[str]) -> list[Tensor]:
    """Load the centres that were saved beside an adapter, one (K, D) for each cluster pull in order.

    Raises:
        FastforgetError: no such file, or one that cannot be read.
    """
    path = Path(folder) / CENTRES_FILE
    try:
        with safe_open(path, framework="pt") as file:
            return [file.get_tensor(name) for name in sorted(file.keys())]
    except FileNotFoundError:
        raise FastforgetError(f"{path} does not exist: this adapter was trained without a cluster pull") from None
    except Exception as error:  # safetensors has its own error class
        raise FastforgetError(f"{path} cannot be read: {error}") from None
