"""The command line: fastforget demo | unlearn | presets | doctor."""

from __future__ import annotations

import logging
import os
import sys
import warnings
from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from fastforget.combine import COMBINE
from fastforget.config import option_types, parse_pairs, parse_text, parse_value, read_config
from fastforget.errors import FastforgetError
from fastforget.jobs.options import LORA_TARGETS, UnlearnOptions
from fastforget.jobs.unlearn import unlearn as unlearn_job
from fastforget.objectives.presets import DEFAULT_PRESET, PRESETS

app = typer.Typer(
    help="Make a causal language model forget chosen text, quickly and in little memory.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

PRESET_HELP = f"Unlearning objective: {', '.join(PRESETS)}."
PRESET_OPTION_HELP = "NAME=VALUE for the preset, e.g. beta=2. Repeatable."


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Folder for the adapter, report.json and curves.png.")] = Path(
        "fastforget-demo"
    ),
    preset: Annotated[str, typer.Option(help=PRESET_HELP)] = DEFAULT_PRESET,
    preset_option: Annotated[list[str] | None, typer.Option(help=PRESET_OPTION_HELP)] = None,
    seed: Annotated[int, typer.Option(help="Which topics are forgotten, and every random draw.")] = 0,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an adapter in the output folder.")] = False,
) -> None:
    """A small model learns Python's language reference by heart and forgets part of it. Offline, no GPU, minutes."""
    from fastforget.jobs.demo import run_demo

    options = parse_pairs(preset_option, "--preset-option", parse_value)
    run_demo(out, preset=preset, preset_options=options, seed=seed, overwrite=overwrite)


def read_config_option(context: typer.Context, path: Path | None) -> Path | None:
    """Makes the options in the file the defaults of the command; what stands on the command line wins over them."""
    if path is not None:
        kinds = option_types(unlearn)
        del kinds["config"]
        context.default_map = read_config(path, kinds)
    return path


# typer's options, each kind under a heading of its own in --help
data = partial(typer.Option, rich_help_panel="Data")
base = partial(typer.Option, rich_help_panel="Model")
training = partial(typer.Option, rich_help_panel="Training")
output = partial(typer.Option, rich_help_panel="Output")

CONFIG_HELP = "YAML file with any of these options; the command line wins. A run leaves its own as config.yaml."
FORGET_HELP = "Required. What to forget: a text file, a .jsonl file, or a dataset's folder or hub name."
COLUMN_HELP = "FIELD=COLUMN, where rows name text, prompt, response or messages otherwise. Repeatable."
COMBINE_HELP = f"How the forget and the retain gradient become one: {', '.join(COMBINE)}."
REFUSALS_HELP = "Text file, one refusal a line, for presets that teach one; default a list of neutral sentences."
ALLOW_HELP = "Take a checkpoint that lacks weights of the model (they are random then), or has others."
CHAT_HELP = "Format prompts and messages as the tokenizer's chats; default where it has a template."


