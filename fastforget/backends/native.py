"""The CPU library that `setup.py` builds from `csrc/`: loads it by path, and says why where it cannot be used."""

from __future__ import annotations

import ctypes
import functools
import os
import sys
from dataclasses import dataclass
from pathlib import Path

ABI_VERSION = 1  # FASTFORGET_ABI_VERSION in csrc/fastforget.h
INSTRUCTION_SETS = ("scalar", "avx2", "avx512")
OVERRIDE = "FASTFORGET_CPU"  # environment variable: one of INSTRUCTION_SETS, to use less than the machine has

LIBRARY = Path(__file__).parents[1] / ("_csrc.dll" if sys.platform == "win32" else "_csrc.so")


class NativeUnavailableError(RuntimeError):
    """The CPU library cannot be used; the message says why and what to do."""


@dataclass(frozen=True)
class NativeStatus:
    """What the CPU library can do on this machine."""

    available: bool
    instruction_set: str | None  # one of INSTRUCTION_SETS; None where the library is not available
    reason: str


@functools.lru_cache
def load(path: Path = LIBRARY) -> ctypes.CDLL:
    """Load the library once and declare its functions. Raises NativeUnavailableError if it cannot be used."""
    if not path.is_file():
        raise NativeUnavailableError(
            f"{path} is not there: fastforget was installed without a C++ compiler, or runs from a folder in which "
            "nothing was built; install a compiler and then fastforget again"
        )
    try:
        library = ctypes.CDLL(str(path))
        library.fastforget_abi_version.argtypes = []
        library.fastforget_abi_version.restype = ctypes.c_int32
        found = library.fastforget_abi_version()
    except (OSError, AttributeError) as error:
        raise NativeUnavailableError(f"{path} could not be loaded: {error}; install fastforget again") from error
    if found != ABI_VERSION:
        raise NativeUnavailableError(
            f"{path} has ABI version {found} and this fastforget needs {ABI_VERSION}; install fastforget again"
        )
    library.fastforget_instruction_set.argtypes = [ctypes.c_char_p]
    library.fastforget_instruction_set.restype = ctypes.c_char_p
    return library


def status(path: Path = LIBRARY) -> NativeStatus:
    """Whether the library can be used, and the instruction set that it picks. Reads FASTFORGET_CPU at each call."""
    try:
        library = load(path)
    except NativeUnavailableError as error:
        return NativeStatus(False, None, str(error))

    requested = os.environ.get(OVERRIDE, "")
    picked = library.fastforget_instruction_set(os.fsencode(requested)).decode()
    if not requested:
        reason = "the best that this machine has"
    elif requested == picked:
        reason = f"asked for with {OVERRIDE}"
    elif requested in INSTRUCTION_SETS:
        reason = f"the best that this machine has; {OVERRIDE}={requested} asks for more"
    else:
        reason = f"the best that this machine has; {OVERRIDE} is none of {', '.join(INSTRUCTION_SETS)}: ignored"
    return NativeStatus(True, picked, reason)
