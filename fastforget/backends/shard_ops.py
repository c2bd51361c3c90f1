"""Statistics and forward KL of a head whose rows lie in several processes, behind autograd.

The forward pass ends with the whole gradient in every process (`combine_shards.py`), so the backward pass is that of
any head; only where the label's logit itself is differentiated the head's rows of labels are exchanged in it.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fastforget.backends import fields as closing
from fastforget.backends import passes_of
from fastforget.backends.blocks import SweepInput
from fastforget.backends.gradients import scatter_scaled
from fastforget.backends.products import label_slope
from fastforget.backends.protocol import Targets
from fastforget.backends.sweep import add_label_rows, label_sweep, paired_sweep
from fastforget.errors import FastforgetError
from fastforget.head import LMHead
from fastforget.vocabulary import COMPARED

LEARNED = ("logp", "lse", "label_logit", "log_not_label")  # what has a gradient


class ShardedStats(torch.autograd.Function):
    """The statistics `names` (n,) of a label sweep; those that are not `LEARNED` without a gradient."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, labels: Tensor, positions: Tensor | None, head: LMHead, names: list[str], backend: str
    ) -> tuple[Tensor, ...]:
        given = SweepInput(passes_of(backend, hidden.dtype), hidden.detach(), labels, positions, head)
        found = label_sweep(given, {*LEARNED, *names}, ctx.needs_input_grad[0])
        values = {name: found.fields[name].clone() for name in names}
        ctx.names, ctx.head = names, head
        ctx.mark_non_differentiable(*(value for name, value in values.items() if name not in LEARNED))
        ctx.save_for_backward(hidden, labels, positions, found.unit_grad, *(found.fields[name] for name in LEARNED))
        return tuple(values.values())

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        hidden, labels, positions, unit_grad, logp, _, label_logit, log_not = ctx.saved_tensors
        head: LMHead = ctx.head
        upstream = {name: grad for name, grad in zip(ctx.names, grads, strict=True) if name in LEARNED}
        factor = closing.unit_factor(upstream, logp, log_not)
        gradient = unit_grad * factor[:, None]
        of_label = sum(upstream[name] for name in ("lse", "label_logit") if name in upstream)
        if isinstance(of_label, Tensor):
            assert head.shard is not None
            rows = torch.zeros_like(gradient)
            add_label_rows(rows, head.own_labels(labels), of_label * label_slope(label_logit, head), head)
            head.shard.add_up(rows)
            gradient += rows
        ones = torch.ones_like(factor)
        return scatter_scaled(gradient, ones, positions, hidden), *[None] * 5


class ShardedDivergence(torch.autograd.Function):
    """Forward KL (n,) of a paired sweep, and log p_y (n,)."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        ref_hidden: Tensor,
        labels: Tensor,
        positions: Tensor | None,
        head: LMHead,
        label_shift: float,
        backend: str,
    ) -> tuple[Tensor, Tensor]:
        given = SweepInput(passes_of(backend, hidden.dtype), hidden.detach(), labels, positions, head)
        found = paired_sweep(given, ref_hidden.detach(), ctx.needs_input_grad[0], label_shift)
        ctx.save_for_backward(hidden, positions, found.grad)
        ctx.mark_non_differentiable(found.logp)
        return found.value, found.logp

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, _: Any) -> tuple[Any, ...]:
        hidden, positions, found = ctx.saved_tensors
        return scatter_scaled(found, grad, positions, hidden), *[None] * 6


def sharded_stats(
    hidden: Tensor,
    labels: Tensor,
    head: LMHead,
    outputs: Collection[str],
    positions: Tensor | None,
    targets: Targets | None,
    backend: str,
) -> dict[str, Tensor]:
    """As `Backend.token_stats`; raises FastforgetError for what is not served, and for a head that trains."""
    names = [*outputs]
    check_served([*names, *(["an anchor or centres"] if targets else [])])
    if hidden.requires_grad and torch.is_grad_enabled():
        check_learned(names)
    head.check_frozen_shard()
    check_rows_alike([hidden], labels, positions, head)
    return dict(zip(names, ShardedStats.apply(hidden, labels, positions, head, names, backend), strict=True))


def sharded_divergence(
    hidden: Tensor,
    ref_hidden: Tensor,
    labels: Tensor | None,
    head: LMHead,
    kind: str,
    positions: Tensor | None,
    label_shift: float,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """As `Backend.divergence`; raises FastforgetError for what is not served, and for a head that trains."""
    check_served([], [kind])
    head.check_frozen_shard()
    if labels is None:
        labels = torch.full((len(hidden if positions is None else positions),), -1, device=hidden.device)
    check_rows_alike([hidden, ref_hidden], labels, positions, head)
    return ShardedDivergence.apply(hidden, ref_hidden, labels, positions, head, label_shift, backend)


def check_rows_alike(states: Sequence[Tensor], labels: Tensor, positions: Tensor | None, head: LMHead) -> None:
    """As `VocabularyShard.check_alike`, of the kept rows."""
    assert head.shard is not None
    head.shard.check_alike([each if positions is None else each[:, :COMPARED][positions] for each in states], labels)


def check_served(statistics: Collection[str], divergences: Collection[str] = ()) -> None:
    """Raise for names of statistics and divergences that such a head does not have."""
    known = [name for name, field in closing.BY_NAME.items() if field.needs in ("basic", "moments")]
    refused = [name for name in statistics if name not in known]
    refused += [kind for kind in divergences if kind != "forward_kl"]
    if refused:
        raise FastforgetError(
            f"{', '.join(refused)}: a head whose vocabulary is sharded over processes has {', '.join(known)} and "
            "forward_kl; use other terms, or a head that is whole in each process (FSDP2's is gathered)"
        )


def check_learned(statistics: Collection[str]) -> None:
    """Raise for names of statistics that have a gradient, but of such a head none."""
    refused = [name for name in statistics if name in closing.DIFFERENTIABLE and name not in LEARNED]
    if refused:
        raise FastforgetError(
            f"{', '.join(refused)}: of a head whose vocabulary is sharded over processes only {', '.join(LEARNED)} and "
            "forward_kl have a gradient; take it without one (detach the states), or use other terms"
        )
