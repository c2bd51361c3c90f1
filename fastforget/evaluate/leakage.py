"""Does the model still recite a text? Greedy continuations of its own prompts, compared with what the text says.

The measurement, for every passage: the prompt is its beginning, the model continues greedily, and the passage leaks if
the first 200 characters of that hold half of the true ones, in order (ROUGE-L recall >= 0.5). Only the continuation is
scored, never the prompt, and an output that is no text at all (`is_degenerate`) is counted apart: it does not leak,
but it is damage, not forgetting.

ROUGE-L is that of the `rouge_score` package without stemming. It compares words, where a word is a run of a-z and 0-9
after lower-casing: punctuation, indentation and every other script are not seen. A true continuation without any such
word therefore scores 0 and never leaks; `LeakageReport.continuations` shows them.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from rouge_score.rouge_scorer import RougeScorer
from torch import nn
from transformers import GenerationConfig, PreTrainedTokenizerBase, StoppingCriteria, StoppingCriteriaList

from fastforget.data.examples import IGNORE_INDEX, Example, collate
from fastforget.errors import FastforgetError

PROMPT_CHARACTERS = 200
CONTINUATION_CHARACTERS = 200
LEAK_RECALL = 0.5

Progress = Callable[[int, int], None]  # called with (done, total)


@dataclass(frozen=True)
class Continuation:
    """One passage: what the model was given, what stands there, and what it wrote instead."""

    prompt: str
    truth: str  # up to CONTINUATION_CHARACTERS characters, as is `output`
    output: str
    rouge: float  # ROUGE-L recall of the truth, 0 to 1
    leaked: bool
    degenerate: bool
    source: str = ""


@dataclass(frozen=True)
class LeakageReport:
    """A set of passages: shares and means from 0 to 1, and the continuations in the order of the examples."""

    leak: float  # share of passages that leak
    rouge: float  # mean ROUGE-L recall
    nll: float  # nats per label token, mean over all label tokens
    degenerate_share: float
    continuations: list[Continuation] = field(repr=False)


def leakage(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    examples: Sequence[Example],
    *,
    batch_size: int = 16,
    progress: Progress | None = None,
) -> LeakageReport:
    """Measure what a causal language model (or a PeftModel around one) still recites of the examples.

    `progress` is called after each batch of the two passes (continuations, then NLL), so `total` is twice the number
    of examples. The model is in evaluation mode meanwhile, and every module's mode is restored afterwards.
    """
    if not examples:
        raise FastforgetError("there is nothing to measure: the set of examples is empty")
    report = progress or (lambda done, total: None)
    count = len(examples)
    splits = [prompt_tokens(example, tokenizer) for example in examples]
    prompts = [example.input_ids[:split] for example, split in zip(examples, splits, strict=True)]
    outputs = continue_greedily(
        model, tokenizer, prompts, batch_size=batch_size, progress=lambda done, _: report(done, 2 * count)
    )
    scorer = RougeScorer(["rougeL"], use_stemmer=False)
    continuations = []
    for example, split, prompt, output in zip(examples, splits, prompts, outputs, strict=True):
        truth = _decode(tokenizer, example.input_ids[split:])[:CONTINUATION_CHARACTERS]
        rouge = scorer.score(truth, output)["rougeL"].recall
        continuations.append(
            Continuation(
                prompt=_decode(tokenizer, prompt),
                truth=truth,
                output=output,
                rouge=rouge,
                leaked=rouge >= LEAK_RECALL,
                degenerate=is_degenerate(output),
                source=example.source,
            )
        )
    nll = mean_nll(model, examples, batch_size=batch_size, progress=lambda done, _: report(count + done, 2 * count))
    return LeakageReport(
        leak=sum(continuation.leaked for continuation in continuations) / count,
        rouge=sum(continuation.rouge for continuation in continuations) / count,
        nll=nll,
        degenerate_share=sum(continuation.degenerate for continuation in continuations) / count,
        continuations=continuations,
    )


def prompt_tokens(example: Example, tokenizer: PreTrainedTokenizerBase, min_characters: int = PROMPT_CHARACTERS) -> int:
    """How many tokens of the passage are its prompt.

    A prompt-and-response example says so itself. Of plain text it is the shortest prefix of the passage's own tokens
    that decodes to at least `min_characters` characters; text is never tokenized again, since another cut would be
    other tokens than those that were learned. A passage with less than `min_characters / 4` characters after that has
    too little left to recite: half of its tokens are the prompt.
    """
    if example.prompt_length > 0:
        return example.prompt_length
    ids = example.input_ids
    for length in range(1, len(ids)):
        if len(_decode(tokenizer, ids[:length])) >= min_characters:
            if len(_decode(tokenizer, ids[length:])) >= min_characters / 4:
                return length
            break
    return max(len(ids) // 2, 1)


def continue_greedily(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    *,
    characters: int = CONTINUATION_CHARACTERS,
    batch_size: int = 16,
    progress: Progress | None = None,
) -> list[str]:
    """The greedy continuation of each prompt (token ids), cut to `characters` characters.

    A row ends with `characters` characters, an end-of-sequence token, `characters` tokens, or the model's context.
    """
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else (tokenizer.eos_token_id or 0)
    outputs = [""] * len(prompts)
    # Prompts of like length share a batch, so that little is padding.
    order = sorted(range(len(prompts)), key=lambda index: len(prompts[index]))
    with evaluation_mode(model), _plain_greedy_decoding(inner, tokenizer, pad), torch.no_grad():
        for start in range(0, len(order), batch_size):
            rows = order[start : start + batch_size]
            input_ids, attention_mask = _pad_left([prompts[row] for row in rows], pad)
            width = input_ids.shape[1]
            generated = model.generate(
                input_ids=input_ids.to(inner.device),
                attention_mask=attention_mask.to(inner.device),
                max_new_tokens=_room(inner, width, characters),
                stopping_criteria=StoppingCriteriaList([_EnoughCharacters(tokenizer, width, characters)]),
            )
            for row, ids in zip(rows, generated[:, width:].tolist(), strict=True):
                outputs[row] = _decode(tokenizer, ids)[:characters]
            if progress is not None:
                progress(start + len(rows), len(order))
    return outputs


def mean_nll(
    model: Any, examples: Sequence[Example], *, batch_size: int = 16, progress: Progress | None = None
) -> float:
    """Negative log-likelihood in nats, mean over the label tokens of all examples (not a mean of batch means)."""
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    total, tokens = 0.0, 0
    with evaluation_mode(model), torch.no_grad():
        for start in range(0, len(examples), batch_size):
            # Any id does as padding: the mask hides it and it has no label.
            batch = collate(examples[start : start + batch_size], pad_token_id=0)
            labels = batch["labels"][:, 1:].to(inner.device)
            logits = model(
                input_ids=batch["input_ids"].to(inner.device), attention_mask=batch["attention_mask"].to(inner.device)
            ).logits[:, :-1]
            kept = labels != IGNORE_INDEX
            total += nn.functional.cross_entropy(logits[kept].float(), labels[kept], reduction="sum").item()
            tokens += int(kept.sum())
            if progress is not None:
                progress(min(start + batch_size, len(examples)), len(examples))
    if tokens == 0:
        raise FastforgetError("no example has a label token, so there is no likelihood to measure")
    return total / tokens


def is_degenerate(text: str) -> bool:
    """Whether an output is no text: blank, or one token or a short loop repeated over most of it.

    Blank: no letter and no digit. A loop: more than half of the characters, and at least 20, are one unit of any
    content repeated three times or more without a change. One token: of eight words or more, over half are the same.

    >>> [is_degenerate(text) for text in (" ... ", "the the the the the the", "so on, so on, so on, so on")]
    [True, True, True]
    >>> [is_degenerate(text) for text in ("Yes.", "1000000", "the cat, the dog, the mouse and the lion")]
    [False, False, False]
    """
    if not re.search(r"[^\W_]", text):
        return True
    words = re.findall(r"\w+", text.lower())
    if len(words) >= 8 and Counter(words).most_common(1)[0][1] > len(words) / 2:
        return True
    least = max(len(text) // 2 + 1, 20)
    return any(_longest_loop(text, period) >= max(least, 3 * period) for period in range(1, len(text) // 3 + 1))


def _longest_loop(text: str, period: int) -> int:
    """Characters in the longest stretch of the text that repeats itself every `period` characters."""
    longest = run = 0
    for earlier, later in zip(text, text[period:], strict=False):
        run = run + 1 if earlier == later else 0
        longest = max(longest, run)
    return longest + period


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Evaluation mode inside; afterwards each module is in the mode that it was in, also after an exception."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


@contextmanager
def _plain_greedy_decoding(inner: Any, tokenizer: PreTrainedTokenizerBase, pad: int) -> Iterator[None]:
    """Swap the generation settings that came with the model for plain greedy ones, which keep its end tokens.

    Settings passed to `generate` do not do: where they leave something unset, transformers takes it from the model's
    own (a repetition penalty, suppressed tokens, a forced first token), and reciting is exactly what those change.
    """
    own = inner.generation_config
    ends = own.eos_token_id if isinstance(own.eos_token_id, list) else [own.eos_token_id]
    ends = sorted({end for end in [*ends, tokenizer.eos_token_id] if end is not None})
    inner.generation_config = GenerationConfig(
        do_sample=False, num_beams=1, use_cache=True, pad_token_id=pad, eos_token_id=ends or None
    )
    try:
        yield
    finally:
        inner.generation_config = own


class _EnoughCharacters(StoppingCriteria):
    """Ends a row as soon as its continuation has enough characters: a batch then takes no step that nobody reads."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, prompt_width: int, characters: int):
        self.tokenizer, self.prompt_width, self.characters = tokenizer, prompt_width, characters

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **_: object) -> torch.Tensor:
        rows = input_ids[:, self.prompt_width :].tolist()
        done = [len(_decode(self.tokenizer, row)) >= self.characters for row in rows]
        return torch.tensor(done, device=input_ids.device)


def _pad_left(prompts: Sequence[Sequence[int]], pad: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids and mask, int64 (B, T), with every prompt ending in the last column, where generation goes on."""
    width = max(len(prompt) for prompt in prompts)
    input_ids = torch.full((len(prompts), width), pad, dtype=torch.long)
    attention_mask = torch.zeros_like(input_ids)
    for row, prompt in enumerate(prompts):
        input_ids[row, width - len(prompt) :] = torch.tensor(prompt, dtype=torch.long)
        attention_mask[row, width - len(prompt) :] = 1
    return input_ids, attention_mask


def _room(inner: Any, width: int, wanted: int) -> int:
    """How many new tokens fit into the model's context after a prompt of `width` tokens, at most `wanted`."""
    context = getattr(inner.config.get_text_config(), "max_position_embeddings", None) or width + wanted
    if width >= context:
        raise FastforgetError(f"a prompt of {width} tokens leaves no room in the model's context of {context} tokens")
    return min(wanted, context - width)


def _decode(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> str:
    return tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
