"""Divergences of a causal LM's next-token distribution from its frozen reference's, per token, over a backend."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fastforget import backends
from fastforget.backends.state_ops import checked_labels
from fastforget.checks import IGNORE_INDEX, check_hidden, check_positions, spread
from fastforget.errors import FastforgetError
from fastforget.head import LMHead

DIVERGENCES = ("forward_kl", "reverse_kl", "jsd")


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
    """Divergence (N,), in nats, of the model's distribution p from the reference's q, through the same frozen head.

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
    if ref_hidden.shape != hidden.shape:
        raise FastforgetError(f"ref_hidden is {tuple(ref_hidden.shape)}, hidden {tuple(hidden.shape)}: they must agree")
    if kind not in DIVERGENCES:
        raise FastforgetError(f"unknown divergence {kind!r}: choose one of {', '.join(DIVERGENCES)}")
    if positions is not None:
        check_positions(positions, len(hidden))
    if head.trainable:
        raise FastforgetError(
            "a divergence from the reference needs a frozen head: here the head trains, so the reference's own is "
            "gone; freeze it (model.get_output_embeddings().requires_grad_(False))"
        )
    labels = shifted_labels(hidden, head, labels, label_shift, positions)
    if positions is not None:
        positions = positions.to(hidden.device, non_blocking=True)
        labels = None if labels is None else labels[positions]
    value, _ = backends.backend_of(backend, hidden.device).divergence(
        hidden, ref_hidden, head, kind, positions=positions, labels=labels, label_shift=label_shift
    )
    return value if positions is None else spread(value, positions, len(hidden))


def shifted_labels(
    hidden: Tensor, head: LMHead, labels: Tensor | None, label_shift: float, positions: Tensor | None
) -> Tensor | None:
    """Labels whose logits the reference has shifted, checked, on the device of the states; None where none is."""
    if not (math.isfinite(label_shift) and label_shift <= 0):
        raise FastforgetError(f"label_shift must be finite and at most 0, not {label_shift}")
    if label_shift == 0:
        return None
    if labels is None:
        raise FastforgetError("label_shift shifts the logits of labels: give labels (N,) too")
    if labels.shape != hidden.shape[:1] or labels.dtype != torch.int64:
        what = f"{labels.dtype} {tuple(labels.shape)}"
        raise FastforgetError(f"labels must be int64 ({hidden.shape[0]},) to go with hidden, not {what}")
    vocabulary = hidden.shape[1] if head.is_identity else head.weight.shape[0]
    kept = labels if positions is None else labels[positions.to(labels.device)]
    checked_labels(kept, vocabulary, IGNORE_INDEX)
    return labels.to(hidden.device, non_blocking=True)
