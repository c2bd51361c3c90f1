"""Tokenized examples, and how they become a batch."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from torch.nn.utils.rnn import pad_sequence

from fastforget.batch import IGNORE_INDEX as IGNORE_INDEX
from fastforget.errors import FastforgetError


@dataclass(frozen=True)
class Example:
    """One tokenized sequence whose tokens from `prompt_length` on are learned or forgotten."""

    input_ids: tuple[int, ...]
    prompt_length: int = 0  # tokens at the start that carry no label
    source: str = ""  # where it came from ("secrets.jsonl:12"), for messages
    alternative: tuple[int, ...] = ()  # tokens of another answer to the prompt, where one is known

    @property
    def answer(self) -> tuple[int, ...]:
        """The labelled tokens; a sequence's first is never predicted."""
        return self.input_ids[max(self.prompt_length, 1) :]

    def with_alternative(self) -> Example:
        """Return the same prompt with the other answer."""
        prompt = self.input_ids[: max(self.prompt_length, 1)]
        return Example((*prompt, *self.alternative), len(prompt), self.source)

    @property
    def label_count(self) -> int:
        """Count the tokens that are predicted: the first token of a sequence never is, nothing stands before it."""
        return len(self.input_ids) - max(self.prompt_length, 1)


class ExampleStream:
    """Examples that are read anew at each iteration, for sets that do not fit in memory; nothing is held between.

    Args:
        open_examples: called at each iteration; an iterator over the examples, from the first one on.
        name: what is read ("secrets.txt"), for messages.

    Iterating raises FastforgetError where not one example has a label.
    """

    def __init__(self, open_examples: Callable[[], Iterator[Example]], name: str) -> None:
        self.open_examples = open_examples
        self.name = name

    def __repr__(self) -> str:
        return f"ExampleStream({self.name!r})"

    def __iter__(self) -> Iterator[Example]:
        empty = True
        for example in self.open_examples():
            if example.label_count > 0:
                empty = False
                yield example
        if empty:
            raise FastforgetError(f"{self.name} holds no text that could be learned or forgotten")

    def head(self, count: int) -> list[Example]:
        """Return the first `count` examples, or all where there are fewer."""
        return list(islice(self, count))


Examples = Sequence[Example] | ExampleStream  # of one set


def in_batches(examples: Sequence[Example], pad_token_id: int, batch_size: int = 8) -> Iterator[dict[str, Any]]:
    """Yield the examples once, in their order, collated."""
    for start in range(0, len(examples), batch_size):
        yield collate(examples[start : start + batch_size], pad_token_id)


def collate(examples: Sequence[Example], pad_token_id: int = 0) -> dict[str, Any]:
    """Right-pad examples into one batch on the CPU; `DataLoader(forget, collate_fn=ff.collate)` takes it too.

    Returns `input_ids`, `attention_mask`, `labels`, each int64 (B, T). Labels are unshifted, as transformers has
    them, and -100 on the prompt and on padding. The mask comes from the lengths, never from `input_ids !=
    pad_token_id`: many tokenizers pad with a token that also occurs in the text. Where the examples have alternative
    answers, `refusal` is such a batch of the same prompts with these (what AltPO looks at).

    Raises:
        FastforgetError: some of the examples have an alternative answer, and some have none.
    """
    rows = [torch.tensor(example.input_ids, dtype=torch.long) for example in examples]
    labels = [
        torch.cat((ids.new_full((example.prompt_length,), IGNORE_INDEX), ids[example.prompt_length :]))
        for ids, example in zip(rows, examples, strict=True)
    ]
    batch: dict[str, Any] = {
        "input_ids": pad_sequence(rows, batch_first=True, padding_value=pad_token_id),
        "attention_mask": pad_sequence([torch.ones_like(ids) for ids in rows], batch_first=True),
        "labels": pad_sequence(labels, batch_first=True, padding_value=IGNORE_INDEX),
    }
    others = [example.with_alternative() for example in examples if example.alternative]
    if others:
        if len(others) < len(examples):
            without = next(example for example in examples if not example.alternative)
            raise FastforgetError(
                f"{without.source or 'an example'} has no alternative answer, and others of its batch have"
            )
        batch["refusal"] = collate(others, pad_token_id)
    return batch
