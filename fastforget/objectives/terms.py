"""The terms of an unlearning loss.

A term says which side of the batch it looks at, what it needs there, and reduces per-token statistics to a scalar. To
write your own: subclass `Term` as a dataclass and define `value`; a line in `presets.PRESETS` gives it a name.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import ClassVar, Literal, overload

import torch
import torch.nn.functional as F
from torch import Tensor

from fastforget.errors import FastforgetError
from fastforget.objectives.requests import (
    LOGP,
    REFERENCE_LOGP,
    CentreRequest,
    Divergence,
    Field,
    Request,
    StateDistances,
    StateRequest,
    described,
)
from fastforget.objectives.schedules import Weight, checked_weight
from fastforget.stats import DIVERGENCES

Side = Literal["forget", "retain"]
REDUCTIONS = ("token", "sequence")


def present(value: Tensor | None, what: str) -> Tensor:
    """Return what a term asked for; raise where it did not ask."""
    if value is None:
        raise FastforgetError(f"a term uses {what} without asking for it: name it in its `requests`")
    return value


@dataclass(frozen=True)
class SideStats:
    """What a term sees of one side of a (micro-)batch: n label tokens of b sequences that have at least one.

    The denominators are those of the whole batch, which a micro-batch is only a part of, so that the terms of all
    micro-batches add up to the loss of the whole.
    """

    sequence: Tensor  # (n,) int64 in 0..b-1, the sequence of each token
    sequence_count: int  # b
    token_total: int  # label tokens of the whole batch
    sequence_total: int  # labelled sequences of the whole batch
    # the answers to what the term requests; of a term that names several streams, to each of them
    tensors: Mapping[Field | Divergence, Tensor] = field(default_factory=dict)  # (n,)
    states: Mapping[StateRequest, StateDistances] = field(default_factory=dict)
    labels: Tensor | None = None  # (n,) int64
    vocabulary: int = 0
    others: Mapping[str, SideStats] = field(default_factory=dict)  # the further streams that the term names, by name
    baseline: Tensor | None = None  # what the term's own `constant` made of its `baseline_stream`

    @overload
    def __getitem__(self, request: Field | Divergence) -> Tensor: ...
    @overload
    def __getitem__(self, request: StateRequest) -> StateDistances: ...
    def __getitem__(self, request: Request) -> Tensor | StateDistances:
        """The answer to a request of the term."""
        if isinstance(request, StateRequest):
            answer: Tensor | StateDistances | None = self.states.get(request)
        else:
            answer = self.tensors.get(request)
        if answer is None:
            raise FastforgetError(f"a term uses {described(request)} without asking for it: name it in its `requests`")
        return answer

    @property
    def logp(self) -> Tensor:
        """(n,) log p_y of each label token, nats: `self[LOGP]`."""
        return self[LOGP]

    def token_mean(self, per_token: Tensor) -> Tensor:
        """Mean over all label tokens of the whole batch of (n,) values: this part's share of it."""
        return per_token.sum() / self.token_total

    def sequence_mean(self, per_sequence: Tensor) -> Tensor:
        """Mean over all labelled sequences of the whole batch of (b,) values: this part's share of it."""
        return per_sequence.sum() / self.sequence_total

    def sequence_sum(self, per_token: Tensor) -> Tensor:
        """(n, ...) -> (b, ...): the sum over each sequence's label tokens."""
        return per_token.new_zeros(self.sequence_count, *per_token.shape[1:]).index_add(0, self.sequence, per_token)

    def sequence_average(self, per_token: Tensor) -> Tensor:
        """(n, ...) -> (b, ...): the mean over each sequence's label tokens, in float32 or more."""
        per_token = per_token.to(torch.promote_types(per_token.dtype, torch.float32))
        counts = self.sequence_sum(per_token.new_ones(len(per_token)))
        return self.sequence_sum(per_token) / counts.view(-1, *[1] * (per_token.dim() - 1))


