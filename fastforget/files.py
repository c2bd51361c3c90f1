"""Files: read with errors that say where, and written whole or not at all, one by itself or several together."""

from __future__ import annotations

import contextlib
import os
import shutil
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO

from fastforget.errors import FastforgetError

PART, COMPLETE = ".part", ".complete"  # folders inside one whose files are replaced together


@contextlib.contextmanager
def written_whole(path: Path) -> Iterator[Path]:
    """Yield a scratch path beside `path`, to write to; it takes its place at the end, and is removed on an exception.

    The folder is made where it is missing. What stood at `path` stays until the new file is complete.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_name(f".{path.name}{PART}")
    try:
        yield scratch
        to_disk(scratch)
        scratch.replace(path)
        to_disk(path.parent)
    finally:
        scratch.unlink(missing_ok=True)


@contextlib.contextmanager
def replaced_together(folder: Path) -> Iterator[Path]:
    """Yield a scratch folder whose files take their places in `folder` at the end, all or none.

    Other files of the folder stay. A process that is killed on the way leaves the old files as they were, or, once the
    new ones are complete, none of the old: `settle`, which the next writer calls, moves the rest.
    """
    is_new = not folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    settle(folder)
    scratch = folder / PART
    try:
        scratch.mkdir()
        yield scratch
        for path in scratch.iterdir():
            to_disk(path)
        scratch.rename(folder / COMPLETE)
    except BaseException:
        shutil.rmtree(scratch, ignore_errors=True)
        if is_new:
            with contextlib.suppress(OSError):  # something else is in it by now
                folder.rmdir()
        raise
    settle(folder)


@contextlib.contextmanager
def made_whole(folder: Path) -> Iterator[Path]:
    """Yield a scratch folder beside `folder`; with all that lies in it, it takes its place at the end.

    A process that is killed on the way leaves at most the scratch folder, which the next writer of `folder` removes.
    """
    scratch = folder.with_name(f".{folder.name}{PART}")
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir(parents=True)
    try:
        yield scratch
        for path in scratch.rglob("*"):
            to_disk(path)
        shutil.rmtree(folder, ignore_errors=True)
        scratch.rename(folder)
        to_disk(folder.parent)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def settle(folder: Path) -> None:
    """Finish, or clear away, what a writer that was killed left in a folder."""
    shutil.rmtree(folder / PART, ignore_errors=True)
    complete = folder / COMPLETE
    if not complete.is_dir():
        return
    new = sorted(complete.iterdir())
    for path in new:  # all of the old first: at no moment do files of both stand together
        (folder / path.name).unlink(missing_ok=True)
    for path in new:
        path.rename(folder / path.name)
    complete.rmdir()


def to_disk(path: Path) -> None:
    """Wait until a file's content, or a folder's names, are on the disk: only then may it take another's place."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def check_regular(place: Path) -> None:
    """Raise FastforgetError where a file, or one in a folder, is none on a disk: a device or a pipe may never end."""
    for path in (place, *(place.iterdir() if os.path.isdir(place) else ())):
        with contextlib.suppress(OSError):  # `open` says what is wrong
            mode = path.stat().st_mode
            if not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):
                raise FastforgetError(f"{path} is a device, a pipe or a socket: a file is needed")


@contextlib.contextmanager
def open_text(path: Path) -> Iterator[TextIO]:
    """Open a UTF-8 file for reading, without a byte-order mark, line ends as \\n.

    Raises:
        FastforgetError: there, or where it is read inside: no such file, one that cannot be read, that is a device or a
            pipe, or that is not UTF-8 (its first bad byte is named).
    """
    check_regular(path)
    try:
        with open(path, encoding="utf-8-sig") as file:
            yield file
    except UnicodeDecodeError:
        raise FastforgetError(f"{path} is not UTF-8 (byte {bad_byte(path)}): convert it, e.g. with iconv") from None
    except FileNotFoundError:
        raise FastforgetError(f"{path} does not exist") from None
    except OSError as error:
        raise FastforgetError(f"{path} cannot be read: {error.strerror}") from None


def bad_byte(path: Path) -> int:
    """Return the offset of the first byte in a file that is not UTF-8: an error while reading counts from its block."""
    offset = 0
    with open(path, "rb") as file:
        for line in file:
            try:
                line.decode()
            except UnicodeDecodeError as error:
                return offset + error.start
            offset += len(line)
    return offset
