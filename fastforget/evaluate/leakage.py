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

import contextlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from transformers import PreTrainedTokenizerBase

from fastforget.data.examples import Example
from fastforget.errors import FastforgetError
from fastforget.evaluate.degenerate import distinct, is_blank, is_degenerate
from fastforget.evaluate.generation import CONTINUATION_CHARACTERS, Progress, continue_greedily, decode, room
from fastforget.evaluate.label_tokens import label_tokens
from fastforget.evaluate.memorisation import Memorisation, MemorisationReport, memorisation, prompt_tokens
from fastforget.evaluate.rouge import rouge_l_recall
from fastforget.head import base_causal_lm

LEAK_RECALL = 0.5


@dataclass(frozen=True)
class Continuation:
    """One passage: what the model was given, what stands there, and what it wrote instead."""

    prompt: str
    truth: str  # up to CONTINUATION_CHARACTERS characters, as is `output`
    output: str
    rouge: float  # ROUGE-L recall of the truth, 0 to 1
    leaked: bool
    degenerate: bool
    blank: bool = False
    source: str = ""


@dataclass(frozen=True)
class LeakageReport:
    """A set of passages: shares and means from 0 to 1, and the continuations in the order of the examples."""

    leak: float  # share of passages that leak
    rouge: float  # mean ROUGE-L recall
    degenerate_share: float
    blank_share: float  # of the degenerate ones, those without a letter or digit
    distinct_2: float | None  # share of distinct pairs of words in all continuations; None where there is no pair
    fluency: float | None  # nats per token of the continuations under the untouched model; None without one
    memorised: MemorisationReport
    continuations: list[Continuation] = field(repr=False)

    @property
    def nll(self) -> float:
        """Nats per label token, mean over all label tokens."""
        return self.memorised.nll


def leakage(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    examples: Sequence[Example],
    *,
    untouched: Any = None,
    lens: bool = False,
    batch_size: int = 16,
    progress: Progress | None = None,
) -> LeakageReport:
    """Measure what a causal language model (or a PeftModel around one) still recites of the examples, and how it reads.

    `progress` is called after each batch of the two passes (continuations, then the true text), so `total` is twice the
    number of examples. The model is in evaluation mode meanwhile, and every module's mode is restored afterwards.

    Args:
        untouched: the model under which the continuations' fluency is measured; default a PeftModel's own base, and
            none for any other model.
        lens: measure each layer's exact memorisation too.
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
    continuations = []
    for example, split, prompt, output in zip(examples, splits, prompts, outputs, strict=True):
        truth = decode(tokenizer, example.input_ids[split:])[:CONTINUATION_CHARACTERS]
        rouge = rouge_l_recall(truth, output)
        continuations.append(
            Continuation(
                prompt=decode(tokenizer, prompt),
                truth=truth,
                output=output,
                rouge=rouge,
                leaked=rouge >= LEAK_RECALL,
                degenerate=is_degenerate(output),
                blank=is_blank(output),
                source=example.source,
            )
        )
    memorised = memorisation(
        model,
        tokenizer,
        examples,
        splits=splits,
        lens=lens,
        batch_size=batch_size,
        progress=lambda done, _: report(count + done, 2 * count),
    )
    return LeakageReport(
        leak=sum(continuation.leaked for continuation in continuations) / count,
        rouge=sum(continuation.rouge for continuation in continuations) / count,
        degenerate_share=sum(continuation.degenerate for continuation in continuations) / count,
        blank_share=sum(continuation.blank for continuation in continuations) / count,
        distinct_2=distinct(outputs, 2),
        fluency=fluency(model, tokenizer, prompts, outputs, untouched=untouched, batch_size=batch_size),
        memorised=memorised,
        continuations=continuations,
    )


def leakage_from(stored: Mapping[str, Any]) -> dict[str, LeakageReport]:
    """Return reports as they were, from what `dataclasses.asdict` and JSON made of them; a missing NLL is NaN."""
    reports = {}
    for name, part in stored.items():
        memorised = part["memorised"]
        passages = [None if each is None else Memorisation(**each) for each in memorised["passages"]]
        nll = math.nan if memorised["nll"] is None else memorised["nll"]
        continuations = [Continuation(**each) for each in part["continuations"]]
        report = {"memorised": MemorisationReport(nll, passages), "continuations": continuations}
        reports[name] = LeakageReport(**{**part, **report})
    return reports


def fluency(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    outputs: Sequence[str],
    *,
    untouched: Any = None,
    batch_size: int = 16,
) -> float | None:
    """Measure how likely the untouched model finds what was written: nats per token of the outputs.

    `untouched` as in `leakage`. None where there is no such model, or no output has a token.
    """
    from peft import PeftModel  # bitsandbytes comes with it, and warns unless `models` silenced it before

    if untouched is None and not isinstance(model, PeftModel):
        return None
    written = [tuple(tokenizer.encode(output, add_special_tokens=False)) for output in outputs]
    examples = [  # cut where other tokens of the same text would not fit into the context any more
        Example((*prompt, *ids[: room(base_causal_lm(model), len(prompt), len(ids))]), prompt_length=len(prompt))
        for prompt, ids in zip(prompts, written, strict=True)
        if ids
    ]
    if not examples:
        return None
    off = model.disable_adapter() if untouched is None else contextlib.nullcontext()
    with off:
        return mean_nll(model if untouched is None else untouched, examples, batch_size=batch_size)


def mean_nll(
    model: Any, examples: Sequence[Example], *, batch_size: int = 16, progress: Progress | None = None
) -> float:
    """Measure the negative log-likelihood in nats: the mean over the label tokens of all examples, not of batch means.

    NaN for a broken model.

    Raises:
        FastforgetError: no example has a label token, or a head that `LMHead.from_model` refuses.
    """
    found = label_tokens(model, examples, batch_size=batch_size, progress=progress)
    logp = [token for tokens in found if tokens is not None for token in tokens.logp]
    if not logp:
        raise FastforgetError("no example has a label token, so there is no likelihood to measure")
    return -math.fsum(logp) / len(logp)
