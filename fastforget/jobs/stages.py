"""A job's parts, each done once: the same command, run again after an interruption, goes on where it was."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from fastforget.evaluate.report import write_json

STAGES = ".stages"  # in a job's output folder
SETTINGS = "settings.json"


class Stages:
    """What the parts of a job found, kept as JSON until all of them are done.

    Args:
        folder: the job's output folder.
        settings: whatever the results depend on; where they are not those of last time, nothing of then is taken.
    """

    def __init__(self, folder: Path, settings: Mapping[str, Any]) -> None:
        self.folder = folder / STAGES
        text = json.dumps(settings, sort_keys=True, default=str)
        self.key = {"settings": hashlib.blake2b(text.encode(), digest_size=16).hexdigest()}
        self.taken_up = read(self.folder / SETTINGS) == self.key  # an earlier run began the same job
        if not self.taken_up:
            shutil.rmtree(self.folder, ignore_errors=True)

    def begin(self) -> None:
        """Note that the job has begun, before its first part is done."""
        write_json(self.folder / SETTINGS, self.key)

    def once(self, name: str, compute: Callable[[], Any]) -> Any:
        """Return what `compute` returned, now or when it was interrupted later: JSON's types alone."""
        path = self.folder / f"{name}.json"
        found = read(path)
        if found is None:
            result = compute()
            self.begin()
            found = write_json(path, {"result": result})
        return found["result"]

    def done(self) -> None:
        """Forget them: the job is complete, and the next one measures anew."""
        shutil.rmtree(self.folder, ignore_errors=True)


def read(path: Path) -> Any:
    """Read a JSON file; None where it is not there, or is broken."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
