"""Checkpoints of a job: folders that are whole or not there, from which it goes on as if it had never stopped.

Each holds the adapter in PEFT's format, for use, and what the job itself needs: STATE, and the parts of the reference's
cache. Of these each is written once, and linked into the checkpoints that follow.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from fastforget.collectives import is_first
from fastforget.data.examples import Example, ExampleStream
from fastforget.errors import BrokenFileError, FastforgetError
from fastforget.files import PART, made_whole
from fastforget.jobs.outputs import Ours, claimed_folder, not_ours
from fastforget.reference import Entry, Reference
from fastforget.reference_folder import frozen_digest, pack_entry, unpack_entry
from fastforget.state_file import read_state, write_state

STATE = "state.safetensors"
REFERENCE = "reference-{}.safetensors"  # the entries that came between the checkpoint before this step and it
NAME = re.compile(r"checkpoint-(\d+)")
FORMAT = 1  # of STATE


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint that was read and is whole."""

    folder: Path
    identity: Mapping[str, Any]
    job: Mapping[str, Any]  # `JobState.collect`
    reference: Mapping[str, Any] | None


class Checkpoints:
    """The checkpoints in a job's output folder.

    Args:
        folder: the output folder.
        keep: so many at most; the oldest go first.
        identity: what a job must have in common with the one that wrote a checkpoint, by name.
        say: called with a line about a checkpoint that is not used.
    """

    def __init__(
        self,
        folder: Path,
        keep: int | None = None,
        identity: Mapping[str, Any] | None = None,
        say: Callable[[str], None] = lambda line: None,
    ) -> None:
        self.folder, self.keep, self.identity, self.say = folder, keep, dict(identity or {}), say
        self.last: Path | None = None  # whose parts of the reference's cache the next one links

    def write(
        self, number: int, job: Mapping[str, Any], reference: Reference | None, save: Callable[[Path], None]
    ) -> None:
        """Write the checkpoint after a step, and remove those that are too many by now.

        Args:
            job: `JobState.collect`.
            save: writes the adapter into the folder that it is given.

        Raises:
            OSError, SafetensorError: it cannot be written; those before are as they were.
        """
        folder = self.folder / f"checkpoint-{number}"
        with made_whole(folder) as scratch:
            save(scratch)
            cache = None
            if reference is not None:
                for part in self.last.glob(REFERENCE.format("*")) if self.last is not None else ():
                    link(part, scratch / part.name)
                changes = {key: pack_entry(entry) for key, entry in reference.changes().items()}
                write_state(scratch / REFERENCE.format(f"{number:09d}"), changes)
                parts = sorted(path.name for path in scratch.glob(REFERENCE.format("*")))
                cache = {"parts": parts, "order": reference.order(), "keeps_embeddings": reference.keeps_embeddings}
            state = {"format": FORMAT, "identity": self.identity, "job": dict(job), "reference": cache}
            write_state(scratch / STATE, state)
        self.last = folder
        if reference is not None:
            reference.saved()
        self.prune()

    def prune(self) -> None:
        """Remove all but the last ones up to the one just written, as many as are kept.

        Later ones are those that `newest` could not read: they would push out what the job goes on from.
        """
        if self.keep is not None and self.last is not None:
            folders = self.folders()
            for folder in folders[: folders.index(self.last) + 1][: -self.keep]:
                shutil.rmtree(folder, ignore_errors=True)

    def folders(self) -> list[Path]:
        """List the checkpoints by their steps; not what a killed process left of one."""
        try:
            paths = list(self.folder.iterdir())
        except OSError:  # the job will say what is wrong with it
            return []
        named = ((NAME.fullmatch(path.name), path) for path in paths if path.is_dir())
        return [path for _, path in sorted((int(match[1]), path) for match, path in named if match)]

    def clear(self) -> None:
        """Remove all checkpoints."""
        for folder in self.folders():
            shutil.rmtree(folder)
        self.settle()

    def begin(self, resume: bool, say: Callable[[str], None]) -> None:
        """Make ready for a job: it goes on from the last one, or begins anew, and then all are removed."""
        self.say = say
        if not resume:
            if is_first():
                self.clear()
        elif not self.folders():
            say(f"--resume: {self.folder} holds no checkpoint, so the job begins at its beginning.")

    def settle(self) -> None:
        """Remove what killed processes left of checkpoints; of several processes the first one does."""
        for scratch in self.folder.glob(f".checkpoint-*{PART}") if is_first() else ():
            shutil.rmtree(scratch)

    def newest(self) -> Checkpoint | None:
        """Read the last checkpoint that is whole; None where there is none."""
        self.settle()
        for folder in reversed(self.folders()):
            try:
                state = read_state(folder / STATE)
                if state["format"] == FORMAT:
                    cache = self.cache(folder, state["reference"])
                    return Checkpoint(folder, state["identity"], state["job"], cache)
                self.say(f"{folder.name} is not used: another version of fastforget wrote it")
            except (BrokenFileError, LookupError, TypeError) as error:
                self.say(f"{folder.name} is not used: {error}")
        return None

    def to_resume(self) -> Checkpoint | None:
        """Read the checkpoint that the job is to go on from; None where it begins at its beginning.

        Raises:
            FastforgetError: it is of another job, by `identity`.
        """
        found = self.newest()
        if found is None:
            return None
        names = {**found.identity, **self.identity}
        differing = [name for name in names if found.identity.get(name) != self.identity.get(name)]
        if differing:
            raise FastforgetError(
                f"--resume: {found.folder} is of a job with other {', '.join(differing[:5])}: give what that one was "
                "given, or start anew with --overwrite"
            )
        self.last = found.folder
        return found

    def cache(self, folder: Path, stored: Mapping[str, Any] | None) -> Mapping[str, Any] | None:
        """Read the reference's cache of a checkpoint, as `Reference.fill` takes it."""
        if stored is None:
            return None
        entries: dict[bytes, Entry] = {}
        for part in stored["parts"]:
            entries |= {key: unpack_entry(content) for key, content in read_state(folder / part).items()}
        entries = {key: entries[key] for key in stored["order"]}
        return {"entries": entries, "keeps_embeddings": stored["keeps_embeddings"]}


