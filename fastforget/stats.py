"""Per-token statistics of a causal LM's output, and their gradients, over a backend.

Losses are a few lines of PyTorch over what these functions return (`fastforget.objectives`).
"""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass, replace
from typing import Literal

from torch import Tensor

from fastforget import backends
from fastforget.backends import OUTPUTS
from fastforget.errors import FastforgetError
from fastforget.head import LMHead

IGNORE_INDEX = -100
DIVERGENCES = ("forward_kl", "reverse_kl", "jsd")
METRICS = ("l2", "cosine")


@dataclass(frozen=True)
class TokenStats:
    """Statistics (N,) per token, 0 where the label is ignored; float32 (float64 for float64 states).

    Notation: z the logits of a token, p = softmax(z), y its label, V the vocabulary. `logp` and `lse` are always there,
    `distance` and `pull` where an anchor and centres were given, the others where they were named in `outputs`. All but
    `logp_mean`, `logp_var` and `argmax` are differentiable.
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
    argmax: Tensor | None = None  # int64, -1 where the label is ignored
    expected_embedding: Tensor | None = None  # (N, D): scale * E_p[W_v]
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
) -> TokenStats:
    """Statistics of the next-token distribution of each kept token (DESIGN section 1).

    Args:
        hidden: (N, D) states that enter the head, float64, float32, bfloat16 or float16.
        head: the output head; where its weight trains, it gets its gradient too.
        labels: (N,) int64, already shifted; -100 is ignored.
        positions: int64, the kept rows. Without it they are found in `labels`, which costs one synchronisation where
            the labels are on a GPU.
        outputs: names of the fields wanted.
        anchor, centres, metric, margin: as in `hidden_stats`, for the same states; "label" takes the head's row of each
            token's label as its anchor.
        backend: "auto", "chunked" or "eager".

    Raises:
        FastforgetError: shapes that do not fit, a label outside the vocabulary (seen where labels are on the CPU), an
            unknown output or backend, or `expected_embedding` of a head with a softcap.
    """
    check_hidden(hidden, head)
    if labels.shape != hidden.shape[:1]:
        raise FastforgetError(f"labels must be ({hidden.shape[0]},) to go with hidden, not {tuple(labels.shape)}")
    unknown = set(outputs) - set(OUTPUTS)
    if unknown:
        raise FastforgetError(f"unknown output {sorted(unknown)[0]!r}: choose from {', '.join(OUTPUTS)}")
    if "expected_embedding" in outputs and (head.softcap is not None or head.is_identity):
        raise FastforgetError("expected_embedding is defined for heads with a weight and without a softcap only")
    positions = positions_of(labels, positions, hidden)
    kept_labels = labels.to(hidden.device)[positions]
    check_labels(kept_labels, hidden.shape[1] if head.is_identity else head.weight.shape[0])
    fields = kept_token_stats(hidden[positions], head, kept_labels, outputs=outputs, backend=backend)
    fields = {name: spread(value, positions, hidden.shape[0], name) for name, value in fields.items()}
    if isinstance(anchor, str):
        anchor = label_anchor(anchor, head, labels.to(hidden.device))
    if anchor is not None or centres is not None:
        fields |= state_fields(hidden, positions, anchor, centres, metric, margin, backend)
    return TokenStats(**fields)


def kept_token_stats(
    hidden: Tensor, head: LMHead, labels: Tensor, *, outputs: Collection[str] = ("logp",), backend: str = "auto"
) -> dict[str, Tensor]:
    """The same over rows that are all kept: no check, no search, fields without gaps. What the step uses."""
    fields = backends.pick(backend, hidden.device).label_stats(hidden, labels, head, outputs)
    return {name: value for name, value in fields.items() if name in outputs or name in ("logp", "lse")}


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
) -> TokenStats:
    """`token_stats` of logits (N, V) that a model has already produced, differentiable with respect to them.

    `hidden` (N, D) are the states that `anchor` and `centres` are for; they get their gradient too. The rest is as in
    `token_stats`.

    Raises:
        FastforgetError: as in `token_stats`, or an anchor or centres without `hidden`.
    """
    stats = token_stats(logits, LMHead(None), labels, positions=positions, outputs=outputs, backend=backend)
    if anchor is None and centres is None:
        return stats
    if hidden is None:
        raise FastforgetError("an anchor or centres need the hidden states: give hidden (N, D) beside the logits")
    if hidden.dim() != 2 or len(hidden) != len(logits):
        raise FastforgetError(f"hidden must be ({len(logits)}, D) to go with the logits, not {tuple(hidden.shape)}")
    states = state_fields(hidden, positions_of(labels, positions, hidden), anchor, centres, metric, margin, backend)
    return replace(stats, **states)


def positions_of(labels: Tensor, positions: Tensor | None, hidden: Tensor) -> Tensor:
    """The kept rows, on the device of the states; found in the labels where they were not given."""
    if positions is None:
        positions = (labels != IGNORE_INDEX).nonzero()[:, 0]
    return positions.to(hidden.device)


def state_fields(
    hidden: Tensor,
    positions: Tensor,
    anchor: Tensor | None,
    centres: Tensor | None,
    metric: str,
    margin: float | None,
    backend: str,
) -> dict[str, Tensor]:
    """`distance` and `pull` (N,) of kept rows, 0 elsewhere, as far as an anchor and centres were given."""
    if anchor is not None:
        check_anchor(anchor, hidden)
        if anchor.dim() == 2:
            anchor = anchor.to(hidden.device)[positions]
    distance, pull = hidden_stats(hidden[positions], anchor, centres, metric, margin, backend=backend)
    values = {"distance": distance, "pull": pull}
    return {name: spread(value, positions, len(hidden)) for name, value in values.items() if value is not None}


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
        backend: "auto", "chunked" or "eager".

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
    check_metric(metric, margin)
    if anchor is not None:
        check_anchor(anchor, hidden)
        anchor = anchor.to(hidden.device)
    if centres is not None:
        if centres.dim() != 2 or len(centres) == 0 or centres.shape[1] != hidden.shape[1]:
            raise FastforgetError(f"centres must be (K, {hidden.shape[1]}) with K >= 1, not {tuple(centres.shape)}")
        centres = centres.to(hidden.device)
    distance, pull = backends.pick(backend, hidden.device).state_stats(hidden, anchor, centres, metric)
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


def divergence(
    hidden: Tensor,
    ref_hidden: Tensor,
    head: LMHead,
    kind: str = "forward_kl",
    *,
    positions: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """Divergence (N,), in nats, of the model's distribution p from the reference's q, through the same frozen head.

    Args:
        hidden: (N, D) the model's states; gradients flow into them.
        ref_hidden: (N, D) the frozen reference's states; none do.
        head: frozen: a head that trains is not the reference's.
        kind: "forward_kl" KL(q||p), "reverse_kl" KL(p||q) or "jsd".
        positions: int64, the rows wanted; the others are 0. Without it, all.
        backend: "auto", "chunked" or "eager".

    Raises:
        FastforgetError: shapes that do not fit, an unknown kind or backend, or a head that trains.
    """
    check_hidden(hidden, head)
    if ref_hidden.shape != hidden.shape:
        raise FastforgetError(f"ref_hidden is {tuple(ref_hidden.shape)}, hidden {tuple(hidden.shape)}: they must agree")
    if kind not in DIVERGENCES:
        raise FastforgetError(f"unknown divergence {kind!r}: choose one of {', '.join(DIVERGENCES)}")
    if positions is None:
        return kept_divergence(hidden, ref_hidden, head, kind, backend=backend)
    positions = positions.to(hidden.device)
    value = kept_divergence(hidden[positions], ref_hidden[positions], head, kind, backend=backend)
    return spread(value, positions, hidden.shape[0])


def kept_divergence(hidden: Tensor, ref_hidden: Tensor, head: LMHead, kind: str, *, backend: str = "auto") -> Tensor:
    """The same over rows that are all kept."""
    if head.trainable:
        raise FastforgetError(
            "a divergence from the reference needs a frozen head: here the head trains, so the reference's own is "
            "gone; freeze it (model.get_output_embeddings().requires_grad_(False))"
        )
    return backends.pick(backend, hidden.device).divergence(hidden, ref_hidden.detach(), head, kind)


def spread(value: Tensor, positions: Tensor, count: int, name: str = "") -> Tensor:
    """Kept values (n, ...) at their positions among `count` rows, 0 elsewhere (argmax: -1)."""
    empty = value.new_full((count, *value.shape[1:]), -1 if name == "argmax" else 0)
    return empty.index_copy(0, positions, value)


def check_hidden(hidden: Tensor, head: LMHead) -> None:
    """Raise where hidden states and head do not fit."""
    if hidden.dim() != 2 or not hidden.is_floating_point():
        raise FastforgetError(f"hidden must be a floating-point (N, D), not {hidden.dtype} {tuple(hidden.shape)}")
    if not head.is_identity and head.weight.shape[1] != hidden.shape[1]:
        raise FastforgetError(f"hidden has D = {hidden.shape[1]}, the head's weight D = {head.weight.shape[1]}")


def check_metric(metric: str, margin: float | None) -> None:
    """Raise for an unknown metric or a margin that is not positive."""
    if metric not in METRICS:
        raise FastforgetError(f"unknown metric {metric!r}: choose one of {', '.join(METRICS)}")
    if margin is not None and not (math.isfinite(margin) and margin > 0):
        raise FastforgetError(f"margin must be positive and finite, or None, not {margin}")


def check_anchor(anchor: Tensor, hidden: Tensor) -> None:
    """Raise where an anchor does not fit the states."""
    count, width = hidden.shape
    if anchor.shape not in ((count, width), (width,)):
        raise FastforgetError(
            f"anchor must be ({count}, {width}) or ({width},) for these states, not {tuple(anchor.shape)}"
        )


def check_labels(labels: Tensor, vocabulary: int) -> None:
    """Raise for a label outside the vocabulary. Only on the CPU: on a device looking would synchronise."""
    if labels.is_cpu and labels.numel() and not (0 <= int(labels.min()) and int(labels.max()) < vocabulary):
        wrong = labels[(labels < 0) | (labels >= vocabulary)][0]
        raise FastforgetError(f"label {int(wrong)} is outside the vocabulary of {vocabulary} (ignored labels are -100)")
