"""The CPU library that `setup.py` builds from `csrc/`: loads it by path, and says why where it cannot be used.

The structures mirror those of `csrc/fastforget.h`, field by field. Nothing here looks at a tensor: `calls.py` does,
before any pointer is passed. ctypes releases the GIL around each call.
"""

from __future__ import annotations

import ctypes
import functools
import os
import sys
from ctypes import c_double, c_float, c_int32, c_int64, c_void_p
from dataclasses import dataclass, field
from pathlib import Path

import torch  # noqa: F401  first: the library then shares its OpenMP instead of bringing another

ABI_VERSION = 5  # FASTFORGET_ABI_VERSION in csrc/fastforget.h
INSTRUCTION_SETS = ("scalar", "avx2", "avx512")
OVERRIDE = "FASTFORGET_CPU"  # environment variable: one of INSTRUCTION_SETS, to use less than the machine has
TILE = 128  # FASTFORGET_TILE

# FASTFORGET_CSRC: another build of it (`make sanitize`)
LIBRARY = Path(
    os.environ.get("FASTFORGET_CSRC")
    or Path(__file__).parents[2] / ("_csrc.dll" if sys.platform == "win32" else "_csrc.so")
)


class Common(ctypes.Structure):
    """What all passes share."""

    _fields_ = (
        ("row_count", c_int64),
        ("vocabulary", c_int64),
        ("bias", c_void_p),
        ("scale", c_float),
        ("softcap", c_float),
        ("threads", c_int32),
        ("instruction_set", c_int32),
    )


class LabelRows(ctypes.Structure):
    """Arguments of fastforget_label_rows."""

    _fields_ = (
        ("common", Common),
        ("logits", c_void_p),
        ("logits_stride", c_int64),
        ("labels", c_void_p),
        ("out", c_void_p),
        ("out_stride", c_int64),
        ("fields", c_void_p),
        ("argmax", c_void_p),
        ("masses", c_void_p),
        ("logits_dtype", c_int32),
        ("out_dtype", c_int32),
    )


class LabelState(ctypes.Structure):
    """What is known of a row after some tiles: only its size matters here."""

    _fields_ = (
        *((name, c_double) for name in ("total", "mean", "deviations", "plain")),
        ("best_index", c_int64),
        *((name, c_float) for name in ("best", "top", "label_logit", "unused")),
    )


class LabelTile(ctypes.Structure):
    """Arguments of fastforget_label_tile."""

    _fields_ = (
        ("common", Common),
        ("whole", c_int64),
        ("tile", c_void_p),
        ("tile_stride", c_int64),
        ("first_column", c_int64),
        ("labels", c_void_p),
        ("states", c_void_p),
        ("grad", c_void_p),
        ("grad_stride", c_int64),
        ("width", c_int64),
        ("write", c_int32),
        ("moments", c_int32),
    )


class LabelEnd(ctypes.Structure):
    """Arguments of fastforget_label_end."""

    _fields_ = (
        ("common", Common),
        ("states", c_void_p),
        ("fields", c_void_p),
        ("argmax", c_void_p),
        ("grad", c_void_p),
        ("grad_stride", c_int64),
        ("width", c_int64),
    )


class PairedRows(ctypes.Structure):
    """Arguments of fastforget_paired_rows."""

    _fields_ = (
        ("common", Common),
        ("policy", c_void_p),
        ("policy_stride", c_int64),
        ("reference", c_void_p),
        ("reference_stride", c_int64),
        ("out", c_void_p),
        ("out_stride", c_int64),
        ("values", c_void_p),
        ("labels", c_void_p),
        ("label_shift", c_float),
        ("kind", c_int32),
    )


class GradientRows(ctypes.Structure):
    """Arguments of fastforget_gradient_rows."""

    _fields_ = (
        ("common", Common),
        ("logits", c_void_p),
        ("logits_stride", c_int64),
        ("labels", c_void_p),
        ("argmax", c_void_p),
        ("projected", c_void_p),
        ("projected_stride", c_int64),
        ("coefficients", c_void_p),
        ("out", c_void_p),
        ("out_stride", c_int64),
    )


class StateRows(ctypes.Structure):
    """Arguments of fastforget_state_rows."""

    _fields_ = (
        ("common", Common),
        ("hidden", c_void_p),
        ("hidden_stride", c_int64),
        ("anchor", c_void_p),
        ("anchor_stride", c_int64),
        ("centres", c_void_p),
        ("centre_count", c_int64),
        ("values", c_void_p),
        ("nearest", c_void_p),
        ("hidden_dtype", c_int32),
        ("cosine", c_int32),
    )


class LiveTiles(ctypes.Structure):
    """Arguments of fastforget_live_tiles."""

    _fields_ = (
        ("row_count", c_int64),
        ("tile_count", c_int64),
        ("masses", c_void_p),
        ("labels", c_void_p),
        ("factor", c_void_p),
        ("limit", c_float),
        ("dense", c_int64),
        ("dense_rows", c_void_p),
        ("dense_count", c_void_p),
        ("tile_rows", c_void_p),
        ("tile_offsets", c_void_p),
        ("dropped", c_void_p),
    )


class TileProduct(ctypes.Structure):
    """Arguments of fastforget_tile_product."""

    _fields_ = (
        ("common", Common),
        ("rows", c_void_p),
        ("rows_stride", c_int64),
        ("weight", c_void_p),
        ("weight_stride", c_int64),
        ("width", c_int64),
        ("tile_count", c_int64),
        ("tile_rows", c_void_p),
        ("tile_offsets", c_void_p),
        ("out", c_void_p),
        ("out_stride", c_int64),
        ("weight_dtype", c_int32),
    )


PASSES = {
    "fastforget_label_rows": LabelRows,
    "fastforget_label_tile": LabelTile,
    "fastforget_label_end": LabelEnd,
    "fastforget_paired_rows": PairedRows,
    "fastforget_gradient_rows": GradientRows,
    "fastforget_state_rows": StateRows,
    "fastforget_live_tiles": LiveTiles,
    "fastforget_tile_product": TileProduct,
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
    requested = os.environ.get(OVERRIDE, "")
    return INSTRUCTION_SETS.index(load().fastforget_instruction_set(os.fsencode(requested)).decode())


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
    return NativeStatus(True, picked, reason, library.fastforget_threading().decode())
