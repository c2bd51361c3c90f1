"""`fastforget recipe`: a published job from its data to a report, with one command."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from fastforget.adapters import save_adapter
from fastforget.config import plain
from fastforget.data.sources import Source, read_source
from fastforget.errors import FastforgetError
from fastforget.evaluate.memorisation import memorisation
from fastforget.evaluate.page import CARD, PAGE, write_card, write_page
from fastforget.evaluate.report import peak_rss_mb, write_json
from fastforget.head import context_length
from fastforget.jobs.checkpoints import Checkpoints
from fastforget.jobs.evaluate import evaluate
from fastforget.jobs.evaluation_options import parsed_place
from fastforget.jobs.loop import run_job
from fastforget.jobs.options import JobSettings, called_with, console_of
from fastforget.jobs.outputs import REPORT, claimed_folder
from fastforget.jobs.progress import shown_steps
from fastforget.jobs.recipe_files import SIDES, Recipe, overridden, read_recipe
from fastforget.jobs.recipe_options import RecipeOptions
from fastforget.jobs.running import say, surroundings
from fastforget.jobs.select import select
from fastforget.jobs.stages import Stages, stamp
from fastforget.jobs.tofu_offline import TofuOfflineOptions, tofu_offline
from fastforget.jobs.unlearn import unlearn
from fastforget.merging import merge
from fastforget.models import load, load_tokenizer
from fastforget.objectives import CE

SELECTED = "forget.jsonl"
SELECTED_FORMAT = "pairs"
ADAPTER, LEARNED = "adapter", "learned"
SAVE_STEPS = 100  # between checkpoints, from which an interrupted recipe goes on
NEEDS_EVALUATOR = ("harm",)


@called_with(RecipeOptions)
def recipe(options: RecipeOptions) -> dict[str, Any]:
    """Run a recipe: select, unlearn, evaluate, report. `fastforget recipe` in Python.

    The folder `out` gets `adapter/` (with a model card), a folder of each evaluation, report.json, report.html and
    README.md. An interrupted recipe goes on where it was when the same is run again.

    Returns:
        What report.json holds.

    Raises:
        FastforgetError: an unknown recipe or field, data that cannot be read, or what `select`, `unlearn` and
            `evaluate` raise; what was done until then is kept.
    """
    if options.offline:
        if options.name != "tofu":
            raise FastforgetError(f"--offline makes the data of tofu, not of {options.name}: leave it out")
        return tofu_offline(
            TofuOfflineOptions(
                Path(options.out),
                seed=options.seed,
                split=options.tofu_split,
                presets=options.preset_names,
                cache=None if options.cache is None else Path(options.cache),
                quiet=options.quiet,
                console=options.console,
            )
        )
    chosen = with_options(overridden(read_recipe(options.name), options.overrides or {}), options)
    with claimed_folder(Path(options.out), overwrite=True), surroundings(options.seed, options.quiet):
        return run_recipe(chosen, options)


def with_options(chosen: Recipe, options: RecipeOptions) -> Recipe:
    """Put the data, the evaluator and the rest of the command line into a recipe.

    Raises:
        FastforgetError: no model, or a recipe whose forget set the user must name.
    """
    if options.model is None:
        raise FastforgetError("--model is missing: which model is to forget?")
    data = chosen["data"]
    for side in SIDES:
        place = getattr(options, side)
        if place is not None:
            data[side] = {**data.get(side, {}), "place": place}
    if data["forget"].get("place") is None:
        raise FastforgetError(f"the recipe {options.name} needs --forget: what is to be forgotten")
    data["asked"] = {**data.get("asked", {}), **(options.sets or {})}
    return chosen


def run_recipe(chosen: Recipe, options: RecipeOptions) -> dict[str, Any]:
    """Do what is not done yet, and write the report."""
    assert options.model is not None
    start = time.perf_counter()
    out, console = Path(options.out), console_of(options.quiet, options.console)
    data = chosen["data"]
    places: list[Any] = [options.model, options.retain_log, options.evaluator]
    for texts in (*(data.get(side, {}).get("place") for side in SIDES), *data["asked"].values()):
        places.append(None if texts is None else parsed_place(texts)[0])
    stamps = [stamp(each) for each in places]
    stages = Stages(out, {"recipe": plain(chosen), "options": options.what_matters(), "places": stamps})
    model = os.fspath(options.model)
    if "fine_tune" in chosen:
        model = stages.once("fine_tune", lambda: learned_model(chosen, options))
    forget = source_arguments("forget", data["forget"])
    evaluator = options.evaluator or chosen.get("select", {}).get("evaluator")
    selection = None
    if evaluator is not None and "select" in chosen:
        selection = stages.once("select", lambda: selected(chosen, options, evaluator))
        forget = {"forget": str(out / SELECTED), "forget_format": SELECTED_FORMAT}
    retain = source_arguments("retain", data["retain"]) if data.get("retain", {}).get("place") is not None else {}
    common: dict[str, Any] = {"bits": options.bits, "device": options.device, "seed": options.seed}
    common |= {"chat_template": options.chat_template, "quiet": options.quiet, "console": options.console}

    def unlearned() -> Any:
        checkpoints = Checkpoints(out / ADAPTER)
        stages.once("unlearn-begun", checkpoints.clear)  # those of another recipe's run
        arguments = {**common, "save_steps": SAVE_STEPS, **forget, **retain, **chosen["unlearn"]}
        return unlearn(model, out=out / ADAPTER, overwrite=True, resume=bool(checkpoints.folders()), **arguments)

    report = stages.once("unlearn", unlearned)
    evaluations = {}
    for suite, settings in chosen["evaluate"].items():
        if suite in NEEDS_EVALUATOR and evaluator is None:
            say(console, f"No --evaluator: the suite {suite} is left out.")
            continue
        arguments = {**common, **asked_of(suite, chosen, options, forget), **settings}
        if suite in NEEDS_EVALUATOR:
            arguments |= {"evaluator": evaluator, "labels": options.labels, "judge_prompt": options.judge_prompt}
        place = {"out": out / f"evaluate-{suite}", "adapter": out / ADAPTER, "suite": suite}
        evaluations[suite] = stages.once(f"evaluate-{suite}", partial(evaluate, model, **place, **arguments))
    whole = {
        **report,
        **{name: each for name, each in evaluations.get("memorisation", {}).items() if name != "suite"},
        "command": "recipe",
        "recipe": options.name,
        "title": chosen["title"],
        "sources": chosen["sources"],
        "model": model,
        "forget": str(data["forget"]["place"]),
        "selection": selection,
        "evaluations": {name: each for name, each in evaluations.items() if name != "memorisation"},
        "settings": plain(chosen),
        "seconds": round(time.perf_counter() - start, 1),
        "peak_rss_mb": round(peak_rss_mb()),
    }
    written = write_json(out / REPORT, whole)
    write_page(out / PAGE, written)
    for folder in (out, out / ADAPTER):
        write_card(folder / CARD, written)
    stages.done()
    say(console, f"The report lies in {out / PAGE}, the adapter in {out / ADAPTER}.")
    return written


def source_arguments(side: str, part: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments of `unlearn` for one side's data."""
    place, subset, split = parsed_place(part["place"])
    found = {side: place, f"{side}_format": part.get("format"), f"{side}_subset": subset}
    return found if split is None else {**found, f"{side}_split": split}


