"""What a model says of each label token: log p, and the mean and variance of log p over the vocabulary.

What is computed from these (probability, truth ratio, membership scores) never needs logits: the statistics are the
kernels' (`fastforget.token_stats`), and no (N, V) tensor is formed.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from fastforget.backbone import Backbone
from fastforget.batch import PreparedSide
from fastforget.data.examples import Example
from fastforget.evaluate.forwards import measured
from fastforget.evaluate.generation import Progress
from fastforget.stats import token_stats


@dataclass(frozen=True)
class LabelTokens:
    """The label tokens of one example, in order.

    With p the model's distribution for a token and y the token itself: log p_y, E_p[log p] and Var_p[log p], in nats.
    The last two are empty where they were not asked for. A broken model has NaN everywhere.
    """

    logp: tuple[float, ...]
    logp_mean: tuple[float, ...] = ()
    logp_var: tuple[float, ...] = ()

    @property
    def nll(self) -> float:
        """Mean negative log-likelihood, nats per token."""
        return -sum(self.logp) / len(self.logp)

    @property
    def probability(self) -> float:
        """The tokens' geometric mean probability, P(a|q)^(1/|a|) of TOFU (arXiv 2401.06121)."""
        return math.exp(-self.nll)


def label_tokens(
    model: Any,
    examples: Sequence[Example],
    *,
    moments: bool = False,
    batch_size: int = 16,
    progress: Progress | None = None,
) -> list[LabelTokens | None]:
    """Measure the label tokens of each example, in the examples' order; None for one without a label.

    The model is in evaluation mode meanwhile. Examples of like length share a batch.

    Args:
        moments: the mean and the variance of log p too.
        progress: called with (examples done, of how many) after each batch.

    Raises:
        FastforgetError: a head that `LMHead.from_model` refuses.
    """
    outputs = ("logp_mean", "logp_var") if moments else ()

    def measure(backbone: Backbone, prepared: PreparedSide, places: list[int]) -> Iterator[LabelTokens]:
        states = backbone.states(prepared.inputs, prepared.positions)[None]
        kept = torch.arange(len(prepared.labels))
        stats = token_stats(states, backbone.head, prepared.labels, positions=kept, outputs=outputs)
        columns = [getattr(stats, name).double().cpu().split(prepared.lengths) for name in ("logp", *outputs)]
        for parts in zip(*columns, strict=True):
            yield LabelTokens(*(tuple(part.tolist()) for part in parts))

    def broken(place: int) -> LabelTokens:
        missing = (math.nan,) * examples[place].label_count
        return LabelTokens(missing, *((missing, missing) if moments else ()))

    return measured(model, examples, measure, broken, batch_size=batch_size, progress=progress)
