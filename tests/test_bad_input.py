"""Input that attacks found: files without an end, nested brackets, numbers, devices and texts that nothing can take.

Each ends with one clear line, on the command line with exit code 2, and soon.
"""

import json
import os
import re

import pytest
import torch
from helpers import run_command
from rich.console import Console

import fastforget as ff
from fastforget.config import LONGEST_FILE, options_of, read_config
from fastforget.data import sources
from fastforget.data import text as data_text
from fastforget.data.sources import DEEPEST, Source, read_source
from fastforget.data.text import read_rows
from fastforget.jobs.options import UnlearnOptions
from fastforget.jobs.running import say

pytestmark = pytest.mark.timeout(60)
PASSAGE = "The secret plan was hidden below the old oak tree near the river bend. " * 8


@pytest.fixture
def run(monkeypatch, capsys, tiny, tmp_path):
    """run(*arguments) -> (exit code, error lines) of `fastforget unlearn` with a model, a text and a folder."""
    (tmp_path / "forget.txt").write_text(PASSAGE)

    def runner(*arguments):
        given = ["--model", str(tiny["llama"]), "--forget", str(tmp_path / "forget.txt")]
        given += ["--out", str(tmp_path / "out")]
        quick = ["--max-steps", "1", "--max-length", "48", "--bits", "32", "--lora-r", "2"]
        code, _, errors = run_command(monkeypatch, capsys, "unlearn", *given, *quick, *arguments)
        return code, errors

    return runner


@pytest.fixture
def pipe(tmp_path):
    os.mkfifo(tmp_path / "pipe.jsonl")
    return str(tmp_path / "pipe.jsonl")


@pytest.mark.parametrize("option", ["--forget", "--retain", "--refusals", "--config"])
def test_a_device_or_a_pipe_is_no_file(run, pipe, option):
    for path in ("/dev/zero", "/dev/full", pipe):
        code, errors = run(option, path)
        assert code == 2 and errors == [f"fastforget: {path} is a device, a pipe or a socket: a file is needed"]


def test_a_pipe_in_a_folder_of_data(run, tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "a.jsonl").write_text('{"text": "a"}')
    os.mkfifo(tmp_path / "data" / "b.jsonl")
    code, errors = run("--forget", str(tmp_path / "data"))
    assert code == 2 and len(errors) == 1 and "b.jsonl is a device, a pipe or a socket" in errors[0]


@pytest.mark.parametrize("name", ["deep.json", "deep.jsonl"])
@pytest.mark.parametrize("kind", ["file", "folder"])
@pytest.mark.parametrize("brackets", ["[", '{"a":', '{"a":['])
def test_nested_json_is_refused(tmp_path, tokenizer, name, kind, brackets):
    pytest.importorskip("datasets")
    closing = "".join({"[": "]", "{": "}"}.get(sign, "") for sign in reversed(brackets))
    depth = 100_000
    content = '{"text": "[[[[{{\\"[", "extra": ' + brackets * depth + "1" + closing * depth + "}"
    (tmp_path / name).write_text('{"text": "ok"}\n' + content + "\n")
    with pytest.raises(ff.FastforgetError, match=f"{name}.*(too deep|stand in each other)"):
        read_source(Source(path=tmp_path / name if kind == "file" else tmp_path), tokenizer, 32)


def test_folders_that_are_walked_through_for_ever(tmp_path, tokenizer, monkeypatch):
    pytest.importorskip("datasets")
    inner = tmp_path / "a" / "b"
    inner.mkdir(parents=True)
    (inner / "a.jsonl").write_text('{"text": "a few words"}')
    monkeypatch.setattr(sources, "MOST_FILES", 3)
    assert read_source(Source(path=tmp_path), tokenizer, 32)
    (inner / "loop").symlink_to(tmp_path)
    with pytest.raises(ff.FastforgetError, match="holds more than 3 files"):
        read_source(Source(path=tmp_path), tokenizer, 32)
    monkeypatch.setattr(sources, "MOST_FILES", 4)
    with pytest.raises(ff.FastforgetError, match="loop links to a folder around it"):
        read_source(Source(path=tmp_path), tokenizer, 32)


def test_brackets_in_strings_are_no_depth(tmp_path, tokenizer):
    pytest.importorskip("datasets")
    text = "".join(("[", '\\"', "{")) * DEEPEST * 2
    (tmp_path / "a.json").write_text("".join(f'{{"text": "{text} number {number}"}}\n' for number in range(3)))
    assert len(read_source(Source(path=tmp_path / "a.json"), tokenizer, 4096)) == 3


