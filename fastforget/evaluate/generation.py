"""Greedy continuations of prompts, in batches, by any Hugging Face causal LM."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import GenerationConfig, PreTrainedTokenizerBase, StoppingCriteria, StoppingCriteriaList

from fastforget.backbone import training_flags_restored
from fastforget.errors import FastforgetError
from fastforget.head import base_causal_lm, context_length

CONTINUATION_CHARACTERS = 200
TAIL_TOKENS = 16  # of a row that are decoded again at the next step
PART_OF_A_CHARACTER = "\ufffd"  # what bytes that end within a character are decoded to

Progress = Callable[[int, int], None]  # called with (done, total)


def continue_greedily(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    *,
    characters: int = CONTINUATION_CHARACTERS,
    batch_size: int = 16,
    progress: Progress | None = None,
) -> list[str]:
    """Continue each prompt (token ids) greedily, for `characters` characters.

    A row ends with `characters` characters, an end-of-sequence token, `characters` tokens, or the model's context.
    """
    causal_lm = base_causal_lm(model)
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else (tokenizer.eos_token_id or 0)
    outputs = [""] * len(prompts)
    # Prompts of like length share a batch, so that little is padding.
    order = sorted(range(len(prompts)), key=lambda index: len(prompts[index]))
    with training_flags_restored(model), plain_greedy_decoding(causal_lm, tokenizer, pad), torch.no_grad():
        model.eval()
        for start in range(0, len(order), batch_size):
            rows = order[start : start + batch_size]
            ids = [torch.tensor(prompts[row], dtype=torch.long, device=causal_lm.device) for row in rows]
            ones = [torch.ones_like(each) for each in ids]
            # on the left: generation goes on in the last column
            input_ids = pad_sequence(ids, batch_first=True, padding_value=pad, padding_side="left")
            width = input_ids.shape[1]
            generated = model.generate(
                input_ids=input_ids,
                attention_mask=pad_sequence(ones, batch_first=True, padding_side="left"),
                max_new_tokens=room(causal_lm, width, characters),
                stopping_criteria=StoppingCriteriaList([EnoughCharacters(tokenizer, len(rows), characters)]),
            )
            for row, continuation in zip(rows, generated[:, width:].tolist(), strict=True):
                outputs[row] = decode(tokenizer, continuation)[:characters]
            if progress is not None:
                progress(start + len(rows), len(order))
    return outputs


@contextmanager
def plain_greedy_decoding(causal_lm: Any, tokenizer: PreTrainedTokenizerBase, pad: int) -> Iterator[None]:
    """Swap the generation settings that came with the model for plain greedy ones, which keep its end tokens.

    Settings passed to `generate` do not do: where they leave something unset, transformers takes it from the model's
    own (a repetition penalty, suppressed tokens, a forced first token), and reciting is exactly what those change.
    """
    own = causal_lm.generation_config
    ends = own.eos_token_id if isinstance(own.eos_token_id, list) else [own.eos_token_id]
    ends = sorted({end for end in [*ends, tokenizer.eos_token_id] if end is not None})
    causal_lm.generation_config = GenerationConfig(
        do_sample=False, num_beams=1, use_cache=True, pad_token_id=pad, eos_token_id=ends or None
    )
    try:
        yield
    finally:
        causal_lm.generation_config = own


class EnoughCharacters(StoppingCriteria):
    """End a row as soon as its continuation has enough characters: a batch then takes no step that nobody reads.

    Each step decodes the last tokens of a row only: of those before them the number of characters is kept. (A decoder
    that strips the space before the first word then counts a few too few: such a row ends a token or two later.)
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, rows: int, characters: int):
        self.tokenizer, self.characters = tokenizer, characters
        self.counted = [0] * rows
        self.tails: list[list[int]] = [[] for _ in range(rows)]

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **_: object) -> torch.Tensor:
        done = []
        for row, token in enumerate(input_ids[:, -1].tolist()):  # called once for each new token
            tail = self.tails[row]
            tail.append(token)
            text = decode(self.tokenizer, tail)
            done.append(self.counted[row] + len(text) >= self.characters)
            if len(tail) >= TAIL_TOKENS and not text.endswith(PART_OF_A_CHARACTER):
                self.counted[row] += len(text)
                tail.clear()
        return torch.tensor(done, device=input_ids.device)


def room(causal_lm: Any, width: int, wanted: int) -> int:
    """Return how many new tokens fit into the model's context after a prompt of `width` tokens, at most `wanted`."""
    context = context_length(causal_lm) or width + wanted
    if width >= context:
        raise FastforgetError(f"a prompt of {width} tokens leaves no room in the model's context of {context} tokens")
    return min(wanted, context - width)


def decode(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> str:
    """Decode tokens as they stand, without special tokens."""
    return tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
