"""`fastforget unlearn`, and `fastforget.unlearn` in Python: a user's model forgets a user's text."""

from __future__ import annotations

import functools
import time
from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from rich.console import Console
from safetensors import SafetensorError

from fastforget.adapters import save_adapter
from fastforget.backbone import Backbone
from fastforget.clusters import save_centres
from fastforget.collectives import is_first
from fastforget.combine import check_sides
from fastforget.compiling import compile_layers
from fastforget.config import CONFIG, plain, write_config
from fastforget.data.examples import ExampleStream
from fastforget.data.refusals import read_refusals
from fastforget.errors import FastforgetError, NonFiniteLossError
from fastforget.evaluate.report import (
    check_measured,
    print_continuations,
    print_table,
    strict,
)
from fastforget.head import context_length
from fastforget.jobs.checkpoints import Checkpoints, claimed_with_checkpoints, identity_of
from fastforget.jobs.companions import check_sets
from fastforget.jobs.launched import launched_processes, own_device
from fastforget.jobs.loop import check_stopping, run_job
from fastforget.jobs.options import NOT_OF_THE_RESULT, JobSettings, UnlearnOptions, called_with
from fastforget.jobs.outputs import BROKEN, REPORT, outcome, say_merge, say_not_gone, write_report, write_somewhere
from fastforget.jobs.planning import fitted
from fastforget.jobs.progress import shown_steps
from fastforget.jobs.running import measure, say, surroundings
from fastforget.jobs.sets import check_ids, read_sets
from fastforget.models import load, load_tokenizer
from fastforget.objectives import Term, layers_of


@called_with(UnlearnOptions)
def unlearn(options: UnlearnOptions) -> dict[str, Any]:
    """Make a model forget a text: `fastforget unlearn` in Python, with the same names and defaults.

    The folder `out` gets a LoRA adapter in PEFT's format, report.json, a model card of it (README.md), and config.yaml,
    with which `fastforget unlearn --config` does the same again. The adapter is written whole or not at all, the others
    only with it. The seed decides every random draw; torch's own generators are left as they were.

    Started by `torchrun` or `accelerate launch`, or in a process group, each process computes its share of every batch,
    and the adapter is that of one process; the first one alone shows and writes (`jobs/launched.py`).

    Args:
        model: a local folder or a hub name of a causal LM.
        forget, retain: what to forget, and what to keep: a text file, a .jsonl file, a dataset's folder or hub name; a
            `datasets.Dataset`; or a list of texts or of dicts. Rows have `text`, or `prompt` and `response`, or chat
            `messages`.
        forget_columns, retain_columns: where rows name these otherwise: field -> column, `{"prompt": "question"}`.
        streaming: read dataset rows as they are needed; needs `max_steps`.
        chat_template: default where the tokenizer has one.
        preset_options: of the preset, by name.
        refusals: what terms that teach a refusal draw from: a text file, one a line, or texts; default a list of ours.
        allow_missing_weights: take a checkpoint that lacks weights of the model, which are then random, or has others.
        epochs, max_steps: passes over the forget set, or, where given, steps.
        fit: memory of the device ("16GB"): take the most bits, at most `bits`, and the largest micro-batch that fit it
            (`fastforget.plan`).
        stop_forget_nll: stop at a step whose forget batch has this NLL (nats per token).
        max_retain_nll: stop at the first step whose retain batch has an NLL above this, with the adapter before.
        save_steps, keep_checkpoints, resume: write a checkpoint every so many steps, keep so many of them, and go on
            from the last one: the adapter ends bit for bit as if nothing had happened (on the same machine's CPU).
        reference_cache: a folder in which other jobs on this model find what the frozen model said.
        combine: "sum", "mgda" or "pcgrad": how the gradients of both sides become one (`fastforget.combine`).
        log_to: "jsonl" (log.jsonl in `out`), "tensorboard" or "wandb": every step's figures.
        quiet: print nothing. Otherwise `console` (default: standard output) gets what the command prints.

    Returns:
        What report.json holds.

    Raises:
        NonFiniteLossError: the loss, its gradient or a weight became NaN; the last good adapter, if any, is saved.
        FastforgetError: any other bad input, before anything is written.
    """
    with launched_processes(options):
        if is_first():
            return in_folder(options)
        with surroundings(options.seed, quiet=True):
            return run_unlearn(replace(options, quiet=True, log_to=None), Checkpoints(Path(options.out)))


def in_folder(options: UnlearnOptions) -> dict[str, Any]:
    """Run a job that writes into its folder."""
    checkpoints = Checkpoints(Path(options.out), options.keep_checkpoints)
    claimed = claimed_with_checkpoints(checkpoints, overwrite=options.overwrite, resume=options.resume)
    with claimed, surroundings(options.seed, options.quiet):
        return run_unlearn(options, checkpoints)


