"""Tokenized examples, and the batches that the step takes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

IGNORE_INDEX = -100


@dataclass(frozen=True)
class Example:
    """One tokenized sequence whose tokens from `prompt_length` on are learned or forgotten."""

    input_ids: tuple[int, ...]
    prompt_length: int = 0  # tokens at the start that carry no label
    source: str = ""  # where it came from ("secrets.jsonl:12"), for messages

    @property
    def label_count(self) -> int:
        """How many tokens are predicted: the first token of a sequence never is, nothing stands before it."""
        return len(self.input_ids) - max(self.prompt_length, 1)


def collate(examples: Sequence[Example], pad_token_id: int) -> dict[str, torch.Tensor]:
    """Right-pad examples into one batch on the CPU.

    Returns `input_ids`, `attention_mask`, `labels`, each int64 (B, T). Labels are unshifted, as transformers has
    them, and -100 on the prompt and on padding. The mask comes from the lengths, never from `input_ids !=
    pad_token_id`: many tokenizers pad with a token that also occurs in the text.
    """
    longest = max(len(example.input_ids) for example in examples)
    input_ids = torch.full((len(examples), longest), pad_token_id, dtype=torch.long)
    attention_mask = torch.zeros_like(input_ids)
    labels = torch.full_like(input_ids, IGNORE_INDEX)
    for row, example in enumerate(examples):
        ids = torch.tensor(example.input_ids, dtype=torch.long)
        input_ids[row, : len(ids)] = ids
        attention_mask[row, : len(ids)] = 1
        labels[row, example.prompt_length : len(ids)] = ids[example.prompt_length :]
    return {"input_ids": input_ids, "attention_mask": attention_mask, "labels": labels}


def cycle(
    examples: Sequence[Example], batch_size: int, pad_token_id: int, seed: int
) -> Iterator[dict[str, torch.Tensor]]:
    """Endless batches, reshuffled at each pass, every example once a pass; the last batch of a pass may be shorter.

    Forget and retain sets are cycled independently of each other, so neither is cut to the other's length.
    """
    generator = torch.Generator().manual_seed(seed)
    while True:
        order = torch.randperm(len(examples), generator=generator).tolist()
        for start in range(0, len(order), batch_size):
            yield collate([examples[index] for index in order[start : start + batch_size]], pad_token_id)
