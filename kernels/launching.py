"""What every launcher shares: which arguments Triton compiles anew for, and the table of configurations.

A launcher takes its block sizes and warps from the same constants as its file's `variants()`, which is what
`tests/kernels/test_compile.py` compiles ahead of time: no configuration is launched that was not compiled there.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

POINTERS = {
    torch.float32: "*fp32",
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.int64: "*i64",
    torch.int8: "*i8",
}

# Triton compiles an int anew where it is 1 or a multiple of 16, and a pointer where it is aligned. Of these arguments
# that would only cost compilations in the middle of a training: they change with the batch, the tile or the block.
UNSPECIALISED = (
    "first",
    "columns",
    "bias_columns",
    "accumulators_stride",
    "normalisers_stride",
    "coefficients_stride",
    "values_stride",
    "moment_rows",
    "write",
    "reference_write",
    "grad_width",
    "reference_grad_width",
    "shift_given",
    "width",
    "centre_count",
    "anchor_width",
    "cosine",
)
UNALIGNED = (
    "labels",
    "argmax",
    "accumulators",
    "normalisers",
    "coefficients",
    "shift",
    "values",
    "nearest",
)
INTERPRETED_BLOCK = 128


@dataclass(frozen=True)
class Variant:
    """One configuration of a kernel, as it is compiled.

    Attributes:
        kernel: the `triton.jit` function.
        signature: argument -> torch dtype of what it points to, or Triton's name of a scalar ("i32", "i64", "fp32").
        constants: argument -> value of each `tl.constexpr`.
        traffic: bytes that one row of a tile reads and writes, in words, for the table in kernels/README.md.
    """

    kernel: Any
    signature: dict[str, torch.dtype | str]
    constants: dict[str, Any]
    num_warps: int
    traffic: str

    def types(self) -> dict[str, str]:
        """The signature in Triton's names, constants included."""
        named = {name: POINTERS.get(kind, kind) for name, kind in self.signature.items()}  # type: ignore[arg-type]
        return {name: str(named.get(name, "constexpr")) for name in self.kernel.arg_names}


def signature(kernel: Any, **pointers: torch.dtype) -> dict[str, torch.dtype | str]:
    """The types of a kernel's arguments: pointers are named; strides have 64 bits; all others have 32."""
    found: dict[str, torch.dtype | str] = {}
    for name in kernel.arg_names:
        if name in pointers:
            found[name] = pointers[name]
        elif not name.isupper():
            found[name] = "i64" if name.endswith("_stride") else "fp32" if name in ("scale", "softcap") else "i32"
    return found


class Place(NamedTuple):
    """A tile of the vocabulary, and how products become logits there; see `fastforget.backends.protocol`."""

    first: int
    columns: int
    padded: int  # elements of a row that may be read and written
    bias: Tensor | None  # (V,) float32, contiguous
    scale: float
    softcap: float  # 0: none

    @property
    def transforms(self) -> bool:
        """Whether there is a bias or a softcap."""
        return self.bias is not None or self.softcap > 0.0

    def bias_or(self, other: Tensor) -> Tensor:
        """The bias, or what stands for it, of the same dtype and not read."""
        return other if self.bias is None else self.bias

    def numbers(self) -> tuple[int | float, ...]:
        """What kernels take, from `first` to `bias_columns`."""
        first, columns, padded, bias, scale, softcap = self
        return first, columns, padded, scale, softcap, 0 if bias is None else columns


def block_size(block: int, interpreted: int = INTERPRETED_BLOCK) -> int:
    """A launch's block size: small ones where the interpreter runs them, so that short rows have several."""
    return interpreted if interpreting() else block


def interpreting() -> bool:
    """Whether kernels run in Triton's interpreter (TRITON_INTERPRET=1, read when Triton is imported)."""
    return bool(triton.knobs.runtime.interpret)
