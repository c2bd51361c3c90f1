"""`fastforget evaluate`: what a model still knows of a text, without and with an adapter."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from fastforget.data.examples import Example
from fastforget.data.sources import Source, check_source, read_source
from fastforget.evaluate.report import check_measured, figures, print_continuations, print_table, write_json
from fastforget.evaluate.robustness import RELEARN_RATE, RELEARN_STEPS, RobustnessRow, print_robustness, robustness
from fastforget.jobs.loop import run_job
from fastforget.jobs.options import EvaluateOptions, JobSettings, called_with, console_of
from fastforget.jobs.outputs import REPORT, claimed_folder
from fastforget.jobs.running import measure, surroundings
from fastforget.models import load, load_tokenizer
from fastforget.objectives import CE

SETS = ("forget", "retain", "unseen")


def read_examples(options: EvaluateOptions, tokenizer: Any) -> dict[str, list[Example]]:
    """Read the passages that are measured, by set."""
    sets: dict[str, list[Example]] = {}
    for name in SETS:
        texts = getattr(options, name)
        if texts is None:
            continue
        source = Source(
            path=texts, columns=options.columns or {}, split=options.split, chat_template=options.chat_template
        )
        check_source(source, name)
        sets[name] = list(read_source(source, tokenizer, options.max_length))[: options.measured_passages]
    return sets


@called_with(EvaluateOptions)
def evaluate(options: EvaluateOptions) -> dict[str, Any]:
    """Measure what a model says of its forget set without and with an adapter: `fastforget evaluate` in Python.

    Both are measured on the same prompts: leak and ROUGE-L of greedy continuations, exact memorisation, extraction
    strength, logit lens, probability, NLL, and how the continuations read. `robust` measures again after merging in 16
    bit, after quantising that to 8 and 4 bit, and after learning half of the forget set again.

    Returns:
        What report.json holds.

    Raises:
        FastforgetError: bad input, before anything is written.
    """
    # no adapter in there is touched
    with claimed_folder(Path(options.out), overwrite=True), surroundings(options.seed, options.quiet):
        return run_evaluate(options)


def run_evaluate(options: EvaluateOptions) -> dict[str, Any]:
    """Read, load, measure with the adapter off and on, print and write."""
    start = time.perf_counter()
    console = console_of(options.quiet, options.console)
    tokenizer = load_tokenizer(options.model)
    sets = read_examples(options, tokenizer)
    model: Any = load(
        options.model,
        bits=options.bits,
        adapter=options.adapter,
        device=options.device,
        allow_missing_weights=options.allow_missing_weights,
    )
    with model.disable_adapter():
        before = measure(model, tokenizer, sets, "The untouched model", console)
    after = before if options.adapter is None else measure(model, tokenizer, sets, "With the adapter", console)
    check_measured(after, "the model is broken")
    report: dict[str, Any] = {
        "command": "evaluate",
        "model": str(options.model),
        "adapter": None if options.adapter is None else str(options.adapter),
        "bits": options.bits,
        **figures(before, after),
    }
    print_table(console, before, after)
    print_continuations(console, before, after, {name: 2 if name == "forget" else 1 for name in sets})
    if options.adapter is not None and options.robust:
        rows = robust_rows(options.model, options.adapter, tokenizer, sets, options.bits, options.device, options.seed)
        report["robustness"] = [asdict(row) for row in rows]
        print_robustness(console, rows)
    report["seconds"] = round(time.perf_counter() - start, 1)
    return write_json(Path(options.out) / REPORT, report)


def robust_rows(
    model: str | os.PathLike[str],
    adapter: str | os.PathLike[str],
    tokenizer: Any,
    sets: Mapping[str, Sequence[Example]],
    bits: int,
    device: str | None,
    seed: int,
) -> list[RobustnessRow]:
    """Measure what lasts of an adapter's forgetting; half of the forget set is learned again by cross-entropy."""
    settings = JobSettings(learning_rate=RELEARN_RATE, max_steps=RELEARN_STEPS, seed=seed)

    def relearn(model: Any, tokenizer: Any, examples: Sequence[Example]) -> None:
        run_job(model, tokenizer, examples, None, [CE(on="forget")], settings)

    torch.manual_seed(seed)  # PEFT draws the fresh adapters
    return robustness(
        model, adapter, tokenizer, sets["forget"], sets.get("unseen", []), relearn, device=device, bits=bits
    )
