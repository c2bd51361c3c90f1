"""`fastforget plan`, and `fastforget unlearn --fit`: a plan printed, and settings taken from one."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Any

from rich.bar import Bar
from rich.console import Console
from rich.table import Column, Table

from fastforget.config import Help
from fastforget.errors import FastforgetError
from fastforget.jobs.options import MODEL, OUTPUT, TRAINING, UnlearnOptions, checked_preset, lora_arguments
from fastforget.models import usable_device
from fastforget.objectives import Term
from fastforget.objectives.presets import DEFAULT_PRESET
from fastforget.plan import LEFT_FREE, Plan, plan

BAR_WIDTH = 16


@dataclass(frozen=True)
class PlanOptions:
    """What `fastforget plan` takes."""

    model: Annotated[str | os.PathLike[str], Help("Required. Local folder or hub name of a causal LM.", MODEL)]
    gpu: Annotated[str | None, Help("Memory of the device, e.g. 16GB: propose what fits it best.", MODEL)] = None
    bits: Annotated[int, Help("Precision of the frozen base, at most: 8, 4, 16 or 32.", MODEL)] = 8
    lora_r: Annotated[int, Help("Rank of the LoRA adapter.", MODEL)] = 32
    lora_targets: Annotated[str, Help("Names, comma-separated, or all-linear.", MODEL)] = "all-linear"
    device: Annotated[str, Help("cuda, or cpu: resident memory.", MODEL)] = "cuda"
    preset: Annotated[str, Help("Unlearning objective, as in fastforget presets.", TRAINING)] = DEFAULT_PRESET
    preset_options: Annotated[
        Mapping[str, Any] | None, Help("NAME=VALUE for the preset, e.g. beta=2. Repeatable.", TRAINING)
    ] = None
    seq_len: Annotated[int, Help("Tokens of a passage.", TRAINING)] = 128
    batch: Annotated[int, Help("Forget passages a step, and as many retain passages.", TRAINING)] = 8
    micro_batch: Annotated[int | None, Help("Passages in memory at once.", TRAINING)] = None
    checkpointing: Annotated[bool, Help("With gradient checkpointing.", TRAINING)] = False
    json: Annotated[bool, Help("Print JSON, in bytes.", OUTPUT)] = False


def run_plan(options: PlanOptions, console: Console) -> None:
    """Make a plan and print it."""
    found = plan(
        options.model,
        gpu=options.gpu,
        bits=options.bits,
        preset=checked_preset(options.preset, options.preset_options),
        seq_len=options.seq_len,
        batch=options.batch,
        micro_batch=options.micro_batch,
        checkpointing=options.checkpointing,
        lora=lora_arguments(options.lora_r, options.lora_targets),
        device=options.device,
    )
    if options.json:
        print(json.dumps(found.as_json(), indent=2))
    else:
        print_plan(found, console)


def print_plan(found: Plan, console: Console) -> None:
    """Print a bar for each component beside the usual loop's, of the settings that fit best or were asked for."""
    ours = found.best or found.asked
    largest = max(ours.peak, found.usual.peak)
    columns = [each for title in ("this step", "the usual loop") for each in (Column("GB", justify="right"), title)]
    table = Table(Column("component", no_wrap=True), *columns, title=str(ours.settings), title_justify="left")
    names = list(dict.fromkeys((*ours.components, *found.usual.components)))
    for name in (*names, "peak"):
        cells: list[Any] = [name]
        for each in (ours, found.usual):
            size = each.peak if name == "peak" else each.components.get(name, 0)
            cells += [gigabytes(size) if size else "", Bar(largest, 0, size, width=BAR_WIDTH) if size else ""]
        table.add_row(*cells, end_section=name == names[-1])
    console.print(table)
    compiled, cache = gigabytes(found.compiled_activations), gigabytes(found.cache_bytes)
    lines = [f"With compiled layers: activations of about {compiled} GB, estimated."]
    if found.device != "cpu" and found.cache_bytes:
        lines.append(f"The host caches {cache} GB of what the reference says of one step's passages.")
    if found.budget is not None:
        lines.append(verdict(found))
    for line in lines:
        console.print(line, highlight=False)


def verdict(found: Plan) -> str:
    """Say which settings fit the device's memory, in a sentence."""
    budget = f"{gigabytes(found.budget or 0)} GB, of which {LEFT_FREE:.0%} are left free"
    if found.best is None:
        return f"Nothing fits into {budget}: take a shorter --seq-len, or a smaller model."
    return (
        f"What fits {budget}, best: {found.best.settings}, peak {gigabytes(found.best.peak)} GB (as asked, "
        f"{found.asked.settings}: {gigabytes(found.asked.peak)} GB)."
    )


def gigabytes(size: int) -> str:
    """Write bytes in GB, with three digits."""
    return f"{size / 1e9:.3g}"


def fitted(options: UnlearnOptions, terms: Sequence[Term], console: Console) -> UnlearnOptions:
    """Return the options of a job with the bits, the micro-batch and the checkpointing that fit its `--fit`.

    Raises:
        FastforgetError: nothing fits, or `plan` cannot say what does.
    """
    if options.fit is None:
        return options
    device = usable_device(options.device)
    found = plan(
        options.model,
        gpu=options.fit,
        bits=options.bits,
        preset=terms,
        seq_len=options.max_length,
        batch=options.batch_size,
        micro_batch=options.micro_batch,
        lora=options.lora,
        device=device.type,
    )
    if found.best is None:
        raise FastforgetError(
            f"nothing fits --fit {options.fit}: even {found.asked.settings.bits} bit needs "
            f"{gigabytes(found.asked.peak)} GB; take a smaller --max-length"
        )
    console.print(verdict(found), highlight=False)
    settings = found.best.settings
    checkpointing = options.checkpointing or settings.checkpointing
    return replace(options, bits=settings.bits, micro_batch=settings.micro_batch, checkpointing=checkpointing, fit=None)
