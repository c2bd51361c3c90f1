"""`fastforget unlearn`, and `fastforget.unlearn` in Python: a user's model forgets a user's text."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from fastforget.backbone import Backbone
from fastforget.clusters import save_centres
from fastforget.combine import check_sides
from fastforget.config import CONFIG, plain, write_config
from fastforget.data.examples import Example
from fastforget.data.refusals import read_refusals
from fastforget.errors import FastforgetError, NonFiniteLossError
from fastforget.jobs.companions import check_sets
from fastforget.jobs.loop import check_stopping, run_job, shown_nll
from fastforget.jobs.options import Texts, UnlearnOptions
from fastforget.jobs.outputs import REPORT, claim_folder
from fastforget.jobs.sets import read_sets
from fastforget.adapters import save_adapter
from fastforget.models import load, load_tokenizer
from fastforget.objectives import Term, layers_of
from fastforget.objectives import preset as preset_terms

if TYPE_CHECKING:  # this module comes with `import fastforget`: what is slow to import waits until a job runs
    from rich.console import Console

    from fastforget.evaluate.leakage import LeakageReport

BROKEN = "unlearning broke the model, and it is not saved; a lower --learning-rate or fewer --max-steps may help"


def unlearn(
    model: str | os.PathLike[str],
    forget: Texts,
    out: str | os.PathLike[str],
    *,
    retain: Texts | None = None,
    forget_columns: Mapping[str, str] | None = None,
    retain_columns: Mapping[str, str] | None = None,
    forget_split: str = UnlearnOptions.forget_split,
    retain_split: str = UnlearnOptions.retain_split,
    forget_subset: str | None = None,
    retain_subset: str | None = None,
    streaming: bool = UnlearnOptions.streaming,
    chat_template: bool | None = None,
    max_length: int = UnlearnOptions.max_length,
    measured_passages: int = UnlearnOptions.measured_passages,
    preset: str = UnlearnOptions.preset,
    preset_options: Mapping[str, Any] | None = None,
    refusals: str | os.PathLike[str] | Sequence[str] | None = None,
    bits: int = UnlearnOptions.bits,
    allow_missing_weights: bool = UnlearnOptions.allow_missing_weights,
    lora_r: int = UnlearnOptions.lora_r,
    lora_alpha: int | None = None,
    lora_targets: str | Sequence[str] = UnlearnOptions.lora_targets,
    device: str | None = None,
    learning_rate: float = UnlearnOptions.learning_rate,
    epochs: float = UnlearnOptions.epochs,
    max_steps: int | None = None,
    batch_size: int = UnlearnOptions.batch_size,
    micro_batch: int | None = None,
    seed: int = UnlearnOptions.seed,
    save_steps: int | None = None,
    stop_forget_nll: float | None = None,
    combine: str = UnlearnOptions.combine,
    overwrite: bool = UnlearnOptions.overwrite,
    quiet: bool = False,
    console: Console | None = None,
) -> dict[str, Any]:
    """Make a model forget a text: `fastforget unlearn` in Python, with the same names and defaults.

    The folder `out` gets a LoRA adapter in PEFT's format, report.json, and config.yaml, with which
    `fastforget unlearn --config` does the same again. The adapter is written whole or not at all, the other two only
    with it. The seed decides every random draw; torch's own generators are left as they were.

    Args:
        model: a local folder or a hub name of a causal LM.
        forget, retain: what to forget, and what to keep: a text file, a .jsonl file, a dataset's folder or hub name; a
            `datasets.Dataset`; or a list of texts or of dicts. Rows have `text`, or `prompt` and `response`, or chat
            `messages`.
        forget_columns, retain_columns: where rows name these otherwise: field -> column, `{"prompt": "question"}`.
        streaming: read dataset rows as they are needed; needs `max_steps`.
        chat_template: default where the tokenizer has one.
        refusals: what terms that teach a refusal draw from: a text file, one a line, or texts; default a list of ours.
        allow_missing_weights: take a checkpoint that lacks weights of the model, which are then random, or has others.
        epochs, max_steps: passes over the forget set, or, where given, steps.
        stop_forget_nll: stop at a step whose forget batch has this NLL (nats per token).
        combine: "sum", "mgda" or "pcgrad": how the gradients of both sides become one (`fastforget.combine`).
        quiet: print nothing. Otherwise `console` (default: standard output) gets what the command prints.

    Returns:
        What report.json holds.

    Raises:
        NonFiniteLossError: the loss, its gradient or a weight became NaN; the last good adapter, if any, is saved.
        FastforgetError: any other bad input, before anything is written.
    """
    given = dict(locals())
    del given["quiet"], given["console"]
    options = UnlearnOptions(**given)
    from rich.console import Console

    console = Console(quiet=True) if quiet else console or Console()
    with library_bars(off=quiet), seeded(options.seed):
        return run_unlearn(options, console)


def run_unlearn(options: UnlearnOptions, console: Console) -> dict[str, Any]:
    """Check, read, load, measure, unlearn, measure, save: what `unlearn` does once its options are one object."""
    from fastforget.evaluate.report import (
        check_measured,
        figures,
        peak_rss_mb,
        print_continuations,
        print_table,
        write_json,
    )

    start = time.perf_counter()
    out = Path(options.out)
    terms = job_terms(options, console)
    check_stopping(terms, options.settings)
    check_sides(options.combine, terms)
    refusals = read_refusals(options.refusals)
    lora = options.lora
    claim_folder(out, options.overwrite)
    sources = {side: options.source(side) for side in ("forget", "retain")}
    config = options.as_config()
    tokenizer = load_tokenizer(options.model)
    examples, measured = read_sets(sources, tokenizer, options, console)
    model = load(
        options.model,
        bits=options.bits,
        lora=lora,
        device=options.device,
        allow_missing_weights=options.allow_missing_weights,
    )
    Backbone(model).check_layers(layers_of(terms))
    context = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if context is not None and options.max_length > context:
        raise FastforgetError(f"--max-length {options.max_length} is more than the model's context of {context} tokens")

    before = recited(model, tokenizer, measured, "Before: continuing the passages", console)
    check_measured(before, "it is broken before anything was unlearned; check its weights, or give --bits 32")
    try:
        with progress(f"Unlearning ({options.preset})", console) as update:
            result = run_job(
                model,
                tokenizer,
                examples["forget"],
                examples.get("retain"),
                terms,
                options.settings,
                out=out,
                progress=lambda step, total, output: update(step, total, shown_nll(output)),
                refusals=refusals,
                max_length=options.max_length,
            )
    except NonFiniteLossError as error:
        if error.good_steps > 0:
            save(model, tokenizer, terms, out, config)
            raise NonFiniteLossError(f"{error}; it is saved in {out}", error.good_steps) from error
        raise
    after = recited(model, tokenizer, measured, "After: continuing the passages", console)
    check_measured(after, BROKEN)
    save(model, tokenizer, terms, out, config)
    report = {
        "command": "unlearn",
        "model": str(options.model),
        "preset": options.preset,
        "preset_options": plain(options.preset_options or {}),
        **{key: plain(value) for key, value in vars(options.settings).items() if value is not None},
        "bits": options.bits,
        **figures(before, after),
        "steps": result.steps,
        "stopped": result.stopped,
        "unlearn_seconds": round(result.seconds, 1),
        "seconds": round(time.perf_counter() - start, 1),
        "peak_rss_mb": round(peak_rss_mb()),
        "adapter": str(out.resolve()),
    }
    report = write_json(out / REPORT, report)
    print_table(console, before, after)
    print_continuations(console, before, after, {name: 2 if name == "forget" else 1 for name in measured})
    console.print(f"{result.stopped}; {result.seconds:.0f} s. The adapter, {REPORT} and {CONFIG} lie in {out}.")
    console.print("Without the adapter the base still knows the text: to ship a model that forgot, merge it.")
    return report


def checked_preset(name: str, options: Mapping[str, Any] | None) -> list[Term]:
    """The preset's terms; raises FastforgetError where an option is unknown or of the wrong type."""
    try:
        return preset_terms(name, **(options or {}))
    except TypeError as error:  # text where a number is wanted, and the like
        raise FastforgetError(f"--preset-option of {name!r} has a value of the wrong type: {error}") from error


