"""The models that the demo unlearns: trained once, and kept in a cache that is checked before it is used."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path

from fastforget.data.examples import Example
from fastforget.errors import FastforgetError

DIGESTS = "digests.json"  # beside the cached base
SCRATCH = ".demo-base-"  # begins the name of a base that is not yet whole,
SCRATCH_SECONDS = 3600  # and after this long never will be: its demo was killed


def cached_base(cache: Path, key: str, write: Callable[[Path], None]) -> tuple[Path, float]:
    """Return (folder of a base, seconds spent on making it).

    Args:
        cache: the folder of all bases; it is made where it is missing, for this user alone.
        key: names the base, and what it depends on.
        write: makes the base, and saves it into the empty folder that it is given.

    Raises:
        FastforgetError: the cache cannot be written.
    """
    folder = cache / f"demo-base-{key}"
    if is_whole(folder):
        return folder, 0.0
    start = time.perf_counter()
    cache.mkdir(mode=0o700, parents=True, exist_ok=True)
    for left in cache.glob(f"{SCRATCH}*"):
        with contextlib.suppress(OSError):
            if time.time() - left.stat().st_mtime > SCRATCH_SECONDS:
                shutil.rmtree(left)
    scratch = Path(tempfile.mkdtemp(dir=cache, prefix=SCRATCH))  # for its owner alone
    try:
        write(scratch)
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
    return folder, time.perf_counter() - start


def base_key(made_by: object, examples: Iterable[Example]) -> str:
    """Hash what a trained base depends on: its recipe, seed and size (`made_by`), its examples and their order."""
    digest = hashlib.blake2b(digest_size=8)
    digest.update(repr(made_by).encode())
    for example in examples:
        digest.update(repr(example.input_ids).encode())
    return digest.hexdigest()


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
