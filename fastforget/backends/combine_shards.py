"""The sweeps of several processes, each over its own part of the vocabulary, as one sweep over all of it.

Every process has the same hidden states. Per row of them the sums of a shard stand relative to a top, or a base b_r and
a shift d_r, of its own. One gather of these numbers gives those of the whole vocabulary:

    label     top = max top_r                          f_r = e^(top_r - top)
              total = sum f_r total_r                  A = sum f_r A_r
    paired    d = lse_p - lse_q                        b = max(top_q, top_p - d)
              f_r = e^(b_r - b)                        a_r = f_r e^(d_r - d)
              difference = sum a_r difference_r + (a_r - f_r) mass_r,      mass_r = sum over the shard of e^(z_q - b_r)
              excess = sum (a_r - f_r) difference_r + f_r excess_r + (a_r - f_r - f_r (d_r - d)) mass_r
              S1 = sum a_r S1_r + (a_r - f_r) S2_r     S2 = sum f_r S2_r

The sums over A, S1 and S2 (n, D) are one exchange at the end: each process closes its own share of the gradient first,
which is linear in them, and to which the label's row of the head belongs in one process alone.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from fastforget.backends.protocol import BASIC_ACCUMULATORS, LABEL_ACCUMULATORS, PAIRED_ACCUMULATORS, PairedBlock
from fastforget.backends.torch_passes import finite_or_zero, log_total
from fastforget.vocabulary import VocabularyShard


def combine_label(parts: Tensor) -> tuple[Tensor, Tensor]:
    """Combine the label accumulators of R shards, (R, A, n), to those of all, (A, n) float64; with f (R, n).

    A: the basic ones, or the moments too; `best_index` then is of the whole vocabulary.
    """
    top, total, rest, label_logit, *moments = parts.double().unbind(1)
    whole_top = top.amax(dim=0)
    moved = top - finite_or_zero(whole_top)
    fade = moved.exp()
    weight = (total + rest) * fade
    whole_total = weight.sum(dim=0)
    zero = torch.zeros_like(whole_total)
    found = [whole_top, whole_total, zero, label_logit.amax(dim=0)]
    if moments:
        mean, deviations, plain, plain_rest, best, index = moments
        offset = torch.where(fade == 0, 0.0, mean + moved)
        whole_mean = (weight * offset).sum(dim=0) / torch.where(whole_total == 0, 1.0, whole_total)
        spread = fade * deviations + weight * (offset - whole_mean).square()
        whole_best = best.amax(dim=0)
        first = torch.where((best == whole_best) | best.isnan(), index, torch.inf).amin(dim=0)
        found += [whole_mean, spread.sum(dim=0), (plain + plain_rest).sum(dim=0), zero, whole_best, first]
    return torch.stack(found), fade


def combine_paired(parts: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Combine the paired accumulators of R shards, (R, 11, n), to those of all, (11, n) float64; with f, a (R, n)."""
    given = dict(zip(PAIRED_ACCUMULATORS, parts.double().unbind(1), strict=True))
    found = {}
    for side in ("policy", "reference"):
        top = given[f"{side}_top"]
        found[f"{side}_top"] = top.amax(dim=0)
        fade = (top - finite_or_zero(found[f"{side}_top"])).exp()
        found[f"{side}_total"] = (given[f"{side}_total"] * fade).sum(dim=0)
        found[f"{side}_label"] = given[f"{side}_label"].amax(dim=0)
    # the fade is the reference's
    found["gap_moment"] = torch.where(fade == 0, 0.0, given["gap_moment"] * fade).sum(dim=0)
    apart = log_total(found["policy_top"], found["policy_total"])
    apart = apart - log_total(found["reference_top"], found["reference_total"])
    found["shift"] = torch.where(apart.isfinite(), apart, 0.0)
    found["base"] = torch.maximum(found["reference_top"], found["policy_top"] - found["shift"])
    moved = given["base"] - finite_or_zero(found["base"])
    fade = moved.exp()
    gap = torch.where(fade == 0, 0.0, given["shift"] - found["shift"])
    along = (moved + given["shift"] - found["shift"]).exp()
    mass = given["reference_total"] * (given["reference_top"] - finite_or_zero(given["base"])).exp()
    found["difference"] = (along * given["difference"] + (along - fade) * mass).sum(dim=0)
    excess = (along - fade) * given["difference"] + fade * given["excess"] + (along - fade - fade * gap) * mass
    found["excess"] = excess.sum(dim=0)
    return torch.stack([found[name] for name in PAIRED_ACCUMULATORS]), fade, along


def share_label(accumulators: Tensor, grad: Tensor | None, shard: VocabularyShard) -> Tensor:
    """Return the accumulators (A, n) of the whole vocabulary; `grad` (n, D), A_r, becomes f_r A_r."""
    if len(accumulators) > BASIC_ACCUMULATORS:
        accumulators[LABEL_ACCUMULATORS.index("best_index")] += shard.first
    whole, fade = combine_label(shard.gather(accumulators))
    if grad is not None:
        grad.mul_(fade[shard.place, :, None].to(grad.dtype))
    return whole


def share_paired(block: PairedBlock, shard: VocabularyShard) -> PairedBlock:
    """Return a block with the accumulators (11, r) of the whole vocabulary; its S1 and S2 become terms of theirs."""
    whole, fade, along = combine_paired(shard.gather(block.accumulators.contiguous()))
    if block.grad is not None and block.reference_grad is not None:
        fade, along = (each[shard.place, :, None].to(block.grad.dtype) for each in (fade, along))
        block.grad.mul_(along).addcmul_(block.reference_grad, along - fade)
        block.reference_grad.mul_(fade)
    return replace(block, accumulators=whole)
