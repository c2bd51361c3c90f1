"""Per-token statistics of a causal LM's output, and their gradients, over a backend.

Losses are a few lines of PyTorch over what these functions return (`fastforget.objectives`).
"""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass, replace
from typing import Literal, get_args

from torch import Tensor

from fastforget import backends
from fastforget.arguments import (
    ComputedRows,
    check_hidden,
    check_labels,
    check_outputs,
    check_positions,
    check_states,
    checked_targets,
    kept_rows,
    masked_rows,
)
from fastforget.backends import in_place as in_place_stats
from fastforget.backends.protocol import Targets
from fastforget.backends.state_ops import checked_labels
from fastforget.batch import IGNORE_INDEX
from fastforget.errors import FastforgetError
from fastforget.head import LMHead

DivergenceKind = Literal["forward_kl", "reverse_kl", "jsd"]
DIVERGENCES: tuple[DivergenceKind, ...] = get_args(DivergenceKind)


@dataclass(frozen=True)
class TokenStats:
    """Statistics (N,) per token, 0 where the label is ignored; float32 (float64 for float64 states).

    Notation: z the logits of a token, p = softmax(z), y its label, V the vocabulary. `logp` and `lse` are always there,
    `distance` and `pull` where an anchor and centres were given, the others where they were named in `outputs`. Which
    of them are differentiable is said in `fastforget.backends.protocol.FIELDS`.

    NaN among a token's logits makes each of its statistics NaN; but `label_logit` where z_y is a number, and what
    begins with `others_` where z_y alone is NaN, are as ever. `argmax` and `others_argmax`, which cannot be NaN, are
    then the index of the first NaN, as torch's are. Infinity has no softmax: it counts as NaN, but in `label_logit`,
    `max_logit`, `logit_mean`, `logp_top2_margin` and the indices. Minus infinity is a token that cannot be said: it
    adds nothing, and where no other token can be said `others_entropy` and `others_embedding` are 0.
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
    """Compute statistics of the next-token distribution of each kept token (docs/concepts.md).

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
    if tail_mass:
        raise FastforgetError(
            "tail_mass is retired: leaving out the tail was slower than the exact product on every GPU row measured; "
            "leave the argument out"
        )
    check_hidden(hidden, head)
    check_labels(labels, len(hidden))
    check_outputs(outputs, head)
    rows = kept_rows(labels, positions, vocabulary_of(hidden, head), hidden.device)
    if isinstance(anchor, str):
        anchor = label_anchor(anchor, head, labels.to(hidden.device))
    targets = checked_targets(hidden, anchor, centres, metric, margin)
    return computed_stats(hidden, head, rows, outputs, targets, margin, backend)


