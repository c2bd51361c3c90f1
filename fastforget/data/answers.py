"""Companions of a batch: the same prompts with refusals, and with other prompts' answers.

A row's prompt is what stands before its first label, its answer is its labelled tokens. Of a passage without a prompt,
all of which is labelled, the prompt is the first token, which is never predicted.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from fastforget.data.examples import IGNORE_INDEX, Example, collate
from fastforget.data.refusals import REFUSALS
from fastforget.data.text import encode
from fastforget.errors import FastforgetError

SPACES = (" ", "\u0120", "\u2581")  # how a token says that a space stands before its word: as it is, byte-level, SP


def with_refusals(
    batch: Mapping[str, Any],
    tokenizer: Any,
    refusals: Sequence[str] = REFUSALS,
    *,
    generator: torch.Generator | None = None,
    max_length: int | None = None,
) -> dict[str, Any]:
    """Return the batch with a companion `refusal`: row i is the prompt of row i, and a refusal drawn for it.

    A refusal begins with a space where the row's own answer does, and ends with the special token that ends that, such
    as the end of a turn. Right-padded, on the CPU; labels are -100 outside the refusal.

    Args:
        batch: a dict of `input_ids`, `labels` and perhaps `attention_mask`, padded on either side.
        refusals: texts to draw from, alike.
        generator: of the draws; default torch's own.
        max_length: tokens of a row at most; longer refusals are cut.

    Raises:
        FastforgetError: no refusals, or a row without a label.
    """
    if not refusals:
        raise FastforgetError("there are no refusals to draw from")
    special = set(tokenizer.all_special_ids) | set(getattr(tokenizer, "added_tokens_decoder", {}))
    drawn = torch.randint(len(refusals), (len(batch["input_ids"]),), generator=generator).tolist()
    examples = []
    for (prompt, answer), choice in zip(prompts_and_answers(batch), drawn, strict=True):
        refusal = refusal_ids(tokenizer, refusals[choice], answer)
        ending = [answer[-1]] if answer[-1] in special else []
        if max_length is not None:
            refusal = refusal[: max(1, max_length - len(prompt) - len(ending))]
        examples.append(Example((*prompt, *refusal, *ending), prompt_length=len(prompt)))
    return {**batch, "refusal": collate(examples, padding_of(tokenizer))}


def mismatched(
    batch: Mapping[str, Any],
    answers: Sequence[Sequence[int]] | Mapping[str, Any],
    k: int = 5,
    *,
    pad_token_id: int,
    generator: torch.Generator | None = None,
    max_length: int | None = None,
) -> dict[str, Tensor]:
    """Collate the prompts of a batch with other prompts' answers, k each: what `batch["mismatch"]` holds.

    Drawn alike and without putting back, never the prompt's own answer. Rows k i to k i + k - 1 belong to prompt i,
    right-padded, on the CPU; labels are -100 outside the answers.

    Args:
        batch: as in `with_refusals`.
        answers: the tokens of each answer to draw from; or a batch, such as the retain set's, for its answers.
        k: answers for each prompt.
        generator: of the draws; default torch's own.
        max_length: tokens of a row at most; longer answers are cut.

    Raises:
        FastforgetError: k that is no whole number from 1 on, fewer than k answers that are not the prompt's own, or a
            row without a label.
    """
    if isinstance(k, bool) or not isinstance(k, int) or k < 1:
        raise FastforgetError(f"k must be a whole number from 1 on, not {k!r}")
    if isinstance(answers, Mapping):
        answers = [answer for _, answer in prompts_and_answers(answers)]
    examples = []
    for prompt, own in prompts_and_answers(batch):
        for answer in draw_others(answers, own, k, generator):
            kept = answer if max_length is None else answer[: max(1, max_length - len(prompt))]
            examples.append(Example((*prompt, *kept), prompt_length=len(prompt)))
    return collate(examples, pad_token_id)


def draw_others(
    answers: Sequence[Sequence[int]], own: Sequence[int], k: int, generator: torch.Generator | None
) -> list[Sequence[int]]:
    """Draw k of the answers, each at most once, none of them the prompt's own."""
    own = tuple(own)

    def first_others(order: Iterable[int]) -> list[Sequence[int]]:
        others = (answer for answer in (answers[index] for index in order) if len(answer) and tuple(answer) != own)
        return list(islice(others, k))

    drawn: list[Sequence[int]] = []
    if len(answers) > 8 * k:  # a few draws do, without a permutation of them all
        drawn = first_others(dict.fromkeys(torch.randint(len(answers), (4 * k,), generator=generator).tolist()))
    if len(drawn) < k:
        drawn = first_others(torch.randperm(len(answers), generator=generator).tolist())
    if len(drawn) < k:
        raise FastforgetError(
            f"a prompt needs {k} answers of other prompts, and there are {len(drawn)}: give more answers, or a smaller "
            "k"
        )
    return drawn


def prompts_and_answers(batch: Mapping[str, Any]) -> list[tuple[list[int], list[int]]]:
    """List (prompt, answer) of each row, token ids without padding; a prompt has one token at least."""
    input_ids, labels = batch["input_ids"].cpu(), batch["labels"].cpu()
    mask = batch.get("attention_mask")
    present = torch.ones_like(input_ids, dtype=torch.bool) if mask is None else mask.cpu() != 0
    pairs = []
    for row in range(len(input_ids)):
        ids, own = input_ids[row][present[row]].tolist(), labels[row][present[row]]
        labelled = (own[1:] != IGNORE_INDEX).nonzero()[:, 0] + 1  # a first token is never predicted
        if len(labelled) == 0:
            raise FastforgetError(f"row {row} of the batch has no label, so it has no answer to put another for")
        pairs.append((ids[: int(labelled[0])], [ids[place] for place in labelled.tolist()]))
    return pairs


def refusal_ids(tokenizer: Any, refusal: str, answer: Sequence[int]) -> list[int]:
    """Return a refusal's tokens, with a space before it where the answer has one."""
    spaced = begins_with_space(tokenizer, answer)
    ids = encode(tokenizer, refusal, "a refusal")
    if begins_with_space(tokenizer, ids) != spaced:
        other = encode(tokenizer, f" {refusal}", "a refusal")
        ids = other if begins_with_space(tokenizer, other) == spaced else ids
    if not ids:
        raise FastforgetError(f"the tokenizer makes no token of the refusal {refusal!r}")
    return ids


def begins_with_space(tokenizer: Any, ids: Sequence[int]) -> bool:
    """Tell whether the first of some tokens stands behind a space."""
    return bool(ids) and str(tokenizer.convert_ids_to_tokens(ids[0])).startswith(SPACES)


def padding_of(tokenizer: Any) -> int:
    """Return the id that padding is filled with: what it is does not matter, the mask says where it stands."""
    return 0 if tokenizer.pad_token_id is None else int(tokenizer.pad_token_id)
