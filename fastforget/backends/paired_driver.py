"""GEMMs, paired rows, GEMM: a divergence and its gradient without ever holding N x V logits.

As in `driver.py`, with the policy's and the reference's products side by side: both softmaxes must be known before a
row is written, so rows are whole here.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastforget.backends import gemm
from fastforget.backends.chunks import Chunks, PairedPass, passes_of
from fastforget.head import LMHead


def divergence_forward(
    hidden: Tensor,
    ref_hidden: Tensor,
    positions: Tensor | None,
    head: LMHead,
    kind: str,
    compute_grad: bool,
    backend: str,
    labels: Tensor | None = None,
    label_shift: float = 0.0,
    tell_logp: bool = False,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """(divergence (n,) of the kept rows, gradient (n, D) over their states, the model's log p_y (n,)).

    With labels (n,) of the kept rows, `label_shift` is added to the reference's logit of each that is not negative.
    `tell_logp`: they are wanted for log p_y too, which costs a row pass and no product.
    """
    chunks = Chunks(hidden, positions, head, buffers=2)
    passes = passes_of(backend, chunks.dtype)
    value = torch.empty(chunks.count, dtype=chunks.dtype, device=hidden.device)
    grad = chunks.empty_states() if compute_grad else None
    logp = torch.empty_like(value) if tell_logp else None
    product = chunks.buffer(times=2)
    written = product
    if compute_grad and passes.row_dtype(head, hidden) != product.dtype:
        written = chunks.buffer(passes.row_dtype(head, hidden))
    for rows in chunks:
        count = rows.stop - rows.start
        policy, reference = product[:count], product[count : 2 * count]
        both = [chunks.of(hidden, rows), chunks.of(ref_hidden, rows)]
        if hidden.dtype == ref_hidden.dtype:  # one product of twice as many rows is faster than two
            gemm.product_into(product[: 2 * count], torch.cat(both), head)
        else:
            gemm.product_into(policy, both[0], head)
            gemm.product_into(reference, both[1], head)
        if logp is not None and labels is not None:
            logits = policy.clone() if passes.OVERWRITES_PRODUCTS else policy
            logp[rows] = passes.label_pass(logits, labels[rows], head, (), None, padded=chunks.padded).fields["logp"]
        out = written[:count] if compute_grad else None
        found: PairedPass = passes.paired_pass(
            policy,
            reference,
            head,
            kind,
            out,
            chunks.padded,
            labels=labels[rows] if labels is not None and label_shift else None,
            label_shift=label_shift,
        )
        value[rows] = found.value
        if grad is not None and found.row is not None:
            gemm.rows_to_hidden(found.row, head, out=grad[rows])
            if found.row_scale is not None:
                grad[rows].div_(found.row_scale[:, None])
    chunks.give_back()
    return value, grad, logp
