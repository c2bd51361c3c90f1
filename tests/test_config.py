"""Options in YAML: every mistake is one line that names file, line and key; what is written reads back the same."""

import inspect
import re
from pathlib import Path
from typing import Annotated

import numpy as np
import pytest
import torch
import typer
import yaml

from fastforget.config import (
    IN_PYTHON,
    checked,
    option_types,
    parse_pairs,
    parse_text,
    parse_value,
    plain,
    read_config,
    value_text,
    write_config,
)
from fastforget.errors import FastforgetError


def command(
    forget: Annotated[str | None, typer.Option()] = None,
    out: Annotated[Path | None, typer.Option()] = None,
    learning_rate: Annotated[float, typer.Option()] = 1.0,
    max_steps: Annotated[int | None, typer.Option()] = None,
    streaming: Annotated[bool, typer.Option()] = False,
    preset_option: Annotated[list[str] | None, typer.Option()] = None,
) -> None:
    """A command."""


KINDS = option_types(command)


@pytest.fixture
def config(tmp_path):
    def read(text):
        path = tmp_path / "c.yaml"
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return read_config(path, KINDS)

    return read


def test_option_types_come_from_the_annotations():
    assert KINDS == {
        "forget": str,
        "out": Path,
        "learning_rate": float,
        "max_steps": int,
        "streaming": bool,
        "preset_option": list[str],
    }
    assert set(KINDS) == set(inspect.signature(command).parameters)


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
        "preset_option": ["beta=2", "retain=none", 'name="2"', "layers=[1, 2]"],
    }
    assert type(values["max_steps"]) is int and "out" not in values, "null is as not given"
    assert config("preset-option: [beta=2, retain=none]") == {"preset_option": ["beta=2", "retain=none"]}
    assert config("preset_option: beta=2") == {"preset_option": ["beta=2"]}
    assert config("learning_rate: 3") == {"learning_rate": 3.0}
    assert config("{}") == {}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("forget: a\nlearning_rat: 1", r"c\.yaml:2: unknown option 'learning_rat': did you mean 'learning_rate'\?$"),
        ("preset_optoins: {}", r"'preset_optoins': did you mean 'preset_options'"),
        ("zzz: 1", r"unknown option 'zzz': the options are forget, out,"),
        ("1: 2", "unknown option '1'"),
        ("config: other.yaml", "unknown option 'config'"),
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
        read_config(tmp_path / "missing.yaml", KINDS)
    with pytest.raises(FastforgetError, match="is a folder"):
        read_config(tmp_path, KINDS)


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
    assert parse_value(value_text(value)) == value


@pytest.mark.parametrize("text", ["2", "none", "null", "1.0", "1e3", "question", '"quoted"', "a=b"])
def test_text_of_pairs_stays_text(text):
    """A column may be called "2" or "none": on the command line as it stands, in a file too."""
    (pair,) = checked({"text": text}, list[str])
    assert parse_pairs([pair], "--forget-column", parse_text) == {"text": text}
    if not text.startswith('"'):
        assert parse_text(text) == text


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
    assert read_config(path, KINDS) == {**options, "preset_option": ["beta=2.5", "retain=none"]}
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
