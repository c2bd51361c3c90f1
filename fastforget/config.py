"""Options as a dataclass states them: as flags, in the file that `--config` reads, and in the config.yaml of a run."""

from __future__ import annotations

import difflib
import inspect
import json
import numbers
import os
import types
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Union, get_args, get_origin, get_type_hints

import yaml

from fastforget.errors import FastforgetError
from fastforget.files import open_text, written_whole
from fastforget.objectives.schedules import Linear

CONFIG = "config.yaml"  # beside the adapter
LONGEST_FILE = 1 << 18  # characters; YAML of this size takes seconds to read
IN_PYTHON = "<given in Python: "  # begins what stands in a config file for a value that YAML cannot hold
KINDS = {  # of options, and what each of them takes in a file; pairs are a dict
    dict: "a mapping, or a list of NAME=VALUE",
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    str: "text",
}


@dataclass(frozen=True)
class Help:
    """What `--help` says of an option, and under which heading; fields annotated with one are options."""

    text: str
    heading: str


@dataclass(frozen=True)
class Option:
    """One option: a field of a dataclass, as the command line and config files have it."""

    name: str
    kind: type  # of KINDS
    values: Callable[[str], Any]  # reads the VALUE of a pair
    default: Any
    required: bool
    may_be_none: bool
    help: Help

    @property
    def flag(self) -> str:
        """Return the flag's name: of pairs, which are given one by one, the singular."""
        return "--" + (self.name.removesuffix("s") if self.kind is dict else self.name).replace("_", "-")


def options_of(options: type) -> dict[str, Option]:
    """List the options that a dataclass states: its fields annotated with a `Help`, by name."""
    signature = inspect.signature(options)
    stated: dict[str, Option] = {}
    for name, hint in get_type_hints(options, include_extras=True).items():
        if get_origin(hint) is not Annotated:
            continue
        kind, text = get_args(hint)
        default = signature.parameters[name].default
        members = get_args(kind) if get_origin(kind) in (Union, types.UnionType) else (kind,)
        mapping = next((member for member in members if get_origin(member) is Mapping), None)
        stated[name] = Option(
            name=name,
            kind=dict if mapping is not None else next(each for each in KINDS if each in members),
            values=parse_text if mapping is not None and get_args(mapping)[1] is str else parse_value,
            default=default,
            required=default is inspect.Parameter.empty,
            may_be_none=types.NoneType in members,
            help=text,
        )
    return stated


