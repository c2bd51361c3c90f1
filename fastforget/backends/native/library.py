"""The CPU library that `setup.py` builds from `csrc/`: loads it by path, and says why where it cannot be used.

`TileArguments` mirrors FastforgetTile of `csrc/fastforget.h`; what that holds of another structure stands flat in it,
which is quicker to fill. Nothing here looks at a tensor: `passes.py` does, before any pointer is passed. ctypes
releases the GIL around each call.
"""

from __future__ import annotations

import ctypes
import functools
import os
import sys
import warnings
from ctypes import c_char_p, c_float, c_int32, c_int64, c_void_p
from dataclasses import dataclass, field
from pathlib import Path

import torch  # noqa: F401  first: the library then shares its OpenMP instead of bringing another

ABI_VERSION = 7  # FASTFORGET_ABI_VERSION in csrc/fastforget.h
INSTRUCTION_SETS = ("scalar", "avx2", "avx512")
OVERRIDE = "FASTFORGET_CPU"  # environment variable: one of INSTRUCTION_SETS, to use less than the machine has

DEVELOPERS = "FASTFORGET_CSRC"  # environment variable: another build of it (`make sanitize`)
LIBRARY = Path(
    os.environ.get(DEVELOPERS) or Path(__file__).parents[2] / ("_csrc.dll" if sys.platform == "win32" else "_csrc.so")
)

PASSES = ("label", "label_moments", "paired", "reverse_kl", "jsd", "gradient")  # as FastforgetPass numbers them


def fields(kind: type, *names: str) -> tuple[tuple[str, type], ...]:
    """Fields of one type."""
    return tuple((name, kind) for name in names)


def rows(*names: str) -> tuple[tuple[str, type], ...]:
    """The fields of a FastforgetRows for each name."""
    parts = (("", c_void_p), ("_stride", c_int64), ("_dtype", c_int64))
    return tuple((name + part, kind) for name in names for part, kind in parts)


class TileArguments(ctypes.Structure):
    """FastforgetTile."""

    _fields_ = (
        *fields(c_int64, "row_count", "first", "columns", "vocabulary", "padded"),
        ("bias", c_void_p),
        *fields(c_float, "scale", "softcap"),
        *fields(c_int32, "threads", "instruction_set"),
        *rows("product", "second_product", "rows", "second_rows"),
        *fields(c_void_p, "labels", "argmax", "accumulators"),
        ("accumulators_stride", c_int64),
        ("given", c_void_p),
        *rows("grad", "second_grad"),
        ("width", c_int64),
    )


SIGNATURES = {  # of each function its result, then its arguments
    "fastforget_instruction_set": (c_char_p, c_char_p),
    "fastforget_threading": (c_char_p,),
    "fastforget_tile": (c_int32, c_int32, ctypes.POINTER(TileArguments)),
}


class NativeUnavailableError(RuntimeError):
    """The CPU library cannot be used; the message says why and what to do."""


@dataclass(frozen=True)
class NativeStatus:
    """What the CPU library can do on this machine."""

    available: bool
    instruction_set: str | None  # one of INSTRUCTION_SETS; None where the library is not available
    reason: str
    threading: str | None = field(default=None, compare=False)  # "openmp" or "threads"


@functools.lru_cache
def load(path: Path = LIBRARY) -> ctypes.CDLL:
    """Load the library once and declare its functions. Raises NativeUnavailableError if it cannot be used."""
    if not path.is_file():
        raise NativeUnavailableError(
            f"{path} is not there: fastforget was installed without a C++ compiler, or runs from a folder in which "
            "nothing was built; install a compiler and then fastforget again"
        )
    if os.environ.get(DEVELOPERS) == str(path):
        warnings.warn(f"{DEVELOPERS}: {path} is loaded as code; this is for fastforget's developers", stacklevel=2)
    try:
        library = ctypes.CDLL(str(path))
        found = library.fastforget_abi_version()
    except (OSError, AttributeError) as error:
        raise NativeUnavailableError(f"{path} could not be loaded: {error}; install fastforget again") from error
    if found != ABI_VERSION:
        raise NativeUnavailableError(
            f"{path} has ABI version {found} and this fastforget needs {ABI_VERSION}; install fastforget again"
        )
    for name, (result, *arguments) in SIGNATURES.items():
        function = getattr(library, name)
        function.restype, function.argtypes = result, arguments
    return library


def instruction_set() -> int:
    """The index in INSTRUCTION_SETS of what is used now. Reads FASTFORGET_CPU at each call."""
    return picked(os.environ.get(OVERRIDE, ""))


@functools.lru_cache
def picked(requested: str) -> int:
    """The index in INSTRUCTION_SETS of what this machine uses where FASTFORGET_CPU is `requested`."""
    return INSTRUCTION_SETS.index(load().fastforget_instruction_set(os.fsencode(requested)).decode())


def status(path: Path = LIBRARY) -> NativeStatus:
    """Whether the library can be used, and the instruction set that it picks. Reads FASTFORGET_CPU at each call."""
    try:
        library = load(path)
    except NativeUnavailableError as error:
        return NativeStatus(False, None, str(error))

    requested = os.environ.get(OVERRIDE, "")
    used = library.fastforget_instruction_set(os.fsencode(requested)).decode()
    if not requested:
        reason = "the best that this machine has"
    elif requested == used:
        reason = f"asked for with {OVERRIDE}"
    elif requested in INSTRUCTION_SETS:
        reason = f"the best that this machine has; {OVERRIDE}={requested} asks for more"
    else:
        reason = f"the best that this machine has; {OVERRIDE} is none of {', '.join(INSTRUCTION_SETS)}: ignored"
    return NativeStatus(True, used, reason, library.fastforget_threading().decode())
