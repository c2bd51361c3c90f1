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

from fastforget.backbone import Backbone, training_flags_restored
from fastforget.batch import check_batch
from fastforget.data.examples import Example, collate


@torch.no_grad()
def text_states(model: Any, examples: Sequence[Example], batch_size: int = 16) -> list[Tensor | None]:
    """Return the normalised states (n, D), float32, of each example's labelled tokens; None where it has none.

    A token's state is the one that predicts the token after it; so the last label's is not among them, and that before
    the first is. The model is in evaluation mode meanwhile.
    """
    backbone = Backbone(model)
    found: list[Tensor | None] = [None] * len(examples)
    with training_flags_restored(model):
        model.eval()
        for start in range(0, len(examples), batch_size):
            part = examples[start : start + batch_size]
            prepared = backbone.prepare(check_batch(collate(part, pad_token_id=0), "the answers"))
            if prepared is None:
                continue
            states = backbone.states(prepared.inputs, prepared.positions)[None].float().cpu()
            normalised = torch.nn.functional.normalize(states, dim=-1)
            for row, own in zip(prepared.rows, normalised.split(prepared.lengths), strict=True):
                found[start + row] = own
    return found


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
