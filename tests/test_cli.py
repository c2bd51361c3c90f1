"""The commands end to end at a small scale, and bad input: one clear line, exit code 2, nothing half-written."""

import json
import math
import re
from dataclasses import dataclass

import pytest
from safetensors.torch import load_file

from fastforget import cli
from fastforget.objectives import PRESETS, NegatedCE

FORGET = "The secret plan was hidden below the old oak tree near the river bend. " * 8
RETAIN = "Two and two are four, and water boils at a hundred degrees at sea level. " * 8


@pytest.fixture
def run(monkeypatch, capsys, tiny, tmp_path):
    """run(*arguments) -> (exit code, output, error lines); MODEL, FORGET and RETAIN stand for small files."""
    files = {"FORGET": (tmp_path / "forget.txt", FORGET), "RETAIN": (tmp_path / "retain.txt", RETAIN)}
    for path, text in files.values():
        path.write_text(text)
    names = {name: str(path) for name, (path, _) in files.items()} | {"MODEL": str(tiny["llama"])}

    def runner(*arguments):
        monkeypatch.setattr("sys.argv", ["fastforget", *(names.get(argument, argument) for argument in arguments)])
        code = 0
        try:
            cli.main()
        except SystemExit as stop:
            code = stop.code or 0
        captured = capsys.readouterr()
        return code, captured.out, captured.err.strip().splitlines()

    return runner


def unlearn(out, *more):
    quick = ["--max-steps", "3", "--max-length", "48", "--bits", "32", "--lora-r", "4"]
    return ["unlearn", "--model", "MODEL", "--forget", "FORGET", "--retain", "RETAIN", "--out", str(out), *quick, *more]


def test_unlearn_writes_adapter_and_report(run, tmp_path):
    out = tmp_path / "out"
    code, text, errors = run(*unlearn(out, "--preset", "npo", "--preset-option", "beta=0.5", "--save-steps", "2"))
    assert code == 0, errors
    report = json.loads((out / "report.json").read_text())
    assert report["preset"] == "npo" and report["preset_options"] == {"beta": 0.5} and report["steps"] == 3
    for key in ("forget_leak_before", "forget_leak_after", "retain_nll_after", "degenerate_share", "peak_rss_mb"):
        assert isinstance(report[key], int | float), key
    assert {"adapter_config.json", "adapter_model.safetensors", "checkpoint-2"} <= {path.name for path in out.iterdir()}
    assert "What the model still recites" in text

    code, _, errors = run(*unlearn(out))
    assert code == 2 and len(errors) == 1 and "already holds an adapter" in errors[0]
    assert run(*unlearn(out, "--overwrite", "--preset", "grad_diff"))[0] == 0
    assert json.loads((out / "report.json").read_text())["preset"] == "grad_diff"


def test_unlearn_without_retain_in_8_bit(run, tmp_path):
    arguments = ["unlearn", "--model", "MODEL", "--forget", "FORGET", "--out", str(tmp_path / "o"), "--max-steps", "2"]
    code, text, errors = run(*arguments, "--max-length", "48")
    assert code == 0, errors
    assert "No --retain" in text and json.loads((tmp_path / "o" / "report.json").read_text())["bits"] == 8


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--forget", "/nowhere.txt"], "/nowhere.txt does not exist"),
        (["--preset", "np"], "unknown preset 'np'.*grad_ascent, grad_diff, npo"),
        (["--preset-option", "betta=1"], "no parameter 'betta'"),
        (["--preset-option", "beta"], "needs NAME=VALUE"),
        (["--retain", "FORGET"], "the same passage is in the forget set"),
        (["--lora-targets", "lm_head"], "adapter on the output head"),
        (["--lora-targets", "nothing"], "could not load the LoRA configuration"),
        (["--model", "/nowhere"], "could not load"),
        (["--bits", "7"], "bits must be one of"),
        (["--learning-rate", "-1"], "learning-rate must be positive"),
        (["--learning-rate", "1e38", "--max-steps", "9"], "became (nan|inf) at step 2 of 9"),
        (["--max-length", "4"], "--max-length must be at least"),
        (["--max-length", "4000"], "more than the model's context"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(run, tmp_path, more, message):
    out = tmp_path / "out"
    code, _, errors = run(*unlearn(out, *more))
    assert code == 2 and len(errors) == 1 and re.search(message, errors[0]), errors
    assert not out.exists(), "nothing half-written"


def test_empty_file_and_output_that_is_a_file(run, tmp_path):
    empty = tmp_path / "empty.txt"
    empty.write_text("\n")
    code, _, errors = run(*unlearn(tmp_path / "out", "--forget", str(empty)))
    assert code == 2 and "is empty" in errors[0] and not (tmp_path / "out").exists()
    code, _, errors = run(*unlearn(empty))
    assert code == 2 and "is a file" in errors[0] and empty.read_text() == "\n"


@dataclass(kw_only=True)
class BreaksAtStepFour(NegatedCE):
    """NaN from its fourth value on."""

    seen: int = 0

    def value(self, stats):
        self.seen += 1
        return super().value(stats) * (math.nan if self.seen >= 4 else 1.0)


def test_nan_after_good_steps_saves_the_last_good_adapter(run, tmp_path, monkeypatch):
    monkeypatch.setitem(PRESETS, "breaks", lambda: [BreaksAtStepFour()])
    out = tmp_path / "out"
    code, _, errors = run(*unlearn(out, "--preset", "breaks", "--max-steps", "9"))
    assert code == 2 and len(errors) == 1
    assert "became nan at step 4 of 9" in errors[0] and f"it is saved in {out}" in errors[0]
    weights = load_file(out / "adapter_model.safetensors")
    assert all(weight.isfinite().all() for weight in weights.values()) and not (out / "report.json").exists()
    assert any(weight.abs().sum() > 0 for name, weight in weights.items() if "lora_B" in name)


def test_doctor_tells_the_backend(run):
    code, text, _ = run("doctor")
    assert code == 0 and "backend auto" in text and "chunked" in text
