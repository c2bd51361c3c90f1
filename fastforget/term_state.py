"""Scalars of terms' own that change from step to step (dual weights): kept in an optimizer's first group.

There `state_dict`, copies and pickles carry them, as 0-dimensional tensors under `unlearn_<term>.<scalar>`: a number
would have to be read off the device at each step. They are replaced, never written into, so that a `state_dict` taken
before is left as it was.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from fastforget.objectives import Term

States = dict[str, dict[str, Tensor]]  # term -> scalar -> ()


class TermStates:
    """Reads terms' scalars, and updates them by the values of each step's whole batch.

    optimizer: in whose first group they lie; None: they are held here, and stay as they are.
    """

    def __init__(self, terms: Mapping[str, Term], optimizer: torch.optim.Optimizer | None = None) -> None:
        self.terms = terms
        self.optimizer = optimizer
        self.initial: States = {
            name: {scalar: torch.tensor(value, dtype=torch.float32) for scalar, value in term.initial_state.items()}
            for name, term in terms.items()
            if term.initial_state
        }
        self._own: dict[str, Any] = {}
        self.begin()
        self.forget()

    @property
    def group(self) -> dict[str, Any]:
        """Where the scalars lie; loading a state replaces an optimizer's groups."""
        return self._own if self.optimizer is None else self.optimizer.param_groups[0]

    def begin(self) -> None:
        """Give the group the scalars that it lacks, as they are before the first step."""
        for name, state in self.initial.items():
            for scalar, value in state.items():
                self.group.setdefault(key_of(name, scalar), value)

    def current(self) -> States:
        """The scalars of the terms that have any, as they are now."""
        group = self.group
        return {name: {scalar: group[key_of(name, scalar)] for scalar in state} for name, state in self.initial.items()}

    def forget(self) -> None:
        """Drop what was noted: gradients were cleared."""
        self._values: dict[str, Tensor] = {}
        self._means = 0

    def note(self, values: Mapping[str, Tensor], is_part: bool) -> None:
        """Add the terms' values of one backward: parts of a batch's means add up to them, means of their own do not."""
        self._means += not is_part
        for name in self.initial.keys() & values.keys():
            value = values[name].detach()
            self._values[name] = self._values[name] + value if name in self._values else value

    def update(self, stands: Tensor | None = None) -> None:
        """After an optimizer step: the scalars of each term that this step's batch had a value for.

        stands: () bool; False where the step was skipped, and its values are no numbers.
        """
        states, group = self.current(), self.group
        for name, value in self._values.items():
            changed = self.terms[name].next_state(states[name], value / max(self._means, 1))
            for scalar, new in changed.items():
                new = new.to(torch.float32)
                group[key_of(name, scalar)] = new if stands is None else torch.where(stands, new, states[name][scalar])
        self.forget()


def key_of(term: str, scalar: str) -> str:
    """The name of a term's scalar in the group."""
    return f"unlearn_{term}.{scalar}"
