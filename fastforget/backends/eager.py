"""Plain PyTorch on all logits at once: the oracle (in float64), and what every other backend is measured against.

Written from the definitions, with autograd for every gradient; N x V logits are held.
"""

from __future__ import annotations

import math
from collections.abc import Collection

import torch
from torch import Tensor

from fastforget.backends.fields import TILE_STATISTICS
from fastforget.backends.protocol import KnownReference, Targets
from fastforget.head import LMHead


class EagerBackend:
    """The oracle as a backend (`protocol.Backend`); under autocast too in float32, as the others are."""

    name = "eager"

    def token_stats(
        self,
        hidden: Tensor,
        labels: Tensor,
        head: LMHead,
        outputs: Collection[str],
        *,
        positions: Tensor | None = None,
        targets: Targets | None = None,
    ) -> dict[str, Tensor]:
        """As `Backend.token_stats`."""
        rows = slice(None) if positions is None else positions
        with torch.autocast(hidden.device.type, enabled=False):
            fields = label_stats(hidden[rows], labels, head, outputs)
        fields = {name: fields[name] for name in outputs}
        if targets:
            states, anchor = hidden if targets.states is None else targets.states, targets.anchor
            anchor = anchor[rows] if anchor is not None and anchor.dim() == 2 else anchor
            fields |= self.state_stats(states[rows], Targets(anchor, targets.centres, targets.metric))
        return fields

    def divergence(
        self,
        hidden: Tensor,
        ref_hidden: Tensor,
        head: LMHead,
        kind: str,
        *,
        labels: Tensor | None = None,
        positions: Tensor | None = None,
        label_shift: float = 0.0,
        known: KnownReference | None = None,
    ) -> tuple[Tensor, Tensor]:
        """As `Backend.divergence`; what is known of the reference is computed all the same."""
        rows = slice(None) if positions is None else positions
        kept, shifted = hidden[rows], labels if label_shift else None
        with torch.autocast(hidden.device.type, enabled=False):
            value = divergence(kept, ref_hidden[rows].detach(), head, kind, shifted, label_shift)
            if labels is None:
                return value, torch.zeros_like(value)
            with torch.no_grad():
                logp = label_stats(kept, labels.clamp(min=0), head, ("logp",))["logp"]
            return value, torch.where(labels >= 0, logp, 0.0)

    def state_stats(self, hidden: Tensor, targets: Targets) -> dict[str, Tensor]:
        """As `Backend.state_stats`."""
        names = ("distance", "pull")
        values = state_stats(hidden, targets.anchor, targets.centres, targets.metric)
        return {name: value for name, value in zip(names, values, strict=True) if value is not None}


def label_stats(hidden: Tensor, labels: Tensor, head: LMHead, outputs: Collection[str]) -> dict[str, Tensor]:
    """Per-token statistics; see `fastforget.stats.token_stats` for the fields."""
    logits = head.logits(hidden)
    log_probs = torch.log_softmax(logits, dim=-1)
    label_column = labels[:, None]
    infinite = (logits == torch.inf).any(dim=-1)  # no softmax: as NaN everywhere else
    fields = {
        "lse": torch.logsumexp(logits, dim=-1).masked_fill(infinite, torch.nan),
        "logp": log_probs.gather(1, label_column)[:, 0],
        "label_logit": logits.gather(1, label_column)[:, 0],
    }
    if "log_not_label" in outputs:
        others = logits.scatter(1, label_column, -torch.inf)
        fields["log_not_label"] = torch.logsumexp(others, dim=-1) - fields["lse"]
    if "others_argmax" in outputs:
        fields["others_argmax"] = logits.scatter(1, label_column, -torch.inf).argmax(dim=-1)
    for name, statistic in TILE_STATISTICS.items():
        if name in outputs:
            fields[name] = statistic.finish(statistic.update(None, logits.detach()))
    if {"others_entropy", "others_embedding"} & set(outputs):
        others = logits.detach().scatter(1, label_column, -torch.inf)
        none = (others == -torch.inf).all(dim=-1, keepdim=True)  # none of them can be said
        log_others = torch.log_softmax(others, dim=-1).masked_fill(none, -torch.inf)
        fields["others_entropy"] = -mean_log_prob(log_others)
        if "others_embedding" in outputs:
            fields["others_embedding"] = head.scale * (log_others.exp() @ head.weight.detach().to(logits.dtype))
    if "max_logit" in outputs or "argmax" in outputs:
        fields["max_logit"], fields["argmax"] = logits.max(dim=-1)
    if "logit_mean" in outputs:
        fields["logit_mean"] = logits.mean(dim=-1)
    probs = log_probs.exp()
    if {"entropy", "logp_mean", "logp_var"} & set(outputs):
        mean = mean_log_prob(log_probs)
        fields["entropy"] = -mean
        fields["logp_mean"] = mean.detach()
        spread = (log_probs - mean[:, None]).masked_fill(probs == 0, 0.0)
        fields["logp_var"] = (probs * spread**2).sum(dim=-1).detach()
    if "expected_embedding" in outputs:
        fields["expected_embedding"] = head.scale * (probs @ head.weight.to(probs.dtype))
    return fields


