"""`fastforget evaluate`: what a model still knows of a text, without and with an adapter."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import torch

from fastforget.data.examples import Example
from fastforget.data.sources import read_source
from fastforget.evaluate.ability import ability, task_manager
from fastforget.evaluate.evaluators import name_of
from fastforget.evaluate.leakage import leakage_from
from fastforget.evaluate.page import PAGE, samples_of, write_page
from fastforget.evaluate.prompting import prompting_rows
from fastforget.evaluate.report import (
    check_measured,
    figures,
    peak_rss_mb,
    print_continuations,
    print_figures,
    print_table,
    write_json,
)
from fastforget.evaluate.robustness import (
    RELEARN_RATE,
    RELEARN_STEPS,
    Merged,
    RobustnessRow,
    print_robustness,
    robustness,
)
from fastforget.evaluate.tofu import LOG
from fastforget.jobs.evaluation_options import MEMORISATION, EvaluateOptions, parsed_place
from fastforget.jobs.loop import run_job
from fastforget.jobs.options import JobSettings, called_with, console_of
from fastforget.jobs.outputs import REPORT, claimed_folder
from fastforget.jobs.running import measure, progress_bar, surroundings
from fastforget.jobs.stages import Stages, stamp
from fastforget.jobs.suites import SUITES, Suite
from fastforget.models import load, load_tokenizer
from fastforget.objectives import CE

SETS = ("forget", "retain", "unseen")


def read_examples(options: EvaluateOptions, tokenizer: Any) -> dict[str, list[Example]]:
    """Read the passages that are measured, by set."""
    sources = {name: options.source(name, options.format_of(name)) for name in SETS}
    return {
        name: list(read_source(source, tokenizer, options.max_length))[: options.measured_passages]
        for name, source in sources.items()
        if source is not None
    }


@called_with(EvaluateOptions)
def evaluate(options: EvaluateOptions) -> dict[str, Any]:
    """Measure what a model says of its forget set without and with an adapter: `fastforget evaluate` in Python.

    Both are measured on the same prompts. The suite "memorisation": leak and ROUGE-L of greedy continuations, exact
    memorisation, extraction strength, logit lens, probability, NLL, and how the continuations read; `robust` measures
    again after merging in 16 bit, after quantising that to 8 and 4 bit, and after learning half of the forget set
    again. The others: "tofu", "muse", "membership", "harm" and "hallucination" (`jobs/suites.py`).

    An interrupted evaluation goes on where it was when the same is run again into the same folder.

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
    tokenizer = load_tokenizer(options.model)
    suite = None if options.suite == MEMORISATION else SUITES[options.suite](options, tokenizer)
    sets = read_examples(options, tokenizer) if suite is None else {}
    manager = task_manager(options.task_names, options.task_folder) if options.task_names else None
    stages = Stages(Path(options.out), stage_settings(options))
    model: Any = load(
        options.model,
        bits=options.bits,
        adapter=options.adapter,
        device=options.device,
        allow_missing_weights=options.allow_missing_weights,
    )
    report: dict[str, Any] = {
        "command": "evaluate",
        "suite": options.suite,
        "model": str(options.model),
        "adapter": None if options.adapter is None else str(options.adapter),
        "bits": options.bits,
        "seed": options.seed,
    }
    if suite is None:
        report |= run_memorisation(options, model, tokenizer, sets, stages)
    else:
        report |= run_suite(options, suite, model, stages)
    if manager is not None:
        report["ability"] = run_tasks(options, model, tokenizer, manager, stages)
    report["seconds"] = round(time.perf_counter() - start, 1)
    report["peak_rss_mb"] = round(peak_rss_mb())
    report = write_json(Path(options.out) / REPORT, report)
    write_page(Path(options.out) / PAGE, report)
    stages.done()
    return report


def stage_settings(options: EvaluateOptions) -> dict[str, Any]:
    """Return what the results of an evaluation depend on: its options, and models and data as they are now."""
    values = {each.name: getattr(options, each.name) for each in fields(options)}
    for name in ("out", "quiet", "console"):
        del values[name]
    if callable(options.evaluator):
        values["evaluator"] = name_of(options.evaluator)
    places: list[Any] = [options.model, options.adapter, options.retain_log, options.evaluator, options.reference]
    for texts in (options.forget, options.retain, options.unseen, *(options.sets or {}).values()):
        places.append(None if texts is None else parsed_place(texts)[0])
    return {**values, "places": [stamp(each) for each in places]}


