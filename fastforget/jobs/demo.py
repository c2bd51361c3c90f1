"""`fastforget demo`, and `fastforget.demo` in Python: a small model learns a real text and forgets part of it.

Offline, on two CPU cores, in minutes.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import shutil
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import platformdirs
import torch
from rich.console import Console

from fastforget.adapters import save_adapter
from fastforget.backbone import Backbone
from fastforget.clusters import save_centres
from fastforget.data.topics import Corpus, load_corpus
from fastforget.errors import FastforgetError
from fastforget.evaluate.plot import CURVES, HOW_TO_GET_IT, plot_curves
from fastforget.evaluate.report import (
    check_measured,
    print_continuations,
    print_table,
    strict,
    write_json,
)
from fastforget.jobs.loop import JobResult, run_job, shown_nll
from fastforget.jobs.memorise import build_model, memorise, save_base
from fastforget.jobs.options import DemoOptions, JobSettings, called_with
from fastforget.jobs.outputs import BROKEN, MERGE, REPORT, claimed_folder, outcome, write_somewhere
from fastforget.jobs.running import measure, progress_bar, say, surroundings
from fastforget.models import load, load_tokenizer
from fastforget.objectives import layers_of

BASE_VERSION = 1  # part of the cache's key: raise it when the base model's recipe changes
DIGESTS = "digests.json"  # beside the cached base
SCRATCH = ".demo-base-"  # begins the name of a base that is not yet whole,
SCRATCH_SECONDS = 3600  # and after this long never will be: its demo was killed
ADAPTER_RANK = 16
FIRST_NLL, LAST_NLL = 8.0, 0.075  # nats per token, about: where memorising begins and ends, for its progress bar


@dataclass(frozen=True)
class DemoScale:
    """How much text and how large a base; the default is the demo, tests take less."""

    topic_counts: tuple[int, int, int] = (4, 8, 4)
    passages_per_topic: int = 6
    hidden_size: int = 256
    layers: int = 2


@called_with(DemoOptions)
def demo(options: DemoOptions) -> dict[str, Any]:
    """Show a small model forget a real text: `fastforget demo` in Python, with the same names and defaults.

    The folder `out` gets a LoRA adapter in PEFT's format, report.json, and curves.png where matplotlib is installed.
    The seed decides which topics are forgotten and every random draw; torch's own generators are left as they were.

    Args:
        overwrite: replace an adapter in `out` that is not the demo's own.
        cache: folder for the trained base, which the next demo with this seed takes; default the user's cache.
        quiet: print nothing. Otherwise `console` (default: standard output) gets what the command prints.

    Returns:
        What report.json holds.

    Raises:
        FastforgetError: an unknown preset or option of it, a seed out of range, or an output folder that holds
            another adapter.
    """
    ours = claimed_folder(Path(options.out), options.overwrite, lambda report: report.get("command") == "demo")
    with ours, surroundings(options.seed, options.quiet):
        return run_demo(options, DemoScale(), JobSettings())


def run_demo(options: DemoOptions, scale: DemoScale, settings: JobSettings) -> dict[str, Any]:
    """Memorise (or take from the cache), load in 8 bit, unlearn, measure, save. Return what report.json holds.

    Raises:
        FastforgetError: as `demo`, or a base that does not learn its text.
    """
    terms = options.terms()
    out, seed, console = Path(options.out), options.seed, options.printer()
    settings = replace(settings, seed=seed)
    start = time.perf_counter()
    torch.manual_seed(seed)

    corpus = load_corpus(seed, topic_counts=scale.topic_counts, passages_per_topic=scale.passages_per_topic)
    sets = {"forget": corpus.forget, "retain": corpus.retain, "unseen": corpus.unseen}
    console.print(
        f"Text: Python's language reference, {len(corpus.forget)} passages to forget, {len(corpus.retain)} to keep, "
        f"{len(corpus.unseen)} never trained on."
    )
    cache = Path(platformdirs.user_cache_dir("fastforget") if options.cache is None else options.cache)
    base, trained = base_model(corpus, seed, scale, cache, console)
    model = load(base, bits=8, lora={"r": ADAPTER_RANK}, device="cpu")
    Backbone(model).check_layers(layers_of(terms))
    tokenizer = load_tokenizer(base)

    before = measure(model, tokenizer, sets, "Before: continuing every passage", console)
    with progress_bar(f"Unlearning ({options.preset})", console) as update:
        result = run_job(
            model,
            tokenizer,
            corpus.forget,
            corpus.retain,
            terms,
            settings,
            progress=lambda step, total, output: update(step, total, shown_nll(output)),
        )
    after = measure(model, tokenizer, sets, "After: continuing every passage", console)
    check_measured(after, BROKEN)

    report: dict[str, Any] = strict(
        {
            "command": "demo",
            "seed": seed,
            **outcome(options, before, after, result, start),
            "base_trained_seconds": round(trained, 1),
            "base": str(base),
        }
    )

    def write(folder: Path) -> None:
        save_adapter(model, tokenizer, folder)
        save_centres(terms, folder)
        write_json(folder / REPORT, report)

    write_somewhere(out, write)
    drawn = draw_curves(out / CURVES, result, report)
    print_table(console, before, after)
    print_continuations(console, before, after, {"forget": 2, "retain": 1})
    cached = f"training the base took {trained:.0f} s" if trained else "the base came from the cache"
    console.print(
        f"Unlearned in {result.steps} steps, {result.seconds:.0f} s ({result.stopped}); "
        f"{report['seconds']:.0f} s in all ({cached}); peak memory {report['peak_rss_mb'] / 1000:.2f} GB."
    )
    for line in (f"The adapter lies in {out}, the figures in {out / REPORT}; the base in {base}.", drawn, MERGE):
        say(console, line)
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


def base_model(corpus: Corpus, seed: int, scale: DemoScale, cache: Path, console: Console) -> tuple[Path, float]:
    """Return (folder of a base that recites the corpus's forget and retain passages, seconds spent on training it)."""
    folder = cache / f"demo-base-{base_key(corpus, seed, scale)}"
    if is_whole(folder):
        return folder, 0.0
    passages = [*corpus.forget, *corpus.retain]
    model = build_model(corpus.tokenizer, hidden_size=scale.hidden_size, layers=scale.layers, seed=seed)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    console.print(f"Training a base of {parameters / 1e6:.1f} M parameters until it recites them word for word ...")
    with progress_bar("Memorising", console) as update:
        memorised = memorise(
            model,
            corpus.tokenizer,
            passages,
            seed=seed,
            progress=lambda recited, nll: update(
                math.log(FIRST_NLL / nll), math.log(FIRST_NLL / LAST_NLL), f"NLL {nll:.2f}"
            ),
        )
    cache.mkdir(mode=0o700, parents=True, exist_ok=True)
    for left in cache.glob(f"{SCRATCH}*"):
        with contextlib.suppress(OSError):
            if time.time() - left.stat().st_mtime > SCRATCH_SECONDS:
                shutil.rmtree(left)
    scratch = Path(tempfile.mkdtemp(dir=cache, prefix=SCRATCH))  # for its owner alone
    try:
        save_base(model, corpus.tokenizer, scratch)
        (scratch / DIGESTS).write_text(json.dumps(digests(scratch)), encoding="utf-8")
        if not is_whole(folder):
            shutil.rmtree(folder, ignore_errors=True)
        try:
            os.replace(scratch, folder)
        except OSError:  # another demo was quicker
            if not is_whole(folder):
                raise FastforgetError(f"the cache folder {folder} cannot be written: remove it and try again") from None
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return folder, memorised.seconds


def is_whole(folder: Path) -> bool:
    """Tell whether a cached base is as it was written, by this user, and nobody else can write to it."""
    try:
        status = folder.stat()
        recorded = json.loads((folder / DIGESTS).read_text(encoding="utf-8"))
        return status.st_uid == os.getuid() and not status.st_mode & 0o022 and recorded == digests(folder)
    except (OSError, ValueError):
        return False


def digests(folder: Path) -> dict[str, str]:
    """Return a digest of each file in a folder but DIGESTS itself, by name."""
    found = {}
    for path in folder.iterdir():
        if path.name != DIGESTS:
            with open(path, "rb") as file:
                found[path.name] = hashlib.file_digest(file, "blake2b").hexdigest()
    return found


def base_key(corpus: Corpus, seed: int, scale: DemoScale) -> str:
    """Hash what the trained base depends on: passages (so also Python's version), their order, its size, its seed."""
    digest = hashlib.blake2b(digest_size=8)
    digest.update(repr((BASE_VERSION, seed, scale)).encode())
    for example in (*corpus.forget, *corpus.retain):
        digest.update(repr(example.input_ids).encode())
    return digest.hexdigest()
