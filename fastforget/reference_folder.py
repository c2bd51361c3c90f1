"""What the frozen reference said, on a disk: parts of its cache for a checkpoint, and a folder that runs share.

An entry of the folder is a file of its own, named by all that it depends on: the frozen weights and their config, the
example's content, the backend and the kind of device. It is written beside its place and moved there, and read only
where it is, bit for bit, as it was written: any number of processes may use one folder.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import tempfile
import time
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from torch import Tensor, nn

from fastforget.errors import BrokenFileError, FastforgetError
from fastforget.files import PART
from fastforget.objectives import Field
from fastforget.reference import Entry, LayerStates
from fastforget.reference_modes import adapter_trains
from fastforget.state_file import read_state, update, write_state

DEFAULT_FOLDER_BYTES = 20 * 10**9
SCRATCH_SECONDS = 3600  # a file that is not whole after this long never will be: its process was killed
FREED = 0.1  # of the limit, whenever it is reached: the folder is not listed at each entry


class ReferenceFolder:
    """Entries of a reference's cache in a folder.

    Args:
        folder: made where it is missing, for this user alone.
        limit: bytes; beyond, the entries that were not used for the longest time go.
        model: whose frozen part is the reference.
        backend: that computes what is kept.
        untouched: the whole model is, as it is when the first entry is asked for.

    Raises:
        FastforgetError: the folder cannot be made.
    """

    def __init__(self, folder: Path, limit: float, model: nn.Module, backend: str, untouched: bool = False) -> None:
        try:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        except OSError as error:
            raise FastforgetError(
                f"{folder} cannot hold what the reference said ({error.strerror}): give another folder, or none"
            ) from None
        self.folder, self.limit = folder, limit
        self.model, self.backend, self.untouched = model, backend, untouched
        self.failed = False  # the disk is full, say: once is enough to be told
        self._prefix: bytes | None = None
        self._used = 0

    def read(self, key: bytes) -> Entry | None:
        """Return an entry; None where there is none, or it is broken, which is then removed."""
        path = self._path(key)
        try:
            if not path.exists():
                return None
            entry = unpack_entry(read_state(path))
            os.utime(path)
        except (BrokenFileError, OSError, LookupError, ValueError, TypeError):
            with contextlib.suppress(OSError):
                path.unlink()
            return None
        return entry

    def write(self, key: bytes, entry: Entry) -> None:
        """Keep an entry, with what was known of the example before; warns once where it cannot."""
        if self.failed:
            return
        path = self._path(key)
        try:
            handle, scratch = tempfile.mkstemp(dir=self.folder, prefix=".", suffix=PART)
            os.close(handle)
            try:
                write_state(Path(scratch), pack_entry((self.read(key) or {}) | entry))
                self._used += os.path.getsize(scratch)
                os.replace(scratch, path)
            except BaseException:
                os.unlink(scratch)
                raise
            if self._used > self.limit:
                self._used = self.tidy()
        except (OSError, SafetensorError) as error:
            self.failed = True
            warnings.warn(f"the reference's cache in {self.folder} is not written on: {error}", stacklevel=2)

    def tidy(self) -> int:
        """Remove what killed processes left and, where the limit is passed, what is oldest; return the bytes in use."""
        found = []
        for path in self.folder.iterdir():
            with contextlib.suppress(OSError):  # another process tidies too; another user's file stays
                status = path.stat()
                if path.suffix != PART:
                    found.append((status.st_mtime, status.st_size, path))
                elif time.time() - status.st_mtime > SCRATCH_SECONDS:
                    path.unlink()
        used = sum(size for _, size, _ in found)
        if used <= self.limit:
            return used
        for _, size, path in sorted(found):
            if used <= (1.0 - FREED) * self.limit:
                break
            with contextlib.suppress(OSError):
                path.unlink(missing_ok=True)
                used -= size
        return used

    def _path(self, key: bytes) -> Path:
        """Where the entry of an example lies."""
        if self._prefix is None:
            self._prefix = f"{frozen_digest(self.model, self.untouched)} {self.backend}".encode()
            self._used = self.tidy()
        return self.folder / f"{hashlib.sha256(self._prefix + key).hexdigest()}.safetensors"


def pack_entry(entry: Entry) -> list[Any]:
    """Return an entry as a file has it."""
    return [
        (["states", each.layer] if isinstance(each, LayerStates) else ["field", each.name, each.of], value)
        for each, value in entry.items()
    ]


def unpack_entry(content: list[Any]) -> Entry:
    """Return the entry of a file."""
    return {
        LayerStates(request[1]) if request[0] == "states" else Field(*request[1:]): value for request, value in content
    }


def frozen_digest(model: nn.Module, untouched: bool = False) -> str:
    """Return a digest of all in a model that does not train: weights and their scales, and the configs they run under.

    `untouched`: of what trains too.

    Every byte is read: a second for about a gigabyte.
    """
    trains = {name for name, parameter in model.named_parameters() if parameter.requires_grad and not untouched}
    digest = hashlib.sha256()
    for name, value in model.state_dict().items():
        if isinstance(value, Tensor) and name not in trains:
            update(digest, name, value)
    config = {name: value for name, value in vars(model.config).items() if name != "_name_or_path"}
    configs = {"model": config, "device": next(model.parameters()).device.type}
    for name, config in getattr(model, "peft_config", {}).items():
        if untouched or not adapter_trains(model, name):
            configs[name] = vars(config)
    digest.update(json.dumps(configs, default=stable, sort_keys=True).encode())
    return digest.hexdigest()


def stable(value: Any) -> Any:
    """Return what JSON lacks in a form that is the same in each process."""
    if isinstance(value, set | frozenset):
        return sorted(map(str, value))
    return dict(vars(value)) if isinstance(value, Mapping) or hasattr(value, "to_dict") else str(value)
