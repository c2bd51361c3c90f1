"""The command line: fastforget demo | unlearn | doctor."""

from __future__ import annotations

import logging
import os
import sys
import warnings
from pathlib import Path
from typing import Annotated, Any

import typer

from fastforget.errors import FastforgetError
from fastforget.jobs.loop import JobSettings
from fastforget.objectives.presets import DEFAULT_PRESET

app = typer.Typer(
    help="Make a causal language model forget chosen text, quickly and in little memory.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Folder for the adapter and report.json.")] = Path("fastforget-demo"),
    preset: Annotated[str, typer.Option(help="Unlearning objective.")] = DEFAULT_PRESET,
    seed: Annotated[int, typer.Option(help="Which topics are forgotten, and every random draw.")] = 0,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an adapter in the output folder.")] = False,
) -> None:
    """A small model learns Python's language reference by heart and forgets part of it. Offline, no GPU, minutes."""
    from fastforget.jobs.demo import run_demo

    run_demo(out, preset_name=preset, seed=seed, overwrite=overwrite)


@app.command()
def unlearn(
    model: Annotated[str, typer.Option(help="Local folder or hub name of a causal LM.")],
    forget: Annotated[Path, typer.Option(help="Text file, or .jsonl with text, or prompt and response.")],
    out: Annotated[Path, typer.Option(help="Folder for the adapter and report.json.")],
    retain: Annotated[Path | None, typer.Option(help="What to keep, in the same forms.")] = None,
    preset: Annotated[str, typer.Option(help="Unlearning objective.")] = DEFAULT_PRESET,
    preset_option: Annotated[list[str] | None, typer.Option(help="NAME=VALUE for the preset, e.g. beta=2.")] = None,
    bits: Annotated[int, typer.Option(help="Precision of the frozen base: 8, 4, 16 or 32.")] = 8,
    lora_r: Annotated[int, typer.Option(help="Rank of the LoRA adapter.")] = 16,
    lora_alpha: Annotated[int | None, typer.Option(help="LoRA's scale; default 2 r.")] = None,
    lora_targets: Annotated[
        str, typer.Option(help="Names, comma-separated, all-linear, or auto: query, key.")
    ] = "auto",
    learning_rate: Annotated[float, typer.Option()] = JobSettings.learning_rate,
    epochs: Annotated[float, typer.Option(help="Passes over the forget set.")] = JobSettings.epochs,
    max_steps: Annotated[int | None, typer.Option(help="Steps; overrides --epochs.")] = None,
    batch_size: Annotated[int, typer.Option(help="Forget passages a step, and as many retain passages.")] = 8,
    micro_batch: Annotated[int | None, typer.Option(help="Passages in memory at once; the same gradients.")] = None,
    max_length: Annotated[int, typer.Option(help="Tokens of a passage at most.")] = 128,
    seed: Annotated[int, typer.Option()] = 0,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1, ...; default the first GPU, else cpu.")] = None,
    save_steps: Annotated[int | None, typer.Option(help="Save a checkpoint every so many steps.")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an adapter in the output folder.")] = False,
    stop_forget_nll: Annotated[
        float | None, typer.Option(help="Stop at a step whose forget batch has this NLL (nats per token).")
    ] = None,
) -> None:
    """Make MODEL forget a text; writes a LoRA adapter in PEFT's format, and report.json."""
    from fastforget.jobs.unlearn import UnlearnRequest, run_unlearn

    lora: dict[str, Any] = {"r": lora_r, "target_modules": lora_target_modules(lora_targets)}
    if lora_alpha is not None:
        lora["lora_alpha"] = lora_alpha
    request = UnlearnRequest(
        model=model,
        forget=forget,
        retain=retain,
        out=out,
        preset_name=preset,
        preset_options=dict(parse_option(option) for option in preset_option or []),
        bits=bits,
        lora=lora,
        max_length=max_length,
        device=device,
        overwrite=overwrite,
    )
    settings = JobSettings(
        learning_rate=learning_rate,
        epochs=epochs,
        max_steps=max_steps,
        batch_size=batch_size,
        micro_batch=micro_batch,
        seed=seed,
        save_steps=save_steps,
        stop_forget_nll=stop_forget_nll,
    )
    run_unlearn(request, settings)


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


def lora_target_modules(text: str) -> str | list[str]:
    """A list of module names, or a word that stands for one."""
    names = [name.strip() for name in text.split(",") if name.strip()]
    if not names:
        raise FastforgetError("--lora-targets is empty: give module names, all-linear, or auto")
    return names[0] if names in (["all-linear"], ["auto"]) else names


def parse_option(text: str) -> tuple[str, Any]:
    """NAME=VALUE, the value a number, none, or text."""
    name, separator, value = text.partition("=")
    if not separator or not name:
        raise FastforgetError(f"--preset-option needs NAME=VALUE, not {text!r}")
    if value.lower() == "none":
        return name, None
    try:
        return name, float(value)
    except ValueError:
        return name, value


def quiet_libraries() -> None:
    """Our own progress bars and lines only; what libraries warn of here is nothing that the user can act on."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
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
