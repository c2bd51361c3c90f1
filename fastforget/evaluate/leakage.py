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

import math
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from rouge_score.rouge_scorer import RougeScorer
from torch.nn.utils.rnn import pad_sequence
from transformers import GenerationConfig, PreTrainedTokenizerBase, StoppingCriteria, StoppingCriteriaList

from fastforget.backbone import training_flags_restored
from fastforget.data.examples import Example, collate
from fastforget.errors import FastforgetError, NonFiniteLossError
from fastforget.head import base_causal_lm
from fastforget.loss import UnlearnLoss
from fastforget.objectives import CE

PROMPT_CHARACTERS = 200
CONTINUATION_CHARACTERS = 200
LEAK_RECALL = 0.5
TAIL_TOKENS = 16  # of a row that are decoded again at the next step
PART_OF_A_CHARACTER = "\ufffd"  # what bytes that end within a character are decoded to

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
        truth = decode(tokenizer, example.input_ids[split:])[:CONTINUATION_CHARACTERS]
        rouge = scorer.score(truth, output)["rougeL"].recall
        continuations.append(
            Continuation(
                prompt=decode(tokenizer, prompt),
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
    """Return how many tokens of the passage are its prompt.

    A prompt-and-response example says so itself. Of plain text it is the shortest prefix of the passage's own tokens
    that decodes to at least `min_characters` characters; text is never tokenized again, since another cut would be
    other tokens than those that were learned. A passage with less than `min_characters / 4` characters after that has
    too little left to recite: half of its tokens are the prompt.
    """
    if example.prompt_length > 0:
        return example.prompt_length
    ids = example.input_ids
    for length in range(1, len(ids)):
        if len(decode(tokenizer, ids[:length])) >= min_characters:
            if len(decode(tokenizer, ids[length:])) >= min_characters / 4:
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


@torch.no_grad()
def mean_nll(
    model: Any, examples: Sequence[Example], *, batch_size: int = 16, progress: Progress | None = None
) -> float:
    """Measure the negative log-likelihood in nats: the mean over the label tokens of all examples, not of batch means.

    It is computed as the loss of `CE` is in training: no (N, V) tensor of logits is formed. NaN for a broken model.

    Raises:
        FastforgetError: no example has a label token, or a head that `LMHead.from_model` refuses.
    """
    loss = UnlearnLoss(model, [CE(on="forget")])
    total, tokens = 0.0, 0
    with training_flags_restored(model):
        model.eval()
        for start in range(0, len(examples), batch_size):
            part = [example for example in examples[start : start + batch_size] if example.label_count > 0]
            if part:  # any id does as padding: the mask hides it and it has no label
                count = sum(example.label_count for example in part)
                try:
                    total += count * loss(collate(part, pad_token_id=0)).loss.item()
                except NonFiniteLossError:  # the figure that says so
                    total = math.nan
                tokens += count
            if progress is not None:
                progress(min(start + batch_size, len(examples)), len(examples))
    if tokens == 0:
        raise FastforgetError("no example has a label token, so there is no likelihood to measure")
    return total / tokens


def is_degenerate(text: str) -> bool:
    """Tell whether an output is no text: blank, or one token or a short loop repeated over most of it.

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
    return any(longest_loop(text, period) >= max(least, 3 * period) for period in range(1, len(text) // 3 + 1))


def longest_loop(text: str, period: int) -> int:
    """Count the characters in the longest stretch of the text that repeats itself every `period` characters."""
    longest = run = 0
    for earlier, later in zip(text, text[period:], strict=False):
        run = run + 1 if earlier == later else 0
        longest = max(longest, run)
    return longest + period


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
    context = getattr(causal_lm.config.get_text_config(), "max_position_embeddings", None) or width + wanted
    if width >= context:
        raise FastforgetError(f"a prompt of {width} tokens leaves no room in the model's context of {context} tokens")
    return min(wanted, context - width)


def decode(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> str:
    """Decode tokens as they stand, without special tokens."""
    return tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
