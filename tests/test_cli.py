"""The commands end to end at a small scale, and bad input: one clear line, exit code 2, nothing half-written."""

import json
import re
import subprocess
import sys

import pytest
import yaml
from helpers import BreaksAt, write_rows
from safetensors.torch import load_file

import fastforget as ff
from fastforget.objectives import PRESETS
from fastforget.objectives.presets import DEFAULT_PRESET


def unlearn(out, *more):
    quick = ["--max-steps", "3", "--max-length", "48", "--bits", "32", "--lora-r", "4"]
    return ["unlearn", "--model", "MODEL", "--forget", "FORGET", "--retain", "RETAIN", "--out", str(out), *quick, *more]


@pytest.mark.parametrize("save_steps", [(), ("--save-steps", "1")])
def test_an_update_that_breaks_the_model_is_no_success(run, tmp_path, save_steps):
    arguments = unlearn(tmp_path / "out", "--learning-rate", "1e38", *save_steps)
    arguments[arguments.index("--max-steps") + 1] = "1"
    code, text, errors = run(*arguments)
    assert code == 2 and len(errors) == 1, errors
    assert re.search(r"became inf after the update of step 1; .* after 0 steps \(a lower learning rate", errors[0])
    assert not (tmp_path / "out").exists() and "still knows" not in text