def read_config(path: str | os.PathLike[str], options: Mapping[str, Option]) -> dict[str, Any]:
    """Read options from a YAML file: those in it, by name.

    Keys are option names, written with `-` or `_`; of pairs also the flag's name (`preset_option`). A null counts as
    not given.

    Raises:
        FastforgetError: a file that cannot be read, is not YAML or no mapping; a key that is unknown or there twice; a
            value of another type. File and line are named.
    """
    path = Path(path)
    flags = {option.flag[2:].replace("-", "_"): option.name for option in options.values()}
    values: dict[str, Any] = {}
    seen: dict[str, int] = {}
    for line, key, value in read_mapping(path):
        name = str(key).replace("-", "_")
        name = flags.get(name, name)
        if name not in options:
            near = difflib.get_close_matches(name, [*options, *flags], n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"the options are {', '.join(options)}"
            raise FastforgetError(f"{path}:{line}: unknown option {str(key)!r}: {hint}")
        if name in seen:
            raise FastforgetError(f"{path}:{line}: {str(key)!r} stands in line {seen[name]} already: remove one")
        seen[name] = line
        if value is None:
            continue
        try:
            values[name] = checked(value, options[name])
        except TypeError:
            expected = KINDS[options[name].kind]
            quotes = ": put it in quotes" if expected == "text" and not isinstance(value, list | dict) else ""
            raise FastforgetError(f"{path}:{line}: {key} must be {expected}, not {described(value)}{quotes}") from None
    return values


def read_mapping(path: Path) -> list[tuple[int, Any, Any]]:
    """List (line, key, value) of each entry of a YAML file; raise FastforgetError where it is no mapping."""
    if os.path.isdir(path):  # which is False, not an error, for a name that is too long
        raise FastforgetError(f"{path} is a folder: --config needs a YAML file")
    with open_text(path) as file:
        text = file.read(LONGEST_FILE + 1)
    if len(text) > LONGEST_FILE:
        raise FastforgetError(f"{path} is longer than {LONGEST_FILE:,} characters, which no file of options is")
    try:
        # by nodes, not yaml.safe_load: nodes know their lines, and a key that is there twice is not lost
        loader = PlainLoader(text)
        root = loader.get_single_node()
        if not isinstance(root, yaml.MappingNode):
            raise FastforgetError(f"{path} is no mapping of options: it needs lines such as 'preset: npo_mean'")
        return [
            (
                key.start_mark.line + 1,
                loader.construct_object(key, deep=True),
                loader.construct_object(value, deep=True),
            )
            for key, value in root.value
        ]
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f"{path}:{mark.line + 1}" if mark is not None else str(path)
        raise FastforgetError(f"{where} is not valid YAML: {error.problem or error.context}") from None
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        raise FastforgetError(f"{path}:{line} is not valid YAML: {error.reason}") from None
    except FastforgetError:
        raise
    except (ValueError, RecursionError):  # a date like 2026-99-99, a number of thousands of digits, brackets too deep
        raise FastforgetError(
            f"{path} is YAML that cannot be read: an impossible date or number, or too deep"
        ) from None


class PlainLoader(yaml.SafeLoader):
    """YAML without aliases: a few lines of them stand for more values than fit in memory."""

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        """Compose a node; raise for an alias."""
        if self.check_event(yaml.AliasEvent):
            event = self.peek_event()
            raise yaml.composer.ComposerError(None, None, "aliases (*name) are not allowed here", event.start_mark)
        return super().compose_node(parent, index)


def checked(value: Any, option: Option) -> Any:
    """Return a value of a file as the option takes it; raise TypeError where it is of another type."""
    if option.kind is dict:
        if isinstance(value, dict):
            json.dumps(value)  # a TypeError where there is a date in it
            return {str(name): part for name, part in value.items()}
        entries = [value] if isinstance(value, str) else value
        if isinstance(entries, list) and all(isinstance(entry, str) for entry in entries):
            return parse_pairs(entries, option.flag, option.values)
    elif option.kind is float and not isinstance(value, bool):
        try:  # of text too: YAML 1.1 takes 3e-3 for that, as its numbers need a dot
            return float(value)
        except (ValueError, OverflowError):
            pass
    elif isinstance(value, option.kind) and (option.kind is bool or not isinstance(value, bool)):
        return value
    raise TypeError


def described(value: Any) -> str:
    """Describe a value of a YAML file in a few words."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list):
        return "a list"
    if isinstance(value, dict):
        return "a mapping"
    text = repr(value) if isinstance(value, str) else str(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def parse_pairs(texts: Sequence[str] | None, option: str, read: Callable[[str], Any]) -> dict[str, Any]:
    """Read NAME=VALUE texts as a mapping; raise FastforgetError, naming the option, for one of another form."""
    pairs = {}
    for text in texts or []:
        name, separator, value = text.partition("=")
        if not separator or not name or not value:
            raise FastforgetError(f"{option} needs NAME=VALUE, not {text!r}")
        pairs[name] = read(value)
    return pairs


def parse_value(text: str) -> Any:
    """Read a VALUE of any type: none, what JSON takes it for (2, true, [1, 2], "2"), a number, or else text."""
    if text.lower() == "none":
        return None
    for read in (json.loads, float):
        try:
            return read(text)
        except (ValueError, RecursionError):
            pass
    return text


def parse_text(text: str) -> str:
    """Read a VALUE that is text, in double quotes or as it stands."""
    value = parse_value(text)
    return value if isinstance(value, str) else text


def write_config(path: Path, options: Mapping[str, Any], comment: str) -> None:
    """Write options as YAML under a line of comment, whole or not at all."""
    text = yaml.safe_dump(plain(options), sort_keys=False, allow_unicode=True, width=2**20)
    with written_whole(path) as scratch:
        scratch.write_text(f"# {comment}\n{text}", encoding="utf-8")


def plain(value: Any) -> Any:
    """Return the value in the types that YAML and JSON hold; what is none of those becomes a placeholder."""
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, str):
        return str(value)
    if isinstance(value, numbers.Real):  # NumPy's scalars too
        return int(value) if isinstance(value, numbers.Integral) else float(value)
    if isinstance(value, os.PathLike):
        return str(os.fspath(value))
    if isinstance(value, Linear):  # a schedule of a weight; read back as the same
        value = vars(value)
    if isinstance(value, Mapping):
        return {str(key): plain(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [plain(part) for part in value]
    return placeholder(value)


def placeholder(value: Any) -> str:
    """Return what stands in a config file for an object that only Python can give."""
    try:
        size = f" of length {len(value)}"
    except TypeError:
        size = ""
    return f"{IN_PYTHON}{type(value).__name__}{size}>"