def mean_log_prob(log_probs: Tensor) -> Tensor:
    """(n,) E_p[log p] of log-probabilities (n, V); 0 log 0 is 0."""
    probs = log_probs.exp()
    return (probs * log_probs.masked_fill(probs == 0, 0.0)).sum(dim=-1)


def divergence(
    hidden: Tensor,
    ref_hidden: Tensor,
    head: LMHead,
    kind: str,
    labels: Tensor | None = None,
    label_shift: float = 0.0,
) -> Tensor:
    """(n,) forward KL(q||p), reverse KL(p||q) or JSD; q is the reference's distribution, p the model's.

    With labels (n,), q is of the reference's logits with `label_shift` added at each label (nowhere, where it is < 0).
    """
    log_p = torch.log_softmax(head.logits(hidden), dim=-1)
    with torch.no_grad():
        ref_logits = head.logits(ref_hidden)
        if labels is not None:
            shift = torch.where(labels >= 0, label_shift, 0.0).to(ref_logits.dtype)
            ref_logits = ref_logits.scatter_add(1, labels.clamp(min=0)[:, None], shift[:, None])
        log_q = torch.log_softmax(ref_logits, dim=-1)
    if kind == "forward_kl":
        return kl(log_q, log_p)
    if kind == "reverse_kl":
        return kl(log_p, log_q)
    nowhere = (log_p == -torch.inf) & (log_q == -torch.inf)  # there logaddexp's gradient is NaN
    log_mixture = torch.logaddexp(log_p.masked_fill(nowhere, 0.0), log_q) - math.log(2.0)
    return 0.5 * (kl(log_p, log_mixture) + kl(log_q, log_mixture))


def state_stats(
    hidden: Tensor, anchor: Tensor | None, centres: Tensor | None, metric: str
) -> tuple[Tensor | None, Tensor | None]:
    """(distance (n,) from the anchor, distance (n,) from the nearest centre), as far as they were given."""
    hidden = hidden.to(torch.promote_types(hidden.dtype, torch.float32))
    distance = pull = None
    if anchor is not None:
        distance = between(hidden, anchor.detach().to(hidden.dtype).expand_as(hidden), metric)
    if centres is not None:
        each = [between(hidden, centre.expand_as(hidden), metric) for centre in centres.detach().to(hidden.dtype)]
        pull = torch.stack(each).min(dim=0).values
    return distance, pull


def between(hidden: Tensor, points: Tensor, metric: str) -> Tensor:
    """|h - a|, or 1 - cos(h, a) (1 where either is 0), by their definitions."""
    if metric == "l2":
        return torch.linalg.vector_norm(hidden - points, dim=-1)
    lengths = torch.linalg.vector_norm(hidden, dim=-1) * torch.linalg.vector_norm(points, dim=-1)
    cosine = (hidden * points).sum(dim=-1) / torch.where(lengths == 0, 1.0, lengths)
    return 1.0 - torch.where(lengths == 0, 0.0, cosine)


def kl(log_from: Tensor, log_to: Tensor) -> Tensor:
    """KL(from || to), by its definition; 0 log 0 is 0."""
    gap = torch.where(log_from == -torch.inf, 0.0, log_from - log_to)
    return (log_from.exp() * gap).sum(dim=-1)