def test_unlearn_writes_adapter_and_report(run, tmp_path):
    out = tmp_path / "out"
    code, text, errors = run(*unlearn(out, "--preset", "npo", "--preset-option", "beta=0.5", "--save-steps", "2"))
    assert code == 0, errors
    report = json.loads((out / "report.json").read_text())
    assert report["preset"] == "npo" and report["preset_options"] == {"beta": 0.5} and report["steps"] == 3
    for key in ("forget_leak_before", "forget_leak_after", "retain_nll_after", "degenerate_share", "peak_rss_mb"):
        assert isinstance(report[key], int | float), key
    assert {"adapter_config.json", "adapter_model.safetensors", "config.yaml", "checkpoint-2"} <= {
        path.name for path in out.iterdir()
    }
    assert "What the model still knows" in text and "fastforget merge" in text
    card = (out / "README.md").read_text()
    assert (
        "`npo` (`beta 0.5`)" in card and "can be undone by switching it off" in card and "More Information" not in card
    )

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
        (["--preset-option", "beta"], "needs NAME=VALUE"),
        (["--preset-option", "beta=much"], "value of the wrong type"),
        (["--forget-column", "text"], "--forget-column needs NAME=VALUE"),
        (["--lora-targets", ","], "--lora-targets is empty"),
        (["--config", "/nowhere.yaml"], "/nowhere.yaml does not exist"),
        (["--chat-template"], "chat template"),
        (["--learning-rate", "1e38", "--max-steps", "9"], "weights became inf after the update of step 1;"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(run, tmp_path, more, message):
    out = tmp_path / "out"
    code, _, errors = run(*unlearn(out, *more))
    assert code == 2 and len(errors) == 1 and re.search(message, errors[0]), errors
    assert not out.exists(), "nothing half-written"


def test_an_output_that_is_a_file_is_refused(run, tmp_path):
    code, _, errors = run(*unlearn(tmp_path / "forget.txt"))
    assert code == 2 and "is a file" in errors[0] and (tmp_path / "forget.txt").is_file()


def test_rows_with_columns_of_other_names_streamed(run, tmp_path):
    table = [{"question": f"Who hid plan {number}?", "answer": "I did."} for number in range(9)]
    rows = write_rows(tmp_path / "rows.jsonl", table)
    columns = ["--forget-column", "prompt=question", "--forget-column", "response=answer", "--measured-passages", "4"]
    arguments = [*unlearn(tmp_path / "out"), "--forget", str(rows), *columns, "--streaming"]
    code, text, errors = run(*arguments)
    assert code == 0, errors
    assert "Streaming passages" in text and "Only the measured passages" in text
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["forget_passages"] == 4 and report["steps"] == 3
    at = arguments.index("--max-steps")
    code, _, errors = run(*arguments[:at], *arguments[at + 2 :], "--model", "/nowhere")
    assert code == 2 and len(errors) == 1 and "--streaming needs --max-steps" in errors[0], "before the model is loaded"


def test_config_gives_options_and_the_command_line_wins(run, tmp_path):
    config = tmp_path / "c.yaml"
    config.write_text(
        f"forget: {tmp_path}/forget.txt\nretain: {tmp_path}/retain.txt\nmax-steps: 2\nmax_length: 48\nbits: 32\n"
        "lora_r: 4\npreset: npo\npreset_options: {beta: 0.5}\nlearning_rate: 1e-3\nchat-template: false\nquiet: true\n"
    )
    code, text, errors = run("unlearn", "--config", str(config), "--model", "MODEL", "--out", str(tmp_path / "one"))
    assert (code, text, errors) == (0, "", [])
    report = json.loads((tmp_path / "one" / "report.json").read_text())
    assert report["preset"] == "npo" and report["preset_options"] == {"beta": 0.5} and report["steps"] == 2
    assert report["learning_rate"] == 0.001 and report["bits"] == 32
    more = ["--max-steps", "1", "--preset-option", "beta=2", "--chat-template", "--no-chat-template"]
    code, _, errors = run("unlearn", *more, "--model", "MODEL", "--out", str(tmp_path / "two"), "--config", str(config))
    assert code == 0, errors
    report = json.loads((tmp_path / "two" / "report.json").read_text())
    assert report["preset_options"] == {"beta": 2} and report["steps"] == 1 and report["learning_rate"] == 0.001


def test_config_of_a_run_repeats_it(run, tmp_path, monkeypatch):
    first, second = tmp_path / "first", tmp_path / "second"
    monkeypatch.chdir(tmp_path)
    arguments = [*unlearn("first", "--seed", "5", "--preset", "npo", "--preset-option", "beta=0.5"), "--quiet"]
    code, _, errors = run(*arguments, "--forget", "forget.txt")
    assert code == 0, errors
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")  # the paths in it are absolute
    config = str(first / "config.yaml")
    code, _, errors = run("unlearn", "--config", config)
    assert code == 2 and f"{first} already holds an adapter" in errors[0]
    code, _, errors = run("unlearn", "--config", config, "--out", str(second))
    assert code == 0, errors
    weights, again = (load_file(folder / "adapter_model.safetensors") for folder in (first, second))
    assert weights.keys() == again.keys() and all(weights[name].equal(again[name]) for name in weights)
    configs = [yaml.safe_load((folder / "config.yaml").read_text()) for folder in (first, second)]
    assert [options.pop("out") for options in configs] == [str(first), str(second)] and configs[0] == configs[1]
    assert configs[0]["preset_options"] == {"beta": 0.5} and configs[0]["learning_rate"] == 3e-3
    assert configs[0]["forget"] == str(tmp_path / "forget.txt")
    code, _, errors = run("unlearn", "--config", config, "--out", str(tmp_path / "third"), "--seed", "6")
    assert code == 0, errors
    other = load_file(tmp_path / "third" / "adapter_model.safetensors")
    assert not all(weights[name].equal(other[name]) for name in weights), "the comparison above can fail"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("learning_rat: 1", r"c\.yaml:1: unknown option 'learning_rat': did you mean 'learning_rate'\?"),
        ("seed: 1\nbits: eight", r"c\.yaml:2: bits must be a whole number, not 'eight'"),
        ("max_steps: -1", "max-steps must be positive"),
        ("seed: 1", "--forget is missing: needed on the command line or in a --config file"),
    ],
)
def test_bad_config_is_one_line_and_exit_code_2(run, tmp_path, text, message):
    config, out = tmp_path / "c.yaml", tmp_path / "out"
    config.write_text(text)
    forget = [] if "seed: 1" == text else ["--forget", "FORGET"]
    code, _, errors = run("unlearn", "--config", str(config), "--model", "MODEL", "--out", str(out), *forget)
    assert code == 2 and len(errors) == 1 and re.search(message, errors[0]), errors
    assert not out.exists(), "nothing half-written"


