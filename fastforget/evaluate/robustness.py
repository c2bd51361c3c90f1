"""Does it last? The same measures after merging and rounding, and after learning other forgotten passages again.

Forgetting in 16 bit has come back after quantising to 4 bit (arXiv 2410.16454), and after a few steps of training on
part of what was forgotten, or on other text (arXiv 2406.13356). So the passages to forget are measured again

- with the adapter merged into its base in 16 bit, and that model quantised to 8 and to 4 bit;
- after `RELEARN_STEPS` steps of training on half of them, on the other half, beside never-trained passages treated
  alike: half of those is learned, the other half measured, in a model that never saw either.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from fastforget.data.examples import Example
from fastforget.evaluate.memorisation import memorisation
from fastforget.merging import merge
from fastforget.models import load

RELEARN_STEPS = 20
RELEARN_RATE = 1e-3
RELEARN_RANK = 16
SHIPPED_BITS = (16, 8, 4)  # that a merged model is loaded in
Relearn = Callable[[Any, Any, Sequence[Example]], None]  # trains the model's adapter on the examples, in place
Merged = Callable[[int, Any], None]  # gets bits, and the merged model loaded in these


@dataclass(frozen=True)
class RobustnessRow:
    """One treatment: exact memorisation and extraction strength of forget passages, and of never-trained ones."""

    treatment: str
    forget_memorisation: float | None
    forget_extraction: float | None
    unseen_memorisation: float | None
    unseen_extraction: float | None


def robustness(
    base: str | os.PathLike[str],
    adapter: str | os.PathLike[str],
    tokenizer: Any,
    forget: Sequence[Example],
    unseen: Sequence[Example],
    relearn: Relearn,
    *,
    other: Sequence[Example] = (),
    device: str | torch.device | None = None,
    bits: int = 8,
    merged: Merged | None = None,
) -> list[RobustnessRow]:
    """Measure what an adapter made a model forget, as it was trained and after each treatment.

    Args:
        base, adapter: the folder or hub name of the model, and the folder of the adapter.
        forget, unseen: the passages that it forgot, and some that it never saw, [] where there are none.
        other: text that is neither; where there is any, it is measured too what learning it brings back.
        relearn: trains a model with a fresh adapter on examples for `RELEARN_STEPS` steps.
        bits: that the adapter was trained in.
        merged: is given each merged model, to measure more of it.
    """
    rows = [row("as it was trained", load(base, bits=bits, adapter=adapter, device=device), tokenizer, forget, unseen)]
    with tempfile.TemporaryDirectory() as scratch:
        folder = merge(base, adapter, Path(scratch) / "merged")
        for merged_bits in SHIPPED_BITS:
            model = load(folder, bits=merged_bits, device=device)
            rows.append(row(merged_name(merged_bits), model, tokenizer, forget, unseen))
            if merged is not None:
                merged(merged_bits, model)
        halves = [(part[::2], part[1::2]) for part in (forget, unseen)]
        shares: list[tuple[float | None, float | None]] = []
        for learned, measured in halves:
            if not learned or not measured:
                shares.append((None, None))
                continue
            model = relearned(folder, learned, tokenizer, relearn, device)
            found = memorisation(model, tokenizer, measured)
            shares.append((found.exact, found.extraction))
        rows.append(RobustnessRow(f"half learned again, {RELEARN_STEPS} steps", *shares[0], *shares[1]))
        if other:
            model = relearned(folder, other, tokenizer, relearn, device)
            rows.append(row(f"other text learned, {RELEARN_STEPS} steps", model, tokenizer, forget, unseen))
    return rows


def merged_name(bits: int) -> str:
    """Name the treatment of a model that was merged in 16 bit, and loaded in these."""
    return f"merged, {'' if bits == 16 else 'then '}{bits} bit"


def relearned(
    folder: Path, learned: Sequence[Example], tokenizer: Any, relearn: Relearn, device: str | torch.device | None
) -> Any:
    """Load a merged model, and train a fresh adapter of it."""
    model = load(folder, bits=16, lora={"r": RELEARN_RANK, "target_modules": "all-linear"}, device=device)
    relearn(model, tokenizer, learned)
    return model


def row(
    treatment: str, model: Any, tokenizer: Any, forget: Sequence[Example], unseen: Sequence[Example]
) -> RobustnessRow:
    """Measure one model."""
    found = [memorisation(model, tokenizer, part) if part else None for part in (forget, unseen)]
    pairs = [(each.exact, each.extraction) if each else (None, None) for each in found]
    return RobustnessRow(treatment, *pairs[0], *pairs[1])


def print_robustness(console: Console, rows: Sequence[RobustnessRow]) -> None:
    """Print the rows as a table: forget passages, never-trained ones in brackets, and why there is a dash."""
    notes = []
    if all(each.unseen_memorisation is None for each in rows):
        notes.append("(-): without --unseen there is no text that the model never saw, to compare with.")
    if any(each.forget_memorisation is None for each in rows):
        notes.append("-: too few passages for that row (half of one, say), or more than the model's context.")
    table = Table(title="Does it last? Forget passages (never-trained ones)", title_justify="left")
    table.add_column("treatment")
    for heading in ("exact memorisation", "extraction strength"):
        table.add_column(heading, justify="right")
    for each in rows:
        table.add_row(
            each.treatment,
            f"{shown(each.forget_memorisation)} ({shown(each.unseen_memorisation)})",
            f"{shown(each.forget_extraction)} ({shown(each.unseen_extraction)})",
        )
    console.print(table)
    for note in notes:
        console.print(note, highlight=False)


def shown(share: float | None) -> str:
    """Write a share, or a dash where there is none."""
    return "-" if share is None else f"{share:.2f}"
