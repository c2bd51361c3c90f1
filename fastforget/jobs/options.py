"""The options of both jobs, stated once: flags of the commands, arguments of the functions, keys of config.yaml."""

from __future__ import annotations

import functools
import inspect
import math
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, fields
from pathlib import Path
from typing import Annotated, Any, ParamSpec, TypeVar, get_type_hints

from rich.console import Console

from fastforget.combine import COMBINE
from fastforget.config import IN_PYTHON, Help, placeholder, plain
from fastforget.data.sources import Source, check_source
from fastforget.errors import FastforgetError
from fastforget.objectives import Term, preset
from fastforget.objectives.presets import DEFAULT_PRESET, PRESETS

SHORTEST = 16  # tokens: less than this and a passage says nothing
NOT_OF_THE_RUN = ("overwrite", "quiet", "console")  # a permission for one folder, and what is printed where

Texts = str | os.PathLike[str] | Iterable[Any]  # a file, folder or hub name; a dataset; or rows, each a str or a dict

HEADINGS = DATA, MODEL, TRAINING, OUTPUT = "Data", "Model", "Training", "Output"  # in --help, in this order

COLUMNS = "FIELD=COLUMN, where rows name text, prompt, response or messages otherwise. Repeatable."
CHAT = "Format prompts and messages as the tokenizer's chats; default where it has a template."
REFUSALS = "Text file, one refusal a line, for presets that teach one; default a list of neutral sentences."
ALLOW = "Take a checkpoint that lacks weights of the model (they are random then), or has others."


@dataclass(frozen=True, kw_only=True)
class RunOptions:
    """What both jobs take."""

    preset: Annotated[str, Help(f"Unlearning objective: {', '.join(PRESETS)}.", TRAINING)] = DEFAULT_PRESET
    preset_options: Annotated[
        Mapping[str, Any] | None, Help("NAME=VALUE for the preset, e.g. beta=2. Repeatable.", TRAINING)
    ] = None
    overwrite: Annotated[bool, Help("Replace an adapter in the output folder.", OUTPUT)] = False
    quiet: Annotated[bool, Help("Print nothing but errors.", OUTPUT)] = False
    console: Console | None = None

    def terms(self) -> list[Term]:
        """Build the preset's terms; raise FastforgetError where an option is unknown or of the wrong type."""
        return checked_preset(self.preset, self.preset_options)

    def printer(self) -> Console:
        """Return the console to print to, which says nothing where the run is quiet."""
        return Console(quiet=True) if self.quiet else self.console or Console()


@dataclass(frozen=True, kw_only=True)
class JobSettings:
    """How long and how hard to train; the defaults are those of the demo, chosen by measurement.

    `epochs` counts passes over the forget set; `max_steps`, where given, overrides it. `stop_forget_nll` ends the job
    at the first step whose forget batch has at least this NLL (nats per token): text that the model never saw costs it
    several nats, and driving the NLL far beyond that only ruins the output. `combine` is `UnlearnStep`'s.

    Raises:
        FastforgetError: a number out of its range, or an unknown way to combine gradients.
    """

    learning_rate: Annotated[float, Help("Of AdamW.", TRAINING)] = 3e-3
    epochs: Annotated[float, Help("Passes over the forget set.", TRAINING)] = 54.0
    max_steps: Annotated[int | None, Help("Steps; overrides --epochs.", TRAINING)] = None
    batch_size: Annotated[int, Help("Forget passages a step, and as many retain passages.", TRAINING)] = 8
    micro_batch: Annotated[int | None, Help("Passages in memory at once; the same gradients.", TRAINING)] = None
    seed: Annotated[int, Help("Of every random draw.", TRAINING)] = 0
    save_steps: Annotated[int | None, Help("Save a checkpoint every so many steps.", OUTPUT)] = None
    stop_forget_nll: Annotated[
        float | None, Help("Stop at a step whose forget batch has this NLL (nats per token).", TRAINING)
    ] = None
    combine: Annotated[
        str, Help(f"How the forget and the retain gradient become one: {', '.join(COMBINE)}.", TRAINING)
    ] = "sum"

    def __post_init__(self) -> None:
        if self.combine not in COMBINE:
            raise FastforgetError(f"combine must be one of {', '.join(COMBINE)}, not {self.combine!r}")
        for name in ("learning_rate", "epochs", "max_steps", "batch_size", "micro_batch", "save_steps"):
            value = getattr(self, name)
            if value is not None and not (math.isfinite(value) and value > 0):
                raise FastforgetError(f"{name.replace('_', '-')} must be positive, not {value}")

    def steps(self, forget_examples: int | None) -> int:
        """Count the steps that the job takes unless it stops early; None: a stream, whose length is not known."""
        if self.max_steps is not None:
            return self.max_steps
        if forget_examples is None:
            raise FastforgetError("a streamed forget set has no length to count epochs by: give --max-steps")
        return max(1, round(self.epochs * math.ceil(forget_examples / self.batch_size)))