def run_suite(options: EvaluateOptions, suite: Suite, model: Any, stages: Stages) -> dict[str, Any]:
    """Measure both models with a suite; return its part of the report, and leave the log of the measured model."""
    console = console_of(options.quiet, options.console)

    def measured(label: str) -> Any:
        with progress_bar(label, console) as update:
            return suite.measure(model, update)

    def untouched() -> Any:
        with model.disable_adapter():
            return measured("The untouched model")

    before = stages.once("untouched", untouched)
    after = before if options.adapter is None else stages.once("adapter", lambda: measured("With the adapter"))
    print_figures(console, options.suite, before["figures"], after["figures"])
    if after["log"]:
        write_json(Path(options.out) / LOG, after["log"])
    return {"before": before, "after": after, "compared": suite.compare(before, after)}


def run_tasks(options: EvaluateOptions, model: Any, tokenizer: Any, manager: Any, stages: Stages) -> dict[str, Any]:
    """Measure the general ability of both models; return its part of the report, in the form of a suite's."""

    def measured() -> Any:
        names, most = options.task_names, options.task_questions
        return {"figures": ability(model, tokenizer, names, manager, limit=most, seed=options.seed)}

    def untouched() -> Any:
        with model.disable_adapter():
            return measured()

    before = stages.once("untouched-tasks", untouched)
    after = before if options.adapter is None else stages.once("adapter-tasks", measured)
    print_figures(console_of(options.quiet, options.console), "general ability", before["figures"], after["figures"])
    return {"before": before, "after": after}


def run_memorisation(
    options: EvaluateOptions, model: Any, tokenizer: Any, sets: Mapping[str, Sequence[Example]], stages: Stages
) -> dict[str, Any]:
    """Measure what both models recite; return its part of the report."""
    console = console_of(options.quiet, options.console)

    def measured(label: str) -> Any:
        return {name: asdict(each) for name, each in measure(model, tokenizer, sets, label, console).items()}

    def untouched() -> Any:
        with model.disable_adapter():
            return measured("The untouched model")

    before = leakage_from(stages.once("untouched", untouched))
    after = before
    if options.adapter is not None:
        after = leakage_from(stages.once("adapter", lambda: measured("With the adapter")))
    check_measured(after, "the model is broken")
    print_table(console, before, after)
    print_continuations(console, before, after, {name: 2 if name == "forget" else 1 for name in sets})
    report = {**figures(before, after), "samples": samples_of(before, after)}
    if options.adapter is not None and options.robust:
        adapter = options.adapter

        def lasting() -> Any:
            retain, unseen = (sets.get(name, []) for name in ("retain", "unseen"))
            place = (options.model, adapter, tokenizer, sets, options.bits, options.device, options.seed)
            rows = robust_rows(*place, other=retain)
            rows += prompting_rows(model, tokenizer, sets["forget"], retain, unseen)
            return [asdict(row) for row in rows]

        report["robustness"] = stages.once("robustness", lasting)
        print_robustness(console, [RobustnessRow(**row) for row in report["robustness"]])
    return report


def robust_rows(
    model: str | os.PathLike[str],
    adapter: str | os.PathLike[str],
    tokenizer: Any,
    sets: Mapping[str, Sequence[Example]],
    bits: int,
    device: str | None,
    seed: int,
    other: Sequence[Example] = (),
    merged: Merged | None = None,
) -> list[RobustnessRow]:
    """Measure what lasts of an adapter's forgetting; half of the forget set is learned again by cross-entropy.

    `other`, `merged`: as in `robustness`.
    """
    settings = JobSettings(learning_rate=RELEARN_RATE, max_steps=RELEARN_STEPS, seed=seed)

    def relearn(model: Any, tokenizer: Any, examples: Sequence[Example]) -> None:
        run_job(model, tokenizer, examples, None, [CE(on="forget")], settings)

    torch.manual_seed(seed)  # PEFT draws the fresh adapters
    unseen = sets.get("unseen", [])
    return robustness(
        model,
        adapter,
        tokenizer,
        sets["forget"],
        unseen,
        relearn,
        other=other,
        merged=merged,
        device=device,
        bits=bits,
    )
