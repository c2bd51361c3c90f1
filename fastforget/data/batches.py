"""Batches of a forget and a retain set without end, each shuffled and cycled by itself; where they are can be saved."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from fastforget.data.examples import Example, Examples, ExampleStream, collate
from fastforget.errors import FastforgetError

SHUFFLE_BUFFER = 1024  # examples of a stream in memory at once; a stream no longer than this is shuffled as a list is


class Cycle(Iterator[dict[str, Tensor]]):
    """Batches of one set without end, reshuffled at each pass; the last batch of a pass may be shorter.

    A stream is read again at its end, and shuffled within a buffer of `SHUFFLE_BUFFER` examples: no more are in memory.

    Args:
        examples: a list of examples or a stream of them.
        batch_size: examples of a batch.
        pad_token_id: stands on padding, which the mask hides.
        seed: of the shuffling.
        skip: so many batches are left out at the beginning, those that a job which goes on has had.

    Raises:
        FastforgetError: a batch size below 1; at the first batch, where there is no example; or what reading a stream
            raises.
    """

    def __init__(
        self, examples: Examples, batch_size: int, pad_token_id: int = 0, seed: int = 0, *, skip: int = 0
    ) -> None:
        if batch_size < 1:
            raise FastforgetError(f"batch_size must be at least 1, not {batch_size}")
        self.examples, self.batch_size, self.pad_token_id = examples, batch_size, pad_token_id
        self.generator = torch.Generator().manual_seed(seed)
        self.begin_pass()
        for _ in range(skip):
            self.take()

    def begin_pass(self) -> None:
        """Start over, in a new order."""
        self.generator_at_start, self.taken = self.generator.get_state(), 0
        if isinstance(self.examples, ExampleStream):
            self.left = shuffled(self.examples, self.generator, SHUFFLE_BUFFER)
        else:
            order = torch.randperm(len(self.examples), generator=self.generator).tolist()
            self.left = map(self.examples.__getitem__, order)

    def __next__(self) -> dict[str, Tensor]:
        """Return the next batch: `input_ids`, `attention_mask`, `labels`, each int64 (B, T) on the CPU."""
        return collate(self.take(), self.pad_token_id)

    def take(self) -> list[Example]:
        """Return the examples of the next batch."""
        batch = list(islice(self.left, self.batch_size))
        if not batch:
            if self.taken:
                self.begin_pass()
                batch = list(islice(self.left, self.batch_size))
            if not batch:
                raise FastforgetError("there are no examples to take batches of")
        self.taken += len(batch)
        return batch

    def state_dict(self) -> dict[str, Any]:
        """Return where it is: the generator as this pass began, and how many examples of the pass were taken."""
        return {"generator": self.generator_at_start.clone(), "taken": self.taken, "examples": self.length()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where another one was; the same pass is drawn again, up to there.

        Raises:
            FastforgetError: the state is of a set of another length, or, of a stream, lies behind its end.
        """
        if state["examples"] != self.length():
            raise FastforgetError(
                f"the batches' state is of a set of {described(state['examples'])}, and this one has "
                f"{described(self.length())}: give the texts that it was saved with"
            )
        self.generator.set_state(state["generator"])
        self.begin_pass()
        self.taken = sum(1 for _ in islice(self.left, state["taken"]))
        if self.taken != state["taken"]:
            raise FastforgetError(
                f"the batches' state is after {state['taken']} examples of a stream that now ends after {self.taken}: "
                "give the texts that it was saved with"
            )

    def length(self) -> int | None:
        """Count the examples; None of a stream."""
        return None if isinstance(self.examples, ExampleStream) else len(self.examples)


class Batches(Iterator[tuple[dict[str, Tensor], dict[str, Tensor] | None]]):
    """Pairs (forget, retain) of batches, each side from its own cycle: neither is cut to the other's length.

    Args:
        forget, retain: the cycles; without a retain set the second of each pair is None.
        steps: how many pairs there are; None: no end.
    """

    def __init__(self, forget: Cycle, retain: Cycle | None, steps: int | None = None) -> None:
        self.forget, self.retain, self.steps = forget, retain, steps
        self.taken = 0

    def __next__(self) -> tuple[dict[str, Tensor], dict[str, Tensor] | None]:
        if self.steps is not None and self.taken >= self.steps:
            raise StopIteration
        self.taken += 1
        return next(self.forget), None if self.retain is None else next(self.retain)

    def state_dict(self) -> dict[str, Any]:
        """Return where both sides are, and how many pairs were taken; for `torch.save`, beside the step's state."""
        retain = None if self.retain is None else self.retain.state_dict()
        return {"forget": self.forget.state_dict(), "retain": retain, "taken": self.taken}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where others of the same sets were.

        Raises:
            FastforgetError: the state is of other sets (`Cycle.load_state_dict`), or has a retain set where these have
                none, or none where these have one.
        """
        if (state["retain"] is None) != (self.retain is None):
            which = ("without", "with") if state["retain"] is None else ("with", "without")
            raise FastforgetError(
                "the state is of batches {} a retain set, and these are {}: give the same".format(*which)
            )
        self.forget.load_state_dict(state["forget"])
        if self.retain is not None:
            self.retain.load_state_dict(state["retain"])
        self.taken = state["taken"]


def batches(
    forget: Examples,
    retain: Examples | None = None,
    *,
    batch_size: int = 8,
    steps: int | None = None,
    seed: int = 0,
    pad_token_id: int = 0,
) -> Batches:
    """Make the loader of a loop: pairs (forget, retain) of batches, as `UnlearnStep` takes them.

    Both sets are shuffled at each pass and cycled independently of each other, so neither is cut to the other's length,
    and a batch has `batch_size` examples of each (the last of a pass may have fewer). A job takes its batches so.

    Args:
        forget, retain: examples (`ff.examples`); without a retain set the second of each pair is None.
        batch_size: examples of either side.
        steps: how many pairs there are; None: no end.
        seed: of the shuffling; the retain set's is the next one.
        pad_token_id: stands on padding, which the mask hides: any token that the model knows does.

    Returns:
        An iterator with `state_dict` and `load_state_dict`, to go on where a job was interrupted.

    Raises:
        FastforgetError: a batch size below 1; at the first batch, a set without examples.
    """
    kept = None if retain is None else Cycle(retain, batch_size, pad_token_id, seed + 1)
    return Batches(Cycle(forget, batch_size, pad_token_id, seed), kept, steps)


def shuffled(examples: ExampleStream, generator: torch.Generator, buffer_size: int) -> Iterator[Example]:
    """Yield every example once, each drawn at random from a buffer of those read last and not yet drawn."""
    buffer: list[Example] = []
    for example in examples:
        if len(buffer) < buffer_size:
            buffer.append(example)
            continue
        index = int(torch.randint(buffer_size, (), generator=generator))
        yield buffer[index]
        buffer[index] = example
    for index in torch.randperm(len(buffer), generator=generator).tolist():
        yield buffer[index]


def described(length: int | None) -> str:
    """Say how many examples a set has."""
    return "a stream's unknown length" if length is None else f"{length} examples"