@dataclass(frozen=True)
class UnlearnOptions(RunOptions, JobSettings):
    """What to unlearn, from which model, how, and where the result goes.

    Raises:
        FastforgetError: a number out of its range.
    """

    model: Annotated[str | os.PathLike[str], Help("Required. Local folder or hub name of a causal LM.", MODEL)]
    forget: Annotated[
        Texts, Help("Required. What to forget: a text file, a .jsonl file, or a dataset's folder or hub name.", DATA)
    ]
    out: Annotated[str | os.PathLike[str], Help("Required. Folder for the adapter, report.json, config.yaml.", OUTPUT)]
    _: KW_ONLY
    retain: Annotated[Texts | None, Help("What to keep, in the same forms.", DATA)] = None
    forget_columns: Annotated[Mapping[str, str] | None, Help(COLUMNS, DATA)] = None
    retain_columns: Annotated[Mapping[str, str] | None, Help("The same for --retain.", DATA)] = None
    forget_split: Annotated[str, Help("Split of a dataset.", DATA)] = "train"
    retain_split: Annotated[str, Help("The same for --retain.", DATA)] = "train"
    forget_subset: Annotated[str | None, Help("Subset (configuration) of a dataset.", DATA)] = None
    retain_subset: Annotated[str | None, Help("The same for --retain.", DATA)] = None
    streaming: Annotated[bool, Help("Read rows as they are needed; needs --max-steps.", DATA)] = False
    chat_template: Annotated[bool | None, Help(CHAT, DATA)] = None
    max_length: Annotated[int, Help("Tokens of a passage at most.", DATA)] = 128
    measured_passages: Annotated[int, Help("Passages of each set that are measured, before and after.", DATA)] = 64
    refusals: Annotated[str | os.PathLike[str] | Sequence[str] | None, Help(REFUSALS, TRAINING)] = None
    bits: Annotated[int, Help("Precision of the frozen base: 8, 4, 16 or 32.", MODEL)] = 8
    allow_missing_weights: Annotated[bool, Help(ALLOW, MODEL)] = False
    lora_r: Annotated[int, Help("Rank of the LoRA adapter.", MODEL)] = 16
    lora_alpha: Annotated[int | None, Help("LoRA's scale; default 2 r.", MODEL)] = None
    lora_targets: Annotated[
        str | Sequence[str], Help("Names, comma-separated, all-linear, or auto: query, key.", MODEL)
    ] = "auto"
    fit: Annotated[str | None, Help("Memory of the device, e.g. 16GB: take the bits and rows that fit it.", MODEL)] = (
        None
    )
    device: Annotated[str | None, Help("cpu, cuda, cuda:1, ...; default the first GPU, else cpu.", MODEL)] = None

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("model", "out"):
            if not isinstance(getattr(self, name), str | os.PathLike):
                raise FastforgetError(f"{name} must be a path, not a {type(getattr(self, name)).__name__}")
        texts = {"forget": self.forget, "retain": self.retain, "refusals": self.refusals}
        for name, value in {**(self.preset_options or {}), **texts}.items():
            if isinstance(value, str) and value.startswith(IN_PYTHON):
                raise FastforgetError(f"{name} was given in Python, and a config file cannot hold that: give it again")
        if self.max_length < SHORTEST:
            raise FastforgetError(f"--max-length must be at least {SHORTEST} tokens, not {self.max_length}")
        for name in ("measured_passages", "lora_r"):
            if getattr(self, name) < 1:
                raise FastforgetError(f"--{name.replace('_', '-')} must be at least 1, not {getattr(self, name)}")
        if self.streaming and self.max_steps is None:
            raise FastforgetError("--streaming needs --max-steps: how long a pass over a stream is, is not known")

    @property
    def lora(self) -> dict[str, Any]:
        """Return the arguments of `peft.LoraConfig`; raise FastforgetError where no module is named."""
        return lora_arguments(self.lora_r, self.lora_targets, self.lora_alpha)

    def source(self, side: str) -> Source | None:
        """Say where the passages of "forget" or "retain" come from, checked as far as that goes without reading them.

        Raises:
            FastforgetError: as `check_source`, or a path that no file can have.
        """
        texts = getattr(self, side)
        if texts is None:
            return None
        source = Source(
            path=texts,
            columns=getattr(self, f"{side}_columns") or {},
            split=getattr(self, f"{side}_split"),
            subset=getattr(self, f"{side}_subset"),
            streaming=self.streaming,
            chat_template=self.chat_template,
        )
        try:
            check_source(source, side)
        except OSError as error:
            raise FastforgetError(
                f"--{side} cannot be read: {error.strerror} (in Python, a text itself goes into a list)"
            ) from None
        return source

    def as_config(self) -> dict[str, Any]:
        """Return what `--config` takes to do the same again: absolute paths, a placeholder for data given in Python."""
        values = {field.name: getattr(self, field.name) for field in fields(self) if field.name not in NOT_OF_THE_RUN}
        for name in ("model", "forget", "retain", "refusals", "out"):
            value = values[name]
            if name == "out" or (isinstance(value, str | os.PathLike) and Path(value).exists()):
                values[name] = str(Path(value).resolve())
            elif value is not None and not isinstance(value, str | os.PathLike):
                values[name] = placeholder(value)
        if not isinstance(self.lora_targets, str):
            values["lora_targets"] = ",".join(self.lora_targets)
        return {name: plain(value) for name, value in values.items()}