def run_unlearn(options: UnlearnOptions, checkpoints: Checkpoints) -> dict[str, Any]:
    """Check, read, load, measure, unlearn, measure, save: what `unlearn` does, with its result and its errors."""
    console = options.printer()
    start = time.perf_counter()
    out = Path(options.out)
    terms = job_terms(options, console)
    options = fitted(options, terms, console)
    check_stopping(terms, options)
    check_sides(options.combine, terms)
    refusals = read_refusals(options.refusals)
    lora = options.lora
    device = own_device(options.device)
    sources = {side: options.source(side) for side in ("forget", "retain")}
    config = options.as_config()
    tokenizer = load_tokenizer(options.model)
    examples, measured = read_sets(sources, tokenizer, options, console)
    model = load(
        options.model,
        bits=options.bits,
        lora=lora,
        device=device,
        allow_missing_weights=options.allow_missing_weights,
        checkpointing=options.checkpointing,
    )
    check_ids(examples, measured, model, tokenizer.pad_token_id)
    if options.compile:
        compile_layers(model, progress=console.print)
    Backbone(model).check_layers(layers_of(terms))
    context = context_length(model)
    if context is not None and options.max_length > context:
        raise FastforgetError(f"--max-length {options.max_length} is more than the model's context of {context} tokens")

    if options.resume or options.save_steps is not None:
        decisive = {name: value for name, value in config.items() if name not in NOT_OF_THE_RESULT}
        checkpoints.identity = identity_of(decisive, examples, model)
    before = measure(model, tokenizer, measured, "Before: continuing the passages", console)
    check_measured(before, "it is broken before anything was unlearned; check its weights, or give --bits 32")
    checkpoints.begin(options.resume, functools.partial(say, console))
    try:
        with shown_steps(options.preset, console, log_to=options.log_to, out=out, goes_on=options.resume) as progress:
            result = run_job(
                model,
                tokenizer,
                examples["forget"],
                examples.get("retain"),
                terms,
                options,
                checkpoints=checkpoints,
                resume=options.resume,
                progress=progress,
                refusals=refusals,
                max_length=options.max_length,
            )
    except NonFiniteLossError as error:
        if error.good_steps > 0:
            save(model, tokenizer, terms, out, config)
            raise NonFiniteLossError(f"{error}; it is saved in {out}", error.good_steps) from error
        raise
    except (OSError, SafetensorError) as error:
        save(model, tokenizer, terms, out, config)
        raise FastforgetError(f"ended early ({error}); the adapter as it has become is saved in {out}") from error
    after = measure(model, tokenizer, measured, "After: continuing the passages", console)
    check_measured(after, BROKEN)
    settings = {each.name: getattr(options, each.name) for each in fields(JobSettings)}
    report = {
        "command": "unlearn",
        "model": str(options.model),
        **{name: plain(value) for name, value in settings.items() if value is not None},
        "bits": options.bits,
        **outcome(options, before, after, result, start),
    }
    save(model, tokenizer, terms, out, config, report)
    print_table(console, before, after)
    print_continuations(console, before, after, {name: 2 if name == "forget" else 1 for name in measured})
    if not isinstance(examples["forget"], ExampleStream):
        say_not_gone(console, result, examples["forget"], tokenizer)
    say(console, f"{result.stopped}; {result.seconds:.0f} s. The adapter, {REPORT} and {CONFIG} lie in {out}.")
    say_merge(console, options.model, out)
    return strict(report)


def job_terms(options: UnlearnOptions, console: Console) -> list[Term]:
    """Build the preset's terms, without those on the retain set where there is none."""
    terms = options.terms()
    if options.retain is None and any(term.on == "retain" for term in terms):
        terms = [term for term in terms if term.on != "retain"]
        say(console, "No --retain: the preset's retain terms are left out, and nothing keeps the rest of the model.")
    check_sets(terms, options.retain is not None, options.stop_forget_nll)
    for note in (term.job_note for term in terms if term.job_note):
        say(console, note)
    return terms


def save(
    model: Any,
    tokenizer: Any,
    terms: Sequence[Term],
    out: Path,
    config: Mapping[str, Any],
    report: Mapping[str, Any] | None = None,
) -> None:
    """Save the adapter, and beside it the cluster centres, the options that it came from, the report and a model card.

    Of several processes the first one saves.
    """
    if not is_first():
        return

    def write(folder: Path) -> None:
        save_adapter(model, tokenizer, folder)
        save_centres(terms, folder)
        comment = "the same again: fastforget unlearn --config THIS_FILE --out ANOTHER_FOLDER"
        write_config(folder / CONFIG, config, comment)
        write_report(folder, report)

    write_somewhere(out, write)
