"""Weights of terms that change from step to step."""

from __future__ import annotations

import math
import numbers
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from typing import Any

from fastforget.errors import FastforgetError

Weight = float | Callable[[int], float]  # a number, or a function of the number of optimizer steps taken


@dataclass(frozen=True)
class Linear:
    """A weight that goes from `start` to `end` in `steps` optimizer steps, and stays there.

    As a preset's option in a config file or on the command line, a mapping: `{start: 0, end: 1, steps: 100}`.

    Raises:
        FastforgetError: a weight that is negative or not finite, or `steps` that is no whole number from 1 on.
    """

    start: float
    end: float
    steps: int

    def __post_init__(self) -> None:
        for name in ("start", "end"):
            value = getattr(self, name)
            if not (is_number(value) and math.isfinite(value) and value >= 0):
                raise FastforgetError(f"Linear: {name} must be finite and not negative, not {value!r}")
        if not (isinstance(self.steps, int) and not isinstance(self.steps, bool) and self.steps >= 1):
            raise FastforgetError(f"Linear: steps must be a whole number from 1 on, not {self.steps!r}")

    def __call__(self, step: int) -> float:
        share = min(step / self.steps, 1.0)
        return (1.0 - share) * self.start + share * self.end


def is_number(value: object) -> bool:
    """Tell whether this is a real number, NumPy's included, and no truth value."""
    return isinstance(value, numbers.Real) and not isinstance(value, bool)


def checked_weight(name: str, weight: Any) -> Weight:
    """Check the weight of the term `name`; a mapping becomes the `Linear` that it describes.

    Raises:
        FastforgetError: a number that is not positive and finite, or neither a number nor a schedule.
    """
    if isinstance(weight, Mapping):
        names = [field.name for field in fields(Linear)]
        if set(weight) != set(names):
            raise FastforgetError(f"{name}: a weight as a mapping needs {', '.join(names)}, and has {list(weight)}")
        return Linear(**weight)
    if callable(weight):
        return weight
    if not is_number(weight):
        raise FastforgetError(
            f"{name}: weight must be a number or a function of the step (fastforget.Linear), not {weight!r}"
        )
    if not (math.isfinite(weight) and weight > 0):
        raise FastforgetError(f"{name}: weight must be positive and finite, not {weight}")
    return weight


def weight_at(name: str, weight: Weight, step: int) -> float:
    """Return the weight of the term `name` after `step` optimizer steps.

    Raises:
        FastforgetError: a schedule that gives no number, or one that is negative or not finite.
    """
    if not callable(weight):
        return weight
    value = weight(step)
    if not is_number(value):
        raise FastforgetError(f"{name}: the schedule of its weight gave {value!r} at step {step}, which is no number")
    if not (math.isfinite(value) and value >= 0):
        raise FastforgetError(
            f"{name}: the schedule of its weight gave {value} at step {step}: it must be finite and not negative"
        )
    return float(value)