def test_required_options_are_named_in_one_line(run):
    code, _, errors = run("unlearn")
    assert code == 2 and len(errors) == 1 and "--model and --forget and --out are missing" in errors[0]


def test_nan_after_good_steps_saves_the_last_good_adapter(run, tmp_path, monkeypatch):
    monkeypatch.setitem(PRESETS, "breaks", lambda: [BreaksAt(step=4)])
    out = tmp_path / "out"
    code, _, errors = run(*unlearn(out, "--preset", "breaks", "--max-steps", "9"))
    assert code == 2 and len(errors) == 1
    assert "became nan at step 4;" in errors[0] and f"it is saved in {out}" in errors[0]
    weights = load_file(out / "adapter_model.safetensors")
    assert all(weight.isfinite().all() for weight in weights.values()) and not (out / "report.json").exists()
    assert not (out / "README.md").exists()
    assert any(weight.abs().sum() > 0 for name, weight in weights.items() if "lora_B" in name)
    assert yaml.safe_load((out / "config.yaml").read_text())["preset"] == "breaks"


def test_hub_tokens_are_written_nowhere(run, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    out = tmp_path / "out"
    code, text, errors = run(*unlearn(out, "--max-steps", "2", "--save-steps", "1", "--log-to", "jsonl"))
    files = [path for path in out.rglob("*") if path.is_file()]
    assert code == 0 and len(files) > 10 and "hf_secret" not in text + "".join(errors)
    assert not [path for path in files if b"hf_secret" in path.read_bytes()]


FLAGS = """--config --help --forget --retain --forget-column --retain-column --forget-split --retain-split
    --forget-subset --retain-subset --forget-format --retain-format --streaming --chat-template --max-length
    --measured-passages
    --model --bits --allow-missing-weights --compile --checkpointing --lora-r --lora-alpha --lora-targets --fit --device
    --learning-rate --decay --epochs --max-steps --batch-size --micro-batch --auto-micro-batch --seed --reference-cache
    --stop-forget-nll --max-retain-nll --until --combine --preset --preset-option --refusals
    --out --save-steps --keep-checkpoints --log-to --overwrite --quiet --resume --json""".split()
DEMO_FLAGS = """--help --model --preset --preset-option --until --robust --seed --log-to --overwrite --quiet --out
    --save-steps --resume --json""".split()


@pytest.mark.parametrize(("command", "flags"), [("unlearn", FLAGS), ("demo", DEMO_FLAGS)])
def test_help_names_every_flag_and_its_default(run, monkeypatch, command, flags):
    monkeypatch.setenv("COLUMNS", "300")
    code, text, _ = run(command, "--help")
    assert code == 0 and re.findall(r"^│ +(--[a-z-]+)", text, re.MULTILINE) == flags
    assert f"[default: {DEFAULT_PRESET}]" in text


def test_doctor_tells_the_backend(run):
    code, text, _ = run("doctor")
    assert code == 0 and "backend auto" in text and "torch" in text


def test_version_and_python_m(run):
    assert run("--version") == (0, f"fastforget {ff.__version__}\n", [])
    result = subprocess.run([sys.executable, "-m", "fastforget", "--version"], capture_output=True, text=True)
    assert (result.returncode, result.stdout) == (0, f"fastforget {ff.__version__}\n"), result.stderr


def test_a_shell_completes_commands(run, monkeypatch):
    """A shell asks the command for its completions: `unl` is `unlearn`."""
    asked = {"_FASTFORGET_COMPLETE": "complete_bash", "COMP_WORDS": "fastforget unl", "COMP_CWORD": "1"}
    for name, value in asked.items():
        monkeypatch.setenv(name, value)
    assert run()[1].split() == ["unlearn"]