@dataclass(kw_only=True)
class Term:
    """Base of all terms: a weight, and the side of the batch that it is on.

    `weight`: positive, or a function of the number of optimizer steps taken (from 0 on) that returns a finite number
    which is not negative, such as `fastforget.Linear(start, end, steps)`.
    """

    name: ClassVar[str] = "term"
    # which batches of its side it looks at: the side's own ("answer") or companions in it ("refusal", "mismatch").
    # `value` gets the first one's statistics; further ones, for which it needs both at once, lie in `stats.others`
    streams: ClassVar[tuple[str, ...]] = ("answer",)
    # a stream of which it takes a constant, without a gradient and over all rows, before any other pass: `constant`
    baseline_stream: ClassVar[str | None] = None
    # its gradient is 0 as long as the adapter does nothing
    starts_at_zero: ClassVar[bool] = False
    # what a job says where it cannot give the term what it is made for
    job_note: ClassVar[str | None] = None
    weight: Weight = 1.0
    on: Side = "forget"

    def __post_init__(self) -> None:
        self.weight = checked_weight(self.name, self.weight)
        if self.on not in ("forget", "retain"):
            raise FastforgetError(f"{self.name}: on must be 'forget' or 'retain', not {self.on!r}")

    @property
    def requests(self) -> tuple[Request, ...]:
        """What must be computed of the streams that the term looks at: the keys to `SideStats`.

        Read once, when the loss is built. `stats.logp` is there by default; a term that defines `requests` names `LOGP`
        too where it reads it. Where no request of a side's terms needs the head, its forward ends at the deepest layer
        that they name.
        """
        return (LOGP,)

    @property
    def mismatched_answers(self) -> int:
        """How many answers of other prompts a prompt gets where a job draws the stream "mismatch"."""
        return 1

    @property
    def subtracted(self) -> float | None:
        """With what strength a job subtracts the trained adapter at its end; None: not at all."""
        return None

    @property
    def centre_request(self) -> CentreRequest | None:
        """Centres that must be found before training, and given to `fit`; None where there are none to find."""
        return None

    def fit(self, centres: Tensor) -> None:
        """Take the centres (K, D) that `centre_request` asks for."""
        raise NotImplementedError

    def check_ready(self) -> None:
        """Raise where the term cannot be computed yet, before the first forward."""

    def constant(self, stats: SideStats) -> Tensor:
        """A mean over `baseline_stream` (or this part's share of it); `value` finds the whole in `stats.baseline`."""
        raise NotImplementedError

    def value(self, stats: SideStats) -> Tensor:
        """Return the unweighted term, a scalar to be minimised."""
        raise NotImplementedError

    @property
    def initial_state(self) -> dict[str, float]:
        """Scalars of its own that change from step to step (dual weights), as they are before the first."""
        return {}

    def factor(self, state: Mapping[str, Tensor]) -> Tensor | float:
        """Return what multiplies the weight, from those scalars as they are now; a constant in the gradient."""
        return 1.0

    def next_state(self, state: Mapping[str, Tensor], value: Tensor) -> dict[str, Tensor]:
        """Return those scalars after an optimizer step, whose whole batch had this `value`. Must not look at either."""
        return dict(state)


def check_positive(term: Term, **parameters: float) -> None:
    """Raise for a parameter that is not positive and finite."""
    for name, value in parameters.items():
        if not (math.isfinite(value) and value > 0):
            raise FastforgetError(f"{term.name}: {name} must be positive and finite, not {value}")


def layers_of(terms: Iterable[Term]) -> set[int | None]:
    """Return the layers whose states these terms ask for; None stands for what enters the head."""
    return {request.layer for term in terms for request in term.requests if isinstance(request, StateRequest)}


def reaches_head(terms: Iterable[Term]) -> bool:
    """Tell whether a forward for these terms goes on to the head; else it ends at the deepest layer they name.

    Where it ends at a layer there is no `logp`, and the step reports no NLL: that would cost the other layers' forward.
    """

    def needs_head(request: Request) -> bool:
        return not isinstance(request, StateRequest) or request.layer is None or request.from_label

    return any(not term.requests or any(map(needs_head, term.requests)) for term in terms)


@dataclass(kw_only=True)
class TokenTerm(Term):
    """Base of terms that are a mean over tokens.

    `reduction`: "token", the mean over all label tokens; "sequence", over each answer's tokens, then over the answers.
    """

    reduction: str = "token"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.reduction not in REDUCTIONS:
            raise FastforgetError(f"{self.name}: reduction must be token or sequence, not {self.reduction!r}")

    def value(self, stats: SideStats) -> Tensor:
        per_token = self.per_token(stats)
        if self.reduction == "token":
            return stats.token_mean(per_token)
        return stats.sequence_mean(stats.sequence_average(per_token))

    def per_token(self, stats: SideStats) -> Tensor:
        """Return the term (n,) of each label token."""
        raise NotImplementedError

    def check_not_negative(self, **parameters: float) -> None:
        """Raise for a parameter that is negative or not finite."""
        for name, parameter in parameters.items():
            if not (math.isfinite(parameter) and parameter >= 0):
                raise FastforgetError(f"{self.name}: {name} must be finite and not negative, not {parameter}")


