"""What every kernel is declared with: the arguments Triton compiles anew for, and its table of configurations.

A kernel's file ends with `options(...)`, what a launch is given, and `variants()`, every configuration that can be
launched, of those same options: `compiling.py` compiles them ahead of time, and a test holds launches to them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import triton

POINTERS = {
    torch.float32: "*fp32",
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.int64: "*i64",
    torch.int8: "*i8",
}
# Triton's names of arguments' types: of pointers, unless a configuration says otherwise; all else are i32, strides i64
TYPES = {
    "scale": "fp32",
    "softcap": "fp32",
    **dict.fromkeys("labels argmax nearest".split(), "*i64"),
    **dict.fromkeys("policy reference bias accumulators normalisers coefficients shift".split(), "*fp32"),
    **dict.fromkeys("grad reference_grad hidden anchor centres values".split(), "*fp32"),
}
# Triton compiles an int anew where it is 1 or a multiple of 16, and a pointer where it is aligned. Of these arguments
# that would only cost compilations in the middle of a training: they change with the batch, the tile or the block.
UNSPECIALISED = (
    "first columns bias_columns accumulators_stride normalisers_stride coefficients_stride values_stride moment_rows "
    "write reference_write grad_width reference_grad_width shift_given width centre_count anchor_width cosine"
).split()
UNALIGNED = "labels argmax accumulators normalisers coefficients shift values nearest".split()
INTERPRETED_BLOCK = 128

tile_kernel = triton.jit(do_not_specialize=UNSPECIALISED, do_not_specialize_on_alignment=UNALIGNED)


@dataclass(frozen=True)
class Variant:
    """One configuration of a kernel, as it is launched and compiled.

    Attributes:
        kernel: the `tile_kernel` function.
        options: what a launch is given by name: each `tl.constexpr`, and `num_warps`.
        dtypes: of pointers, where they are not those of TYPES.
        traffic: bytes that one row of a tile reads and writes, in words, for the table in kernels/README.md.
    """

    kernel: Any
    options: Mapping[str, Any]
    dtypes: Mapping[str, torch.dtype]
    traffic: str

    def types(self) -> dict[str, str]:
        """The signature in Triton's names, constants included."""
        found = {name: "i64" if name.endswith("_stride") else "i32" for name in self.kernel.arg_names}
        found |= {name: kind for name, kind in TYPES.items() if name in found}
        found |= {name: POINTERS[dtype] for name, dtype in self.dtypes.items()}
        return found | {name: "constexpr" for name in self.options if name in found}


def block_size(block: int, interpreted: int = INTERPRETED_BLOCK) -> int:
    """A launch's block size: small ones where the interpreter runs them, so that short rows have several."""
    return interpreted if interpreting() else block


def interpreting() -> bool:
    """Whether kernels run in Triton's interpreter (TRITON_INTERPRET=1, read when Triton is imported)."""
    return bool(triton.knobs.runtime.interpret)
