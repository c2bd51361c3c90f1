"""The options of `fastforget recipe`."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass
from typing import Annotated, Any

from rich.console import Console

from fastforget.config import Help, placeholder, plain
from fastforget.jobs.evaluation_options import names_of
from fastforget.jobs.options import CHAT, DATA, MODEL, OUTPUT, TRAINING, Texts, check_characters, check_seed

OVERRIDE = "FIELD=VALUE of the recipe, e.g. unlearn.max_steps=200. Repeatable."
NOT_IN_RESULTS = ("out", "quiet", "console", "cache")


@dataclass(frozen=True)
class RecipeOptions:
    """Which recipe, for which model, with which data instead of the published, and where the result goes.

    Raises:
        FastforgetError: a seed out of range, or a text that holds no character.
    """

    name: str
    out: Annotated[str | os.PathLike[str], Help("Required. Folder for the adapter and the report.", OUTPUT)]
    _: KW_ONLY
    model: Annotated[str | os.PathLike[str] | None, Help("Local folder or hub name of a causal LM.", MODEL)] = None
    forget: Annotated[Texts | None, Help("What to forget, instead of the recipe's: NAME#SUBSET@SPLIT.", DATA)] = None
    retain: Annotated[Texts | None, Help("What to keep, instead of the recipe's.", DATA)] = None
    unseen: Annotated[Texts | None, Help("Text that the model never saw, to compare with.", DATA)] = None
    sets: Annotated[Mapping[str, str] | None, Help("NAME=PLACE, what the suites ask, by set.", DATA)] = None
    chat_template: Annotated[bool | None, Help(CHAT, DATA)] = None
    retain_log: Annotated[
        str | os.PathLike[str] | None, Help("log.json of a model that never saw the forget set.", DATA)
    ] = None
    evaluator: Annotated[
        str | os.PathLike[str] | Callable[..., Any] | None,
        Help("Selects what to forget; the suite harm's too.", MODEL),
    ] = None
    labels: Annotated[str | Sequence[str] | None, Help("Labels of a classifier that count.", MODEL)] = None
    judge_prompt: Annotated[str | None, Help("What a causal LM is asked, with {prompt} and {response}.", MODEL)] = None
    overrides: Annotated[Mapping[str, Any] | None, Help(OVERRIDE, TRAINING)] = None
    seed: Annotated[int, Help("Of every random draw.", TRAINING)] = 0
    bits: Annotated[int, Help("Precision of the frozen base: 8, 4, 16 or 32.", MODEL)] = 8
    device: Annotated[str | None, Help("cpu, cuda, cuda:1, ...; default the first GPU, else cpu.", MODEL)] = None
    offline: Annotated[bool, Help("tofu: make authors and models here, and prove it at small scale.", DATA)] = False
    tofu_split: Annotated[str, Help("Percentage of the authors to forget with --offline: 01, 05 or 10.", DATA)] = "10"
    presets: Annotated[str | Sequence[str] | None, Help("Of --offline, comma-separated; default all.", TRAINING)] = None
    cache: str | os.PathLike[str] | None = None
    quiet: Annotated[bool, Help("Print nothing but errors.", OUTPUT)] = False
    console: Console | None = None

    def __post_init__(self) -> None:
        check_characters(self)
        check_seed(self.seed)

    @property
    def preset_names(self) -> list[str]:
        """List the presets of --offline."""
        return names_of(self.presets)

    def what_matters(self) -> dict[str, Any]:
        """Return the options that results depend on, as JSON has them."""
        values = {name: value for name, value in vars(self).items() if name not in NOT_IN_RESULTS}
        return {name: placeholder(each) if callable(each) else plain(each) for name, each in values.items()}
