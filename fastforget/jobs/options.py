"""The options of both jobs, stated once: flags of the commands, arguments of the functions, keys of config.yaml."""

from __future__ import annotations

import functools
import inspect
import math
import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, fields
from pathlib import Path
from typing import Annotated, Any, ParamSpec, TypeVar, get_type_hints

from rich.console import Console

from fastforget.combine import COMBINE
from fastforget.config import IN_PYTHON, Help, placeholder, plain
from fastforget.data.formats import FORMATS
from fastforget.data.sources import Source, check_source
from fastforget.errors import FastforgetError
from fastforget.guard import GuardSettings
from fastforget.jobs.step_logs import LIBRARIES, check_log
from fastforget.objectives import Term, preset
from fastforget.objectives.presets import DEFAULT_PRESET, PRESETS

SMALL, SMOLLM2 = "small", "smollm2"  # the demo's models
GONE = "gone"  # of --until: at the level of passages that the model never saw
EPOCHS = 66.0
UNTIL_STEPS = 198  # of a job that ends by itself, at least, unless asked: few passages are few steps an epoch
SHORTEST = 16  # tokens: less than this and a passage says nothing
LARGEST = 10**9  # of steps, passages, tokens: beyond, a number is a slip of the keyboard
LARGEST_RATE = 1e38  # AdamW divides it by 1 - beta, and float32 ends at 3.4e38
LARGEST_SEED = 2**32 - 1  # scikit-learn takes the fewest
LARGEST_RANK = 2**16
NO_TEXT = re.compile("[\0\ud800-\udfff]")
NOT_OF_THE_RUN = ("log_to", "overwrite", "resume", "quiet", "console")  # of one folder, or what is shown where
NOT_OF_THE_RESULT = ("out", "save_steps", "keep_checkpoints")  # a job that resumes may have others

Texts = str | os.PathLike[str] | Iterable[Any]  # a file, folder or hub name; a dataset; or rows, each a str or a dict

HEADINGS = DATA, MODEL, TRAINING, OUTPUT = "Data", "Model", "Training", "Output"  # in --help, in this order

COLUMNS = "FIELD=COLUMN, where rows name text, prompt, response or messages otherwise. Repeatable."
ALTERNATIVE = "alternative=COLUMN names other answers to the same prompts, for altpo."
FORMAT = f"A published data set's rows: {', '.join(FORMATS)}."
CHAT = "Format prompts and messages as the tokenizer's chats; default where it has a template."
REFUSALS = "Text file, one refusal a line, for presets that teach one; default a list of neutral sentences."
ROBUST = "Also after merging, quantising, and learning half of the forgotten again."
SAVE_STEPS = "Save a checkpoint every so many steps."
RESUME = "Go on from the last checkpoint in the output folder."
ALLOW = "Take a checkpoint that lacks weights of the model (they are random then), or has others."


@dataclass(frozen=True, kw_only=True)
class RunOptions:
    """What both jobs take."""

    preset: Annotated[str, Help(f"Unlearning objective: {', '.join(PRESETS)}.", TRAINING)] = DEFAULT_PRESET
    preset_options: Annotated[
        Mapping[str, Any] | None, Help("NAME=VALUE for the preset, e.g. beta=2. Repeatable.", TRAINING)
    ] = None
    log_to: Annotated[str | None, Help(f"Log each step's figures: {', '.join(LIBRARIES)}.", OUTPUT)] = None
    overwrite: Annotated[bool, Help("Replace an adapter in the output folder.", OUTPUT)] = False
    quiet: Annotated[bool, Help("Print nothing but errors.", OUTPUT)] = False
    console: Console | None = None

    def __post_init__(self) -> None:
        check_log(self.log_to)
        check_characters(self)

    def terms(self) -> list[Term]:
        """Build the preset's terms; raise FastforgetError where an option is unknown or of the wrong type."""
        return checked_preset(self.preset, self.preset_options)

    def printer(self) -> Console:
        """Return the console to print to, which says nothing where the run is quiet."""
        return console_of(self.quiet, self.console)


