"""`fastforget demo`, and `fastforget.demo` in Python: a small model learns a real text and forgets part of it.

Offline, on two CPU cores, in minutes.
"""

from __future__ import annotations

import functools
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import platformdirs
import torch

from fastforget.adapters import save_adapter
from fastforget.aiming import aim_adapter
from fastforget.backbone import Backbone
from fastforget.clusters import save_centres
from fastforget.config import plain
from fastforget.data.examples import in_batches
from fastforget.errors import FastforgetError
from fastforget.evaluate.plot import CURVES, HOW_TO_GET_IT, plot_curves
from fastforget.evaluate.report import (
    check_measured,
    print_continuations,
    print_table,
    strict,
)
from fastforget.evaluate.robustness import print_robustness
from fastforget.jobs.checkpoints import Checkpoints, claimed_with_checkpoints, identity_of
from fastforget.jobs.lasting import DEMO_BITS, measure_lasting, print_lasting
from fastforget.jobs.loop import run_job
from fastforget.jobs.options import SMALL, SMOLLM2, DemoOptions, JobSettings, called_with
from fastforget.jobs.outputs import BROKEN, REPORT, outcome, say_merge, say_not_gone, write_report, write_somewhere
from fastforget.jobs.progress import shown_steps
from fastforget.jobs.running import measure, say, surroundings
from fastforget.jobs.smollm2 import PRESET_OPTIONS, smollm2_subject
from fastforget.jobs.state import JobResult
from fastforget.jobs.subjects import DemoScale, small_subject
from fastforget.models import load, load_tokenizer
from fastforget.objectives import layers_of, subtraction
from fastforget.objectives.presets import DEFAULT_PRESET


@called_with(DemoOptions)
def demo(options: DemoOptions) -> dict[str, Any]:
    """Show a small model forget a real text: `fastforget demo` in Python, with the same names and defaults.

    The folder `out` gets a LoRA adapter in PEFT's format, report.json, and curves.png where matplotlib is installed.
    The seed decides which topics are forgotten and every random draw; torch's own generators are left as they were.

    Args:
        overwrite: replace an adapter in `out` that is not the demo's own.
        model: "small", or "smollm2" for SmolLM2-135M-Instruct, which learns and forgets invented people
            (`fastforget[real]`).
        until: when it may end; None: after the steps of the job's defaults.
        robust: whether it is measured what lasts of it (`fastforget evaluate --robust`); default yes.
        save_steps, resume: write a checkpoint every so many steps, until the demo is through; go on from the last one.
        cache: folder for the trained base, which the next demo with this seed takes; default the user's cache.
        quiet: print nothing. Otherwise `console` (default: standard output) gets what the command prints.

    Returns:
        What report.json holds.

    Raises:
        FastforgetError: an unknown preset or option of it, a seed out of range, an output folder that holds another
            adapter, or checkpoints of another demo.
    """
    claimed = claimed_with_checkpoints(
        Checkpoints(Path(options.out)),
        overwrite=options.overwrite,
        resume=options.resume,
        ours=lambda report: report.get("command") == "demo",
    )
    with claimed, surroundings(options.seed, options.quiet):
        return run_demo(options, DemoScale(), JobSettings(until=options.until, save_steps=options.save_steps))


