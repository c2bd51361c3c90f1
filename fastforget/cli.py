"""The command line: fastforget demo | unlearn | select | evaluate | merge | recipe | plan | presets | doctor."""

from __future__ import annotations

import inspect
import json
import os
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

import fastforget
from fastforget.config import Option, options_of, parse_pairs, read_config
from fastforget.errors import FastforgetError
from fastforget.jobs.evaluation_options import EvaluateOptions, SelectOptions
from fastforget.jobs.merging import ARGUMENTS as MERGE_ARGUMENTS
from fastforget.jobs.merging import MergeOptions
from fastforget.jobs.options import HEADINGS, OUTPUT, DemoOptions, UnlearnOptions
from fastforget.jobs.planning import PlanOptions, run_plan
from fastforget.jobs.recipe_options import RecipeOptions
from fastforget.quiet import quiet_commands

app = typer.Typer(no_args_is_help=True, pretty_exceptions_enable=False)

CONFIG_HELP = "YAML file with any of these options; the command line wins. A run leaves its own as config.yaml."
JSON_HELP = "Print the result as JSON (what report.json holds, where there is one), and nothing else."


def print_version(wanted: bool) -> None:
    """Print the version and end, where `--version` is given."""
    if wanted:
        print(f"fastforget {fastforget.__version__}")
        raise typer.Exit()


@app.callback()
def top_level(
    version: Annotated[
        bool, typer.Option("--version", callback=print_version, is_eager=True, help="Print the version, and end.")
    ] = False,
) -> None:
    """Make a causal language model forget chosen text, quickly and in little memory."""


def taking(
    options: type, *, config: bool = False, reports: bool = False, arguments: Mapping[str, str] = {}
) -> Callable[[Callable[..., Any]], Callable[..., None]]:
    """Give a command a flag for each option that a dataclass states; it is called with those that were given, by name.

    Args:
        config: a flag `--config` too, for a file of options, over which the command line wins.
        reports: a flag `--json` too, to print what the command returns, and nothing else.
        arguments: name and help of what is given without a flag, in order.
    """
    stated = options_of(options)

    def decorate(run: Callable[..., Any]) -> Callable[..., None]:
        def command(context: typer.Context, **values: Any) -> None:
            sources = {name: context.get_parameter_source(name) for name in values}
            given = {name: values[name] for name, source in sources.items() if source and source.name == "COMMANDLINE"}
            path, as_json = given.pop("config", None), given.pop("as_json", False)
            for name, texts in given.items():
                if name in stated and stated[name].kind is dict:
                    given[name] = parse_pairs(texts, stated[name].flag, stated[name].values)
            given = {**(read_config(path, stated) if path else {}), **given}
            missing = [option.flag for option in stated.values() if option.required and option.name not in given]
            if missing:
                verb = "is" if len(missing) == 1 else "are"
                raise FastforgetError(
                    f"{' and '.join(missing)} {verb} missing: needed on the command line or in a --config file"
                )
            if as_json:
                report = run(**{**given, "quiet": True})
                if int(os.environ.get("RANK", 0)) == 0:  # of several processes, which torchrun numbers, one prints
                    print(json.dumps(report, indent=2))
            else:
                run(**given)

        parameters = [parameter("context", typer.Context, inspect.Parameter.empty)]
        for name, text in arguments.items():
            parameters.append(parameter(name, Annotated[str, typer.Argument(help=text)], inspect.Parameter.empty))
        if config:
            parameters.append(parameter("config", Annotated[Path | None, typer.Option(help=CONFIG_HELP)], None))
        in_order = sorted(stated.values(), key=lambda each: (HEADINGS.index(each.help.heading), not each.required))
        parameters += [flag_of(option) for option in in_order]
        if reports:
            flag = typer.Option("--json", help=JSON_HELP, rich_help_panel=OUTPUT)
            parameters.append(parameter("as_json", Annotated[bool, flag], False))
        command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        command.__name__, command.__doc__ = run.__name__, run.__doc__
        return command

    return decorate


def flag_of(option: Option) -> inspect.Parameter:
    """Return an option as the parameter of a typer command."""
    names = f"{option.flag}/--no-{option.flag[2:]}" if option.kind is bool and option.may_be_none else option.flag
    kind: Any = list[str] if option.kind is dict else option.kind
    default = None if option.required else option.default
    flag = typer.Option(names, help=option.help.text, rich_help_panel=option.help.heading)
    return parameter(option.name, Annotated[kind | None if default is None else kind, flag], default)


def parameter(name: str, annotation: Any, default: Any) -> inspect.Parameter:
    """Return a parameter that is given by name."""
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)


@app.command()
@taking(DemoOptions, reports=True)
def demo(**options: Any) -> dict[str, Any]:
    """Let a small model learn Python's language reference by heart and forget part of it. Offline, no GPU, minutes."""
    from fastforget.jobs.demo import demo

    return demo(**options)


@app.command()
@taking(UnlearnOptions, config=True, reports=True)
def unlearn(**options: Any) -> dict[str, Any]:
    """Make MODEL forget a text; writes a LoRA adapter in PEFT's format, report.json and config.yaml."""
    from fastforget.jobs.unlearn import unlearn

    return unlearn(**options)


@app.command()
@taking(SelectOptions, config=True, reports=True)
def select(**options: Any) -> dict[str, Any]:
    """Score dialogues with an evaluator, and write those that are to be forgotten."""
    from fastforget.jobs.select import select

    return select(**options)


@app.command()
@taking(EvaluateOptions, reports=True)
def evaluate(**options: Any) -> dict[str, Any]:
    """Measure what MODEL still knows of a text, without and with an adapter; writes report.json."""
    from fastforget.jobs.evaluate import evaluate

    return evaluate(**options)


@app.command()
@taking(MergeOptions, reports=True, arguments=MERGE_ARGUMENTS)
def merge(**options: Any) -> dict[str, Any]:
    """Add ADAPTER to the weights of BASE, and write into OUT an ordinary model to ship, without an adapter."""
    from fastforget.jobs.merging import merge

    return merge(**options)


@app.command()
@taking(RecipeOptions, reports=True, arguments={"name": "harmful, copyright, hallucination, privacy, tofu or muse."})
def recipe(**options: Any) -> dict[str, Any]:
    """Run a published job from its data to a report: select, unlearn, evaluate."""
    from fastforget.jobs.recipe import recipe

    return recipe(**options)


@app.command()
@taking(PlanOptions)
def plan(**options: Any) -> None:
    """Say how much memory a job on MODEL will need, from its config alone, and which settings fit a device."""
    from rich.console import Console

    run_plan(PlanOptions(**options), Console())


@app.command()
def presets(
    as_json: Annotated[bool, typer.Option("--json", help="A JSON list, with every option's default.")] = False,
) -> None:
    """List every preset: its paper, what it needs, and what a step of it costs."""
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
def doctor(as_json: Annotated[bool, typer.Option("--json", help="A JSON object.")] = False) -> None:
    """Show versions, devices, and which backend is in use and why."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from fastforget.doctor import report

    if as_json:
        print(json.dumps(dict(report()), indent=2))
        return
    table = Table(show_header=False, box=None)
    for name, finding in report():
        table.add_row(name, Text(finding))  # a path in it is no markup
    Console().print(table)


def main() -> None:
    """Run the command line; bad input ends with one line on the error stream and exit code 2."""
    try:
        quiet_commands()
        app(prog_name="fastforget")
    except FastforgetError as error:
        message = str(error).encode(errors="backslashreplace").decode()  # a path may hold half a surrogate pair
        print(f"fastforget: {message}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("fastforget: interrupted; nothing more was written", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    main()
