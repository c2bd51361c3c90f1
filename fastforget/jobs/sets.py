"""The passages of an unlearning job: what is forgotten, what is kept, and which of both are measured."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from fastforget.data.examples import Example, Examples, ExampleStream
from fastforget.data.sources import Source, read_source
from fastforget.errors import FastforgetError
from fastforget.jobs.options import UnlearnOptions

if TYPE_CHECKING:
    from rich.console import Console


def read_sets(
    sources: Mapping[str, Source | None], tokenizer: Any, options: UnlearnOptions, console: Console
) -> tuple[dict[str, Examples], dict[str, list[Example]]]:
    """Read the passages of each set; return them, and those at its start, which are measured before and after.

    Raises:
        FastforgetError: a source that cannot be read, or a passage in both sets. Streams are not read to their end for
            that: of them the measured passages are compared, and that is printed.
    """
    examples: dict[str, Examples] = {}
    measured: dict[str, list[Example]] = {}
    compared: dict[str, list[Example]] = {}
    for side, source in sources.items():
        if source is not None:
            part = examples[side] = read_source(source, tokenizer, options.max_length)
            if isinstance(part, ExampleStream):
                measured[side] = compared[side] = part.head(options.measured_passages)
            else:
                measured[side], compared[side] = part[: options.measured_passages], part
    longest = f"of at most {options.max_length} tokens"
    if options.streaming:
        console.print(f"Streaming passages {longest}, for {options.max_steps} steps.")
    else:
        forget, keep = len(compared["forget"]), len(compared.get("retain", []))
        console.print(f"{forget} passage{'s' * (forget != 1)} to forget, {keep} to keep, {longest}.")
    if "retain" in compared:
        if options.streaming:
            console.print("Only the measured passages, at the start of each stream, are checked for being in both.")
        refuse_overlap(compared["forget"], compared["retain"])
    return examples, measured


def check_ids(
    examples: Mapping[str, Examples], measured: Mapping[str, Sequence[Example]], model: Any, pad: int
) -> None:
    """Raise where a text, or padding, has a token that the model has no embedding of; of streams, one measured."""
    known = model.get_input_embeddings().weight.shape[0]
    for side, part in examples.items():
        for example in measured[side] if isinstance(part, ExampleStream) else part:
            largest = max(pad, *example.input_ids)
            if largest >= known:
                raise FastforgetError(
                    f"{example.source}: the tokenizer gives token {largest}, and the model has embeddings of {known} "
                    "tokens: they do not belong together (or the model's embeddings were not resized)"
                )


def refuse_overlap(forget: Sequence[Example], retain: Sequence[Example]) -> None:
    """Raise where a passage is to be forgotten and to be kept."""
    kept = {example.input_ids: example.source for example in retain}
    for example in forget:
        if example.input_ids in kept:
            raise FastforgetError(
                f"the same passage is in the forget set ({example.source}) and in the retain set "
                f"({kept[example.input_ids]}): remove it from one of them"
            )
