"""Per-token statistics of a causal LM's output, and their gradients, over a backend.

Losses are a few lines of PyTorch over what these functions return (`fastforget.objectives`).
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from fastforget import backends
from fastforget.backends import eager, ops
from fastforget.backends import in_place as in_place_stats
from fastforget.backends.chunks import Against
from fastforget.checks import (
    EMPTY,
    IGNORE_INDEX,
    check_anchor,
    check_labels,
    check_metric,
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
    `logp_mean`, `logp_var`, `others_entropy` and `argmax` are differentiable.
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
    expected_embedding: Tensor | None = None  # (N, D): scale * E_p[W_v]
    distance: Tensor | None = None  # of the state from its anchor, at most the margin
    pull: Tensor | None = None  # distance of the state from the nearest centre
    dropped_mass: Tensor | None = None  # with tail_mass > 0: sum of |gradient of logp over z| that was left out


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
        hidden: (N, D) states that enter the head, float64, float32, bfloat16 or float16.
        head: the output head; where its weight trains, it gets its gradient too.
        labels: (N,) int64, already shifted; -100 is ignored.
        positions: int64, the kept rows. Without it they are found in `labels`, which costs one synchronisation where
            the labels are on a GPU.
        outputs: names of the fields wanted.
        anchor, centres, metric, margin: as in `hidden_stats`, for the same states; "label" takes the head's row of each
            token's label as its anchor.
        backend: "auto", "triton", "native", "chunked" or "eager".

        tail_mass: how much of each token's gradient over the vocabulary (its absolute sum) the backend may leave out
            of the product with the head, where that saves time; what it did leave out is `dropped_mass`. 0 is exact.

    Under `torch.compile` without `positions`, ignored rows are computed too and masked: their number is not known when
    the graph is built.

    Raises:
        FastforgetError: shapes that do not fit, a label outside the vocabulary (seen where labels are on the CPU), an
            unknown output or backend, or `expected_embedding` of a head with a softcap.
    """
    check_token_arguments(hidden, head, labels, outputs, tail_mass)
    if isinstance(anchor, str):
        anchor = label_anchor(anchor, head, labels.to(hidden.device))
    against = checked_against(hidden, anchor, centres, metric, margin)
    return stats_of(hidden, head, labels, positions, outputs, against, margin, tail_mass, backend)


def stats_of(
    hidden: Tensor,
    head: LMHead,
    labels: Tensor,
    positions: Tensor | None,
    outputs: Collection[str],
    against: Against,
    margin: float | None,
    tail_mass: float,
    backend: str,
) -> TokenStats:
    """`token_stats` of arguments that have been checked."""
    check_labels(labels, hidden.shape[1] if head.is_identity else head.weight.shape[0], positions)
    labels = labels.to(hidden.device, non_blocking=True)
    masked = positions is None and torch.compiler.is_compiling()
    if masked:  # how many rows are kept is not known when the graph is built: all are computed, and masked afterwards
        kept_labels = labels.clamp(min=0)
    else:
        positions = positions_of(labels, positions, hidden)
        kept_labels = labels[positions]
    fields = kept_token_stats(
        hidden,
        head,
        kept_labels,
        positions=positions,
        outputs=outputs,
        against=against,
        tail_mass=tail_mass,
        backend=backend,
    )
    if "distance" in fields and margin is not None:
        fields["distance"] = fields["distance"].clamp(max=margin)
    if masked:
        return TokenStats(**{name: masked_rows(value, labels, name) for name, value in fields.items()})
    assert positions is not None
    return TokenStats(**{name: spread(value, positions, len(hidden), name) for name, value in fields.items()})