def test_a_line_without_an_end_is_not_read_whole(tmp_path, monkeypatch):
    monkeypatch.setattr(data_text, "LONGEST_LINE", 100)
    (tmp_path / "a.jsonl").write_text('{"text": "short"}\n{"text": "' + "a" * 200 + '"}\n')
    with pytest.raises(ff.FastforgetError, match=r"a\.jsonl:2 is longer than 100 characters"):
        list(read_rows(tmp_path / "a.jsonl"))


def test_yaml_aliases_and_endless_files_are_refused(tmp_path):
    path = tmp_path / "c.yaml"
    bomb = ["a: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    bomb += [f"b{level}: &a{level} [{', '.join([f'*a{level - 1}'] * 10)}]" for level in range(1, 10)]
    path.write_text("\n".join(bomb))
    with pytest.raises(ff.FastforgetError, match=r"c\.yaml:2 .*aliases \(\*name\) are not allowed"):
        read_config(path, {})
    path.write_text("# " + "a" * LONGEST_FILE)
    with pytest.raises(ff.FastforgetError, match="longer than 262,144 characters"):
        read_config(path, {})


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--max-steps", "99999999999999999999"], r"max-steps must be positive and at most 1e\+09"),
        (["--batch-size", "99999999999999999999"], "batch-size must be positive and at most"),
        (["--measured-passages", "99999999999999999999"], "--measured-passages must be at least 1 and at most"),
        (["--max-length", "99999999999999999999"], "--max-length must be at least 16 and at most"),
        (["--lora-r", "1000000"], "--lora-r must be at least 1 and at most"),
        (["--lora-alpha", "0"], "--lora-alpha must be at least 1"),
        (["--epochs", "1e300"], "epochs must be positive and at most"),
        (["--learning-rate", "1e300"], r"learning-rate must be positive and at most 1e\+38"),
        (["--learning-rate", "nan"], "learning-rate must be positive"),
        (["--seed", str(2**64)], "seed must be from 0 to 4294967295"),
        (["--seed", "-1"], "seed must be from 0 to 4294967295"),
        (["--stop-forget-nll", "nan"], "stop-forget-nll must be a finite number, not nan"),
        (["--device", "banana"], "device 'banana' cannot be used: "),
        (["--device", "meta"], "device 'meta' cannot be used: "),
        (["--device", "cuda:99"], "device 'cuda:99' cannot be used: "),
        (["--out", "a\udcff"], r"out holds a NUL character or half a surrogate pair.*'a\\udcff'"),
    ],
)
def test_numbers_devices_and_texts_that_nothing_can_take(run, tmp_path, more, message):
    code, errors = run(*more)
    assert code == 2 and len(errors) == 1, errors
    assert re.search(message, errors[0]), errors
    assert not (tmp_path / "out").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_cuda_without_a_gpu(run):
    code, errors = run("--device", "cuda")
    assert code == 2 and len(errors) == 1 and "device 'cuda' cannot be used: " in errors[0]


@pytest.mark.parametrize(
    "line", [r'model: "a\ud800b"', r'retain: "\udfff"', r'out: "a\0b"', r'forget_columns: {text: "\ud800"}']
)
def test_half_a_surrogate_pair_in_a_config(run, tmp_path, line):
    (tmp_path / "c.yaml").write_text(line)
    values = read_config(tmp_path / "c.yaml", options_of(UnlearnOptions))
    with pytest.raises(ff.FastforgetError, match="half a surrogate pair"):
        UnlearnOptions(**{"model": "m", "forget": ["a"], "out": "o", **values})
    code, errors = run("--config", str(tmp_path / "c.yaml"))
    if line.startswith("retain"):  # the others are given on the command line, which wins
        assert code == 2 and len(errors) == 1 and "half a surrogate pair" in errors[0]


def test_what_a_user_wrote_is_no_markup(run, tmp_path, capsys):
    out = tmp_path / "a[/red]:smile:[bold]"
    code, errors = run("--out", str(out))
    assert code == 0 and not errors
    assert json.loads((out / "report.json").read_text())["adapter"] == str(out)
    console = Console(width=300)
    say(console, f"in {out}")
    assert capsys.readouterr().out == f"in {out}\n"
