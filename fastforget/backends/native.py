"""The row passes of the `native` backend: C++ on the CPU (`csrc/`), between products that torch computes.

Every shape, dtype and stride is checked here before a pointer is passed, and every label by the library before it
writes anything. The formulas, and why they are as they are: kernels/label_rows.py, paired_rows.py, gradient_rows.py
and state_rows.py, the same passes in Triton.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping

import torch
from torch import Tensor

from fastforget.backends import gemm, library, states
from fastforget.backends.calls import (
    DTYPES,
    call,
    check_rows,
    check_vector,
    common,
    float32_bias,
    pointer,
)
from fastforget.backends.chunks import LabelPass, PairedPass
from fastforget.backends.label_fields import LabelFields
from fastforget.backends.label_tiles import tiled_label_pass as tiled_label_pass
from fastforget.backends.library import TILE
from fastforget.backends.live_tiles import skipping_product as skipping_product
from fastforget.errors import FastforgetError
from fastforget.head import LMHead

COEFFICIENTS = ("lse", "unit", "entropy", "label_logit", "max_logit", "logit_mean")
KINDS = ("forward_kl", "reverse_kl", "jsd")

ANY_DTYPE = True  # products may come in any dtype, and are then overwritten in it
MEASURES_STATES = False  # the driver does, apart
OVERWRITES_PRODUCTS = False  # only where a row is wanted


def row_dtype(head: LMHead, hidden: Tensor) -> torch.dtype:
    """The dtype of written rows: the products are float32, and so are the tiles that a 16-bit weight is cast in."""
    return torch.float32


def label_pass(
    product: Tensor,
    labels: Tensor,
    head: LMHead,
    names: Collection[str],
    out: Tensor | None,
    *,
    padded: int | None = None,
    masses: bool = False,
) -> LabelPass:
    """Statistics of each row, and the row written into `out`."""
    count, vocabulary = product.shape
    check_rows("products", product, DTYPES)
    check_vector("labels", labels, count, torch.int64)
    if out is not None:
        check_rows("written rows", out, DTYPES, product.shape)
        if out.data_ptr() == product.data_ptr() and out.dtype != product.dtype:
            raise FastforgetError(f"rows of {product.dtype} cannot be overwritten with {out.dtype}")
    fields = LabelFields(labels, names)
    tiles = product.new_empty(count, -(-vocabulary // TILE), dtype=torch.float32) if masses else None
    bias = float32_bias(head, vocabulary)
    written = product if out is None else out
    call(
        "fastforget_label_rows",
        library.LabelRows(
            common(count, vocabulary, bias, head.scale, head.softcap),
            product.data_ptr(),
            product.stride(0),
            labels.data_ptr(),
            pointer(out),
            written.stride(0),
            fields.values.data_ptr(),
            pointer(fields.argmax),
            pointer(tiles),
            DTYPES.index(product.dtype),
            DTYPES.index(written.dtype),
        ),
    )
    result = LabelPass(fields.told(), written, masses=tiles)
    if head.softcap is not None:
        result.label_slope = fields["label_slope"]
    if out is not None and out.dtype == torch.float16:
        result.row_scale = fields["row_scale"]
    return result


def paired_pass(
    policy: Tensor,
    reference: Tensor,
    head: LMHead,
    kind: str,
    out: Tensor | None,
    padded: int | None = None,
    labels: Tensor | None = None,
    label_shift: float = 0.0,
) -> PairedPass:
    """A divergence of each row, and where `out` is given its gradient over the logits."""
    count, vocabulary = policy.shape
    if labels is not None:
        check_vector("labels", labels, count, torch.int64)
    check_rows("the policy's products", policy)
    check_rows("the reference's products", reference, shape=policy.shape)
    if out is not None:
        check_rows("written rows", out, shape=policy.shape)
    values = policy.new_empty(count)
    bias = float32_bias(head, vocabulary)
    call(
        "fastforget_paired_rows",
        library.PairedRows(
            common(count, vocabulary, bias, head.scale, head.softcap),
            policy.data_ptr(),
            policy.stride(0),
            reference.data_ptr(),
            reference.stride(0),
            pointer(out),
            0 if out is None else out.stride(0),
            values.data_ptr(),
            pointer(labels),
            label_shift,
            KINDS.index(kind),
        ),
    )
    return PairedPass(values, out)


def gradient_pass(
    product: Tensor,
    labels: Tensor,
    head: LMHead,
    coefficients: Mapping[str, Tensor],
    *,
    argmax: Tensor | None,
    projected: Tensor | None,
    out: Tensor,
    padded: int | None = None,
) -> Tensor:
    """The gradient over the logits for any mix of upstream gradients, written into `out`."""
    count, vocabulary = product.shape
    check_rows("products", product)
    check_rows("written rows", out, shape=product.shape)
    check_vector("labels", labels, count, torch.int64)
    if argmax is not None:
        check_vector("argmax", argmax, count, torch.int64)
    if projected is not None:
        check_rows("projected products", projected, shape=product.shape)
    given = product.new_zeros(len(COEFFICIENTS), count)
    for row, name in zip(given, COEFFICIENTS, strict=True):
        if name in coefficients:
            row.copy_(coefficients[name])
    bias = float32_bias(head, vocabulary)
    call(
        "fastforget_gradient_rows",
        library.GradientRows(
            common(count, vocabulary, bias, head.scale, head.softcap),
            product.data_ptr(),
            product.stride(0),
            labels.data_ptr(),
            pointer(argmax),
            pointer(projected),
            0 if projected is None else projected.stride(0),
            given.data_ptr(),
            out.data_ptr(),
            out.stride(0),
        ),
    )
    return out


def state_pass(
    hidden: Tensor, positions: Tensor | None, anchor: Tensor | None, centres: Tensor | None, metric: str
) -> dict[str, Tensor]:
    """`distance`, `pull` and `nearest` of states, as far as there are an anchor and centres."""
    if positions is not None:
        hidden = hidden.index_select(0, positions)
        anchor = anchor.index_select(0, positions) if anchor is not None and anchor.dim() == 2 else anchor
    count, width = hidden.shape
    hidden = gemm.rows_contiguous(hidden)
    check_rows("hidden states", hidden, DTYPES)
    if anchor is not None:
        anchor = gemm.rows_contiguous(anchor.float())  # of any dtype
        check_rows("the anchor", anchor.expand(count, width), shape=hidden.shape)
    if centres is not None:
        centres = centres.float()
        if metric == "cosine":
            centres = states.unit_vectors(centres)[0]
        centres = centres.contiguous()
        check_rows("centres", centres, shape=(len(centres), width))
    values = hidden.new_zeros(2, count, dtype=torch.float32)
    nearest = hidden.new_zeros(count, dtype=torch.int64)
    if width:
        call(
            "fastforget_state_rows",
            library.StateRows(
                common(count, width),
                hidden.data_ptr(),
                hidden.stride(0),
                pointer(anchor),
                anchor.stride(0) if anchor is not None and anchor.dim() == 2 else 0,
                pointer(centres),
                0 if centres is None else len(centres),
                values.data_ptr(),
                nearest.data_ptr(),
                DTYPES.index(hidden.dtype),
                int(metric == "cosine"),
            ),
        )
    fields = {}
    if anchor is not None:
        fields["distance"] = values[0].clone()  # an op's results must not share memory
    if centres is not None:
        fields |= {"pull": values[1].clone(), "nearest": nearest}
    return fields
