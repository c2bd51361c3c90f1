"""A job's parts, each done once: the same command, run again after an interruption, goes on where it was."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterable, Mapping, Sized
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
        if read(self.folder / SETTINGS) != self.key:
            shutil.rmtree(self.folder, ignore_errors=True)

    def once(self, name: str, compute: Callable[[], Any]) -> Any:
        """Return what `compute` returned, now or when it was interrupted later: JSON's types alone."""
        path = self.folder / f"{name}.json"
        found = read(path)
        if found is None:
            result = compute()
            write_json(self.folder / SETTINGS, self.key)
            found = write_json(path, {"result": result})
        return found["result"]

    def done(self) -> None:
        """Forget them: the job is complete, and the next one measures anew."""
        shutil.rmtree(self.folder, ignore_errors=True)


def stamp(place: Any) -> Any:
    """Return, as JSON, what tells a user's data or model from another that is called the same.

    Of a file a digest of its content, of a folder (a model's may be large) the sizes and times of its files, of rows
    that are given in Python a digest of them.
    """
    if isinstance(place, str | os.PathLike):
        if os.path.isfile(place):
            with open(place, "rb") as file:
                return hashlib.file_digest(file, "blake2b").hexdigest()
        if os.path.isdir(place):
            files = [path for path in sorted(Path(place).iterdir()) if path.is_file()]
            return [[path.name, path.stat().st_size, path.stat().st_mtime_ns] for path in files]
    elif isinstance(place, Iterable) and isinstance(place, Sized):  # a stream cannot be read twice
        digest = hashlib.blake2b()
        for row in place:
            digest.update(repr(row).encode(errors="surrogatepass"))
        return digest.hexdigest()
    return None


def read(path: Path) -> Any:
    """Read a JSON file; None where it is not there, or is broken."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
