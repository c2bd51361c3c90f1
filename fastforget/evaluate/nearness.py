"""Is an answer nearer to the hallucinated than to the right one? Token by token, by states of the untouched model.

BERTScore (Zhang et al., arXiv 1904.09675) with other states: each token of one text is matched with the most similar
token of the other (cosine); recall is the mean over the right text's tokens, precision over the output's, and F1 their
harmonic mean. The states are those that enter the untouched model's own head, after its own question, so that no
further model is needed; figures of other states are not comparable with these.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastforget.backbone import Backbone
from fastforget.batch import PreparedSide
from fastforget.data.examples import Example
from fastforget.evaluate.forwards import measured


def text_states(model: Any, examples: Sequence[Example], batch_size: int = 16) -> list[Tensor | None]:
    """Return the normalised states (n, D), float32, of each example's labelled tokens; None where it has none.

    A token's state is the one that predicts the token after it; so the last label's is not among them, and that before
    the first is. The model is in evaluation mode meanwhile.
    """

    def measure(backbone: Backbone, prepared: PreparedSide, places: list[int]) -> tuple[Tensor, ...]:
        states = backbone.states(prepared.inputs, prepared.positions)[None].float().cpu()
        return torch.nn.functional.normalize(states, dim=-1).split(prepared.lengths)

    def broken(place: int) -> Tensor:
        return torch.full((examples[place].label_count, 1), torch.nan)

    return measured(model, examples, measure, broken, batch_size=batch_size)


def similarity(truth: Tensor, output: Tensor) -> float:
    """Return F1 of the best matches between two texts' normalised states, (n, D) and (m, D).

    >>> similarity(torch.eye(2), torch.eye(2)[:1])
    0.6666666666666666
    """
    cosines = truth @ output.T
    recall, precision = float(cosines.amax(1).mean()), float(cosines.amax(0).mean())
    return 0.0 if recall + precision <= 0.0 else 2.0 * recall * precision / (recall + precision)


def nearest(right: Sequence[Tensor | None], wrong: Sequence[Tensor | None], output: Tensor | None) -> bool | None:
    """Tell whether an output is nearer to a wrong answer than to every right one; None where a text has no token."""
    if output is None or not any(each is not None for each in right) or not any(each is not None for each in wrong):
        return None
    best = [max(similarity(each, output) for each in side if each is not None) for side in (right, wrong)]
    return best[1] > best[0]