def token_stats_from_logits(
    logits: Tensor,
    labels: Tensor,
    hidden: Tensor | None = None,
    *,
    positions: Tensor | None = None,
    outputs: Collection[str] = ("logp",),
    anchor: Tensor | Literal["label"] | None = None,
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
    read them after it, or write them before it (another `in_place` call on a part of them too), and there is one
    backward pass only.

    Raises:
        FastforgetError: as in `token_stats`, an anchor or centres without `hidden`, an embedding, or with `in_place`
            the backend "eager" or rows that are not contiguous.
    """
    head = LMHead(None)
    check_hidden(logits, head)
    check_labels(labels, len(logits))
    check_outputs(outputs, head)
    if isinstance(anchor, str):
        anchor = label_anchor(anchor, head, labels)
    if hidden is not None:
        check_states(hidden)
        if len(hidden) != len(logits):
            raise FastforgetError(f"hidden must be ({len(logits)}, D) to go with the logits, not {tuple(hidden.shape)}")
        targets = replace(checked_targets(hidden, anchor, centres, metric, margin), states=hidden)
    elif anchor is not None or centres is not None:
        raise FastforgetError("an anchor or centres need the hidden states: give hidden (N, D) beside the logits")
    else:
        targets = Targets()
    if not in_place:
        rows = kept_rows(labels, positions, logits.shape[1], logits.device)
        return computed_stats(logits, head, rows, outputs, targets, margin, backend)
    name = backends.pick(backend, logits.device)
    if name == "eager":
        raise FastforgetError("backend 'eager' leaves gradients to autograd, which needs the logits: not in_place=True")
    if logits.stride(1) != 1 and logits.shape[1] > 1:
        raise FastforgetError("in_place=True needs logits whose rows are contiguous")
    if logits.stride(0) < logits.shape[1] and len(logits) > 1:
        raise FastforgetError("in_place=True needs logits of their own: these rows overlap in memory")
    rows = masked_rows(labels, positions, logits.shape[1], logits.device)
    assert rows.mask is not None
    fields = in_place_stats.label_stats(logits, rows.labels, rows.mask, with_defaults(outputs), backend=name)
    if hidden is not None and targets:
        fields |= backends.backend_of(name, hidden.device).state_stats(hidden, targets)
    return spread_stats(fields, rows, margin)


def computed_stats(
    hidden: Tensor,
    head: LMHead,
    rows: ComputedRows,
    outputs: Collection[str],
    targets: Targets,
    margin: float | None,
    backend: str,
) -> TokenStats:
    """Compute the statistics of some rows, by a backend, among all rows."""
    if rows.mask is not None:  # what does not count may be NaN (padding under attention), and NaN times 0 is NaN
        ignored = ~rows.mask[:, None]
        hidden = hidden.masked_fill(ignored, 0.0)
        if targets.states is not None:
            targets = replace(targets, states=targets.states.masked_fill(ignored, 0.0))
    fields = backends.backend_of(backend, hidden.device).token_stats(
        hidden, rows.labels, head, with_defaults(outputs), positions=rows.positions, targets=targets
    )
    return spread_stats(fields, rows, margin)


def with_defaults(outputs: Collection[str]) -> tuple[str, ...]:
    """Return the outputs named, after those that are always there."""
    return tuple(dict.fromkeys(("logp", "lse", *outputs)))


def spread_stats(fields: dict[str, Tensor], rows: ComputedRows, margin: float | None) -> TokenStats:
    """Fields of the rows computed as statistics of all rows, the distance at most the margin."""
    if margin is not None and "distance" in fields:
        fields["distance"] = fields["distance"].clamp(max=margin)
    return TokenStats(**{name: rows.spread(name, value) for name, value in fields.items()})


def vocabulary_of(hidden: Tensor, head: LMHead) -> int:
    """Return the number of logits."""
    return hidden.shape[1] if head.is_identity else head.vocabulary


def label_anchor(anchor: str, head: LMHead, labels: Tensor) -> Tensor:
    """(n, D): the head's row of each label, the anchor named "label"; any row for a label that is ignored."""
    if anchor != "label":
        raise FastforgetError(f"anchor must be 'label' or a tensor, not {anchor!r}")
    if head.is_identity:
        raise FastforgetError("anchor='label' needs the head's rows, and here there are only logits")
    head.check_whole("anchor='label'")
    return head.weight.detach()[labels.clamp(0, len(head.weight) - 1)]


def hidden_stats(
    hidden: Tensor,
    anchor: Tensor | None = None,
    centres: Tensor | None = None,
    metric: str = "l2",
    margin: float | None = None,
    *,
    backend: str = "auto",
) -> tuple[Tensor | None, Tensor | None]:
    """Measure how far hidden states of any layer are from their anchor, and from the nearest of K cluster centres.

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
    check_states(hidden)
    if anchor is None and centres is None:
        raise FastforgetError("hidden_stats needs an anchor, centres, or both")
    targets = checked_targets(hidden, anchor, centres, metric, margin)
    measured = backends.backend_of(backend, hidden.device).state_stats(hidden, targets)
    distance, pull = measured.get("distance"), measured.get("pull")
    if distance is not None and margin is not None:
        distance = distance.clamp(max=margin)
    return distance, pull


def divergence(
    hidden: Tensor,
    ref_hidden: Tensor,
    head: LMHead,
    kind: str = "forward_kl",
    *,
    positions: Tensor | None = None,
    labels: Tensor | None = None,
    label_shift: float = 0.0,
    backend: str = "auto",
) -> Tensor:
    """Compute the divergence (N,), in nats, of the model's distribution p from the reference's q, by the same head.

    Args:
        hidden: (N, D) the model's states; gradients flow into them.
        ref_hidden: (N, D) the frozen reference's states; none do.
        head: frozen: a head that trains is not the reference's.
        kind: "forward_kl" KL(q||p), "reverse_kl" KL(p||q) or "jsd".
        positions: int64, the rows wanted; the others are 0. Without it, all.
        labels: (N,) int64, for `label_shift`; at -100 there is no shift.
        label_shift: nats, at most 0: what is added to the reference's logit (after a softcap) of each row's label, so
            that q is softmax(z_ref + label_shift onehot(label)): the target of UNDIAL.
        backend: "auto", "triton", "native", "torch" or "eager".

    Raises:
        FastforgetError: shapes that do not fit, an unknown kind or backend, a head that trains, a shift that is
            positive or without labels, or a label outside the vocabulary (seen where labels are on the CPU).
    """
    check_hidden(hidden, head)
    check_states(ref_hidden, "ref_hidden")
    if ref_hidden.shape != hidden.shape:
        raise FastforgetError(f"ref_hidden is {tuple(ref_hidden.shape)}, hidden {tuple(hidden.shape)}: they must agree")
    if kind not in DIVERGENCES:
        raise FastforgetError(f"unknown divergence {kind!r}: choose one of {', '.join(DIVERGENCES)}")
    if head.trainable:
        raise FastforgetError(
            "a divergence from the reference needs a frozen head: here the head trains, so the reference's own is "
            "gone; freeze it (model.get_output_embeddings().requires_grad_(False))"
        )
    if not (math.isfinite(label_shift) and label_shift <= 0):
        raise FastforgetError(f"label_shift must be finite and at most 0, not {label_shift}")
    if positions is not None:
        check_positions(positions, len(hidden))
    shifted = None  # labels (n,) of the rows wanted, where their logits are shifted
    if label_shift:
        if labels is None:
            raise FastforgetError("label_shift shifts the logits of labels: give labels (N,) too")
        check_labels(labels, len(hidden))
        shifted = labels if positions is None else labels[positions.to(labels.device)]
        inside = checked_labels(shifted, vocabulary_of(hidden, head), IGNORE_INDEX)
        shifted = inside.where(shifted != IGNORE_INDEX, shifted).to(hidden.device, non_blocking=True)
    if positions is not None:
        positions = positions.to(hidden.device, non_blocking=True)
    value, _ = backends.backend_of(backend, hidden.device).divergence(
        hidden, ref_hidden, head, kind, positions=positions, labels=shifted, label_shift=label_shift
    )
    if positions is None:
        return value
    return value.new_zeros(len(hidden)).index_copy(0, positions, value)
