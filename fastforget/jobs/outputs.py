"""Output folders: what lies in one already, whether it may be replaced, and what is said of what is written."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fastforget.config import plain
from fastforget.errors import FastforgetError
from fastforget.evaluate.report import Reports, figures, peak_rss_mb
from fastforget.jobs.loop import JobResult
from fastforget.jobs.options import DemoOptions, UnlearnOptions

REPORT = "report.json"
BROKEN = "unlearning broke the model, and it is not saved; a lower --learning-rate or fewer --max-steps may help"
MERGE = "Without the adapter the base still knows the text: to ship a model that forgot, merge it."
ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors")


def claim_folder(folder: Path, overwrite: bool, ours: Callable[[dict[str, Any]], bool] = lambda report: False) -> None:
    """Check, before any work, that results can go into `folder`; nothing is written or removed.

    Args:
        overwrite: the user said that an adapter in there may be replaced.
        ours: takes the report.json in the folder; whether the adapter may be replaced without that.

    Raises:
        FastforgetError: the path is a file, or the folder holds an adapter already.
    """
    if folder.exists() and not folder.is_dir():
        raise FastforgetError(f"{folder} is a file: --out needs a folder")
    if overwrite or not any((folder / name).exists() for name in ADAPTER_FILES):
        return
    try:
        report = json.loads((folder / REPORT).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        report = {}
    if not ours(report):
        raise FastforgetError(f"{folder} already holds an adapter: give another --out, or --overwrite to replace it")


def outcome(
    options: DemoOptions | UnlearnOptions, before: Reports, after: Reports, result: JobResult, start: float
) -> dict[str, Any]:
    """Collect what both jobs' report.json holds; `start` is what `time.perf_counter` said then."""
    return {
        "preset": options.preset,
        "preset_options": plain(options.preset_options or {}),
        **figures(before, after),
        "steps": result.steps,
        "stopped": result.stopped,
        "unlearn_seconds": round(result.seconds, 1),
        "seconds": round(time.perf_counter() - start, 1),
        "peak_rss_mb": round(peak_rss_mb()),
        "adapter": str(Path(options.out).resolve()),
    }
