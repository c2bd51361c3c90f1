"""How much of a text a model still predicts with the true text as context: measures that one token cannot fool.

For each passage, over its T tokens behind the prompt, all from one forward of the true text:

- exact memorisation: the share of them that are the likeliest token (Tirumala et al., arXiv 2205.10770);
- extraction strength: 1 - k / T, k the fewest of them that must be given so that greedy decoding writes all the rest
  (Carlini et al., arXiv 2012.07805, as arXiv 2407.06460 and open-unlearning use it). Greedy decoding from there on
  writes the rest exactly where each of its tokens is the likeliest one given the true ones before it;
- logit lens: exact memorisation as each layer's states, through the final norm and the head, predict it;
- probability: the geometric mean of the tokens' probabilities, exp(mean log p).

The statistics are the kernels' (`fastforget.token_stats`): no (N, V) tensor of logits is formed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from fastforget.backbone import Backbone
from fastforget.batch import PreparedSide
from fastforget.data.examples import Example
from fastforget.errors import FastforgetError
from fastforget.evaluate.forwards import measured
from fastforget.evaluate.generation import Progress, decode
from fastforget.head import base_causal_lm
from fastforget.stats import token_stats

PROMPT_CHARACTERS = 200
SAME_STATES = 0.05  # of the final states: a final norm that gives these from the last layer's is the right one


@dataclass(frozen=True)
class Memorisation:
    """One passage; shares from 0 to 1."""

    exact: float
    extraction: float
    probability: float
    lens: tuple[float, ...] = ()  # exact memorisation layer by layer, from the first; () where it was not asked for


@dataclass(frozen=True)
class MemorisationReport:
    """A set of passages, in the order of the examples: None for one with nothing behind its prompt.

    The means are over passages, each of equal weight; None where no passage counts.
    """

    nll: float  # nats per label token, the prompt of plain text among them; mean over all label tokens of the set
    passages: list[Memorisation | None] = field(repr=False)

    @property
    def exact(self) -> float | None:
        return self.mean(lambda passage: passage.exact)

    @property
    def extraction(self) -> float | None:
        return self.mean(lambda passage: passage.extraction)

    @property
    def probability(self) -> float | None:
        return self.mean(lambda passage: passage.probability)

    @property
    def lens(self) -> list[float]:
        """Mean exact memorisation by layer."""
        layers = zip(*(passage.lens for passage in self.passages if passage is not None), strict=True)
        return [sum(shares) / len(shares) for shares in layers]

    def mean(self, share: Callable[[Memorisation], float]) -> float | None:
        """Return the mean share over the passages that count."""
        shares = [share(passage) for passage in self.passages if passage is not None]
        return sum(shares) / len(shares) if shares else None


def memorisation(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    examples: Sequence[Example],
    *,
    splits: Sequence[int] | None = None,
    lens: bool = False,
    batch_size: int = 16,
    progress: Progress | None = None,
) -> MemorisationReport:
    """Measure what a causal language model (or a PeftModel around one) predicts of the examples' own text.

    The model is in evaluation mode meanwhile. Of a broken model all figures are NaN.

    Args:
        splits: how many tokens of each example are its prompt, where that is known (`prompt_tokens`).
        lens: measure each layer too, which costs a product with the head for each. Where no final norm is found for it,
            it stays empty.

    Raises:
        FastforgetError: no example has a label token, or a head that `LMHead.from_model` refuses.
    """
    if not any(example.label_count > 0 for example in examples):
        raise FastforgetError("no example has a label token, so there is nothing to measure")
    if splits is None:
        splits = [prompt_tokens(example, tokenizer) for example in examples]
    behind = [max(len(example.input_ids) - split, 0) for example, split in zip(examples, splits, strict=True)]

    def measure(
        backbone: Backbone, prepared: PreparedSide, places: list[int]
    ) -> list[tuple[float, Memorisation | None]]:
        return measure_batch(backbone, prepared, [behind[place] for place in places], lens)

    def broken(place: int) -> tuple[float, Memorisation]:
        return math.nan, Memorisation(math.nan, math.nan, math.nan)

    found = measured(model, examples, measure, broken, batch_size=batch_size, progress=progress)
    total = sum(each[0] for each in found if each is not None)
    nll = -total / sum(max(example.label_count, 0) for example in examples)
    return MemorisationReport(nll, [None if each is None else each[1] for each in found])


def measure_batch(
    backbone: Backbone, prepared: PreparedSide, behind: Sequence[int], lens: bool
) -> list[tuple[float, Memorisation | None]]:
    """Return the sum of log p over all label tokens of each labelled row, and its measures.

    `behind`: how many tokens of each row, the last ones, stand behind its prompt.
    """
    norm = final_norm(backbone) if lens and not backbone.head.is_identity else None
    layers = list(range(len(backbone.stack()))) if norm is not None else []
    states = backbone.states(prepared.inputs, prepared.positions, (None, *layers))
    logp, greedy = likeliest(backbone, states[None], prepared.labels)
    ends = torch.tensor(prepared.lengths).cumsum(0).tolist()
    rows = [range(end - count, end) for end, count in zip(ends, behind, strict=True)]
    lenses: list[Tensor] = []
    places = [place for each in rows for place in each]
    if places and norm is not None and applies(norm, states[layers[-1]], states[None]):
        kept = torch.tensor(places, device=greedy.device)
        lenses = [
            greedy.new_zeros(greedy.shape).index_put_(
                (kept,), likeliest(backbone, norm(states[layer][kept]), prepared.labels[kept])[1]
            )
            for layer in layers
        ]
    greedy, lenses = greedy.cpu(), [each.cpu() for each in lenses]
    found: list[tuple[float, Memorisation | None]] = []
    for own, whole in zip(rows, logp.split(prepared.lengths), strict=True):
        passage = None
        if own:
            part = slice(own.start, own.stop)
            exact, extraction = reproduced(greedy[part].tolist())
            by_layer = tuple(float(each[part].float().mean()) for each in lenses)
            passage = Memorisation(exact, extraction, math.exp(float(logp[part].mean())), by_layer)
        found.append((float(whole.sum()), passage))
    return found


def likeliest(backbone: Backbone, states: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Return each token's log p on the CPU in float64, and whether it is the likeliest one, (n,) both."""
    rows = torch.arange(len(labels))
    stats = token_stats(states, backbone.head, labels, positions=rows, outputs=("argmax",))
    assert stats.argmax is not None
    return stats.logp.double().cpu(), stats.argmax == labels


def reproduced(greedy: Sequence[bool]) -> tuple[float, float]:
    """Return exact memorisation and extraction strength of one passage, from whether each token is the likeliest one.

    >>> reproduced([True, False, True, True])
    (0.75, 0.5)
    """
    given = max((place + 1 for place, right in enumerate(greedy) if not right), default=0)
    return sum(greedy) / len(greedy), 1.0 - given / len(greedy)


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


def final_norm(backbone: Backbone) -> nn.Module | None:
    """Return the norm between the last layer and the head: the last one registered beside the list of layers."""
    stack = backbone.stack()
    parents = [m for m in base_causal_lm(backbone.model).modules() if any(child is stack for child in m.children())]
    norms = [child for parent in parents for child in parent.children() if "norm" in type(child).__name__.lower()]
    return norms[-1] if norms else None


def applies(norm: nn.Module, last: Tensor, final: Tensor) -> bool:
    """Tell whether this norm makes the final states from the last layer's."""
    made = norm(last)
    return made.shape == final.shape and float((made - final).norm()) <= SAME_STATES * float(final.norm())
