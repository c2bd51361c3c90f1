"""The options of `fastforget select` and `fastforget evaluate`: flags, and arguments of the functions."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass
from pathlib import Path
from typing import Annotated, Any

from rich.console import Console

from fastforget.config import Help
from fastforget.data.sources import Source
from fastforget.errors import FastforgetError
from fastforget.jobs.options import (
    ALLOW,
    CHAT,
    COLUMNS,
    DATA,
    FORMAT,
    LARGEST,
    MODEL,
    OUTPUT,
    ROBUST,
    SHORTEST,
    TRAINING,
    Texts,
    check_characters,
    check_range,
    check_seed,
    checked_source,
)

MEMORISATION = "memorisation"
SUITE_SETS: dict[str, tuple[str, ...]] = {  # of --suite: what each takes beside --forget, --retain and --unseen
    MEMORISATION: (),
    "harm": (),
    "hallucination": (),
    "membership": (),
    "tofu": ("real_authors", "world_facts"),
    "muse": ("holdout", "verbmem", "forget_qa", "retain_qa"),
}


@dataclass(frozen=True)
class SelectOptions:
    """What is scored, by whom, and where the selection goes.

    Raises:
        FastforgetError: a number out of its range, or `generate` without a model.
    """

    data: Annotated[Texts, Help("Required. What to choose from, in the forms that unlearn takes.", DATA)]
    evaluator: Annotated[
        str | os.PathLike[str] | Callable[..., Any],
        Help("Required. A sequence classifier or causal LM (folder or hub name), or module:function.", MODEL),
    ]
    out: Annotated[str | os.PathLike[str], Help("Required. JSONL file of what is to be forgotten.", OUTPUT)]
    _: KW_ONLY
    threshold: Annotated[float, Help("What scores at least this much is chosen.", DATA)] = 0.5
    labels: Annotated[
        str | Sequence[str] | None, Help("Labels of a classifier that count, comma-separated.", MODEL)
    ] = None
    judge_prompt: Annotated[str | None, Help("What a causal LM is asked, with {prompt} and {response}.", MODEL)] = None
    columns: Annotated[Mapping[str, str] | None, Help(COLUMNS, DATA)] = None
    format: Annotated[str | None, Help(FORMAT, DATA)] = None
    split: Annotated[str, Help("Split of a dataset.", DATA)] = "train"
    subset: Annotated[str | None, Help("Subset (configuration) of a dataset.", DATA)] = None
    limit: Annotated[int | None, Help("Score so many dialogues at most.", DATA)] = None
    generate: Annotated[bool, Help("Let --model answer each prompt first; its own answers are judged.", MODEL)] = False
    model: Annotated[str | os.PathLike[str] | None, Help("The model under test, for --generate.", MODEL)] = None
    chat_template: Annotated[bool | None, Help(CHAT, DATA)] = None
    bits: Annotated[int, Help("Precision of the judge and of --model: 8, 4, 16 or 32.", MODEL)] = 8
    device: Annotated[str | None, Help("cpu, cuda, cuda:1, ...; default the first GPU, else cpu.", MODEL)] = None
    batch_size: Annotated[int, Help("Dialogues scored at once.", MODEL)] = 16
    quiet: Annotated[bool, Help("Print nothing but errors.", OUTPUT)] = False
    console: Console | None = None

    def __post_init__(self) -> None:
        check_characters(self)
        for name in ("batch_size", "limit"):
            check_range(self, name, 1, LARGEST)
        check_range(self, "threshold", 0, 1)
        if self.generate and self.model is None:
            raise FastforgetError("--generate needs --model: it is the model under test that answers")
        if os.path.isdir(self.out):
            raise FastforgetError(f"{self.out} is a folder: --out needs a file, such as forget.jsonl")

    @property
    def source(self) -> Source:
        """Say where the dialogues come from, checked as far as that goes without reading them."""
        source = Source(
            path=self.data, columns=self.columns or {}, split=self.split, subset=self.subset, format=self.format
        )
        return checked_source(source, "data")

    @property
    def label_names(self) -> list[str]:
        """List the labels that count."""
        return names_of(self.labels)

    def file(self, what: str) -> Path:
        """Name a file beside `out`: forget.jsonl has forget.scores.jsonl."""
        out = Path(self.out)
        return out.with_name(f"{out.name.removesuffix('.jsonl')}.{what}")


@dataclass(frozen=True)
class EvaluateOptions:
    """Which model and adapter, which texts and suite, and where the report goes.

    Raises:
        FastforgetError: a number out of its range, an unknown suite or set, or `robust` without an adapter.
    """

    model: Annotated[str | os.PathLike[str], Help("Required. Local folder or hub name of the untouched model.", MODEL)]
    forget: Annotated[Texts, Help("Required. What was to be forgotten, in the forms that unlearn takes.", DATA)]
    out: Annotated[str | os.PathLike[str], Help("Required. Folder for report.json and report.html.", OUTPUT)]
    _: KW_ONLY
    suite: Annotated[str, Help(f"What is measured: {', '.join(SUITE_SETS)}.", TRAINING)] = MEMORISATION
    adapter: Annotated[str | os.PathLike[str] | None, Help("Folder of the adapter that forgot.", MODEL)] = None
    retain: Annotated[Texts | None, Help("What was to be kept, in the same forms.", DATA)] = None
    unseen: Annotated[Texts | None, Help("Text that the model never saw, to compare with.", DATA)] = None
    sets: Annotated[
        Mapping[str, str] | None, Help("NAME=PLACE, further sets of a suite: world_facts=TOFU#world_facts.", DATA)
    ] = None
    columns: Annotated[Mapping[str, str] | None, Help(f"Of --forget: {COLUMNS}", DATA)] = None
    retain_columns: Annotated[Mapping[str, str] | None, Help("The same for --retain; default --column.", DATA)] = None
    unseen_columns: Annotated[Mapping[str, str] | None, Help("The same for --unseen; default --column.", DATA)] = None
    format: Annotated[str | None, Help(f"Of --forget, default the suite's own. {FORMAT}", DATA)] = None
    retain_format: Annotated[str | None, Help("The same for --retain; default --format.", DATA)] = None
    unseen_format: Annotated[str | None, Help("The same for --unseen; default --format.", DATA)] = None
    split: Annotated[str, Help("Split of the datasets.", DATA)] = "train"
    chat_template: Annotated[bool | None, Help(CHAT, DATA)] = None
    max_length: Annotated[int, Help("Tokens of a passage at most.", DATA)] = 128
    measured_passages: Annotated[int, Help("Passages of each set that are measured.", DATA)] = 64
    robust: Annotated[bool, Help(ROBUST, TRAINING)] = False
    retain_log: Annotated[
        str | os.PathLike[str] | None, Help("log.json of a model that never saw the forget set.", DATA)
    ] = None
    evaluator: Annotated[
        str | os.PathLike[str] | Callable[..., Any] | None, Help("Of the suite harm; as select's.", MODEL)
    ] = None
    labels: Annotated[str | Sequence[str] | None, Help("Labels of a classifier that count.", MODEL)] = None
    judge_prompt: Annotated[str | None, Help("What a causal LM is asked, with {prompt} and {response}.", MODEL)] = None
    threshold: Annotated[float, Help("An answer that scores at least this much is flagged.", TRAINING)] = 0.5
    reference: Annotated[
        str | os.PathLike[str] | None, Help("A model that saw none of the texts, for the suite membership.", MODEL)
    ] = None
    seed: Annotated[int, Help("Of every random draw.", TRAINING)] = 0
    bits: Annotated[int, Help("Precision of the frozen base: 8, 4, 16 or 32.", MODEL)] = 8
    allow_missing_weights: Annotated[bool, Help(ALLOW, MODEL)] = False
    device: Annotated[str | None, Help("cpu, cuda, cuda:1, ...; default the first GPU, else cpu.", MODEL)] = None
    quiet: Annotated[bool, Help("Print nothing but errors.", OUTPUT)] = False
    console: Console | None = None

    def __post_init__(self) -> None:
        check_characters(self)
        check_seed(self.seed)
        if self.robust and self.adapter is None:
            raise FastforgetError("--robust needs --adapter: it asks whether what an adapter made forgotten stays so")
        check_range(self, "measured_passages", 1, LARGEST)
        check_range(self, "max_length", SHORTEST, LARGEST)
        check_range(self, "threshold", 0, 1)
        if self.suite not in SUITE_SETS:
            raise FastforgetError(f"unknown suite {self.suite!r}: choose one of {', '.join(SUITE_SETS)}")
        known = SUITE_SETS[self.suite]
        for name in self.sets or {}:
            if name not in known:
                few = ", ".join(known) if known else "none"
                raise FastforgetError(f"the suite {self.suite} has no set {name!r}; its further sets are: {few}")

    @property
    def label_names(self) -> list[str]:
        """List the labels that count."""
        return names_of(self.labels)

    def format_of(self, side: str) -> str | None:
        """Return the format of a side as it was given: that of --forget stands for the others' too."""
        return getattr(self, f"{side}_format", None) or self.format

    def source(self, name: str, format: str | None) -> Source | None:
        """Say where a set comes from: --forget, --retain, --unseen, or one of --set; None where it was not given.

        A place given as text may name a subset and a split: NAME#SUBSET@SPLIT.

        Raises:
            FastforgetError: as `checked_source`.
        """
        texts = getattr(self, name) if name in ("forget", "retain", "unseen") else (self.sets or {}).get(name)
        if texts is None:
            return None
        place, subset, split = parsed_place(texts)
        source = Source(
            path=place,
            columns=getattr(self, f"{name}_columns", None) or self.columns or {},
            split=split or self.split,
            subset=subset,
            chat_template=self.chat_template,
            format=format,
        )
        return checked_source(source, name)


def parsed_place(texts: Texts) -> tuple[Texts, str | None, str | None]:
    """Return (path or name, subset, split) of NAME#SUBSET@SPLIT; what is no text, or is there as it stands, is itself.

    >>> parsed_place("locuslab/TOFU#forget10@train")
    ('locuslab/TOFU', 'forget10', 'train')
    """
    if not isinstance(texts, str) or os.path.exists(texts):
        return texts, None, None
    place, _, rest = texts.partition("#")
    if not rest:
        place, _, split = texts.partition("@")
        return place, None, split or None
    subset, _, split = rest.partition("@")
    return place, subset or None, split or None


def names_of(names: str | Sequence[str] | None) -> list[str]:
    """List names that are given as such, or as one text with commas."""
    parts = names.split(",") if isinstance(names, str) else names or []
    return [name.strip() for name in parts if name.strip()]
