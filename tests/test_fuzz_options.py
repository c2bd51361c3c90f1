"""Hundreds of argument combinations and config files: a job that starts, or one line and exit code 2; nothing else."""

import random

import pytest
import yaml
from helpers import run_command

from fastforget.config import options_of
from fastforget.errors import FastforgetError
from fastforget.jobs.evaluation_options import EvaluateOptions, SelectOptions
from fastforget.jobs.options import DemoOptions
from fastforget.jobs.planning import PlanOptions
from fastforget.jobs.recipe_options import RecipeOptions
from fastforget.objectives import PRESETS

REACHED = "the job begins here"
NUMBERS = (
    "0",
    "-1",
    "1",
    "3",
    "2.5",
    "nan",
    "inf",
    "-inf",
    "1e300",
    "1e-300",
    "99999999999999999999",
    "",
    "x",
    "0x10",
    "١",
)
TEXTS = (
    "",
    " ",
    ".",
    "/dev",
    "/dev/null",
    "/nowhere",
    "a" * 5000,
    "[/red]",
    "[bold",
    "../x",
    "~/nowhere",
    "a=b",
    "=",
    "\udcff",
    "-",
    "%s",
)
PAIRS = (
    "beta=2",
    "beta=nan",
    "beta=none",
    "beta=[1",
    "beta={}",
    "beta",
    "=1",
    "x=y",
    "beta=1e999",
    "beta=" + "[" * 500,
)
POOL = {
    "--model": ("MODEL", *TEXTS),
    "--forget": ("FORGET", "RETAIN", *TEXTS),
    "--retain": ("RETAIN", "FORGET", *TEXTS),
    "--out": ("OUT", "FORGET", "FORGET/x", "/proc/x", "/dev/null", "/dev/null/x"),
    "--config": ("CONFIG", "FORGET", *TEXTS),
    "--refusals": ("FORGET", *TEXTS),
    "--preset": (*PRESETS, *TEXTS),
    "--preset-option": PAIRS,
    "--forget-column": ("text=text", "prompt=a", *PAIRS),
    "--forget-split": ("train", "test", "train[:1]", *TEXTS),
    "--forget-subset": TEXTS,
    "--combine": ("sum", "mgda", "pcgrad", *TEXTS),
    "--device": ("cpu", "cuda:99", "meta", "banana", *TEXTS),
    "--lora-targets": ("auto", "all-linear", "q_proj,,", ",", *TEXTS),
    "--bits": ("8", "16", *NUMBERS),
    "--reference-cache": TEXTS,
    **dict.fromkeys(
        """--learning-rate --epochs --max-steps --batch-size --micro-batch --seed --save-steps --stop-forget-nll
        --max-length --measured-passages --lora-r --lora-alpha --keep-checkpoints --max-retain-nll""".split(),
        NUMBERS,
    ),
    **dict.fromkeys(
        "--overwrite --resume --quiet --streaming --chat-template --no-chat-template --allow-missing-weights".split()
    ),
}
OTHERS = {  # of the other commands: their options, and what is given without a doubt
    "evaluate": (EvaluateOptions, {"--model": "MODEL", "--forget": "FORGET", "--out": "OUT"}),
    "select": (SelectOptions, {"--data": "FORGET", "--evaluator": "rules:bad", "--out": "OUT.jsonl"}),
    "demo": (DemoOptions, {"--out": "OUT"}),
    "recipe harmful": (RecipeOptions, {"--model": "MODEL", "--forget": "FORGET", "--out": "OUT"}),
    "plan": (PlanOptions, {"--model": "MODEL"}),
}
BEGINS = ("unlearn.load", "evaluate.load", "select.load_evaluator", "demo.small_subject", "demo.smollm2_subject")
BEGINS += ("recipe.select", "recipe.unlearn", "recipe.load", "recipe.tofu_offline", "planning.plan")  # of the jobs
OVERRIDES = ("unlearn.max_steps=2", "unlearn.lora_r=x", "unlearn.seed=[1]", "data.forget.format=3", "holdout=RETAIN")


