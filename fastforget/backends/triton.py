"""The row passes of the `triton` backend: the kernels of `fastforget_kernels`, as the driver takes them."""

from __future__ import annotations

from collections.abc import Collection, Mapping

import torch
from torch import Tensor

from fastforget.backends.chunks import Against, LabelPass, PairedPass
from fastforget.backends.gemm import rows_contiguous
from fastforget.backends.label_fields import MEASURED, MOMENTS
from fastforget.head import LMHead
from fastforget_kernels import gradient_rows, label_rows, paired_rows, skipping, state_rows

ANY_DTYPE = True  # products may come in any dtype, and are then overwritten in it
MEASURES_STATES = True  # in the label pass, where it can
OVERWRITES_PRODUCTS = False  # only where a row is wanted


def row_dtype(head: LMHead, hidden: Tensor) -> torch.dtype:
    """The dtype of written rows: what the second product with the head takes."""
    if head.is_identity or head.weight.dtype not in (torch.bfloat16, torch.float16):
        return torch.float32
    return head.weight.dtype


def label_pass(
    product: Tensor,
    labels: Tensor,
    head: LMHead,
    names: Collection[str],
    out: Tensor | None,
    *,
    padded: int | None = None,
    masses: bool = False,
    against: Against | None = None,
) -> LabelPass:
    """Statistics of each row, its states' distances, and the row written into `out`, in one launch."""
    found = label_rows.label_rows(
        product,
        labels,
        bias=head.bias,
        scale=head.scale,
        softcap=head.softcap,
        moments=bool(MOMENTS & set(names)),
        out=out,
        padded=padded,
        masses=masses,
        states=None if against is None else measured(against),
    )
    values = dict(zip(label_rows.FIELDS, found.fields.unbind(0), strict=True))
    fields = {name: values[name] for name in ("logp", "lse", "label_logit", "log_not_label")}
    if found.argmax is not None:
        fields |= {name: values[name] for name in MEASURED}
        fields |= {"entropy": -values["logp_mean"], "argmax": found.argmax}
    result = LabelPass(fields, product if out is None else out, masses=found.masses)
    if head.softcap is not None:
        result.label_slope = values["label_slope"]
    if out is not None and out.dtype == torch.float16:
        result.row_scale = values["row_scale"]
    if against is not None and found.states is not None:
        result.states = state_fields(found.states, found.nearest, against)
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
    value, row_scale = paired_rows.paired_rows(
        policy,
        reference,
        kind,
        bias=head.bias,
        scale=head.scale,
        softcap=head.softcap,
        out=out,
        padded=padded,
        labels=labels,
        label_shift=label_shift,
    )
    scaled = out is not None and out.dtype == torch.float16
    return PairedPass(value, out, row_scale if scaled else None)


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
    gradient_rows.gradient_rows(
        product,
        labels,
        coefficients,
        argmax=argmax,
        projected=projected,
        bias=head.bias,
        scale=head.scale,
        softcap=head.softcap,
        out=out,
        padded=padded,
    )
    return out


def state_pass(
    hidden: Tensor, positions: Tensor | None, anchor: Tensor | None, centres: Tensor | None, metric: str
) -> dict[str, Tensor]:
    """`distance`, `pull` and `nearest` of states, as far as there are an anchor and centres."""
    states = hidden if positions is None else hidden.index_select(0, positions)
    if positions is not None and anchor is not None and anchor.dim() == 2:
        anchor = anchor.index_select(0, positions)
    against = Against(states, anchor, centres, metric)
    values, nearest = state_rows.state_rows(*measured(against))
    fields = state_fields(values, nearest, against)
    return {name: value.clone() for name, value in fields.items()}  # an op's results must not share memory


def measured(against: Against) -> tuple[Tensor, Tensor | None, Tensor | None, str]:
    """States, anchor, centres and metric as the kernels take them: rows contiguous."""
    assert against.states is not None
    states = rows_contiguous(against.states)
    anchor, centres = against.anchor, against.centres
    if anchor is not None:
        anchor = rows_contiguous(anchor.float())  # of any dtype, and rounded to none
    if centres is not None:
        centres = state_rows.prepared_centres(centres, against.metric)
    return states, anchor, centres, against.metric


def state_fields(values: Tensor, nearest: Tensor | None, against: Against) -> dict[str, Tensor]:
    """The kernels' distances under the fields' names."""
    fields = {}
    if against.anchor is not None:
        fields["distance"] = values[0]
    if against.centres is not None and nearest is not None:
        fields |= {"pull": values[1], "nearest": nearest}
    return fields


def skipping_product(
    found: LabelPass, labels: Tensor, head: LMHead, weight: Tensor | None, tail_mass: float, out: Tensor
) -> Tensor:
    """The second product without the tiles that may be left out; returns the mass dropped of each row (n,)."""
    assert found.masses is not None
    return skipping.skipping_product(
        found.row, head.weight, found.masses, labels, weight, tail_mass, scale=head.scale, out=out
    )
