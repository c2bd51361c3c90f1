"""What moves while a job runs, and with which it goes on from a checkpoint bit for bit (on one machine's CPU)."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy
import torch
from torch import nn

from fastforget.guard import copy
from fastforget.jobs.companions import Companions
from fastforget.jobs.until import ForgetUntilGone
from fastforget.step import UnlearnStep

WARMUP_STEPS = 10


@dataclass
class JobResult:
    """What happened, step by step; NLLs are means per label token of that step's batch, before its update."""

    stopped: str = ""  # why the job ended
    steps: int = 0  # updates taken
    seconds: float = 0.0
    tokens: int = 0  # of the batches of both sides, padding and companions left out
    forget_nll: list[float] = field(default_factory=list)
    retain_nll: list[float] = field(default_factory=list)
    not_gone: list[int] = field(default_factory=list)  # places in the forget set, where there was a rule for that


class Pace:
    """The steps of a job, numbered from 1, and the learning rate's factor: it rises, stays, and falls to 0 at the end.

    Args:
        steps: at most so many.
        decay: the share of the steps over which it falls; what is before may turn out to be shorter (`decay_from`).
    """

    def __init__(self, steps: int, decay: float) -> None:
        self.last, self.decay = steps, decay
        self.decays_from = steps - round(decay * steps)
        self.number = 0

    def __iter__(self) -> Iterator[int]:
        while self.number < self.last:
            self.number += 1
            yield self.number

    def decay_from(self, step: int) -> None:
        """Let the rate fall from this step on, over as many as `decay` makes of the steps so far."""
        self.decays_from = step
        self.last = min(self.last, step + round(step * self.decay / (1.0 - self.decay)))

    def factor(self, done: int) -> float:
        """Return the factor of the step after `done` steps."""
        falling = (self.last - done) / max(1, self.last - self.decays_from)
        return min(1.0, (done + 1) / WARMUP_STEPS, max(0.0, falling))


@dataclass
class JobState:
    """All that moves, between two steps, but the reference's cache; the batches follow from the number of steps.

    The guard has nothing of its own: before a checkpoint the weights are known to be good. `rows` are for
    `UnlearnStep`'s `first_micro_batch`.
    """

    model: nn.Module
    step: UnlearnStep
    scheduler: torch.optim.lr_scheduler.LambdaLR
    pace: Pace
    companions: Companions
    until: ForgetUntilGone | None
    result: JobResult

    def trainable(self) -> dict[str, torch.Tensor]:
        """The weights that train, by name."""
        return {name: each for name, each in self.model.named_parameters() if each.requires_grad}

    def collect(self) -> dict[str, Any]:
        """Return it as nested values and tensors."""
        return {
            "weights": self.trainable(),
            "optimizer": self.step.state_dict(),
            "scheduler": self.scheduler.state_dict(),
            "pace": {"number": self.pace.number, "last": self.pace.last, "decays_from": self.pace.decays_from},
            "rows": self.step.rows_at_once("auto"),
            "companions": self.companions.generator.get_state(),
            "until": None if self.until is None else self.until.state(),
            "result": asdict(self.result),
            "random": random_state(),
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Make everything as it was when `state` was collected."""
        weights = self.trainable()
        copy(list(weights.values()), [state["weights"][name] for name in weights])
        self.step.load_state_dict(state["optimizer"])
        self.step.guard.accept()
        self.scheduler.load_state_dict(state["scheduler"])
        vars(self.pace).update(state["pace"])
        self.companions.generator.set_state(state["companions"])
        if self.until is not None:
            self.until.restore(state["until"])
        vars(self.result).update(state["result"])
        restore_random_state(state["random"])


def random_state() -> dict[str, Any]:
    """Return the states of all generators that nobody holds: torch's, Python's and numpy's."""
    kind, words, *rest = numpy.random.get_state(legacy=True)
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        "python": random.getstate(),
        "numpy": (kind, [int(word) for word in words], *rest),
    }


def restore_random_state(state: Mapping[str, Any]) -> None:
    """Put the states of these generators back; of GPUs those that are there."""
    torch.set_rng_state(state["torch"])
    for device, each in zip(range(torch.cuda.device_count()), state["cuda"], strict=False):
        torch.cuda.set_rng_state(each, device)
    random.setstate(state["python"])
    numpy.random.set_state(state["numpy"])
