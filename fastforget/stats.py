"""Per-token statistics of a causal LM's output, and their gradients, over a backend.

Losses are a few lines of PyTorch over what these functions return (`fastforget.objectives`).
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from fastforget import backends
from fastforget.backends import in_place as in_place_stats
from fastforget.backends.fields import EMPTY
from fastforget.backends.protocol import Targets
from fastforget.backends.state_ops import checked_labels
from fastforget.checks import (
    IGNORE_INDEX,
    check_anchor,
    check_labels,
    check_metric,
    check_positions,
    check_token_arguments,
    masked_rows,
    spread,
)
from fastforget.errors import FastforgetError
from fastforget.head import LMHead


@dataclass(frozen=True)
class TokenStats:
    """Statistics (N,) per token, 0 where the label is ignored; float32 (float64 for float64 states).

    Notation: z the logits of a token, p = softmax(z), y its label, V the vocabulary. `logp` and `lse` are always there,
    `distance` and `pull` where an anchor and centres were given, the others where they were named in `outputs`. All but
    `logp_mean`, `logp_var`, `logp_top2_margin`, `argmax` and what begins with `others_` are differentiable.
    """

    logp: Tensor  # log p_y, nats
    lse: Tensor  # logsumexp(z)
    label_logit: Tensor | None = None  # z_y
    log_not_label: Tensor | None = None  # log(1 - p_y), summed over v != y
    max_logit: Tensor | None = None  # max_v z_v
    logit_mean: Tensor | None = None  # the plain mean of z over the vocabulary
    entropy: Tensor | None = None  # of p, nats
    logp_mean: Tensor | None = None  # E_p[log p]
    logp_var: Tensor | None = None  # Var_p[log p]
    others_entropy: Tensor | None = None  # of softmax over v != y, nats
    argmax: Tensor | None = None  # int64, -1 where the label is ignored
    others_argmax: Tensor | None = None  # int64, over v != y
    logp_top2_margin: Tensor | None = None  # log p of the likeliest token less that of the second, nats
    expected_embedding: Tensor | None = None  # (N, D): scale * E_p[W_v]
    others_embedding: Tensor | None = None  # (N, D): the same of softmax over v != y
    distance: Tensor | None = None  # of the state from its anchor, at most the margin
    pull: Tensor | None = None  # distance of the state from the nearest centre


def token_stats(
    hidden: Tensor,
    head: LMHead,
    labels: Tensor,
    *,
    positions: Tensor | None = None,
    outputs: Collection[str] = ("logp",),
    anchor: Tensor | Literal["label"] | None = None,
    centres: Tensor | None = None,
    metric: str = "l2",
    margin: float | None = None,
    backend: str = "auto",
    tail_mass: float = 0.0,
) -> TokenStats:
    """Statistics of the next-token distribution of each kept token (DESIGN section 1).

    Args:
        hidden: (N, D) states that enter the head, float64, float32, bfloat16 or float16, of any strides.
        head: the output head; where its weight trains, it gets its gradient too.
        labels: (N,) int64, already shifted; -100 is ignored.
        positions: int64, the kept rows. Without it they are found in `labels`, which costs one synchronisation where
            the labels are on a GPU.
        outputs: names of the fields wanted.
        anchor, centres, metric, margin: as in `hidden_stats`, for the same states; "label" takes the head's row of each
            token's label as its anchor.
        backend: "auto", "triton", "native", "torch" or "eager".
        tail_mass: retired, as it was slower than the exact product; anything but 0 raises.

    Under `torch.compile` without `positions`, ignored rows are computed too and masked: their number is not known when
    the graph is built.

    Raises:
        FastforgetError: shapes that do not fit, a label outside the vocabulary (on a GPU without `positions` known from
            the CPU: a device-side assertion that says so), an unknown output or backend, or an embedding of a head with
            a softcap.
    """
    check_token_arguments(hidden, head, labels, outputs)
    if tail_mass:
        raise FastforgetError(
            "tail_mass is retired: leaving out the tail was slower than the exact product on every GPU row measured; "
            "leave the argument out"
        )
    if isinstance(anchor, str):
        anchor = label_anchor(anchor, head, labels.to(hidden.device))
    targets = checked_targets(hidden, anchor, centres, metric, margin)
    return stats_of(hidden, head, labels, positions, outputs, targets, margin, backend)


def stats_of(
    hidden: Tensor,
    head: LMHead,
    labels: Tensor,
    positions: Tensor | None,
    outputs: Collection[str],
    targets: Targets,
    margin: float | None,
    backend: str,
) -> TokenStats:
    """`token_stats` of arguments that have been checked."""
    vocabulary = hidden.shape[1] if head.is_identity else head.weight.shape[0]
    if positions is not None:
        check_positions(positions, len(hidden))
    masked = positions is None and torch.compiler.is_compiling()
    if masked:  # how many rows are kept is not known when the graph is built: all are computed, and masked afterwards
        labels = labels.to(hidden.device, non_blocking=True)
        kept_labels = checked_labels(labels, vocabulary, IGNORE_INDEX)
    else:
        positions, kept_labels = kept_rows(hidden, labels, positions, vocabulary)
    names = tuple(dict.fromkeys(("logp", "lse", *outputs)))
    found = backends.backend_of(backend, hidden.device)
    fields = found.token_stats(hidden, kept_labels, head, names, positions=positions, targets=targets)
    if "distance" in fields and margin is not None:
        fields["distance"] = fields["distance"].clamp(max=margin)
    if masked:
        return TokenStats(**{name: masked_rows(value, labels, EMPTY.get(name, 0)) for name, value in fields.items()})
    if positions is None:
        return TokenStats(**fields)
    return TokenStats(
        **{name: spread(value, positions, len(hidden), EMPTY.get(name, 0)) for name, value in fields.items()}
    )


def kept_rows(
    hidden: Tensor, labels: Tensor, positions: Tensor | None, vocabulary: int
) -> tuple[Tensor | None, Tensor]:
    """(the kept rows or None for all, their labels), on the device of the states, once all labels are known right."""
    if torch.compiler.is_compiling() or not labels.is_cpu:
        labels = labels.to(hidden.device, non_blocking=True)
        found = (labels != IGNORE_INDEX).nonzero()[:, 0] if positions is None else positions
        found = found.to(hidden.device, non_blocking=True)
        return found, checked_labels(labels[found], vocabulary, vocabulary)  # none of the kept may be ignored
    if positions is None:
        positions = (labels != IGNORE_INDEX).nonzero()[:, 0]
        if len(positions) == len(labels):  # all of them: nothing to gather, nothing to spread
            positions = None
    kept = labels if positions is None else labels[positions.cpu()]
    check_labels(kept, vocabulary)
    kept = kept.to(hidden.device, non_blocking=True)
    return None if positions is None else positions.to(hidden.device, non_blocking=True), kept


def token_stats_from_logits(
    logits: Tensor,
    labels: Tensor,
    hidden: Tensor | None = None,
    *,
    positions: Tensor | None = None,
    outputs: Collection[str] = ("logp",),
    anchor: Tensor | None = None,
    centres: Tensor | None = None,
    metric: str = "l2",
    margin: float | None = None,
    backend: str = "auto",
    in_place: bool = False,
) -> TokenStats:
    """`token_stats` of logits (N, V) that a model has already produced, differentiable with respect to them.

    `hidden` (N, D) are the states that `anchor` and `centres` are for; they get their gradient too. The rest is as in
    `token_stats`. The forward pass only reads the logits.

    With `in_place` the logits become their own gradient in the backward pass: no second (N, V) tensor. Nothing else may
    read them after it, and there is one backward pass only.

    Raises:
        FastforgetError: as in `token_stats`, an anchor or centres without `hidden`, an embedding, or with `in_place`
            the backend "eager" or rows that are not contiguous.
    """
    if hidden is None and (anchor is not None or centres is not None):
        raise FastforgetError("an anchor or centres need the hidden states: give hidden (N, D) beside the logits")
    if hidden is not None and (hidden.dim() != 2 or len(hidden) != len(logits)):
        raise FastforgetError(f"hidden must be ({len(logits)}, D) to go with the logits, not {tuple(hidden.shape)}")
    head = LMHead(None)
    check_token_arguments(logits, head, labels, outputs)
    targets = Targets() if hidden is None else checked_targets(hidden, anchor, centres, metric, margin)
    targets = replace(targets, states=hidden)
    if in_place:
        return stats_in_place(logits, labels, positions, outputs, targets, margin, backend)
    return stats_of(logits, head, labels, positions, outputs, targets, margin, backend)


def stats_in_place(
    logits: Tensor,
    labels: Tensor,
    positions: Tensor | None,
    outputs: Collection[str],
    targets: Targets,
    margin: float | None,
    backend: str,
) -> TokenStats:
    """`token_stats_from_logits(in_place=True)` of arguments that have been checked."""
    name = backends.pick(backend, logits.device)
    if name == "eager":
        raise FastforgetError("backend 'eager' leaves gradients to autograd, which needs the logits: not in_place=True")
    if positions is not None:
        check_positions(positions, len(logits))
    if logits.stride(0) == 0 and len(logits) > 1:
        raise FastforgetError("in_place=True needs logits of their own: these are one row, expanded")
    if logits.stride(1) != 1 and logits.shape[1] > 1:
        raise FastforgetError("in_place=True needs logits whose rows are contiguous")
    if labels.is_cpu and not torch.compiler.is_compiling():
        kept_labels = labels[labels != IGNORE_INDEX] if positions is None else labels[positions.cpu()]
        check_labels(kept_labels, logits.shape[1])
    labels = labels.to(logits.device, non_blocking=True)
    kept = labels != IGNORE_INDEX
    if positions is not None:
        kept = kept & torch.zeros_like(kept).index_fill(0, positions.to(logits.device, non_blocking=True), True)
    labels = torch.where(kept, labels, 0)
    names = tuple(dict.fromkeys(("logp", "lse", *outputs)))
    fields = in_place_stats.label_stats(logits, labels, kept, names, backend=name)
    if targets and targets.states is not None:
        distance, pull = hidden_stats(
            targets.states, targets.anchor, targets.centres, targets.metric, margin, backend=backend
        )
        measured = {"distance": distance, "pull": pull}
        fields |= {field: value for field, value in measured.items() if value is not None}
    return TokenStats(**{field: torch.where(kept, value, EMPTY.get(field, 0)) for field, value in fields.items()})


def checked_targets(
    hidden: Tensor, anchor: Tensor | None, centres: Tensor | None, metric: str, margin: float | None
) -> Targets:
    """Anchor and centres, checked, as constants on the device of the states."""
    check_metric(metric, margin)
    if anchor is not None:
        check_anchor(anchor, hidden)
        anchor = anchor.detach().to(hidden.device)
    if centres is not None:
        if centres.dim() != 2 or len(centres) == 0 or centres.shape[1] != hidden.shape[1]:
            raise FastforgetError(f"centres must be (K, {hidden.shape[1]}) with K >= 1, not {tuple(centres.shape)}")
        centres = centres.detach().to(hidden.device)
    return Targets(anchor, centres, metric)


def hidden_stats(
    hidden: Tensor,
    anchor: Tensor | None = None,
    centres: Tensor | None = None,
    metric: str = "l2",
    margin: float | None = None,
    *,
    backend: str = "auto",
) -> tuple[Tensor | None, Tensor | None]:
    """Distance of each hidden state from its anchor, and from the nearest of K cluster centres: of any layer's states.

    Gradients flow into `hidden` alone; where a distance is 0 its gradient is 0, so that a state that starts at its own
    anchor gives no NaN. With `margin` the distance is min(distance, margin), without a gradient beyond it: minimising
    `margin - distance` is then the hinge that pushes a state away only as far as the margin.

    Args:
        hidden: (N, D), float64, float32, bfloat16 or float16.
        anchor: (N, D), one for each state, or (D,), one for all.
        centres: (K, D).
        metric: "l2" is |h - a|; "cosine" is 1 - cos(h, a), and 1 where either is 0.
        margin: positive, in units of the metric.
        backend: "auto", "triton", "native", "torch" or "eager".

    Returns:
        (distance (N,), pull (N,)), float32 (float64 for float64 states); None for what was not given.

    Raises:
        FastforgetError: neither an anchor nor centres, shapes that do not fit, an unknown metric, a margin that is not
            positive.
    """
    if hidden.dim() != 2 or not hidden.is_floating_point():
        raise FastforgetError(f"hidden must be a floating-point (N, D), not {hidden.dtype} {tuple(hidden.shape)}")
    if anchor is None and centres is None:
        raise FastforgetError("hidden_stats needs an anchor, centres, or both")
    targets = checked_targets(hidden, anchor, centres, metric, margin)
    found = backends.backend_of(backend, hidden.device).state_stats(hidden, targets)
    distance, pull = found.get("distance"), found.get("pull")
    if distance is not None and margin is not None:
        distance = distance.clamp(max=margin)
    return distance, pull


def label_anchor(anchor: str, head: LMHead, labels: Tensor) -> Tensor:
    """(n, D): the head's row of each label, the anchor named "label"; row 0 for an ignored one."""
    if anchor != "label":
        raise FastforgetError(f"anchor must be 'label' or a tensor, not {anchor!r}")
    if head.weight is None:
        raise FastforgetError("anchor='label' needs the head's rows, and here there are only logits")
    return head.weight.detach()[labels.clamp(min=0)]