@dataclass(frozen=True, kw_only=True)
class JobSettings:
    """How long and how hard to train; the defaults are those of the demo, chosen by measurement.

    `epochs` counts passes over the forget set; `max_steps`, where given, overrides it. With `until` the default number
    of epochs is at least `UNTIL_STEPS` steps. The learning rate rises over ten
    steps, stays, and falls linearly to 0 over the last `decay` of the steps, in which the output settles: without that
    it is full of loops. `stop_forget_nll` ends the job
    at the first step whose forget batch has at least this NLL (nats per token): text that the model never saw costs it
    several nats, and driving the NLL far beyond that only ruins the output. `max_retain_nll` ends it at the first step
    whose retain batch has an NLL above that, with the last adapter that was below. `until` leaves passages out of the
    steps that the model no longer predicts, and lets the learning rate fall as soon as all are gone (`jobs/until.py`):
    "gone", or "em=LEVEL" for an exact memorisation of at most that level. `combine` is `UnlearnStep`'s.

    Raises:
        FastforgetError: a number out of its range, or an unknown way to combine gradients.
    """

    learning_rate: Annotated[float, Help("Of AdamW.", TRAINING)] = 3e-3
    decay: Annotated[
        float, Help("Share of the steps, at the end, over which the learning rate falls to 0.", TRAINING)
    ] = 0.6
    epochs: Annotated[float, Help("Passes over the forget set.", TRAINING)] = EPOCHS
    max_steps: Annotated[int | None, Help("Steps; overrides --epochs.", TRAINING)] = None
    batch_size: Annotated[int, Help("Forget passages a step, and as many retain passages.", TRAINING)] = 8
    micro_batch: Annotated[int | None, Help("Passages in memory at once; the same gradients.", TRAINING)] = None
    auto_micro_batch: Annotated[bool, Help("Halve --micro-batch whenever memory runs out.", TRAINING)] = False
    seed: Annotated[int, Help("Of every random draw.", TRAINING)] = 0
    save_steps: Annotated[int | None, Help(SAVE_STEPS, OUTPUT)] = None
    keep_checkpoints: Annotated[int | None, Help("Checkpoints that are kept, the last ones.", OUTPUT)] = None
    reference_cache: Annotated[
        str | os.PathLike[str] | None, Help("Folder that keeps what the frozen model said, for other jobs.", TRAINING)
    ] = None
    stop_forget_nll: Annotated[
        float | None, Help("Stop at a step whose forget batch has this NLL (nats per token).", TRAINING)
    ] = None
    max_retain_nll: Annotated[
        float | None, Help("Stop, with the adapter before, where a retain batch's NLL is above this.", TRAINING)
    ] = None
    until: Annotated[
        str | None, Help("Let it end once every passage is gone: gone, or em=LEVEL of exact memorisation.", TRAINING)
    ] = None
    combine: Annotated[
        str, Help(f"How the forget and the retain gradient become one: {', '.join(COMBINE)}.", TRAINING)
    ] = "sum"

    def __post_init__(self) -> None:
        if self.until is not None:
            parsed_until(self.until)
        if self.combine not in COMBINE:
            raise FastforgetError(f"combine must be one of {', '.join(COMBINE)}, not {self.combine!r}")
        if not 0.0 <= self.decay < 1.0:
            raise FastforgetError(f"decay must be at least 0 and less than 1, not {self.decay}")
        for name in (
            "learning_rate",
            "epochs",
            "max_steps",
            "batch_size",
            "micro_batch",
            "save_steps",
            "keep_checkpoints",
        ):
            value, largest = getattr(self, name), LARGEST_RATE if name == "learning_rate" else LARGEST
            if value is not None and not 0 < value <= largest:
                raise FastforgetError(f"{name.replace('_', '-')} must be positive and at most {largest:g}, not {value}")
        check_seed(self.seed)
        if self.stop_forget_nll is not None and not math.isfinite(self.stop_forget_nll):
            raise FastforgetError(f"stop-forget-nll must be a finite number, not {self.stop_forget_nll}")
        self.guard  # noqa: B018 (it checks its numbers)

    @property
    def guard(self) -> GuardSettings:
        """Return when the step gives up: a job is the same each time, so NaN would come again."""
        return GuardSettings(bad_steps=1, max_retain_nll=self.max_retain_nll)

    def steps(self, forget_examples: int | None) -> int:
        """Count the steps that the job takes unless it stops early; None: a stream, whose length is not known."""
        if self.max_steps is not None:
            return self.max_steps
        if forget_examples is None:
            raise FastforgetError("a streamed forget set has no length to count epochs by: give --max-steps")
        least = UNTIL_STEPS if self.until is not None and self.epochs == EPOCHS else 1
        return max(least, round(self.epochs * math.ceil(forget_examples / self.batch_size)))


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
    forget_columns: Annotated[Mapping[str, str] | None, Help(f"{COLUMNS} {ALTERNATIVE}", DATA)] = None
    retain_columns: Annotated[Mapping[str, str] | None, Help("The same for --retain.", DATA)] = None
    forget_split: Annotated[str, Help("Split of a dataset.", DATA)] = "train"
    retain_split: Annotated[str, Help("The same for --retain.", DATA)] = "train"
    forget_subset: Annotated[str | None, Help("Subset (configuration) of a dataset.", DATA)] = None
    retain_subset: Annotated[str | None, Help("The same for --retain.", DATA)] = None
    forget_format: Annotated[str | None, Help(FORMAT, DATA)] = None
    retain_format: Annotated[str | None, Help("The same for --retain.", DATA)] = None
    streaming: Annotated[bool, Help("Read rows as they are needed; needs --max-steps.", DATA)] = False
    chat_template: Annotated[bool | None, Help(CHAT, DATA)] = None
    max_length: Annotated[int, Help("Tokens of a passage at most.", DATA)] = 128
    measured_passages: Annotated[int, Help("Passages of each set that are measured, before and after.", DATA)] = 64
    refusals: Annotated[str | os.PathLike[str] | Sequence[str] | None, Help(REFUSALS, TRAINING)] = None
    bits: Annotated[int, Help("Precision of the frozen base: 8, 4, 16 or 32.", MODEL)] = 8
    allow_missing_weights: Annotated[bool, Help(ALLOW, MODEL)] = False
    compile: Annotated[bool, Help("Compile the decoder layers first (torch.compile), for a GPU.", MODEL)] = False
    checkpointing: Annotated[bool, Help("Keep less of each layer for the backward pass; slower.", MODEL)] = False
    lora_r: Annotated[int, Help("Rank of the LoRA adapter.", MODEL)] = 32
    lora_alpha: Annotated[int | None, Help("LoRA's scale; default 2 r.", MODEL)] = None
    lora_targets: Annotated[str | Sequence[str], Help("Names, comma-separated, or all-linear.", MODEL)] = "all-linear"
    resume: Annotated[bool, Help(RESUME, OUTPUT)] = False
    fit: Annotated[str | None, Help("Memory of the device, e.g. 16GB: take the bits and rows that fit it.", MODEL)] = (
        None
    )
    device: Annotated[str | None, Help("cpu, cuda, cuda:1, ...; default the first GPU, else cpu.", MODEL)] = None

    def __post_init__(self) -> None:
        RunOptions.__post_init__(self)
        JobSettings.__post_init__(self)
        for name in ("model", "out"):
            if not isinstance(getattr(self, name), str | os.PathLike):
                raise FastforgetError(f"{name} must be a path, not a {type(getattr(self, name)).__name__}")
        texts = {"forget": self.forget, "retain": self.retain, "refusals": self.refusals}
        for name, value in {**(self.preset_options or {}), **texts}.items():
            if isinstance(value, str) and value.startswith(IN_PYTHON):
                raise FastforgetError(f"{name} was given in Python, and a config file cannot hold that: give it again")
        for name, least, largest in (
            ("max_length", SHORTEST, LARGEST),
            ("measured_passages", 1, LARGEST),
            ("lora_r", 1, LARGEST_RANK),
            ("lora_alpha", 1, LARGEST),
        ):
            check_range(self, name, least, largest)
        if self.streaming and self.max_steps is None:
            raise FastforgetError("--streaming needs --max-steps: how long a pass over a stream is, is not known")
        if self.streaming and self.until is not None:
            raise FastforgetError(
                "--until needs a forget set that is held, not streamed: leave --streaming or --until out"
            )

    @property
    def lora(self) -> dict[str, Any]:
        """Return the arguments of `peft.LoraConfig`; raise FastforgetError where no module is named."""
        return lora_arguments(self.lora_r, self.lora_targets, self.lora_alpha)

    def source(self, side: str) -> Source | None:
        """Say where the passages of "forget" or "retain" come from, checked as far as that goes without reading them.

        Raises:
            FastforgetError: as `checked_source`.
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
            format=getattr(self, f"{side}_format"),
        )
        return checked_source(source, side)

    def as_config(self) -> dict[str, Any]:
        """Return what `--config` takes to do the same again: absolute paths, a placeholder for data given in Python."""
        values = {field.name: getattr(self, field.name) for field in fields(self) if field.name not in NOT_OF_THE_RUN}
        for name in ("model", "forget", "retain", "refusals", "out"):
            value = values[name]
            if name == "out" or (isinstance(value, str | os.PathLike) and os.path.exists(value)):
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
        FastforgetError: a seed out of range.
    """

    out: Annotated[str | os.PathLike[str], Help("Folder for the adapter, report.json and curves.png.", OUTPUT)] = (
        "fastforget-demo"
    )
    _: KW_ONLY
    model: Annotated[str, Help("small, or smollm2: a real one (needs fastforget[real]).", MODEL)] = SMALL
    until: Annotated[str | None, Help("When the small one may end: gone, or em=LEVEL.", TRAINING)] = GONE
    robust: Annotated[bool | None, Help("Measure what lasts of it; default yes.", TRAINING)] = None
    save_steps: Annotated[int | None, Help(f"{SAVE_STEPS} They go when the demo is through.", OUTPUT)] = None
    resume: Annotated[bool, Help(RESUME, OUTPUT)] = False
    seed: Annotated[int, Help("Which topics are forgotten, and every random draw.", TRAINING)] = 0
    cache: str | os.PathLike[str] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_seed(self.seed)
        if self.model not in (SMALL, SMOLLM2):
            raise FastforgetError(f"the demo's model is {SMALL} or {SMOLLM2}, not {self.model!r}")
        if self.until is not None:
            parsed_until(self.until)