def selected(chosen: Recipe, options: RecipeOptions, evaluator: Any) -> dict[str, Any]:
    """Let an evaluator choose what is to be forgotten."""
    place, subset, split = parsed_place(chosen["data"]["forget"]["place"])
    settings = {name: value for name, value in chosen["select"].items() if name != "evaluator"}
    arguments = {
        "format": chosen["data"]["forget"].get("format"),
        "subset": subset,
        **({} if split is None else {"split": split}),
        "labels": options.labels,
        "judge_prompt": options.judge_prompt,
        "bits": options.bits,
        "device": options.device,
        "quiet": options.quiet,
        "console": options.console,
        **settings,
    }
    return select(place, evaluator, Path(options.out) / SELECTED, **arguments)


def asked_of(suite: str, chosen: Recipe, options: RecipeOptions, forget: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments of `evaluate` that say what a suite measures."""
    data = chosen["data"]
    asked = data["asked"]
    if suite in ("tofu", "muse"):
        sides = {side: asked[side] for side in SIDES if side in asked}
        further = {name: place for name, place in asked.items() if name not in SIDES}
        if "forget" not in sides:
            raise FastforgetError(f"the suite {suite} needs data.asked.forget")
        return {**sides, "sets": further, "retain_log": options.retain_log}
    if suite == "hallucination":  # the questions, with right and wrong answers, whatever was selected of them
        return {"forget": data["forget"]["place"], "format": data["forget"].get("format")}
    found: dict[str, Any] = {"format": data["forget"].get("format"), "forget": data["forget"]["place"]}
    if "forget_format" in forget and forget["forget_format"] == SELECTED_FORMAT:
        found = {"format": SELECTED_FORMAT, "forget": forget["forget"]}
    for side in ("retain", "unseen"):
        if suite == "memorisation" and data.get(side, {}).get("place") is not None:
            found |= {side: data[side]["place"], f"{side}_format": data[side].get("format")}
    return found


def learned_model(chosen: Recipe, options: RecipeOptions) -> str:
    """Fine-tune the model on the text where it does not know it, and merge; return the folder of the one that does."""
    assert options.model is not None
    settings = dict(chosen["fine_tune"])
    known, bits = settings.pop("known"), settings.pop("bits")
    longest, rank = settings.pop("max_length"), settings.pop("lora_r")
    console = console_of(options.quiet, options.console)
    place, subset, split = parsed_place(chosen["data"]["forget"]["place"])
    # whole blocks: a format's pieces are for forgetting
    named = chosen["data"]["forget"].get("format")
    source = Source(path=place, subset=subset, split=split or "train", format=None if named == "book" else named)
    tokenizer = load_tokenizer(options.model)
    model: Any = load(options.model, bits=bits, lora={"r": rank}, device=options.device)
    context = context_length(model) or longest
    examples = list(read_source(source, tokenizer, min(longest, context)))
    found = memorisation(model, tokenizer, examples).exact
    if found is not None and found >= known:
        console.print(f"The model knows the text (exact memorisation {found:.2f}).")
        return os.fspath(options.model)
    console.print("The model does not know the text yet: fine-tuning it in ...")
    job = JobSettings(seed=options.seed, **settings)
    with shown_steps("fine-tuning", console, log_to=None, out=Path(options.out)) as progress:
        run_job(model, tokenizer, examples, None, [CE(on="forget")], job, progress=progress)
    out = Path(options.out)
    save_adapter(model, tokenizer, out / f"{LEARNED}-adapter")
    folder = out / LEARNED
    clear(folder)
    return str(merge(options.model, out / f"{LEARNED}-adapter", folder))


def clear(folder: Path) -> None:
    """Remove what an interrupted merge left, which would be refused."""
    if folder.is_dir():
        for path in folder.iterdir():
            path.unlink()
