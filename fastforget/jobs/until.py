"""A stopping rule that asks the question itself: which passages of the forget set does the model still know?

A passage is gone when its exact memorisation (`evaluate/memorisation.py`) is at most a level. What the training step
computes anyway says so of the passages in its batch; a passage that is gone leaves the batches, is looked at again
every `RECHECK_STEPS`, and comes back where it has recovered. When all are gone at once the learning rate falls to 0,
and all passages are in the batches again, so that the output of each settles.

Of several processes each looks at its share of the passages, and all know what any of them found.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from fastforget.batch import Batch
from fastforget.collectives import own_part, union
from fastforget.data.examples import Example, collate
from fastforget.errors import FastforgetError
from fastforget.evaluate.memorisation import memorisation, prompt_tokens
from fastforget.jobs.options import parsed_until
from fastforget.objectives import Field, Request, SideStats, Term, reaches_head
from fastforget.objectives.terms import present

ABOVE_UNSEEN = 0.05  # of exact memorisation: "gone" is that of never-trained passages, and this much
WITHOUT_UNSEEN = 0.15  # "gone" where no never-trained passages are at hand
RECHECK_STEPS = 20  # a forward of the passages that are gone: about 2 % of the time where these are as many as a batch
RECHECKED = 64  # passages at most, drawn at random: a large set is looked at a part at a time
NAMED = 8  # passages that are not gone: as many are named
ARGMAX = Field("argmax")


def level_of(until: str, never_trained: float | None) -> float:
    """Return the exact memorisation at which a passage is gone; `never_trained`: that of passages never seen."""
    level = parsed_until(until)
    if level is not None:
        return level
    return WITHOUT_UNSEEN if never_trained is None else never_trained + ABOVE_UNSEEN


@dataclass(kw_only=True)
class GreedyShare(Term):
    """The share of label tokens that are the likeliest one. It is watched, not learned from: its factor is 0."""

    name: ClassVar[str] = "greedy_share"
    parts: list[tuple[Tensor, Tensor, int]] = field(default_factory=list)  # of the last batch: greedy, sequence, count

    @property
    def requests(self) -> tuple[Request, ...]:
        return (ARGMAX,)

    def value(self, stats: SideStats) -> Tensor:
        greedy = stats[ARGMAX] == present(stats.labels, "labels")
        self.parts.append((greedy, stats.sequence, stats.sequence_count))
        return stats.token_mean(greedy.float())

    def factor(self, state: Mapping[str, Tensor]) -> float:
        return 0.0

    def taken(self) -> list[Tensor]:
        """Return, row by row of what was computed, whether each label token is the likeliest one, and forget them."""
        rows = [greedy[sequence == row].cpu() for greedy, sequence, count in self.parts for row in range(count)]
        self.parts.clear()
        return rows


class ForgetUntilGone(Iterator[Batch]):
    """The forget set of a job with a stopping rule: gives the batches, and says when all of it is gone.

    Args:
        level: exact memorisation at which a passage is gone, 0 to 1.
        terms: of the loss; where they look at the forget set's own answers, what they compute is used, and `watched`
            must be among the step's terms.
    """

    def __init__(
        self,
        examples: Sequence[Example],
        tokenizer: Any,
        level: float,
        terms: Sequence[Term],
        *,
        batch_size: int,
        seed: int,
    ) -> None:
        self.examples, self.tokenizer, self.level, self.batch_size = examples, tokenizer, level, batch_size
        self.splits = [prompt_tokens(each, tokenizer) for each in examples]
        self.behind = [max(len(each.input_ids) - split, 0) for each, split in zip(examples, self.splits, strict=True)]
        on_answers = [term for term in terms if term.on == "forget" and "answer" in term.streams]
        self.watched = GreedyShare() if on_answers and reaches_head(on_answers) else None
        self.measured = frozenset(place for place, count in enumerate(self.behind) if count > 0)
        self.known = set(self.measured)
        self.random = random.Random(seed)
        self.waiting: list[int] = []
        self.batch: list[int] = []
        if not self.known:
            raise FastforgetError("until: no passage of the forget set has a token behind its prompt")

    def __next__(self) -> Batch:
        """Return passages that are still known, each once before any of them comes again."""
        if self.watched is not None:
            self.watched.parts.clear()  # what was computed since, to see whether an update broke something
        self.waiting = [place for place in self.waiting if place in self.known]
        if not self.waiting:
            self.waiting = self.random.sample(sorted(self.known), len(self.known))
        self.batch, self.waiting = self.waiting[: self.batch_size], self.waiting[self.batch_size :]
        return collate([self.examples[place] for place in self.batch], self.tokenizer.pad_token_id)

    def note(self, device: torch.device) -> None:
        """Take what the step just computed of its batch, before its update: what is gone leaves."""
        if self.watched is None:
            return
        own, taken = self.batch[own_part()], self.watched.taken()
        last = taken[len(taken) - len(own) :]  # where memory ran out, those of passes that were repeated stand before
        gone = [
            place
            for place, greedy in zip(own, last, strict=True)
            if float(greedy[-self.behind[place] :].float().mean()) <= self.level
        ]
        self.known -= union(gone, len(self.examples), device)

    def finished(self, model: Any, step: int) -> bool:
        """Look again at passages that are gone, where that is due; tell whether all are gone, and stay so."""
        if self.known and step % RECHECK_STEPS:
            return False
        everything = not self.known or self.watched is None
        gone = sorted(self.measured - self.known)
        asked = list(range(len(self.examples))) if self.watched is None else gone
        self.look_at(model, asked if everything else self.random.sample(asked, min(RECHECKED, len(asked))))
        return not self.known

    def look_at(self, model: Any, places: Sequence[int]) -> None:
        """Measure these passages as they are now."""
        if not places:
            return
        known: set[int] = set()
        own = places[own_part()]
        if own:
            asked, splits = [self.examples[place] for place in own], [self.splits[place] for place in own]
            found = memorisation(model, self.tokenizer, asked, splits=splits).passages
            measured = zip(own, found, strict=True)
            known = {place for place, passage in measured if passage is not None and passage.exact > self.level}
        device = next(model.parameters()).device
        self.known = self.known - set(places) | union(known, len(self.examples), device)

    def take_all(self) -> None:
        """Put every passage into the batches again."""
        self.known = set(self.measured)

    def state(self) -> dict[str, Any]:
        """Return what changes from step to step."""
        return {"known": sorted(self.known), "waiting": self.waiting, "random": self.random.getstate()}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on from what `state` returned."""
        self.known, self.waiting = set(state["known"]), list(state["waiting"])
        self.random.setstate(state["random"])

    def final(self, model: Any) -> str:
        """Measure all passages; say how many are not gone, and which, by their numbers in the set from 1 on."""
        self.look_at(model, range(len(self.examples)))
        total, left = len(self.measured), len(self.known)
        verb, rule = "is" if left == 1 else "are", f"exact memorisation of each at most {self.level:.2f}"
        if left:
            numbers = ", ".join(str(place + 1) for place in sorted(self.known)[:NAMED])
            more = f" and {left - NAMED} more" if left > NAMED else ""
            return f"{left} of {total} {verb} not gone yet ({rule}): passage{'s' * (left > 1)} {numbers}{more}"
        return f"{'the passage is' if total == 1 else f'all {total} passages are'} gone ({rule})"