def job_terms(options: UnlearnOptions, console: Console) -> list[Term]:
    """The preset's terms, without those on the retain set where there is none."""
    terms = checked_preset(options.preset, options.preset_options)
    if options.retain is None and any(term.on == "retain" for term in terms):
        terms = [term for term in terms if term.on != "retain"]
        console.print("No --retain: the preset's retain terms are left out, and nothing keeps the rest of the model.")
    check_sets(terms, options.retain is not None, options.stop_forget_nll)
    if options.preset == "altpo":
        console.print("altpo: a job has no alternative answer for each prompt, so one of the refusals stands for it.")
    return terms


def recited(
    model: Any, tokenizer: Any, sets: Mapping[str, Sequence[Example]], label: str, console: Console
) -> dict[str, LeakageReport]:
    """What the model recites of each set, under a progress bar unless the console is quiet."""
    from fastforget.evaluate.leakage import leakage
    from fastforget.jobs.measuring import measure

    if console.quiet:
        return {name: leakage(model, tokenizer, examples) for name, examples in sets.items()}
    return measure(model, tokenizer, sets, label)


def progress(label: str, console: Console) -> contextlib.AbstractContextManager[Any]:
    """A progress bar, or nothing where the console is quiet."""
    from fastforget.jobs.progress import progress_bar

    return contextlib.nullcontext(lambda *_: None) if console.quiet else progress_bar(label)


def save(model: Any, tokenizer: Any, terms: Sequence[Term], out: Path, config: Mapping[str, Any]) -> None:
    """The adapter, and beside it the cluster centres and the options that it came from."""
    save_adapter(model, tokenizer, out)
    save_centres(terms, out)
    write_config(out / CONFIG, config, "the same again: fastforget unlearn --config THIS_FILE --out ANOTHER_FOLDER")


@contextlib.contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Every draw from torch inside follows from the seed, the adapter's first weights too; outside nothing changes."""
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        torch.manual_seed(seed)
        yield


@contextlib.contextmanager
def library_bars(off: bool) -> Iterator[None]:
    """Where `off`, transformers shows no progress bars of its own inside."""
    from transformers.utils import logging

    if not off or not logging.is_progress_bar_enabled():
        yield
        return
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.enable_progress_bar()