def kept_token_stats(
    hidden: Tensor,
    head: LMHead,
    labels: Tensor,
    *,
    positions: Tensor | None = None,
    outputs: Collection[str] = ("logp",),
    against: Against | None = None,
    tail_mass: float = 0.0,
    backend: str = "auto",
) -> dict[str, Tensor]:
    """The same over kept rows alone: no check, no search, fields without gaps. What the step uses.

    labels (n,) are those of the kept rows; without `positions` every row of hidden is one.
    """
    name = backends.pick(backend, hidden.device)
    against = against or Against()
    if name == "eager":
        rows = slice(None) if positions is None else positions
        fields = eager.label_stats(hidden[rows], labels, head, outputs)
        if against:
            states = (hidden if against.states is None else against.states)[rows]
            anchor = against.anchor
            anchor = anchor[rows] if anchor is not None and anchor.dim() == 2 else anchor
            found = zip(
                ("distance", "pull"), eager.state_stats(states, anchor, against.centres, against.metric), strict=True
            )
            fields |= {name: value for name, value in found if value is not None}
        if tail_mass > 0:
            fields["dropped_mass"] = torch.zeros_like(fields["logp"])
    else:
        fields = ops.label_stats(
            hidden, labels, head, outputs, positions=positions, against=against, tail_mass=tail_mass, backend=name
        )
    unasked = {"log_not_label", "argmax"} - set(outputs)
    return {name: value for name, value in fields.items() if name not in unasked}


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
    `token_stats`.

    With `in_place` the logits are overwritten, and become their own gradient in the backward pass: no second (N, V)
    tensor. Nothing else may read them afterwards, there is one backward pass only, and gradients come from `logp`,
    `lse`, `label_logit` and `log_not_label` alone.

    Raises:
        FastforgetError: as in `token_stats`, an anchor or centres without `hidden`, or with `in_place` an
            `expected_embedding` or the backend "eager".
    """
    if hidden is None and (anchor is not None or centres is not None):
        raise FastforgetError("an anchor or centres need the hidden states: give hidden (N, D) beside the logits")
    if hidden is not None and (hidden.dim() != 2 or len(hidden) != len(logits)):
        raise FastforgetError(f"hidden must be ({len(logits)}, D) to go with the logits, not {tuple(hidden.shape)}")
    head = LMHead(None)
    check_token_arguments(logits, head, labels, outputs, 0.0)
    against = Against() if hidden is None else checked_against(hidden, anchor, centres, metric, margin)
    against.states = hidden
    if in_place:
        return stats_in_place(logits, labels, positions, outputs, against, margin, backend)
    return stats_of(logits, head, labels, positions, outputs, against, margin, 0.0, backend)


def stats_in_place(
    logits: Tensor,
    labels: Tensor,
    positions: Tensor | None,
    outputs: Collection[str],
    against: Against,
    margin: float | None,
    backend: str,
) -> TokenStats:
    """`token_stats_from_logits(in_place=True)` of arguments that have been checked."""
    name = backends.pick(backend, logits.device)
    if name == "eager":
        raise FastforgetError("backend 'eager' leaves gradients to autograd, which needs the logits: not in_place=True")
    if logits.stride(1) != 1 and logits.shape[1] > 1:
        raise FastforgetError("in_place=True needs logits whose rows are contiguous")
    check_labels(labels, logits.shape[1], positions)
    labels = labels.to(logits.device, non_blocking=True)
    kept = labels != IGNORE_INDEX
    if positions is not None:
        kept = kept & torch.zeros_like(kept).index_fill(0, positions.to(logits.device, non_blocking=True), True)
    labels = torch.where(kept, labels, 0)
    fields = in_place_stats.label_stats(logits, labels, kept, outputs, backend=name)
    fields = {field: fields[field] for field in fields if field in (*outputs, "logp", "lse")}
    found: dict[str, Tensor | None] = {}
    if against and against.states is not None:
        found["distance"], found["pull"] = hidden_stats(
            against.states, against.anchor, against.centres, against.metric, margin, backend=backend
        )
    fields |= {field: value for field, value in found.items() if value is not None}
    return TokenStats(**{field: torch.where(kept, value, EMPTY.get(field, 0)) for field, value in fields.items()})


def positions_of(labels: Tensor, positions: Tensor | None, hidden: Tensor) -> Tensor:
    """The kept rows, on the device of the states; found in the labels where they were not given."""
    if positions is None:
        positions = (labels != IGNORE_INDEX).nonzero()[:, 0]
    return positions.to(hidden.device, non_blocking=True)


def checked_against(
    hidden: Tensor, anchor: Tensor | None, centres: Tensor | None, metric: str, margin: float | None
) -> Against:
    """Anchor and centres, checked, as constants on the device of the states."""
    check_metric(metric, margin)
    if anchor is not None:
        check_anchor(anchor, hidden)
        anchor = anchor.detach().to(hidden.device)
    if centres is not None:
        if centres.dim() != 2 or len(centres) == 0 or centres.shape[1] != hidden.shape[1]:
            raise FastforgetError(f"centres must be (K, {hidden.shape[1]}) with K >= 1, not {tuple(centres.shape)}")
        centres = centres.detach().to(hidden.device)
    return Against(None, anchor, centres, metric)


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
        backend: "auto", "triton", "native", "chunked" or "eager".

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
    against = checked_against(hidden, anchor, centres, metric, margin)
    name = backends.pick(backend, hidden.device)
    if name == "eager":
        distance, pull = eager.state_stats(hidden, against.anchor, against.centres, metric)
    else:
        distance, pull = ops.state_stats(hidden, against.anchor, against.centres, metric, backend=name)
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
