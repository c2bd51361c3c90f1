"""Output folders: what lies in one already, whether it may be replaced, and what is said of what is written."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shlex
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.text import Text
from safetensors import SafetensorError

from fastforget.config import plain
from fastforget.data.examples import Example
from fastforget.errors import FastforgetError
from fastforget.evaluate.page import CARD, is_card, write_card
from fastforget.evaluate.report import Reports, figures, peak_rss_mb, write_json
from fastforget.files import settle
from fastforget.jobs.options import DemoOptions, UnlearnOptions
from fastforget.jobs.running import say
from fastforget.jobs.state import JobResult
from fastforget.models import base_of

REPORT = "report.json"
BROKEN = "unlearning broke the model, and it is not saved; a lower --learning-rate or fewer --max-steps may help"
SHOWN, SHOWN_CHARACTERS = 3, 60  # of passages that are not gone
CURVE_POINTS = 200  # of a curve in report.json
PROBE_BYTES = 1 << 16  # a disk may be so full that a file can be made and not filled
ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors")


Ours = Callable[[dict[str, Any]], bool]  # whether a report.json is of a job whose adapter the next may replace


def not_ours(report: dict[str, Any]) -> bool:
    """Say that a job replaces no adapter unasked."""
    return False


@contextlib.contextmanager
def claimed_folder(folder: Path, overwrite: bool, ours: Ours = not_ours) -> Iterator[None]:
    """Hold an output folder for one job: results can go into it, and no other job writes there meanwhile.

    It is made where it is missing, and is gone again where the job has left nothing in it.

    Args:
        overwrite: the user said that an adapter in there may be replaced.
        ours: takes the report.json in the folder; whether the adapter may be replaced without that.

    Raises:
        FastforgetError: the path is a file, nothing can be written there, another job has it, or it holds an adapter
            already.
    """
    made: list[Path] = []
    handle = None
    try:
        try:
            if folder.exists() and not folder.is_dir():
                raise FastforgetError(f"{folder} is a file: --out needs a folder")
            made += [path for path in (folder, *folder.parents) if not path.exists()]
            folder.mkdir(parents=True, exist_ok=True)
            handle = os.open(folder, os.O_RDONLY)
            lock(handle, folder)
            with tempfile.TemporaryFile(dir=folder) as probe:
                probe.write(bytes(PROBE_BYTES))
            settle(folder)
        except OSError as error:
            what = f"nothing can be written into {folder} ({error.strerror})"
            raise FastforgetError(f"{what}: give another --out") from None
        check_replaceable(folder, overwrite, ours)
        yield
    finally:
        if handle is not None:
            os.close(handle)
        with contextlib.suppress(OSError):  # results lie there
            for path in made:
                path.rmdir()


def lock(handle: int, folder: Path) -> None:
    """Lock an open folder until it is closed; raise FastforgetError where another run has locked it."""
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise FastforgetError(f"another run is writing into {folder}: wait for it, or give another --out") from None
    except OSError:  # some network file systems lock no folders
        pass


def check_replaceable(folder: Path, overwrite: bool, ours: Ours) -> None:
    """Raise FastforgetError where a folder holds an adapter that may not be replaced."""
    if overwrite or not any((folder / name).exists() for name in ADAPTER_FILES):
        return
    try:
        report = json.loads((folder / REPORT).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        report = None
    if not isinstance(report, dict) or not ours(report):
        raise FastforgetError(f"{folder} already holds an adapter: give another --out, or --overwrite to replace it")


def write_somewhere(out: Path, write: Callable[[Path], None]) -> None:
    """Write a job's results into `out`, or, where that has become impossible, into a new temporary folder.

    Raises:
        FastforgetError: `out` could not be written; where the results are instead.
    """
    try:
        return write(out)
    except (OSError, SafetensorError) as error:
        reason = str(error)
    try:
        elsewhere = Path(tempfile.mkdtemp(prefix="fastforget-"))
        write(elsewhere)
    except (OSError, SafetensorError) as error:
        raise FastforgetError(f"the adapter is lost: {reason}; and in the temporary folder: {error}") from None
    raise FastforgetError(f"{out} cannot be written ({reason}): the adapter is saved in {elsewhere} instead")


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
        "seconds_a_step": round(result.seconds / max(result.steps, 1), 3),
        "tokens_a_second": round(result.tokens / max(result.seconds, 1e-9), 1),
        "seconds": round(time.perf_counter() - start, 1),
        "peak_rss_mb": round(peak_rss_mb()),
        "adapter": str(Path(options.out).resolve()),
        "curves": {
            side: thinned(values)
            for side, values in (("forget", result.forget_nll), ("retain", result.retain_nll))
            if values
        },
    }


def write_report(folder: Path, report: Mapping[str, Any] | None) -> None:
    """Write report.json and the model card beside an adapter; without a report, see that no other adapter's stay."""
    if report is None:
        (folder / REPORT).unlink(missing_ok=True)
        if is_card(folder / CARD):
            (folder / CARD).unlink()
        return
    write_json(folder / REPORT, report)
    write_card(folder / CARD, report)


def say_not_gone(console: Console, result: JobResult, forget: Sequence[Example], tokenizer: Any) -> None:
    """Show the passages that are not gone, the first ones: on the console alone, a report may be shown to others."""
    for place in result.not_gone[:SHOWN]:
        text = tokenizer.decode(forget[place].input_ids, skip_special_tokens=True)
        start = " ".join(text.split())[:SHOWN_CHARACTERS]
        say(console, f"Not gone yet: passage {place + 1}, of {forget[place].source}: {start} ...")


def say_merge(console: Console, model: str | os.PathLike[str], adapter: Path) -> None:
    """Say what an adapter does not do, and the command that does it."""
    why = "Without the adapter the base still knows the text: to ship a model that forgot, merge it."
    command = shlex.join(["fastforget", "merge", base_of(model), str(adapter), f"{adapter}-merged"])
    say(console, why)
    console.print(Text(f"  {command}"), soft_wrap=True)  # to be copied


def thinned(values: Sequence[float], most: int = CURVE_POINTS) -> list[float]:
    """Return at most so many of the values, at even distances, the last one among them.

    >>> thinned([0.0, 1.0, 2.0, 3.0, 4.0], 2)
    [1.0, 4.0]
    """
    stride = max(1, -(-len(values) // most))
    return [round(value, 4) for value in values[::-1][::stride][::-1]]
