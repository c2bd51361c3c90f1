"""What the demo unlearns: a small model and Python's language reference, or SmolLM2 and invented people."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console

from fastforget.data.examples import Example
from fastforget.data.topics import load_corpus
from fastforget.evaluate.leakage import LeakageReport
from fastforget.evaluate.report import Reports
from fastforget.jobs.bases import base_key, cached_base
from fastforget.jobs.memorise import build_model, memorise, save_base
from fastforget.jobs.running import progress_bar

BASE_VERSION = 1  # part of the cache's key: raise it when the base model's recipe changes
FIRST_NLL, LAST_NLL = 8.0, 0.075  # nats per token, about: where memorising begins and ends, for its progress bar


@dataclass(frozen=True)
class DemoScale:
    """How much text and how large a base; the default is the demo, tests take less."""

    topic_counts: tuple[int, int, int] = (4, 8, 4)
    passages_per_topic: int = 6
    hidden_size: int = 256
    layers: int = 2


@dataclass(frozen=True)
class Subject:
    """A base that knows what it is to forget, and what is measured of it.

    sets: passages by name: "forget", "retain", and "unseen", which were never trained on. forgotten: what is trained on
    to forget the forget set, where that is not its passages as they are; kept: what is trained on beside it. aimed_by:
    texts to keep by which the adapter is aimed first, where it is. settings: of the job. values: by set, the words by
    which an output answers its prompt. ability: measures what else the model can do, by figure; told: says all figures
    in lines, of the model before and after.
    """

    base: Path
    trained_seconds: float
    sets: dict[str, list[Example]]
    kept: Sequence[Example]
    forgotten: Sequence[Example] = ()
    settings: dict[str, Any] = field(default_factory=dict)
    values: dict[str, list[str]] = field(default_factory=dict)
    lora: dict[str, Any] = field(default_factory=dict)
    aimed_by: Sequence[Example] = ()
    ability: Callable[[Any, Any], dict[str, Any]] | None = None
    told: Callable[[dict[str, Any], dict[str, Any]], list[str]] = lambda before, after: []

    def figures(self, model: Any, tokenizer: Any, reports: Reports) -> dict[str, Any]:
        """Measure what this subject has of its own: answers to its prompts by set, how they read, and other ability."""
        if self.ability is None:
            return {}
        found: dict[str, Any] = {}
        for name, report in reports.items():
            found[f"{name}_answered"] = share_answered(report, self.values[name])
            found[f"{name}_extraction"] = report.memorised.extraction
            found[f"{name}_fluency"] = report.fluency
        return {**found, **self.ability(model, tokenizer)}


def share_answered(report: LeakageReport, values: Sequence[str]) -> float:
    """Return the share of prompts whose output holds the words that answer it."""
    outputs = [each.output for each in report.continuations]
    return sum(value in output for value, output in zip(values, outputs, strict=True)) / len(outputs)


def small_subject(seed: int, scale: DemoScale, cache: Path, console: Console) -> Subject:
    """Train (or take from the cache) a small OPT that recites passages of the language reference."""
    corpus = load_corpus(seed, topic_counts=scale.topic_counts, passages_per_topic=scale.passages_per_topic)
    console.print(
        f"Text: Python's language reference, {len(corpus.forget)} passages to forget, {len(corpus.retain)} to keep, "
        f"{len(corpus.unseen)} never trained on."
    )

    def write(folder: Path) -> None:
        model = build_model(corpus.tokenizer, hidden_size=scale.hidden_size, layers=scale.layers, seed=seed)
        parameters = sum(parameter.numel() for parameter in model.parameters())
        console.print(f"Training a base of {parameters / 1e6:.1f} M parameters until it recites them word for word ...")
        with progress_bar("Memorising", console) as update:

            def progress(recited: float, nll: float) -> None:
                update(math.log(FIRST_NLL / nll), math.log(FIRST_NLL / LAST_NLL), f"NLL {nll:.2f}")

            memorise(model, corpus.tokenizer, [*corpus.forget, *corpus.retain], seed=seed, progress=progress)
        save_base(model, corpus.tokenizer, folder)

    # the passages tell Python's version, too
    key = base_key((BASE_VERSION, seed, scale), [*corpus.forget, *corpus.retain])
    base, seconds = cached_base(cache, key, write)
    sets = {"forget": corpus.forget, "retain": corpus.retain, "unseen": corpus.unseen}
    return Subject(base, seconds, sets, corpus.retain)