@dataclass(kw_only=True)
class NegatedCE(TokenTerm):
    """Gradient ascent: minus the mean NLL of the label tokens (arXiv 2310.10683, eq. 2; unbounded below).

    The published loop of that paper takes the mean per answer: `reduction="sequence"`.
    """

    name: ClassVar[str] = "negated_ce"

    def per_token(self, stats: SideStats) -> Tensor:
        return stats.logp


@dataclass(kw_only=True)
class CE(TokenTerm):
    """Cross-entropy: the mean NLL of the label tokens."""

    name: ClassVar[str] = "ce"
    on: Side = "retain"

    def per_token(self, stats: SideStats) -> Tensor:
        return -stats.logp


@dataclass(kw_only=True)
class KL(Term):
    """Mean divergence from the frozen reference over the label tokens (arXiv 2310.10683, eq. 5, for forward KL).

    `direction`: "forward_kl" KL(reference || model), "reverse_kl" or "jsd".
    The published code averages over prompt and padding too; here only label tokens count.
    """

    name: ClassVar[str] = "kl"
    starts_at_zero: ClassVar[bool] = True
    on: Side = "retain"
    direction: str = "forward_kl"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.direction not in DIVERGENCES:
            raise FastforgetError(f"kl: direction must be one of {', '.join(DIVERGENCES)}, not {self.direction!r}")

    @property
    def requests(self) -> tuple[Request, ...]:
        return (Divergence(self.direction),)

    def value(self, stats: SideStats) -> Tensor:
        return stats.token_mean(stats[Divergence(self.direction)])


@dataclass(kw_only=True)
class NPO(Term):
    """Negative preference optimisation (arXiv 2404.05868, eq. 3): -(2/beta) mean_B log sigmoid(beta (L - L_ref)).

    L is the NLL of a whole answer (`level="sequence"`, as published). Its scale grows with the answer's length, so that
    at beta = 0.1 an answer of a hundred tokens saturates the sigmoid long before it is forgotten. `level="mean"` takes
    L as the mean over the answer's tokens; `level="token"` applies the formula to each token, so that a token that is
    forgotten is left alone while others are still known. Both want a larger beta (1 to 4).
    """

    name: ClassVar[str] = "npo"
    beta: float = 0.1
    level: str = "sequence"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive(self, beta=self.beta)
        if self.level not in ("sequence", "mean", "token"):
            raise FastforgetError(f"npo: level must be sequence, mean or token, not {self.level!r}")

    @property
    def requests(self) -> tuple[Request, ...]:
        return LOGP, REFERENCE_LOGP

    def value(self, stats: SideStats) -> Tensor:
        log_ratio = stats.logp - stats[REFERENCE_LOGP]
        if self.level == "token":
            mean = stats.token_mean(F.logsigmoid(-self.beta * log_ratio))
        else:
            reduce = stats.sequence_sum if self.level == "sequence" else stats.sequence_average
            mean = stats.sequence_mean(F.logsigmoid(-self.beta * reduce(log_ratio)))
        return mean * (-2.0 / self.beta)


@dataclass(kw_only=True)
class SimNPO(Term):
    """NPO without a reference (arXiv 2410.07163, eq. 4): -(2/beta) mean_B log sigmoid(beta (L / T - delta)).

    L / T is the mean NLL of an answer's tokens; `delta` (nats per token) is the paper's margin gamma, and `weight` the
    weight of its forget loss.
    """

    name: ClassVar[str] = "simnpo"
    beta: float = 4.5
    delta: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive(self, beta=self.beta)
        if not math.isfinite(self.delta):
            raise FastforgetError(f"simnpo: delta must be finite, not {self.delta}")

    def value(self, stats: SideStats) -> Tensor:
        nll = -stats.sequence_average(stats.logp)
        return stats.sequence_mean(F.logsigmoid(self.beta * (nll - self.delta))) * (-2.0 / self.beta)
