"""The demo's base model: a small OPT that has learned its passages by heart.

What is to be forgotten must first be known for certain, so training ends when the model recites, not after a number of
steps. Whether it recites is read off one forward pass: if every token of a passage after its prompt is the most
likely one given those before it, then greedy decoding from that prompt writes exactly this passage.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from transformers import OPTConfig, OPTForCausalLM, PreTrainedTokenizerBase

from fastforget.batch import Batch
from fastforget.data.batches import Cycle
from fastforget.data.examples import IGNORE_INDEX, Example, in_batches
from fastforget.data.text import text_examples
from fastforget.data.topics import train_tokenizer
from fastforget.errors import FastforgetError, NonFiniteLossError
from fastforget.quiet import library_bars

PROMPT_TOKENS = 16  # fewer than a prompt of 200 characters has (18 and more here): the rest holds the continuation
SURE = 0.5  # a token's probability: above it, it is the most likely one whatever the others are
TINY_PROMPT, TINY_VOCABULARY, TINY_CONTEXT = 8, 512, 256  # of `tiny_model`, in tokens
RECITED = 1.0  # share of passages that must be recited


@dataclass(frozen=True)
class Memorised:
    """How it went: optimizer steps, nats per token, and the share of passages that are recited."""

    steps: int
    nll: float
    recited: float


def build_model(
    tokenizer: PreTrainedTokenizerBase, *, hidden_size: int = 256, layers: int = 2, context: int = 512, seed: int = 0
) -> OPTForCausalLM:
    """Build a freshly initialised OPT, 2.8 M parameters by default.

    Two layers learn by heart twice as fast as four. `hidden_size` is a multiple of 64, as bitsandbytes wants it.
    """
    config = OPTConfig(
        vocab_size=len(tokenizer),
        hidden_size=hidden_size,
        word_embed_proj_dim=hidden_size,
        ffn_dim=4 * hidden_size,
        num_hidden_layers=layers,
        num_attention_heads=hidden_size // 64,
        max_position_embeddings=context,
        dropout=0.0,  # it is meant to overfit
        attention_dropout=0.0,
        layerdrop=0.0,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return OPTForCausalLM(config)


def memorise(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    passages: Sequence[Example],
    *,
    seed: int = 0,
    learning_rate: float = 1.5e-3,
    batch_size: int = 8,
    max_passes: int = 300,
    prompt_tokens: int = PROMPT_TOKENS,
    progress: Callable[[float, float], None] | None = None,
) -> Memorised:
    """Train in place until the model recites the passages; `FastforgetError` if `max_passes` over them do not do it.

    It recites a passage where it would write all that stands behind the first `prompt_tokens` tokens.
    `progress` is called after each pass with the share of passages recited and the NLL of the pass (nats per token).
    """
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, betas=(0.9, 0.95), weight_decay=0.0)
    steps_per_pass = -(-len(passages) // batch_size)
    batches = Cycle(passages, batch_size, tokenizer.pad_token_id, seed)
    steps, nll = 0, float("inf")
    for _ in range(max_passes):
        model.train()  # `recited_share` left it in evaluation mode
        # Warm up over 30 steps, and slow down as the text is learned: at the full rate the last tenth of a nat is
        # noise. The rate follows the loss, since the number of steps is not known beforehand.
        of_pass = range(steps + 1, steps + 1 + steps_per_pass)
        rates = [learning_rate * min(1.0, step / 30, max(nll, 0.1)) for step in of_pass]
        nll = train(model, optimizer, batches, rates)
        steps += steps_per_pass
        if not math.isfinite(nll):
            raise NonFiniteLossError(f"the loss of the base model became {nll} by step {steps}")
        recited = recited_share(model, passages, tokenizer.pad_token_id, prompt_tokens) if nll < 0.5 else 0.0
        if progress is not None:
            progress(recited, nll)
        if recited >= RECITED:
            model.eval()
            return Memorised(steps, nll, recited)
    raise FastforgetError(
        f"the model did not learn the text by heart in {max_passes} passes: it recites {recited:.0%} of it"
    )


def train(
    model: nn.Module, optimizer: torch.optim.Optimizer, batches: Iterator[Batch], rates: Sequence[float]
) -> float:
    """Take a step for each learning rate, with clipped gradients; return the mean loss (nats per token)."""
    losses = []
    for rate in rates:
        optimizer.param_groups[0]["lr"] = rate
        loss = model(**next(batches)).loss
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.detach())
    return torch.stack(losses).mean().item()


@torch.no_grad()
def recited_share(
    model: nn.Module, passages: Sequence[Example], pad_token_id: int, prompt_tokens: int, batch_size: int = 16
) -> float:
    """Return the share of passages whose every token after the prompt has a probability over one half."""
    model.eval()
    recited = 0
    for batch in in_batches(passages, pad_token_id, batch_size):
        labels = batch.pop("labels")[:, 1:]
        log_probs = model(**batch).logits[:, :-1].float().log_softmax(-1)
        label_probs = log_probs.gather(-1, labels.clamp(min=0)[..., None]).squeeze(-1).exp()
        sure = (label_probs > SURE) | (labels == IGNORE_INDEX)
        recited += int(sure[:, prompt_tokens - 1 :].all(dim=1).sum())
    return recited / len(passages)


def tiny_model(folder: str | Path, texts: Sequence[str], *, seed: int = 0) -> str:
    """Write a tiny model that knows these texts by heart, to try things without a download; it takes seconds.

    What it recites is all that stands behind a text's first tokens, by which it must be told from the others.

    Args:
        folder: gets the model and a tokenizer made for the texts, as `from_pretrained` and `fastforget.load` read them.
        texts: a few dozen, of at most 250 tokens each.
        seed: of its first weights and the order of the texts.

    Returns:
        The folder.

    Raises:
        FastforgetError: no texts, or texts that it cannot learn by heart.
    """
    tokenizer = train_tokenizer(texts, vocabulary_size=TINY_VOCABULARY)
    passages = [example for text in texts for example in text_examples(text, tokenizer, TINY_CONTEXT, "texts")]
    if not passages:
        raise FastforgetError("there is no text to learn")
    model = build_model(tokenizer, hidden_size=64, context=TINY_CONTEXT, seed=seed)
    memorise(model, tokenizer, passages, seed=seed, learning_rate=3e-3, prompt_tokens=TINY_PROMPT)
    with library_bars(off=True):
        save_base(model, tokenizer, folder)
    return str(folder)


def save_base(model: OPTForCausalLM, tokenizer: PreTrainedTokenizerBase, folder: str | Path) -> None:
    """Write an ordinary Hugging Face folder: `from_pretrained` reads it back, in 8 bit too."""
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