def run_demo(options: DemoOptions, scale: DemoScale, settings: JobSettings) -> dict[str, Any]:
    """Train (or take from the cache), load in 8 bit, unlearn, measure, save. Return what report.json holds.

    Raises:
        FastforgetError: as `demo`, or a base that does not learn its text.
    """
    if options.model == SMOLLM2 and options.preset == DEFAULT_PRESET:
        options = replace(options, preset_options={**PRESET_OPTIONS, **(options.preset_options or {})})
    terms = options.terms()
    out, seed, console = Path(options.out), options.seed, options.printer()
    settings = replace(settings, seed=seed)
    if subtraction(terms) is not None:  # which forgets only when it is subtracted, at the end
        settings = replace(settings, until=None)
    start = time.perf_counter()
    torch.manual_seed(seed)

    cache = Path(platformdirs.user_cache_dir("fastforget") if options.cache is None else options.cache)
    if options.model == SMALL:
        subject = small_subject(seed, scale, cache, console)
    else:
        subject = smollm2_subject(seed, cache, console)
    settings = replace(settings, **subject.settings)
    sets = subject.sets
    forget = subject.forgotten or sets["forget"]
    model = load(subject.base, bits=DEMO_BITS, lora=subject.lora, device="cpu")
    Backbone(model).check_layers(layers_of(terms))
    tokenizer = load_tokenizer(subject.base)

    decisive = {"preset": options.preset, "preset_options": plain(options.preset_options or {}), **asdict(settings)}
    del decisive["save_steps"]
    kept = {"forget": forget, "retain": subject.kept}
    checkpoints = Checkpoints(out, keep=1, identity=identity_of(decisive, kept, model))
    checkpoints.begin(options.resume, functools.partial(say, console))
    before = measure(model, tokenizer, sets, "Before: continuing every passage", console)
    own = {"before": subject.figures(model, tokenizer, before)}
    if subject.aimed_by:  # after all measurements, in which PEFT lets all of an adapter train again
        aim_adapter(model, *(in_batches(part, tokenizer.pad_token_id) for part in (sets["forget"], subject.aimed_by)))
    with shown_steps(options.preset, console, log_to=options.log_to, out=out, goes_on=options.resume) as progress:
        result = run_job(
            model,
            tokenizer,
            forget,
            subject.kept,
            terms,
            settings,
            progress=progress,
            never_trained=before["unseen"].memorised.exact,
            checkpoints=checkpoints,
            resume=options.resume,
        )
    after = measure(model, tokenizer, sets, "After: continuing every passage", console)
    check_measured(after, BROKEN)
    own["after"] = subject.figures(model, tokenizer, after)

    report: dict[str, Any] = strict(
        {
            "command": "demo",
            "seed": seed,
            **{f"{name}_{when}": value for when, found in own.items() for name, value in found.items()},
            **outcome(options, before, after, result, start),
            "model": options.model,
            "base_trained_seconds": round(subject.trained_seconds, 1),
            "base": str(subject.base),
        }
    )

    def write(folder: Path) -> None:
        save_adapter(model, tokenizer, folder)
        save_centres(terms, folder)
        write_report(folder, report)

    write_somewhere(out, write)
    drawn = draw_curves(out / CURVES, result, report)
    print_table(console, before, after)
    print_continuations(console, before, after, {"forget": 2, "retain": 1})
    for line in subject.told(own["before"], own["after"]):
        say(console, line)
    if options.robust is not False:
        console.print("Does it last? The adapter is merged, quantised, and half of the passages are learned again ...")
        rows, lasting = measure_lasting(subject, out, tokenizer, own["before"], seed)
        print_robustness(console, rows)
        print_lasting(console, subject, lasting)
        report |= {"robustness": [asdict(row) for row in rows], **({"lasting": lasting} if lasting else {})}
        report["seconds"] = round(time.perf_counter() - start, 1)
        write_report(out, report)
    checkpoints.clear()
    cached = (
        f"training the base took {subject.trained_seconds:.0f} s"
        if subject.trained_seconds
        else "the base came from the cache"
    )
    console.print(
        f"Unlearned in {result.steps} steps, {result.seconds:.0f} s ({result.stopped}); "
        f"{report['seconds']:.0f} s in all ({cached}); peak memory {report['peak_rss_mb'] / 1000:.2f} GB."
    )
    say_not_gone(console, result, sets["forget"], tokenizer)
    say(console, f"The adapter lies in {out}, the figures in {out / REPORT}; the base in {subject.base}.")
    say(console, drawn)
    say_merge(console, subject.base, out)
    return report


def draw_curves(path: Path, result: JobResult, report: dict[str, Any]) -> str:
    """Draw the job's curves; return the line that says where they are, or why there are none.

    The picture of an earlier run never stays: it would be taken for this one's.
    """
    path.unlink(missing_ok=True)
    measured = {side: (report[f"{side}_nll_before"], report[f"{side}_nll_after"]) for side in ("forget", "retain")}
    options = "".join(f", {name} {value}" for name, value in report["preset_options"].items())
    title = f"fastforget demo: {report['preset']}{options}, seed {report['seed']}"
    try:
        drawn = plot_curves(
            path, result.forget_nll, result.retain_nll, title=title, measured=measured, steps=result.steps
        )
    except (FastforgetError, OSError) as error:  # all else is measured and saved by now
        return f"No curves: {error}."
    if drawn is None:
        return f"No {path.name}: drawing the curves needs matplotlib ({HOW_TO_GET_IT})."
    return f"Forget and retain NLL over the steps are drawn in {path}."
