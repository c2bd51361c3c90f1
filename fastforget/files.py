"""Text files: read with errors that say where, and written whole or not at all."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO

from fastforget.errors import FastforgetError


@contextlib.contextmanager
def written_whole(path: Path) -> Iterator[Path]:
    """Yield a scratch path beside `path`, to write to; it takes its place at the end, and is removed on an exception.

    The folder is made where it is missing. What stood at `path` stays until the new file is complete.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_name(f".{path.name}.part")
    try:
        yield scratch
        scratch.replace(path)
    finally:
        scratch.unlink(missing_ok=True)


@contextlib.contextmanager
def open_text(path: Path) -> Iterator[TextIO]:
    """Open a UTF-8 file for reading, without a byte-order mark, line ends as \\n.

    Raises:
        FastforgetError: there, or where it is read inside: no such file, one that cannot be read, or that is not UTF-8
            (its first bad byte is named).
    """
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