def console_of(quiet: bool, console: Console | None) -> Console:
    """Return the given console, or standard output; where it is to be quiet, one that says nothing."""
    return Console(quiet=True) if quiet else console or Console()


def checked_source(source: Source, name: str) -> Source:
    """Return a source that is right as far as that is known without reading it; `name` is its option's.

    Raises:
        FastforgetError: as `check_source`, or a path that no file can have.
    """
    try:
        check_source(source, name)
    except OSError as error:
        raise FastforgetError(
            f"--{name} cannot be read: {error.strerror} (in Python, a text itself goes into a list)"
        ) from None
    return source


def check_characters(options: object) -> None:
    """Raise FastforgetError where one of a dataclass's texts holds what no file name and no text can."""
    for name, value in vars(options).items():
        for part in [*value, *value.values()] if isinstance(value, Mapping) else [value]:
            if isinstance(part, str | os.PathLike) and NO_TEXT.search(str(part)):
                raise FastforgetError(
                    f"{name} holds a NUL character or half a surrogate pair, which is no character: {str(part)!a}"
                )


def check_range(options: object, name: str, least: float, largest: float) -> None:
    """Raise FastforgetError where a number that was given is not in its range."""
    value = getattr(options, name)
    if value is not None and not least <= value <= largest:
        flag = f"--{name.replace('_', '-')}"
        raise FastforgetError(f"{flag} must be at least {least} and at most {largest}, not {value}")


