"""What a backend is: the tile passes that the sweep calls, what they are given and what they leave, typed.

A sweep (`sweep.py`) takes a block of rows through the vocabulary a tile of columns at a time: product 1 of the tile
(the logits), one of the passes below, product 2 of the tile (what the pass wrote, times the head's rows). A pass reads
the tile once or twice, brings the rows' accumulators up to date, and writes the rows of product 2. Everything per row
that is computed once a sweep (statistics from accumulators, closing formulas) stands in `fields.py`, for all backends.

Notation: z a row of logits, y its label, "the others" all tokens but y. Logits are made of products h @ W.T by
`LogitMap`. A *lazy top* m is a logit near the largest of the others so far: it is set by the first tile and moves, to
the largest so far, only where that lies more than LAZY above it (with float16 rows or moments: always). Where it moves,
what was accumulated is multiplied with e^(old m - new m), the rows of `grad` included. Before the first logit it is
-infinity, which every exponent takes as 0.

All tensors of a block are of r rows. Accumulators are float32 (Triton) or float64, one row of them for each name; a
pass whose tile begins at column 0 ignores what they held. NaN in a row reaches that row's accumulators, and no other's.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Literal, NamedTuple, Protocol

import torch
from torch import Tensor

from fastforget.head import LMHead

LAZY = 30.0  # how far above the top a logit may lie before the top moves; e^30 times a vocabulary is far from 3e38
FLOAT16_SCALE = 8192.0  # what float16 rows are multiplied with, lest most of a row flush to zero; the sweep divides
RECENTRE = 0.5  # how far lse_p - lse_q may move from a paired block's shift before the pass moves the shift
NEAR_SHIFT = 8.0  # beyond it z_p - z_q rounds at its size: rows are plain differences, gaps those of log-probabilities

Coupling = Literal["reverse_kl", "jsd"]


@dataclass(frozen=True)
class Statistic:
    """One statistic of a token.

    `needs`: "basic" or "moments", the accumulators that it is made of; "embedding", the second product; "tiles", a pass
    in plain torch over each tile (`fields.TILE_STATISTICS`), for statistics that nobody's training waits for.
    """

    name: str
    needs: Literal["basic", "moments", "embedding", "tiles"]
    differentiable: bool = True
    integer: bool = False  # int64, -1 where there is none; else float, 0 where there is none


FIELDS = (
    Statistic("logp", "basic"),
    Statistic("lse", "basic"),
    Statistic("label_logit", "basic"),
    Statistic("log_not_label", "basic"),
    Statistic("max_logit", "moments"),
    Statistic("logit_mean", "moments"),
    Statistic("entropy", "moments"),
    Statistic("logp_mean", "moments", differentiable=False),
    Statistic("logp_var", "moments", differentiable=False),
    Statistic("others_entropy", "moments", differentiable=False),
    Statistic("argmax", "moments", differentiable=False, integer=True),
    Statistic("others_argmax", "moments", differentiable=False, integer=True),
    Statistic("logp_top2_margin", "tiles", differentiable=False),
    Statistic("expected_embedding", "embedding"),
    Statistic("others_embedding", "embedding", differentiable=False),
)

# of the label pass; the first four always, the others where moments are wanted
LABEL_ACCUMULATORS = (
    "top",  # the lazy top of the others
    "total",  # sum over the others of e^(z - top)
    "total_rest",  # to be added to it: what float32 sums rounded off; 0 from float64
    "label_logit",  # z_y
    "mean",  # of z - top over the others, weighted by e^(z - top); terms of z = -infinity are 0
    "deviations",  # sum over the others of e^(z - top) (z - top - mean)^2
    "sum",  # of all tokens' z
    "sum_rest",  # to be added to it
    "best",  # the largest z of the others; NaN from the first NaN on
    "best_index",  # the first token that has it, as a float
)
BASIC_ACCUMULATORS = 4

# of the paired pass; p is the policy's softmax, q the reference's, both over the others (over all where y < 0)
PAIRED_ACCUMULATORS = (
    "policy_top",  # a running largest z_p
    "policy_total",  # sum of e^(z_p - policy_top)
    "reference_top",
    "reference_total",
    "gap_moment",  # sum of e^(z_q - reference_top) (z_p - z_q); terms of z_q = -infinity are 0
    "base",  # the lazy top of z_q and of z_p - shift
    "shift",  # near lse_p - lse_q: what is taken out of z_p
    "difference",  # sum of e^(z_q - base) expm1(gap), gap = z_p - z_q - shift: the written rows' sum, before the slope
    "excess",  # sum of e^(z_q - base) (expm1(gap) - gap), every term >= 0
    "policy_label",  # z_p of the label, -infinity without one
    "reference_label",
)

# what the coupled pass is given of each row; its log p is (z_p - policy_top) - policy_log_total
COUPLED_NORMALISERS = (
    "policy_top",
    "policy_log_total",
    "reference_top",
    "reference_log_total",
    "lse_gap",  # lse_p - lse_q
    "centre",  # a guess of the mean of x under p, which is taken out of x
)
COUPLED_ACCUMULATORS = (
    "ratio",  # sum over the others of p (x - centre), x = log p - log q (reverse KL) or log p - log((p + q) / 2) (JSD)
    "from_policy",  # sum over the others of what KL(p||q), or KL(p||m), sums: from (expm1(d) - d) >= 0, d = log to/from
    "from_reference",  # the same of KL(q||m); 0 for reverse KL
    "probability",  # sum over the others of p
)

# what the gradient pass is given of each row
GRADIENT_COEFFICIENTS = (
    "top",  # m
    "share",  # 1 / sum over the others of e^(z - m); 0 where there are no others
    "others_probability",  # 1 - p_y
    "label_probability",  # p_y
    "lse",  # upstream gradients
    "entropy",
    "offset_mean",  # E_p[z - m]
    "unit",  # upstream of the others' softmax - onehot(y)
    "label_entry",  # all that the label's entry holds, but for what `projected` adds
    "max_logit",  # upstream, added at argmax
    "logit_mean",  # upstream / V, added everywhere
    "projected_mean",  # E_p[scale * projected]
)


@dataclass(frozen=True)
class LogitMap:
    """How products become logits: z = scale * product + bias, then softcap * tanh(z / softcap) where softcap > 0."""

    bias: Tensor | None  # (V,) contiguous, float32 (float64 where products are)
    scale: float
    softcap: float  # 0: none

    @classmethod
    def of(cls, head: LMHead, dtype: torch.dtype) -> LogitMap:
        """The map of a head, its bias as passes read it."""
        bias = None if head.bias is None else head.bias.detach().to(dtype).contiguous()
        if bias is not None and head.shard is not None:  # of the token that stands for those of other processes
            bias = torch.cat([bias, bias.new_zeros(1)])
        return cls(bias, head.scale, head.softcap or 0.0)


class Tile(NamedTuple):  # as quick to make as a tuple: there is one for each tile
    """Where in the vocabulary a tile of c columns lies, and what its rows may be taken to be.

    `padded`: how many elements of a row of every buffer may be read and written, at least c; what lies past c is
    anything, and may be left as anything.
    """

    first: int
    columns: int
    vocabulary: int
    padded: int
    logit_map: LogitMap


@dataclass(frozen=True)
class StateTargets:
    """What states are measured against, as passes read it: float32 (float64 for float64 states), rows contiguous.

    `centres` are of length 1 (0 where they are 0) where the metric is the cosine.
    """

    anchor: Tensor | None  # (r, D), or (D,) for all rows
    centres: Tensor | None  # (K, D)
    cosine: bool


@dataclass(frozen=True)
class StateBlock:
    """Hidden states of a block's rows, to be measured: |h - a| or half the squared distance of the unit vectors.

    Where h or a point is 0 the cosine distance is 1. `values`: distance from the anchor, and from the nearest centre;
    `nearest`: that centre, the first of several. What has no target is left alone.
    """

    states: Tensor  # (r, D), rows contiguous
    targets: StateTargets
    values: Tensor  # (2, r), rows of any stride
    nearest: Tensor  # (r,) int64, contiguous


@dataclass(frozen=True)
class LabelBlock:
    """Rows of the label sweep."""

    labels: Tensor  # (r,) int64, contiguous, each inside the vocabulary
    accumulators: Tensor  # (LABEL_ACCUMULATORS or the first BASIC_ACCUMULATORS of them, r), rows of any stride
    grad: Tensor | None  # (r, D) float32, rows contiguous: what product 2 has added up to; not read at the first tile
    states: StateBlock | None = None  # measured with the first tile

    @property
    def moments(self) -> bool:
        """Whether the accumulators past the basic ones are wanted."""
        return len(self.accumulators) > BASIC_ACCUMULATORS


@dataclass(frozen=True)
class PairedBlock:
    """Rows of the paired sweep: the policy's and the frozen reference's side by side.

    `shift` is (r,) float32 where the reference's embedding is known and product 2 is of the written rows alone; None
    where the pass chooses it: from the first tile, and anew where lse_p - lse_q so far lies further than RECENTRE from
    it. With it the base moves too, where the reference had only logits of -infinity so far. Then `grad` holds S1,
    `reference_grad` S2 = sum of e^(z_q - base) W, and when base and shift become b' and s'

        S1' = a S1 + (a - f) S2,  S2' = f S2,  f = e^(b - b'),  a = e^(b + s - b' - s')

    and likewise difference' and excess' (with the sums over e^(z_q - base), which reference_total and gap_moment give).
    """

    labels: Tensor  # (r,) int64, contiguous; negative: none is left out
    accumulators: Tensor  # (PAIRED_ACCUMULATORS, r), rows of any stride
    shift: Tensor | None
    grad: Tensor | None  # (r, D) float32, rows contiguous; None: no rows are written
    reference_grad: Tensor | None  # the same; None where the shift is given


@dataclass(frozen=True)
class CoupledBlock:
    """Rows of the coupled sweep, in which both normalisers are known: reverse KL and JSD."""

    kind: Coupling
    labels: Tensor  # (r,) int64, contiguous; negative: none is left out
    normalisers: Tensor  # (COUPLED_NORMALISERS, r) float32 (float64 where products are), contiguous
    accumulators: Tensor  # (COUPLED_ACCUMULATORS, r), rows of any stride


@dataclass(frozen=True)
class GradientBlock:
    """Rows of the gradient sweep, in which the normaliser is known."""

    labels: Tensor  # (r,) int64, contiguous
    argmax: Tensor  # (r,) int64, contiguous; -1: none
    coefficients: Tensor  # (GRADIENT_COEFFICIENTS, r) float32 (float64 where products are), contiguous


@dataclass(frozen=True)
class Targets:
    """What hidden states are measured against: anchor (N, D) or (D,), centres (K, D), of any dtype; None for neither.

    `states` (N, D) are those measured, where they are not the hidden states that enter the head.
    """

    anchor: Tensor | None = None
    centres: Tensor | None = None
    metric: str = "l2"
    states: Tensor | None = None

    def __bool__(self) -> bool:
        return self.anchor is not None or self.centres is not None


@dataclass(frozen=True)
class KnownReference:
    """What is cached of the reference, by `token_stats` with the same labels: it saves the fourth product of a KL.

    Its likeliest other token k sets a paired block's shift, z_p,k - z_q,k: then written rows are at most 1 / q_k times
    as large as with the normalisers known, whatever the policy has become.
    """

    others_embedding: Tensor  # (n, D) of the kept rows
    others_argmax: Tensor  # (n,) int64


class Backend(Protocol):
    """What statistics, losses and the reference call: differentiable functions of kept rows, arguments checked before.

    Everything is of the n rows of hidden (N, D) at `positions` (int64, on its device), or of all; labels (n,) int64 are
    theirs. Results are float32 (float64 for float64 states).
    """

    name: str

    def token_stats(
        self,
        hidden: Tensor,
        labels: Tensor,
        head: LMHead,
        outputs: Collection[str],
        *,
        positions: Tensor | None = None,
        targets: Targets | None = None,
    ) -> dict[str, Tensor]:
        """{field: (n,) or (n, D)} of `outputs`; with `targets` `distance` and `pull` too, as far as asked."""

    def divergence(
        self,
        hidden: Tensor,
        ref_hidden: Tensor,
        head: LMHead,
        kind: str,
        *,
        labels: Tensor | None = None,
        positions: Tensor | None = None,
        label_shift: float = 0.0,
        known: KnownReference | None = None,
    ) -> tuple[Tensor, Tensor]:
        """(divergence (n,) of the policy's p from the reference's q, log p_y (n,) without a gradient).

        `label_shift` is added to the reference's logit of each label that is not negative; log p_y is 0 where it is, or
        where there are no labels.
        """

    def state_stats(self, hidden: Tensor, targets: Targets) -> dict[str, Tensor]:
        """`distance` and `pull` (n,) of any layer's states, as far as asked."""


class TilePasses(Protocol):
    """The passes of one backend. Tiles are (r, c), rows contiguous with any stride between them.

    Products are float32 (float64: plain torch alone); logits that a model has produced come as they are, in float32,
    bfloat16 or float16. Rows that are written are float32, bfloat16 or float16, may begin where the product's rows
    begin in memory, and hold anything past c. Labels and argmax are of the whole vocabulary. `logits` at the label and
    the slope 1 - (z / softcap)^2 of a softcap, with which every written entry is multiplied, are the passes' affair.
    """

    name: str

    def accumulator_dtype(self, products: torch.dtype) -> torch.dtype:
        """The dtype of accumulators: float32 or float64."""

    def row_dtype(self, operands: torch.dtype) -> torch.dtype:
        """The dtype of the rows for a second product with a weight of this dtype, on this backend's devices."""

    def label_tile(self, tile: Tile, product: Tensor, rows: Tensor | None, block: LabelBlock) -> None:
        """Bring the accumulators up to date; write e^(z - top), times the slope, 0 at the label; fade `grad`.

        float16 rows or moments: the top is the running largest. float16 rows are multiplied with FLOAT16_SCALE.
        """

    def paired_tile(
        self,
        tile: Tile,
        policy: Tensor,
        reference: Tensor,
        rows: Tensor | None,
        reference_rows: Tensor | None,
        block: PairedBlock,
    ) -> None:
        """Bring the accumulators up to date; write e^(z_q - base) expm1(gap) times the policy's slope, 0 at the label.

        And where `reference_rows` is given (which may begin where `reference` begins) e^(z_q - base) times the same
        slope, 0 at the label. float16 rows: the base is the running largest, and both are times FLOAT16_SCALE.
        """

    def coupled_tile(
        self,
        tile: Tile,
        policy: Tensor,
        reference: Tensor,
        rows: Tensor | None,
        policy_rows: Tensor | None,
        block: CoupledBlock,
    ) -> None:
        """Bring the accumulators up to date; write p (x - centre) over `policy`, p over `reference`, times the slope.

        Both are 0 at the label. Never in float16.
        """

    def gradient_tile(
        self, tile: Tile, product: Tensor, projected: Tensor | None, rows: Tensor, block: GradientBlock
    ) -> None:
        """Write the gradient over the logits, times the slope, for any mix of upstream gradients (never scaled):

            v != y   unit_v ((1 - p_y) (c_lse - c_entropy (z_v - m - offset_mean) + r_v - projected_mean) + c_unit)
            v == y   label_entry + p_y (r_y - projected_mean)
            and everywhere c_logit_mean, and c_max_logit at argmax

        unit_v = share e^(z_v - m); r = scale * projected (0 without). A logit of minus infinity adds nothing.
        """

    def state_pass(self, block: StateBlock) -> None:
        """Measure hidden states of any layer."""
