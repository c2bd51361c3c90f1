"""The CPU library that `setup.py` builds from `csrc/`: loads it by path, and says why where it cannot be used.

The structures mirror those of `csrc/fastforget.h`, field by field; what a structure holds of another one stands flat in
it. Nothing here looks at a tensor: `passes.py` does, before any pointer is passed. ctypes releases the GIL around each
call.
"""

from __future__ import annotations

import ctypes
import functools
import os
import sys
from ctypes import c_float, c_int32, c_int64, c_void_p
from dataclasses import dataclass, field
from pathlib import Path

import torch  # noqa: F401  first: the library then shares its OpenMP instead of bringing another

ABI_VERSION = 6  # FASTFORGET_ABI_VERSION in csrc/fastforget.h
INSTRUCTION_SETS = ("scalar", "avx2", "avx512")
OVERRIDE = "FASTFORGET_CPU"  # environment variable: one of INSTRUCTION_SETS, to use less than the machine has

# FASTFORGET_CSRC: another build of it (`make sanitize`)
LIBRARY = Path(
    os.environ.get("FASTFORGET_CSRC")
    or Path(__file__).parents[2] / ("_csrc.dll" if sys.platform == "win32" else "_csrc.so")
)

Fields = tuple[tuple[str, type], ...]


def fields(kind: type, *names: str) -> Fields:
    """Fields of one type."""
    return tuple((name, kind) for name in names)


def rows(*names: str) -> Fields:
    """The fields of a FastforgetRows for each name."""
    return tuple(
        field for name in names for field in ((name, c_void_p), (f"{name}_stride", c_int64), (f"{name}_dtype", c_int64))
    )


TILE = (
    *fields(c_int64, "row_count", "first", "columns", "vocabulary", "padded"),
    ("bias", c_void_p),
    *fields(c_float, "scale", "softcap"),
    *fields(c_int32, "threads", "instruction_set"),
)
ACCUMULATORS = (("accumulators", c_void_p), ("accumulators_stride", c_int64))
GRAD = (("grad", c_void_p), ("grad_stride", c_int64), ("width", c_int64))


class LabelTile(ctypes.Structure):
    """Arguments of fastforget_label_tile."""

    _fields_ = (
        *TILE,
        *rows("product", "rows"),
        ("labels", c_void_p),
        *ACCUMULATORS,
        *GRAD,
        ("moments", c_int64),
    )


class PairedTile(ctypes.Structure):
    """Arguments of fastforget_paired_tile."""

    _fields_ = (
        *TILE,
        *rows("policy", "reference", "rows", "reference_rows"),
        ("labels", c_void_p),
        *ACCUMULATORS,
        ("shift", c_void_p),
        ("reference_grad", c_void_p),
        ("reference_grad_stride", c_int64),
        *GRAD,
    )


class CoupledTile(ctypes.Structure):
    """Arguments of fastforget_coupled_tile."""

    _fields_ = (
        *TILE,
        *rows("policy", "reference", "rows", "policy_rows"),
        *fields(c_void_p, "labels", "normalisers"),
        *ACCUMULATORS,
        ("kind", c_int64),
    )


class GradientTile(ctypes.Structure):
    """Arguments of fastforget_gradient_tile."""

    _fields_ = (
        *TILE,
        *rows("product", "projected", "rows"),
        *fields(c_void_p, "labels", "argmax", "coefficients"),
    )


class StateRows(ctypes.Structure):
    """Arguments of fastforget_state_rows."""

    _fields_ = (
        *fields(c_int64, "row_count", "width"),
        *rows("states"),
        *(("anchor", c_void_p), ("anchor_stride", c_int64)),
        *(("centres", c_void_p), ("centre_count", c_int64)),
        *(("values", c_void_p), ("values_stride", c_int64)),
        ("nearest", c_void_p),
        *fields(c_int32, "cosine", "threads", "instruction_set"),
    )


PASSES = {
    "fastforget_label_tile": LabelTile,
    "fastforget_paired_tile": PairedTile,
    "fastforget_coupled_tile": CoupledTile,
    "fastforget_gradient_tile": GradientTile,
    "fastforget_state_rows": StateRows,
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
    library.fastforget_threading.argtypes = []
    library.fastforget_threading.restype = ctypes.c_char_p
    for name, arguments in PASSES.items():
        function = getattr(library, name)
        function.argtypes = [ctypes.POINTER(arguments)]
        function.restype = ctypes.c_int32
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