def check_seed(seed: int) -> None:
    """Raise FastforgetError for a seed that not every library takes."""
    if not 0 <= seed <= LARGEST_SEED:
        raise FastforgetError(f"seed must be from 0 to {LARGEST_SEED}, not {seed}")


def parsed_until(until: str) -> float | None:
    """Return the level that "em=LEVEL" names; None for "gone", whose level the job finds.

    Raises:
        FastforgetError: neither of both, or a level that is not from 0 to 1.
    """
    if until == GONE:
        return None
    name, _, level = until.partition("=")
    try:
        if name == "em" and 0.0 <= float(level) <= 1.0:
            return float(level)
    except ValueError:
        pass
    raise FastforgetError(f"until must be gone, or em=LEVEL with a level from 0 to 1, not {until!r}")


def lora_arguments(rank: int, targets: str | Sequence[str], alpha: int | None = None) -> dict[str, Any]:
    """Return the arguments of `peft.LoraConfig`; raise FastforgetError where no module is named."""
    names = targets.split(",") if isinstance(targets, str) else targets
    modules = [name.strip() for name in names if name.strip()]
    if not modules:
        raise FastforgetError("--lora-targets is empty: give module names, or all-linear")
    scale = {} if alpha is None else {"lora_alpha": alpha}
    return {"r": rank, "target_modules": modules[0] if modules == ["all-linear"] else modules, **scale}


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
