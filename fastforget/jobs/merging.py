"""`fastforget merge`: `fastforget.merge` as a command, and what it says of the folder."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from typing import Annotated, Any

from rich.console import Console

from fastforget import merging
from fastforget.config import Help
from fastforget.evaluate.report import peak_rss_mb
from fastforget.jobs.options import MODEL, OUTPUT, called_with, check_characters, console_of
from fastforget.jobs.running import say, surroundings

ARGUMENTS = {
    "base": "The model: a local folder or a hub name.",
    "adapter": "The folder that unlearn wrote.",
    "out": "A folder that is new, or empty.",
}


@dataclass(frozen=True)
class MergeOptions:
    """Which model, with which adapter, into which folder.

    Raises:
        FastforgetError: a text that holds no character.
    """

    base: str | os.PathLike[str]
    adapter: str | os.PathLike[str]
    out: str | os.PathLike[str]
    bits: Annotated[int, Help("Of the weights that are saved: 16, 32, 8 or 4.", MODEL)] = 16
    quiet: Annotated[bool, Help("Print nothing but errors.", OUTPUT)] = False
    console: Console | None = None

    def __post_init__(self) -> None:
        check_characters(self)


@called_with(MergeOptions)
def merge(options: MergeOptions) -> dict[str, Any]:
    """Merge an adapter into its base, and say where the model lies, how large it is, and what it took.

    Raises:
        FastforgetError: as `fastforget.merge`.
    """
    start = time.perf_counter()
    with surroundings(seed=0, quiet=options.quiet):
        folder = merging.merge(options.base, options.adapter, options.out, bits=options.bits)
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    report = {
        "command": "merge",
        "model": str(options.base),
        "adapter": str(options.adapter),
        "out": str(folder.resolve()),
        "bits": options.bits,
        "bytes": size,
        "seconds": round(time.perf_counter() - start, 1),
        "peak_rss_mb": round(peak_rss_mb()),
    }
    what = f"The merged model, {options.bits} bit, {size / 1e6:,.1f} MB, lies in {folder}"
    say(console_of(options.quiet, options.console), f"{what}: an ordinary folder, without an adapter.")
    return report
