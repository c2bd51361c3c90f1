"""Forwards of a set of examples in batches, of which each measure takes what it needs."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any, TypeVar

import torch

from fastforget.backbone import Backbone, training_flags_restored
from fastforget.batch import PreparedSide, check_batch
from fastforget.data.examples import Example, collate
from fastforget.errors import NonFiniteLossError
from fastforget.evaluate.generation import Progress

Result = TypeVar("Result")


@torch.no_grad()
def measured(
    model: Any,
    examples: Sequence[Example],
    measure: Callable[[Backbone, PreparedSide, list[int]], Iterable[Result]],
    broken: Callable[[int], Result],
    *,
    batch_size: int = 16,
    progress: Progress | None = None,
) -> list[Result | None]:
    """Measure each example that has a label, in batches of like length; results in the examples' order, None without.

    The model is in evaluation mode meanwhile. Where FSDP2 shards it all processes measure the same.

    Args:
        measure: given a batch, and which of the examples its labelled rows are, returns a result of each of these.
        broken: the result of one example of a model whose head gives no numbers.
        progress: called with (examples done, of how many) after each batch.

    Raises:
        FastforgetError: a head that `LMHead.from_model` refuses.
    """
    backbone = Backbone(model)
    found: list[Result | None] = [None] * len(examples)
    order = sorted(range(len(examples)), key=lambda place: len(examples[place].input_ids))
    with training_flags_restored(model):
        model.eval()
        for start in range(0, len(order), batch_size):
            places = order[start : start + batch_size]
            chosen = [replace(examples[place], alternative=()) for place in places]
            batch = collate(chosen, pad_token_id=0)  # the mask hides the padding
            prepared = backbone.prepare(check_batch(batch, "the examples"))
            if prepared is not None:
                labelled = [places[row] for row in prepared.rows]
                try:
                    with backbone.whole_head():
                        results = list(measure(backbone, prepared, labelled))
                except NonFiniteLossError:  # the head's own check, on the first batch
                    results = [broken(place) for place in labelled]
                for place, result in zip(labelled, results, strict=True):
                    found[place] = result
            if progress is not None:
                progress(start + len(places), len(order))
    return found
