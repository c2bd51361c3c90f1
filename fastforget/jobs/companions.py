"""What a job adds to its batches for terms that need it: refusals, and answers of other prompts, fresh at each step."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from fastforget.batch import Batch
from fastforget.data.answers import mismatched, padding_of, with_refusals
from fastforget.data.examples import Example, ExampleStream
from fastforget.data.refusals import REFUSALS
from fastforget.errors import FastforgetError
from fastforget.objectives import Term
from fastforget.streams import used_streams

STREAM_EXAMPLES_FOR_ANSWERS = 1024


class Answers(Sequence[tuple[int, ...]]):
    """The answers of examples, each cut out when it is asked for."""

    def __init__(self, examples: Sequence[Example]) -> None:
        self.examples = examples

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, index: Any) -> Any:
        return self.examples[index].answer


class Companions:
    """Attaches to a step's batches the companions that the terms look at.

    Args:
        retain: the retain set, whose answers stand for those of other prompts; of a stream, those at its start. Where
            it holds fewer than a term's `mismatched_answers`, each prompt gets all of them.
        refusals: texts to draw from.
        max_length: tokens of a row at most.
        seed: of the draws.

    Raises:
        FastforgetError: a term needs other prompts' answers, and there is no retain set.
    """

    def __init__(
        self,
        terms: Sequence[Term],
        tokenizer: Any,
        retain: Sequence[Example] | ExampleStream | None,
        refusals: Sequence[str] = REFUSALS,
        *,
        max_length: int | None = None,
        seed: int = 0,
    ) -> None:
        check_sets(terms, bool(retain))
        self.used = {(term.on, stream) for term in terms for stream in used_streams(term)}
        self.draws = max((term.mismatched_answers for term in terms if "mismatch" in used_streams(term)), default=0)
        self.tokenizer, self.refusals, self.max_length = tokenizer, refusals, max_length
        self.generator = torch.Generator().manual_seed(seed)
        if self.draws and retain:
            known = retain.head(STREAM_EXAMPLES_FOR_ANSWERS) if isinstance(retain, ExampleStream) else retain
            self.answers = Answers(known)
            self.draws = min(self.draws, len(known))

    def attach(self, side: str, batch: Batch) -> Batch:
        """Return one side's batch with the companions that terms on it look at."""
        whole = dict(batch)
        if (side, "refusal") in self.used and "refusal" not in whole:  # examples may have alternative answers
            whole = with_refusals(
                whole, self.tokenizer, self.refusals, generator=self.generator, max_length=self.max_length
            )
        if (side, "mismatch") in self.used:
            whole["mismatch"] = mismatched(
                batch,
                self.answers,
                self.draws,
                pad_token_id=padding_of(self.tokenizer),
                generator=self.generator,
                max_length=self.max_length,
            )
        return whole


def check_sets(terms: Sequence[Term], has_retain: bool, stop_forget_nll: float | None = None) -> None:
    """Raise where terms need a retain set's answers and there is none, or a stop needs an NLL that no term makes."""
    drawing = [term.name for term in terms if "mismatch" in used_streams(term)]
    if drawing and not has_retain:
        raise FastforgetError(
            f"{', '.join(drawing)} draws other prompts' answers from the retain set, and there is none: give one"
        )
    if stop_forget_nll is not None and not any(term.on == "forget" and "answer" in term.streams for term in terms):
        names = ", ".join(term.name for term in terms)
        raise FastforgetError(
            f"--stop-forget-nll watches the NLL of the forget set's answers, and no term computes it ({names}): leave "
            "it out, or take another preset"
        )