@app.command()
def unlearn(
    config: Annotated[Path | None, typer.Option(help=CONFIG_HELP, is_eager=True, callback=read_config_option)] = None,
    forget: Annotated[str | None, data(help=FORGET_HELP)] = None,
    retain: Annotated[str | None, data(help="What to keep, in the same forms.")] = None,
    forget_column: Annotated[list[str] | None, data(help=COLUMN_HELP)] = None,
    retain_column: Annotated[list[str] | None, data(help="The same for --retain.")] = None,
    forget_split: Annotated[str, data(help="Split of a dataset.")] = UnlearnOptions.forget_split,
    retain_split: Annotated[str, data(help="The same for --retain.")] = UnlearnOptions.retain_split,
    forget_subset: Annotated[str | None, data(help="Subset (configuration) of a dataset.")] = None,
    retain_subset: Annotated[str | None, data(help="The same for --retain.")] = None,
    streaming: Annotated[bool, data("--streaming", help="Read rows as they are needed; needs --max-steps.")] = False,
    chat_template: Annotated[bool | None, data("--chat-template/--no-chat-template", help=CHAT_HELP)] = None,
    max_length: Annotated[int, data(help="Tokens of a passage at most.")] = UnlearnOptions.max_length,
    measured_passages: Annotated[
        int, data(help="Passages of each set that are measured, before and after.")
    ] = UnlearnOptions.measured_passages,
    model: Annotated[str | None, base(help="Required. Local folder or hub name of a causal LM.")] = None,
    bits: Annotated[int, base(help="Precision of the frozen base: 8, 4, 16 or 32.")] = UnlearnOptions.bits,
    allow_missing_weights: Annotated[bool, base("--allow-missing-weights", help=ALLOW_HELP)] = False,
    lora_r: Annotated[int, base(help="Rank of the LoRA adapter.")] = UnlearnOptions.lora_r,
    lora_alpha: Annotated[int | None, base(help="LoRA's scale; default 2 r.")] = None,
    lora_targets: Annotated[str, base(help="Names, comma-separated, all-linear, or auto: query, key.")] = LORA_TARGETS,
    device: Annotated[str | None, base(help="cpu, cuda, cuda:1, ...; default the first GPU, else cpu.")] = None,
    preset: Annotated[str, training(help=PRESET_HELP)] = UnlearnOptions.preset,
    preset_option: Annotated[list[str] | None, training(help=PRESET_OPTION_HELP)] = None,
    refusals: Annotated[str | None, training(help=REFUSALS_HELP)] = None,
    learning_rate: Annotated[float, training(help="Of AdamW.")] = UnlearnOptions.learning_rate,
    epochs: Annotated[float, training(help="Passes over the forget set.")] = UnlearnOptions.epochs,
    max_steps: Annotated[int | None, training(help="Steps; overrides --epochs.")] = None,
    batch_size: Annotated[
        int, training(help="Forget passages a step, and as many retain passages.")
    ] = UnlearnOptions.batch_size,
    micro_batch: Annotated[int | None, training(help="Passages in memory at once; the same gradients.")] = None,
    seed: Annotated[int, training(help="Of every random draw.")] = UnlearnOptions.seed,
    stop_forget_nll: Annotated[
        float | None, training(help="Stop at a step whose forget batch has this NLL (nats per token).")
    ] = None,
    combine: Annotated[str, training(help=COMBINE_HELP)] = UnlearnOptions.combine,
    out: Annotated[Path | None, output(help="Required. Folder for the adapter, report.json, config.yaml.")] = None,
    save_steps: Annotated[int | None, output(help="Save a checkpoint every so many steps.")] = None,
    overwrite: Annotated[bool, output("--overwrite", help="Replace an adapter in the output folder.")] = False,
    quiet: Annotated[bool, output("--quiet", help="Print nothing but errors.")] = False,
) -> None:
    """Make MODEL forget a text; writes a LoRA adapter in PEFT's format, report.json and config.yaml."""
    options = dict(locals())  # the options alone: before any other name is bound
    del options["config"]  # read already, by `read_config_option`
    missing = [f"--{name}" for name in ("model", "forget", "out") if options[name] is None]
    if missing:
        verb = "is" if len(missing) == 1 else "are"
        raise FastforgetError(
            f"{' and '.join(missing)} {verb} missing: needed on the command line or in a --config file"
        )
    for side in ("forget", "retain"):
        options[f"{side}_columns"] = parse_pairs(options.pop(f"{side}_column"), f"--{side}-column", parse_text)
    options["preset_options"] = parse_pairs(options.pop("preset_option"), "--preset-option", parse_value)
    unlearn_job(**options)


@app.command()
def presets(
    as_json: Annotated[bool, typer.Option("--json", help="A JSON list, with every option's default.")] = False,
) -> None:
    """Every preset: its paper, what it needs, and what a step of it costs."""
    import json

    from rich.console import Console
    from rich.table import Column, Table

    from fastforget.catalogue import COST_NOTE, cards, row

    if as_json:
        print(json.dumps([card.as_json() for card in cards()], indent=2))
        return
    table = Table(Column("preset", no_wrap=True), "arXiv", "needs", "forwards", "GEMMs")
    for card in cards():
        table.add_row(*row(card))
    console = Console()
    console.print(table)
    console.print(COST_NOTE)


@app.command()
def doctor() -> None:
    """Versions, devices, and which backend is in use and why."""
    from rich.console import Console
    from rich.table import Table

    from fastforget.doctor import report

    table = Table(show_header=False, box=None)
    for name, finding in report():
        table.add_row(name, finding)
    Console().print(table)


def quiet_libraries() -> None:
    """Our own progress bars and lines only; what libraries warn of here is nothing that the user can act on."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    warnings.filterwarnings("ignore", category=FutureWarning)
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    import transformers

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()


def main() -> None:
    """Entry point: bad input ends with one line on the error stream and exit code 2."""
    try:
        quiet_libraries()
        app()
    except FastforgetError as error:
        print(f"fastforget: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("fastforget: interrupted; nothing more was written", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    main()