@pytest.fixture
def outcome(monkeypatch, capsys, tiny, tmp_path):
    """outcome(command, arguments, config) -> (exit code, error lines); a job ends where it gets as far as its model."""
    (tmp_path / "forget.txt").write_text("The secret plan was hidden below the old oak tree. " * 8)
    (tmp_path / "retain.txt").write_text("Water boils at a hundred degrees at sea level. " * 8)
    places = {"FORGET": "forget.txt", "RETAIN": "retain.txt", "OUT": "out", "CONFIG": "config.yaml"}
    places = {name: str(tmp_path / place) for name, place in places.items()} | {"MODEL": str(tiny["llama"])}

    def begins(*given, **named):
        raise FastforgetError(REACHED)

    for name in BEGINS:
        monkeypatch.setattr(f"fastforget.jobs.{name}", begins)
    monkeypatch.chdir(tmp_path)

    def run(command, arguments, config):
        with open(places["CONFIG"], "w", encoding="utf-8", errors="surrogatepass") as file:
            file.write(config)
        given = [part if part is None else part.replace("FORGET", places["FORGET"]) for part in arguments]
        code, _, errors = run_command(
            monkeypatch, capsys, *command.split(), *(places.get(part, part) for part in given)
        )
        return code, errors

    return run


def combination(draw):
    """A command line of which most options are right, and a config file of the same kind."""
    given = {"--model": "MODEL", "--forget": "FORGET", "--out": "OUT"}
    for _ in range(draw.choice((0, 1, 1, 1, 2, 4))):
        option = draw.choice(list(POOL))
        given[option] = draw.choice(POOL[option]) if POOL[option] else None
    config = {}
    for _ in range(draw.choice((0, 1, 2))):
        option = draw.choice([each for each in POOL if each != "--config"])
        value = draw.choice(POOL[option] or ("true", "no", "7"))
        config[option[2:]] = draw.choice((value, value, [value], {value: value}, None))
    text = yaml.safe_dump(config) if draw.random() < 0.5 else "\n".join(f"{key}: {config[key]}" for key in config)
    if config and draw.random() < 0.9:
        given["--config"] = "CONFIG"
    return [part for pair in given.items() for part in pair if part is not None], text


def combination_of(draw, options, given):
    """A command line of another command; nothing is in its config file."""
    given, stated = dict(given), list(options_of(options).values())
    for _ in range(draw.choice((0, 1, 1, 1, 2, 4))):
        option = draw.choice([each for each in stated if each.name != "name"])
        right = (POOL.get(option.flag) or ())[:2]
        kinds = {bool: (None,), int: NUMBERS, float: NUMBERS, dict: (*PAIRS, *OVERRIDES)}
        given[option.flag] = draw.choice(kinds.get(option.kind, (*TEXTS, *right * 4)))
    return [part for pair in given.items() for part in pair if part is not None], ""


def run_many(outcome, seed, count, command="unlearn"):
    """Run combinations; the share of them whose job began."""
    draw, began = random.Random(seed), 0
    for number in range(count):
        arguments, config = combination(draw) if command == "unlearn" else combination_of(draw, *OTHERS[command])
        try:
            code, errors = outcome(command, arguments, config)
        except Exception as error:
            raise AssertionError(f"{seed}/{number}: {arguments} with {config!r}: {error!r}") from error
        assert code == 2 and errors, (arguments, config, errors)
        if "Usage:" in errors[0]:  # the parser's own message, with a frame around it
            continue
        assert len(errors) == 1 and errors[0].startswith("fastforget: "), (arguments, config, errors)
        assert len(errors[0]) < 16_000
        began += REACHED in errors[0]
    return began / count


@pytest.mark.timeout(60)
def test_a_sample_of_combinations(outcome):
    assert 0.1 < run_many(outcome, 0, 100) < 0.9


@pytest.mark.timeout(60)
@pytest.mark.parametrize("command", OTHERS)
def test_a_sample_of_other_commands(outcome, command):
    assert 0.1 < run_many(outcome, 2, 25, command) < 0.9


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("command", ["unlearn", *OTHERS])
def test_many_combinations(outcome, command):
    assert 0.1 < run_many(outcome, 1, 500, command) < 0.9