@dataclass(frozen=True)
class DemoOptions(RunOptions):
    """Where the demo's result goes, and what it does there.

    Raises:
        FastforgetError: a seed out of range (scikit-learn takes the fewest).
    """

    out: Annotated[str | os.PathLike[str], Help("Folder for the adapter, report.json and curves.png.", OUTPUT)] = (
        "fastforget-demo"
    )
    _: KW_ONLY
    seed: Annotated[int, Help("Which topics are forgotten, and every random draw.", TRAINING)] = 0
    cache: str | os.PathLike[str] | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.seed < 2**32:
            raise FastforgetError(f"seed must be from 0 to {2**32 - 1}, not {self.seed}")


def lora_arguments(rank: int, targets: str | Sequence[str], alpha: int | None = None) -> dict[str, Any]:
    """Return the arguments of `peft.LoraConfig`; raise FastforgetError where no module is named."""
    names = targets.split(",") if isinstance(targets, str) else targets
    modules = [name.strip() for name in names if name.strip()]
    if not modules:
        raise FastforgetError("--lora-targets is empty: give module names, all-linear, or auto")
    scale = {} if alpha is None else {"lora_alpha": alpha}
    word = modules in (["all-linear"], ["auto"])
    return {"r": rank, "target_modules": modules[0] if word else modules, **scale}


def checked_preset(name: str, options: Mapping[str, Any] | None) -> list[Term]:
    """Build the preset's terms; raise FastforgetError where an option is unknown or of the wrong type."""
    try:
        return preset(name, **(options or {}))
    except TypeError as error:  # text where a number is wanted, and the like
        raise FastforgetError(f"--preset-option of {name!r} has a value of the wrong type: {error}") from error


Arguments = ParamSpec("Arguments")
Options = TypeVar("Options")
Result = TypeVar("Result")


def called_with(
    options: Callable[Arguments, Options],
) -> Callable[[Callable[[Options], Result]], Callable[Arguments, Result]]:
    """Make a function of one object into one that takes the object's own arguments, to callers and type checkers."""
    hints = get_type_hints(options)
    signature = inspect.signature(options)
    parameters = [each.replace(annotation=hints[each.name]) for each in signature.parameters.values()]

    def decorate(function: Callable[[Options], Result]) -> Callable[Arguments, Result]:
        @functools.wraps(function)
        def call(*given: Arguments.args, **named: Arguments.kwargs) -> Result:
            return function(options(*given, **named))

        call.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
        return call

    return decorate
