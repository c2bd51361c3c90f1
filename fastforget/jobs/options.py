"""The options of an unlearning job, and their defaults: those of the command and of `fastforget.unlearn`."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from fastforget.config import IN_PYTHON, placeholder, plain
from fastforget.data.sources import Source, check_source
from fastforget.errors import FastforgetError
from fastforget.jobs.loop import JobSettings
from fastforget.objectives.presets import DEFAULT_PRESET

SHORTEST = 16  # tokens: less than this and a passage says nothing
LORA_TARGETS = "auto"
NOT_OF_THE_RUN = ("overwrite",)  # a permission for one folder: config.yaml must not give it to the next

Texts = str | os.PathLike[str] | Iterable[Any]  # a file, folder or hub name; a dataset; or rows, each a str or a dict


@dataclass(frozen=True, kw_only=True)
class UnlearnOptions(JobSettings):
    """What to unlearn, from which model, how, and where the result goes; every default of the command and of `unlearn`.

    Raises:
        FastforgetError: a number out of its range.
    """

    model: str | os.PathLike[str]
    forget: Texts
    out: str | os.PathLike[str]
    retain: Texts | None = None
    forget_columns: Mapping[str, str] | None = None
    retain_columns: Mapping[str, str] | None = None
    forget_split: str = "train"
    retain_split: str = "train"
    forget_subset: str | None = None
    retain_subset: str | None = None
    streaming: bool = False
    chat_template: bool | None = None
    max_length: int = 128
    measured_passages: int = 64
    preset: str = DEFAULT_PRESET
    preset_options: Mapping[str, Any] | None = None
    refusals: str | os.PathLike[str] | Sequence[str] | None = None
    bits: int = 8
    allow_missing_weights: bool = False
    lora_r: int = 16
    lora_alpha: int | None = None
    lora_targets: str | Sequence[str] = LORA_TARGETS
    device: str | None = None
    overwrite: bool = False

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
            raise FastforgetError("--streaming needs --max-steps: how long a pass over a stream is, nobody knows")

    @property
    def settings(self) -> JobSettings:
        """The part of the options that the loop takes."""
        return JobSettings(**{field.name: getattr(self, field.name) for field in fields(JobSettings)})

    @property
    def lora(self) -> dict[str, Any]:
        """Arguments of `peft.LoraConfig`; raises FastforgetError where no module is named."""
        names = self.lora_targets.split(",") if isinstance(self.lora_targets, str) else self.lora_targets
        modules = [name.strip() for name in names if name.strip()]
        if not modules:
            raise FastforgetError("--lora-targets is empty: give module names, all-linear, or auto")
        alpha = {} if self.lora_alpha is None else {"lora_alpha": self.lora_alpha}
        word = modules in (["all-linear"], ["auto"])
        return {"r": self.lora_r, "target_modules": modules[0] if word else modules, **alpha}

    def source(self, side: str) -> Source | None:
        """Where the passages of "forget" or "retain" come from, checked as far as that goes without reading them."""
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
        except OSError as error:  # of a path that no file can have
            raise FastforgetError(
                f"--{side} cannot be read: {error.strerror} (in Python, a text itself goes into a list)"
            ) from None
        return source

    def as_config(self) -> dict[str, Any]:
        """What `--config` takes to do the same again: paths are absolute, data given in Python a placeholder."""
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
