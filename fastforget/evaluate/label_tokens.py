"""What a model says of each label token: log p, and the mean and variance of log p over the vocabulary.

What is computed from these (probability, truth ratio, membership scores) never needs logits: the statistics are the
kernels' (`fastforget.token_stats`), and no (N, V) tensor is formed.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from fastforget.backbone import Backbone, training_flags_restored
from fastforget.batch import check_batch
from fastforget.data.examples import Example, collate
from fastforget.errors import NonFiniteLossError
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


@torch.no_grad()
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
    backbone = Backbone(model)
    outputs = ("logp_mean", "logp_var") if moments else ()
    found: list[LabelTokens | None] = [None] * len(examples)
    order = sorted(range(len(examples)), key=lambda index: len(examples[index].input_ids))
    with training_flags_restored(model):
        model.eval()
        for start in range(0, len(order), batch_size):
            rows = order[start : start + batch_size]
            part = [examples[row] for row in rows]
            try:
                measured = measure_batch(backbone, part, outputs)
            except NonFiniteLossError:  # the head's own check, on the first batch
                measured = [broken(each, moments) for each in part]
            for row, tokens in zip(rows, measured, strict=True):
                found[row] = tokens
            if progress is not None:
                progress(start + len(rows), len(order))
    return found


def measure_batch(
    backbone: Backbone, examples: Sequence[Example], outputs: tuple[str, ...]
) -> list[LabelTokens | None]:
    """Measure one batch."""
    batch = check_batch(collate(examples, pad_token_id=0), "the examples")  # the mask hides the padding
    prepared = backbone.prepare(batch)
    found: list[LabelTokens | None] = [None] * len(examples)
    if prepared is None:
        return found
    states = backbone.states(prepared.inputs, prepared.positions)[None]
    places = torch.arange(len(prepared.labels))
    stats = token_stats(states, backbone.head, prepared.labels, positions=places, outputs=outputs)
    columns = [getattr(stats, name).double().cpu().split(prepared.lengths) for name in ("logp", *outputs)]
    for row, *parts in zip(prepared.rows, *columns, strict=True):
        found[row] = LabelTokens(*(tuple(part.tolist()) for part in parts))
    return found


def broken(example: Example, moments: bool) -> LabelTokens | None:
    """Return NaN for each label token of an example; None where it has none."""
    if example.label_count <= 0:
        return None
    missing = (math.nan,) * example.label_count
    return LabelTokens(missing, *((missing, missing) if moments else ()))
