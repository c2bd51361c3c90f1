"""Options in YAML: every mistake is one line that names file, line and key; what is written reads back the same."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import pytest
import torch
import yaml

from fastforget.config import (
    IN_PYTHON,
    Help,
    checked,
    options_of,
    parse_pairs,
    parse_text,
    parse_value,
    plain,
    read_config,
    write_config,
)
from fastforget.errors import FastforgetError


@dataclass(frozen=True)
class Stated:
    """Options of every kind, and a field that is none."""

    forget: Annotated[str | Path, Help("", "")]
    out: Annotated[str | None, Help("", "")] = None
    learning_rate: Annotated[float, Help("", "")] = 1.0
    max_steps: Annotated[int | None, Help("", "")] = None
    streaming: Annotated[bool, Help("", "")] = False
    preset_options: Annotated[Mapping[str, Any] | None, Help("", "")] = None
    columns: Annotated[Mapping[str, str] | None, Help("", "")] = None
    console: object = None


OPTIONS = options_of(Stated)


@pytest.fixture
def config(tmp_path):
    def read(text):
        path = tmp_path / "c.yaml"
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return read_config(path, OPTIONS)

    return read


def test_options_come_from_the_annotations():
    kinds = {name: (option.kind, option.may_be_none) for name, option in OPTIONS.items()}
    assert kinds == {
        "forget": (str, False),
        "out": (str, True),
        "learning_rate": (float, False),
        "max_steps": (int, True),
        "streaming": (bool, False),
        "preset_options": (dict, True),
        "columns": (dict, True),
    }
    assert OPTIONS["preset_options"].flag == "--preset-option" and OPTIONS["max_steps"].flag == "--max-steps"
    assert OPTIONS["forget"].required and OPTIONS["learning_rate"].default == 1.0


def test_values_keep_their_types(config):
    values = config(
        "# a comment\nforget: a.txt\nlearning-rate: 3e-3\nmax_steps: 7\nstreaming: true\nout:\n"
        "preset_options: {beta: 2, retain: null, name: '2', layers: [1, 2]}\n"
    )
    assert values == {
        "forget": "a.txt",
        "learning_rate": 0.003,  # YAML 1.1 takes 3e-3 for text
        "max_steps": 7,
        "streaming": True,
        "preset_options": {"beta": 2, "retain": None, "name": "2", "layers": [1, 2]},
    }
    assert type(values["max_steps"]) is int and "out" not in values, "null is as not given"
    assert config("preset-option: [beta=2, retain=none]") == {"preset_options": {"beta": 2, "retain": None}}
    assert config("preset_option: beta=2") == {"preset_options": {"beta": 2}}
    assert config("columns: [text=2]") == config("column: text=2") == {"columns": {"text": "2"}}
    assert config("learning_rate: 3") == {"learning_rate": 3.0}
    assert config("{}") == {}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("forget: a\nlearning_rat: 1", r"c\.yaml:2: unknown option 'learning_rat': did you mean 'learning_rate'\?$"),
        ("preset_optoins: {}", r"'preset_optoins': did you mean 'preset_options'"),
        ("zzz: 1", r"unknown option 'zzz': the options are forget, out,"),
        ("1: 2", "unknown option '1'"),
        ("console: x", "unknown option 'console'"),
        ("preset_option: beta", "--preset-option needs NAME=VALUE, not 'beta'"),
        ("preset_options: {}\npreset-option: {}", "stands in line 1 already"),
        ("? [a]\n: 1", "unknown option"),
        ("learning-rate: 1\nlearning_rate: 2", r"c\.yaml:2: 'learning_rate' stands in line 1 already"),
        ("forget: a\nforget:", r"c\.yaml:2: 'forget' stands in line 1 already"),
        ("learning_rate: fast", r"c\.yaml:1: learning_rate must be a number, not 'fast'$"),
        ("learning_rate: true", "must be a number, not true"),
        ("learning_rate: [1]", "must be a number, not a list"),
        ("max-steps: 1.5", "max-steps must be a whole number, not 1.5"),
        ("max_steps: yes", "whole number, not true"),
        ("streaming: 1", "streaming must be true or false, not 1"),
        ("forget: 7", "forget must be text, not 7: put it in quotes"),
        ("forget: no", "forget must be text, not false: put it in quotes"),
        ("forget: 2026-11-21", "must be text, not 2026-11-21: put it in quotes"),
        ("forget: [a, b]", "forget must be text, not a list$"),
        ("out: {a: b}", "out must be text, not a mapping$"),
        ("preset_option: 3", "must be a mapping, or a list of NAME=VALUE, not 3"),
        ("preset_option: [1]", "must be a mapping, or a list of NAME=VALUE, not a list"),
        ("preset_options: {beta: 2026-11-21}", "must be a mapping, or a list of NAME=VALUE"),
        ("", "is no mapping of options"),
        ("- a\n- b", "is no mapping of options"),
        ("just text", "is no mapping of options"),
        ("forget: a\nout: [b", r"c\.yaml:2 is not valid YAML: expected ',' or '\]'"),
        ("forget: a: b", r"c\.yaml:1 is not valid YAML: mapping values are not allowed here"),
        ("forget: a\nout: !!python/object:os.system x", r"c\.yaml:2 is not valid YAML: could not determine"),
        ("forget: a\n---\nout: b", "not valid YAML: but found another document"),
        ("forget: a\nout: b\x00", r"c\.yaml:2 is not valid YAML: special characters"),
        ("forget: 2026-99-99", "YAML that cannot be read"),
        ("forget: " + "[" * 5000, "YAML that cannot be read|not valid YAML"),
        ("max_steps: " + "9" * 5000, "YAML that cannot be read"),
        (b"forget: \xff", r"is not UTF-8 \(byte 8\)"),
    ],
)
def test_mistakes_are_one_line(config, text, message):
    with pytest.raises(FastforgetError) as error:
        config(text)
    assert re.search(message, str(error.value)) and "\n" not in str(error.value), error.value


def test_files_that_are_none(tmp_path):
    with pytest.raises(FastforgetError, match=r"missing\.yaml does not exist"):
        read_config(tmp_path / "missing.yaml", OPTIONS)
    with pytest.raises(FastforgetError, match="is a folder"):
        read_config(tmp_path, OPTIONS)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("2", 2),
        ("0.5", 0.5),
        (".5", 0.5),
        ("1e-4", 1e-4),
        ("None", None),
        ("true", True),
        ("[1, 2]", [1, 2]),
        ('"2"', "2"),
        ("ce+kl", "ce+kl"),
        ("a=b", "a=b"),
        ("[" * 5000, "[" * 5000),
    ],
)
def test_values_of_pairs(text, value):
    pairs = parse_pairs([f"name={text}"], "--preset-option", parse_value)
    assert pairs == {"name": value} and type(pairs["name"]) is type(value)


@pytest.mark.parametrize("text", ["2", "none", "null", "1.0", "1e3", "question", '"quoted"', "a=b"])
def test_text_of_pairs_stays_text(text):
    """A column may be called "2" or "none": on the command line as it stands, in a file too."""
    assert checked({"text": text}, OPTIONS["columns"]) == {"text": text}
    assert parse_pairs([f"text={text}"], "--forget-column", parse_text) == {"text": text.strip('"')}


@pytest.mark.parametrize("text", ["beta", "=2", "beta="])
def test_pairs_need_a_name_and_a_value(text):
    with pytest.raises(FastforgetError, match=f"--preset-option needs NAME=VALUE, not '{text}'"):
        parse_pairs([text], "--preset-option", parse_value)


def test_plain_values():
    rows = [{"text": "secret"}]
    options = {
        "path": Path("a/b"),
        "steps": np.int64(3),
        "rate": np.float32(0.5),
        "flag": True,
        "nothing": None,
        "layers": (1, 2),
        "nested": {"k": Path("c")},
        "centres": torch.zeros(3, 2),
        "generator": iter(rows),
    }
    result = plain(options)
    assert result.pop("centres") == f"{IN_PYTHON}Tensor of length 3>"
    assert result.pop("generator") == f"{IN_PYTHON}list_iterator>"
    assert result == {
        "path": "a/b",
        "steps": 3,
        "rate": 0.5,
        "flag": True,
        "nothing": None,
        "layers": [1, 2],
        "nested": {"k": "c"},
    }
    assert type(result["steps"]) is int and type(result["rate"]) is float and result["flag"] is True


def test_what_is_written_reads_back(tmp_path):
    path = tmp_path / "config.yaml"
    options = {"forget": "Ärger: #1.txt", "learning_rate": 1e-05, "max_steps": 3, "streaming": False, "out": None}
    write_config(path, {**options, "preset_options": {"beta": 2.5, "retain": None}}, "how to use it")
    assert path.read_text().startswith("# how to use it\nforget:")
    assert yaml.safe_load(path.read_text())["learning_rate"] == 1e-05
    del options["out"]
    assert read_config(path, OPTIONS) == {**options, "preset_options": {"beta": 2.5, "retain": None}}
    assert [entry.name for entry in tmp_path.iterdir()] == ["config.yaml"], "no scratch file stays"


def test_a_write_that_fails_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "config.yaml"
    write_config(path, {"forget": "old"}, "")

    def broken(*_, **__):
        raise OSError("disk full")

    monkeypatch.setattr(Path, "write_text", broken)
    with pytest.raises(OSError, match="disk full"):
        write_config(path, {"forget": "new"}, "")
    monkeypatch.undo()
    assert yaml.safe_load(path.read_text()) == {"forget": "old"}
