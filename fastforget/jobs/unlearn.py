"""`fastforget unlearn`: a user's model forgets a user's text."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from fastforget.data.examples import Example
from fastforget.data.text import read_examples
from fastforget.errors import FastforgetError, NonFiniteLossError
from fastforget.evaluate.report import figures, peak_rss_mb, print_continuations, print_table, write_json
from fastforget.jobs.loop import JobSettings, run_job
from fastforget.jobs.measuring import measure
from fastforget.jobs.outputs import REPORT, claim_folder
from fastforget.jobs.progress import progress_bar
from fastforget.models import load, load_tokenizer, save_adapter
from fastforget.objectives import preset

SHORTEST = 16  # tokens: less than this and a passage says nothing


@dataclass(frozen=True, kw_only=True)
class UnlearnRequest:
    """What to unlearn, from which model, and where the result goes; names as on the command line."""

    model: str
    forget: Path
    retain: Path | None
    out: Path
    preset_name: str
    preset_options: Mapping[str, Any]
    bits: int = 8
    lora: Mapping[str, Any] | None = None
    max_length: int = 128
    device: str | None = None
    overwrite: bool = False
    measured_passages: int = 64


def run_unlearn(request: UnlearnRequest, settings: JobSettings, console: Console | None = None) -> dict[str, Any]:
    """Load, measure, unlearn, measure, save. Returns what report.json holds.

    All input is checked before the model is loaded, and the adapter is written whole or not at all.

    Raises:
        NonFiniteLossError: the loss became NaN; the last good adapter is saved, where there is one.
        FastforgetError: any other bad input, before anything is written.
    """
    start = time.perf_counter()
    console = console or Console()
    options = dict(request.preset_options)
    terms = preset(request.preset_name, **options)
    if request.retain is None and any(term.on == "retain" for term in terms):
        terms = [term for term in terms if term.on != "retain"]
        console.print("No --retain: the preset's retain terms are left out, and nothing keeps the rest of the model.")
    if request.max_length < SHORTEST:
        raise FastforgetError(f"--max-length must be at least {SHORTEST} tokens, not {request.max_length}")
    claim_folder(request.out, request.overwrite)
    for path in (request.forget, request.retain):
        if path is not None and not Path(path).exists():
            raise FastforgetError(f"{path} does not exist")
    tokenizer = load_tokenizer(request.model)
    forget = read_examples(request.forget, tokenizer, request.max_length)
    retain = read_examples(request.retain, tokenizer, request.max_length) if request.retain is not None else None
    if retain is not None:
        refuse_overlap(forget, retain)
    console.print(
        f"{len(forget)} passages to forget, {len(retain or [])} to keep, of at most {request.max_length} tokens."
    )
    model = load(request.model, bits=request.bits, lora=request.lora, device=request.device)
    context = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if context is not None and request.max_length > context:
        raise FastforgetError(f"--max-length {request.max_length} is more than the model's context of {context} tokens")

    sets = {"forget": forget[: request.measured_passages]}
    if retain is not None:
        sets["retain"] = retain[: request.measured_passages]
    before = measure(model, tokenizer, sets, "Before: continuing the passages")
    try:
        with progress_bar(f"Unlearning ({request.preset_name})") as update:
            result = run_job(
                model,
                tokenizer,
                forget,
                retain,
                terms,
                settings,
                out=request.out,
                progress=lambda step, total, output: update(
                    step, total, f"forget NLL {output.stats['forget_nll']:.2f}"
                ),
            )
    except NonFiniteLossError as error:
        if error.good_steps > 0:
            save_adapter(model, tokenizer, request.out)
            raise NonFiniteLossError(f"{error}; it is saved in {request.out}", error.good_steps) from error
        raise
    after = measure(model, tokenizer, sets, "After: continuing the passages")
    save_adapter(model, tokenizer, request.out)
    report = {
        "command": "unlearn",
        "model": request.model,
        "preset": request.preset_name,
        "preset_options": options,
        **{key: value for key, value in asdict(settings).items() if value is not None},
        "bits": request.bits,
        **figures(before, after),
        "steps": result.steps,
        "stopped": result.stopped,
        "unlearn_seconds": round(result.seconds, 1),
        "seconds": round(time.perf_counter() - start, 1),
        "peak_rss_mb": round(peak_rss_mb()),
        "adapter": str(request.out.resolve()),
    }
    write_json(request.out / REPORT, report)
    print_table(console, before, after)
    print_continuations(console, before, after, {name: 2 if name == "forget" else 1 for name in sets})
    console.print(f"{result.stopped}; {result.seconds:.0f} s. The adapter and {REPORT} lie in {request.out}.")
    console.print("Without the adapter the base still knows the text: to ship a model that forgot, merge it.")
    return report


def refuse_overlap(forget: Sequence[Example], retain: Sequence[Example]) -> None:
    """Raise where a passage is to be forgotten and to be kept."""
    kept = {example.input_ids: example.source for example in retain}
    for example in forget:
        if example.input_ids in kept:
            raise FastforgetError(
                f"the same passage is in the forget set ({example.source}) and in the retain set "
                f"({kept[example.input_ids]}): remove it from one of them"
            )
