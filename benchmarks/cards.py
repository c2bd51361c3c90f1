"""What fits on a card: plans (`fastforget plan`) of models of known shapes, for docs/cards.md. Nothing is measured.

python -m benchmarks.cards            write results/DATE-cards.json, and its table into docs/cards.md
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers

import fastforget as ff
from benchmarks.harness import ROOT, commit, parser_of, write_whole
from benchmarks.tables import replace_block, table
from fastforget.plan import Settings

PAGE = ROOT / "docs" / "cards.md"
BEGIN, END = "<!-- cards: begin, written by python -m benchmarks.cards -->", "<!-- cards: end -->"
CARDS = ("12GB", "16GB", "24GB", "40GB")
NAMES = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "tie_word_embeddings")
SHAPES = {  # by NAMES, as the models' own configs have them
    "1B (Llama 3.2)": (2048, 8192, 16, 32, True),
    "3B (Llama 3.2)": (3072, 8192, 28, 24, True),
    "8B (Llama 3.1)": (4096, 14336, 32, 32, False),
}
SHARED: dict[str, Any] = {"num_key_value_heads": 8, "vocab_size": 128256, "max_position_embeddings": 131072}
SETTINGS: dict[str, Any] = {"bits": 16, "seq_len": 512, "batch": 8}  # of each plan; 8 forget and 8 retain passages
HEADINGS = ("card", "model", "what fits best", "peak, GB", "the usual loop in 16 bit, GB")


def main(arguments: Sequence[str] | None = None) -> int:
    """Plan every shape for every card; write the plans and the page's table."""
    parser = parser_of("cards", __doc__)
    parser.add_argument("--page", type=Path, default=PAGE)
    options = parser.parse_args(arguments)
    rows = list(planned())
    file = options.out / f"{options.date}-cards.json"
    try:
        page = replace_block(options.page.read_text(encoding="utf-8"), BEGIN, END, "\n".join(lines(rows, options)))
    except ValueError as error:
        print(f"cards: {options.page}: {error}", file=sys.stderr)
        return 2
    about = {"date": f"{options.date}", "commit": commit(), "torch": torch.__version__, "settings": SETTINGS}
    write_whole(file, json.dumps({**about, "rows": rows}, indent=1) + "\n")
    write_whole(options.page, page)
    return 0


def planned() -> Iterable[dict[str, Any]]:
    """Make the plan of each shape for each card, as plain data."""
    with tempfile.TemporaryDirectory() as folder:
        for card in CARDS:
            for name, shape in SHAPES.items():
                sizes = SHARED | dict(zip(NAMES, shape, strict=True))
                transformers.LlamaConfig(**sizes, architectures=["LlamaForCausalLM"]).save_pretrained(folder)
                yield {**ff.plan(folder, gpu=card, **SETTINGS).as_json(), "card": card, "model": name}


def lines(rows: Sequence[dict[str, Any]], options: argparse.Namespace) -> list[str]:
    """Write the table, and where its figures are."""
    cells = []
    for row in rows:
        best = row["best"]
        fits = "nothing" if best is None else str(Settings(**best["settings"]))
        cells.append([row["card"], row["model"], fits, gigabytes(best), gigabytes(row["usual"])])
    where = f"../benchmarks/results/{options.date}-cards.json"
    return [*table(HEADINGS, cells), "", f"`python -m benchmarks.cards`, {options.date}: [every figure]({where})."]


def gigabytes(footprint: dict[str, Any] | None) -> str:
    """Write the peak in GB."""
    return "" if footprint is None else f"{footprint['peak'] / 1e9:.1f}"


if __name__ == "__main__":
    sys.exit(main())
