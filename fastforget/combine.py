"""Combining the gradient of the forget terms with that of the retain terms, where they pull in different directions.

Notation: f and r are the gradients of the two sides over all trainable weights, as one vector each. "sum" adds them.
The other two return a combination a f + b r whose a and b follow from f.f, r.r and f.r:

"mgda"    the shortest vector between f and r (multiple-gradient descent; for two objectives in closed form, arXiv
          1810.04650, section 3.2): g f + (1 - g) r with g = clip((r - f).r / |f - r|^2, 0, 1). A step against it lowers
          both losses, as far as they are linear, or it is 0. It is 0 wherever one of the two is: a side that has no
          gradient yet (a KL or hidden_mse at the start of an adapter) brings it to a standstill.
"pcgrad"  each loses what it has against the other (arXiv 2001.06782, algorithm 1, the sum of both): where f.r < 0,
          (f - (f.r / r.r) r) + (r - (f.r / f.f) f); f + r otherwise.

arXiv 2412.20412 motivates such combinations for unlearning. Both are homogeneous: if f and r are both multiplied by a
number (a GradScaler's, or one over the accumulation steps) the result is multiplied by it too. Where one of them is not
finite the result is not either, so a GradScaler skips the step. Nothing synchronises with the host.

Of several processes f and r are those of all, averaged before they are combined; under FSDP2, where each holds a part
of them, the products are summed over the parts.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from fastforget.errors import FastforgetError
from fastforget.objectives import Term
from fastforget.rollback import Saved, put_back, saved
from fastforget.shards import is_shard, local, sum_of_parts

Gradients = list[Tensor | None]  # of each parameter; None where there is none, which counts as 0
Average = Callable[[Sequence[Tensor], Sequence[Tensor | None]], Gradients]  # over the processes, in place
Agree = Callable[[Callable[[], Gradients]], Gradients]  # as `collectives.agreed`


def mgda(forget: Gradients, retain: Gradients) -> tuple[Tensor, Tensor]:
    """Return the factors of f and r, scalars."""
    away = dot(forget, retain, lambda f, r: (r - f) * r)
    apart = dot(forget, retain, lambda f, r: (f - r).square())
    # f = r: every point between them is the same
    share = torch.where(apart == 0, 0.5, away / torch.where(apart == 0, 1.0, apart)).clamp(0.0, 1.0)
    return share, 1.0 - share


def pcgrad(forget: Gradients, retain: Gradients) -> tuple[Tensor, Tensor]:
    """Return the factors of f and r, scalars."""
    against = dot(forget, retain, lambda f, r: f * r).clamp(max=0.0)
    forget_square = dot(forget, retain, lambda f, r: f.square())
    retain_square = dot(forget, retain, lambda f, r: r.square())
    return 1.0 - ratio(against, forget_square), 1.0 - ratio(against, retain_square)


COMBINATIONS: dict[str, Callable[[Gradients, Gradients], tuple[Tensor, Tensor]]] = {"mgda": mgda, "pcgrad": pcgrad}
COMBINE = ("sum", *COMBINATIONS)


def ratio(numerator: Tensor, denominator: Tensor) -> Tensor:
    """numerator / denominator, and 0 for 0 / 0 (a gradient of 0 is in nobody's way)."""
    return torch.where(denominator == 0, 0.0, numerator / torch.where(denominator == 0, 1.0, denominator))


def dot(forget: Gradients, retain: Gradients, part: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """Sum `part(f, r)` over all parameters, in float32 or more, on the first one's device."""
    total: Tensor | None = None
    sharded: Tensor | None = None
    for f, r in zip(forget, retain, strict=True):
        given = f if f is not None else r
        if given is None:
            continue
        sharded = given if is_shard(given) else sharded
        dtype = torch.promote_types(given.dtype, torch.float32)
        zero = local(given).new_zeros((), dtype=dtype)
        value = part(zero if f is None else local(f).to(dtype), zero if r is None else local(r).to(dtype)).sum()
        total = value if total is None else total + value.to(total.device, non_blocking=True)
    if total is None:
        return torch.zeros(())
    return total if sharded is None else sum_of_parts(total, sharded)


def combined(how: str, forget: Gradients, retain: Gradients) -> Gradients:
    """a f + b r for each parameter, in tensors of its own."""
    a, b = COMBINATIONS[how](forget, retain)
    result: Gradients = []
    for f, r in zip(forget, retain, strict=True):
        parts = [
            each.to(factor.dtype) * factor.to(each.device, non_blocking=True)
            for each, factor in ((f, a), (r, b))
            if each is not None
        ]
        like = f if f is not None else r
        result.append(
            None if like is None else (parts[0].add_(parts[1]) if len(parts) == 2 else parts[0]).to(like.dtype)
        )
    return result


def check_sides(how: str, terms: Sequence[Term], passes: str = "sequential") -> None:
    """Raise for an unknown combination, or one of sides of which one has no term or that share a pass."""
    if how not in COMBINE:
        raise FastforgetError(f"combine must be one of {', '.join(COMBINE)}, not {how!r}")
    if how == "sum":
        return
    if passes == "joint":
        raise FastforgetError(f"combine={how!r} needs a pass of its own for each side: leave passes at 'sequential'")
    for side in ("forget", "retain"):
        own = [term for term in terms if term.on == side]
        if not own:
            raise FastforgetError(
                f"combine={how!r} combines the gradients of the forget and the retain terms, and there is no term on "
                f"the {side} set: add one, or leave combine at 'sum'"
            )


def warn_of_standstill(how: str, terms: Sequence[Term]) -> None:
    """Warn where "mgda" takes no first step: a side has nothing but distances from the reference, which start at 0."""
    for side in ("forget", "retain"):
        own = [term for term in terms if term.on == side]
        if how == "mgda" and all(term.starts_at_zero for term in own):
            names = ", ".join(term.name for term in own)
            warnings.warn(
                f"combine='mgda': a fresh adapter gives {names} no gradient, and beside a gradient of 0 MGDA takes no "
                "step: add another term, such as ce",
                stacklevel=3,
            )


def alone(action: Callable[[], Gradients]) -> Gradients:
    """Return what an action returns."""
    return action()


class SummedGradients:
    """The gradients of both sides, summed up by autograd in `.grad`: what "sum" needs of `SideGradients`, nothing."""

    def cleared(self, parameters: Sequence[Tensor]) -> None:
        """Take note that the gradients have been cleared."""

    def begin(self, parameters: Sequence[Tensor]) -> None:
        """Before the passes of one `backward`."""

    def undone_where_it_fails(self) -> contextlib.AbstractContextManager[None]:
        """The passes of one `backward`; whoever calls it puts `.grad` back."""
        return contextlib.nullcontext()

    def side_pass(self, side: str | None, parameters: Sequence[Tensor]) -> contextlib.AbstractContextManager[None]:
        """One pass."""
        return contextlib.nullcontext()

    def finish(
        self, held: Sequence[Tensor], trained: Sequence[Tensor], average: Average | None = None, agree: Agree = alone
    ) -> None:
        """After the passes: average over the processes."""
        if average is not None:
            averaged(trained, average)


def averaged(parameters: Sequence[Tensor], average: Average) -> None:
    """Average `.grad` over the processes; it stays None where no process has one."""
    gradients = average(parameters, [parameter.grad for parameter in parameters])
    for parameter, gradient in zip(parameters, gradients, strict=True):
        parameter.grad = gradient


class SideGradients:
    """The gradients of both sides, kept apart over one or more backward passes, and their combination in `.grad`.

    After each `backward` of the step `.grad` holds the combination of all that was summed up since the gradients were
    cleared: of the sums, never a sum of combinations; or, as long as only one side has been seen, that side's sum. So
    clipping, a GradScaler's `unscale_` and the step itself find in `.grad` what they always find there. It costs two
    more copies of the trainable weights' gradients.

    `.grad` belongs to this object between clearing and stepping: another loss's gradients in it, or a change to it
    between two passes (clipping each micro-batch), would be lost in the next combination, and are refused.
    """

    def __init__(self, how: str) -> None:
        self.how = how
        self._sums: dict[str, Gradients] = {}
        self._left: list[tuple[Tensor, int] | None] = []  # each .grad as this object left it, and its version
        # the sums as they were before the passes of one `backward`, while these run
        self._before: dict[str, list[Saved | None]] | None = None

    def cleared(self, parameters: Sequence[Tensor]) -> None:
        """Take note that the gradients have been cleared, set to None or to 0."""
        self._sums, self._left = {}, versions(parameters)

    def begin(self, parameters: Sequence[Tensor]) -> None:
        """Before the passes of one `backward`.

        Raises:
            FastforgetError: `.grad` holds what this object did not leave there.
        """
        now = versions(parameters)
        if all(each is None for each in now):
            self._sums = {}
        elif len(now) != len(self._left) or not all(map(same, now, self._left)):
            raise FastforgetError(
                f"combine={self.how!r} needs the gradients of both sides apart, and .grad holds others, or was changed "
                "since the last backward: clear it first (step.zero_grad()), and clip after the last micro-batch only"
            )
        self._before = {side: [saved(each) for each in part] for side, part in self._sums.items()}
        if not self._sums:
            self._sums = {side: [None] * len(parameters) for side in ("forget", "retain")}

    @contextlib.contextmanager
    def undone_where_it_fails(self) -> Iterator[None]:
        """The passes of one `backward`: where an exception ends them the sums are again what they were before."""
        try:
            yield
        except BaseException:
            if self._before is not None:
                self._sums = {side: [put_back(each) for each in part] for side, part in self._before.items()}
            raise
        finally:
            self._before = None

    @contextlib.contextmanager
    def side_pass(self, side: str | None, parameters: Sequence[Tensor]) -> Iterator[None]:
        """While one pass runs, which is of one side, `.grad` is the sum of that side."""
        assert side is not None
        for parameter, kept in zip(parameters, self._sums[side], strict=True):
            parameter.grad = kept
        yield
        self._sums[side] = [parameter.grad for parameter in parameters]

    @torch.no_grad()
    def finish(
        self, held: Sequence[Tensor], trained: Sequence[Tensor], average: Average | None = None, agree: Agree = alone
    ) -> None:
        """After the passes: the combination goes into `.grad`.

        Args:
            held: the parameters of the passes before, which are the optimizer's.
            trained: all that train with them, whose `.grad` autograd has summed up.
            average: over the processes; without it the sums are this process's own until a later call.
            agree: lets all processes fail where one has no memory for the combination.
        """
        if average is not None:
            own = set(map(id, held))
            averaged([each for each in trained if id(each) not in own], average)
            if self._sums:
                sums = average([*held, *held], [*self._sums["forget"], *self._sums["retain"]])
                self._sums = {"forget": sums[: len(held)], "retain": sums[len(held) :]}
        seen = [part for part in self._sums.values() if any(gradient is not None for gradient in part)]

        def combine() -> Gradients:
            if len(seen) == 2:
                return combined(self.how, *seen)
            # a copy: clipping must not reach the sum
            return [None if each is None else each.clone() for each in (seen[0] if seen else [None] * len(held))]

        for parameter, gradient in zip(held, agree(combine), strict=True):
            parameter.grad = gradient
        self._left = versions(held)


def versions(parameters: Sequence[Tensor]) -> list[tuple[Tensor, int] | None]:
    """Return each parameter's gradient, and how often it (its part here) has been written to."""
    return [None if each.grad is None else (each.grad, local(each.grad)._version) for each in parameters]


def same(one: tuple[Tensor, int] | None, other: tuple[Tensor, int] | None) -> bool:
    """Tell whether two entries of `versions` are of the same tensor, unchanged."""
    if one is None or other is None:
        return one is other
    return one[0] is other[0] and one[1] == other[1]
