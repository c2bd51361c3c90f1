"""The paired pass of the `chunked` backend: policy and reference logits of one chunk side by side.

Values are sums of terms that are each >= 0 (the expm1 form), and the row written for the second product is the
difference itself (p - q), never a difference of two rounded products: at the start of every LoRA run p is almost q,
and both would drown otherwise.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fastforget.backends import gemm
from fastforget.head import LMHead


def divergence(hidden: Tensor, ref_hidden: Tensor, head: LMHead, kind: str) -> Tensor:
    """(n,) forward KL(q||p), reverse KL(p||q) or JSD; q is the reference's distribution, p the model's."""
    compute_grad = torch.is_grad_enabled() and hidden.requires_grad
    return Divergence.apply(hidden, ref_hidden, head, kind, compute_grad)


class Divergence(torch.autograd.Function):
    """Divergence of kept rows from the reference; the gradient over hidden states is computed in the forward pass."""

    @staticmethod
    def forward(ctx, hidden, ref_hidden, head, kind, compute_grad):
        dtype = gemm.compute_dtype(hidden)
        count = hidden.shape[0]
        vocabulary = hidden.shape[1] if head.is_identity else head.weight.shape[0]
        value = torch.empty(count, dtype=dtype, device=hidden.device)
        grad = torch.empty(hidden.shape, dtype=dtype, device=hidden.device) if compute_grad else None
        policy_buffer = gemm.chunk_buffer(count, vocabulary, hidden)
        reference_buffer = torch.empty_like(policy_buffer)
        for rows in gemm.row_chunks(count, vocabulary, dtype):
            policy = policy_buffer[: rows.stop - rows.start]
            reference = reference_buffer[: rows.stop - rows.start]
            gemm.logits_into(policy, hidden[rows], head)
            gemm.logits_into(reference, ref_hidden[rows], head)
            slope = gemm.softcap_slope(policy, head) if compute_grad else None
            log_p, log_q = gemm.log_softmax_(policy), gemm.log_softmax_(reference)
            value[rows], row = KINDS[kind](log_p, log_q, compute_grad)
            if row is not None and grad is not None:
                if slope is not None:
                    row.mul_(slope)
                gemm.rows_to_hidden(row, head, out=grad[rows])
        if grad is not None:
            ctx.save_for_backward(grad)
        ctx.hidden_dtype = hidden.dtype
        return value

    @staticmethod
    @once_differentiable
    def backward(ctx, upstream):
        (grad,) = ctx.saved_tensors
        return (grad * upstream[:, None]).to(ctx.hidden_dtype), None, None, None, None


def forward_kl_rows(log_p: Tensor, log_q: Tensor, compute_grad: bool) -> tuple[Tensor, Tensor | None]:
    """KL(q||p) (n,), and its gradient over the logits p - q (n, V)."""
    return kl_sum(log_q, log_p), probability_difference(log_p, log_q) if compute_grad else None


def reverse_kl_rows(log_p: Tensor, log_q: Tensor, compute_grad: bool) -> tuple[Tensor, Tensor | None]:
    """KL(p||q) (n,), and its gradient over the logits p (log p - log q - KL) (n, V)."""
    value = kl_sum(log_p, log_q)
    return value, log_p.exp() * (log_p - log_q - value[:, None]) if compute_grad else None


def jsd_rows(log_p: Tensor, log_q: Tensor, compute_grad: bool) -> tuple[Tensor, Tensor | None]:
    """JSD(p, q) (n,), and its gradient over the logits p/2 (log p - log m - KL(p||m)), m = (p + q)/2 (n, V)."""
    log_mixture = torch.logaddexp(log_p, log_q).sub_(math.log(2.0))
    from_policy = kl_sum(log_p, log_mixture)
    value = 0.5 * (from_policy + kl_sum(log_q, log_mixture))
    return value, 0.5 * log_p.exp() * (log_p - log_mixture - from_policy[:, None]) if compute_grad else None


KINDS = {"forward_kl": forward_kl_rows, "reverse_kl": reverse_kl_rows, "jsd": jsd_rows}


def kl_sum(log_from: Tensor, log_to: Tensor) -> Tensor:
    """KL(from || to) (n,) as a sum of from * (expm1(d) - d) >= 0, d = log to - log from."""
    gap = log_to - log_from
    # where |d| is large, expm1 may overflow against a probability that is 0: there the same term is to - from - from*d
    near = (torch.expm1(gap.clamp(-1.0, 1.0)) - gap) * log_from.exp()
    far = log_to.exp() - log_from.exp() - log_from.exp() * gap
    return torch.where(gap.abs() <= 1.0, near, far).clamp_min_(0.0).sum(dim=1)


def probability_difference(log_p: Tensor, log_q: Tensor) -> Tensor:
    """p - q without cancellation where they are close."""
    gap = log_p - log_q
    near = torch.expm1(gap.clamp(-1.0, 1.0)) * log_q.exp()
    return torch.where(gap.abs() <= 1.0, near, log_p.exp() - log_q.exp())