@contextlib.contextmanager
def claimed_with_checkpoints(
    checkpoints: Checkpoints, *, overwrite: bool, resume: bool, ours: Ours = not_ours
) -> Iterator[None]:
    """Hold an output folder for a job that writes checkpoints there, or goes on from them (`claimed_folder`).

    Raises:
        FastforgetError: as `claimed_folder`, or it holds checkpoints that are neither to be gone on with nor replaced.
    """
    replaces = overwrite or (resume and bool(checkpoints.folders()))
    with claimed_folder(checkpoints.folder, replaces, ours):
        if checkpoints.folders() and not resume and not overwrite:
            raise FastforgetError(
                f"{checkpoints.folder} holds checkpoints of an earlier job: --resume goes on with it, --overwrite "
                "removes them"
            )
        yield


def link(path: Path, target: Path) -> None:
    """Let a file have a second name, or, where the file system has none, a copy."""
    try:
        os.link(path, target)
    except OSError:
        shutil.copyfile(path, target)


def identity_of(
    config: Mapping[str, Any], examples: Mapping[str, Sequence[Example] | ExampleStream], model: nn.Module
) -> dict[str, str]:
    """Return what a job that resumes must share with the one that it goes on with, by the names that messages give.

    Args:
        config: the options that decide what is computed.
        examples: of each set; of a stream only the name counts.
    """
    texts = {
        name: repr(sets) if isinstance(sets, ExampleStream) else [(each.input_ids, each.prompt_length) for each in sets]
        for name, sets in examples.items()
    }
    return {
        **{f"--{name.replace('_', '-')}": repr(value) for name, value in config.items()},
        **{f"{name} set": hashlib.sha256(repr(text).encode()).hexdigest() for name, text in texts.items()},
        "weights of the model": frozen_digest(model),
    }
