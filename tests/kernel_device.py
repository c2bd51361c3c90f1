"""Which backends of ours the tests run, and where: Triton's on a GPU, else in its interpreter on the CPU."""

import pytest
import torch

from fastforget.backends import why_not_native, why_not_triton

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
WHY_NOT = why_not_triton(DEVICE)
ON_GPU = [pytest.mark.gpu] if DEVICE.type == "cuda" else []  # there, `pytest -m gpu` chooses them
needs_triton = [
    *ON_GPU,
    pytest.mark.skipif(WHY_NOT is not None, reason=f"the kernels do not run here: {WHY_NOT}"),
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),  # of the interpreter's NumPy: infinities that are not chosen
]
WHY_NOT_NATIVE = why_not_native(torch.device("cpu"))
needs_native = pytest.mark.skipif(WHY_NOT_NATIVE is not None, reason=f"no C++ row passes: {WHY_NOT_NATIVE}")
OURS = ["torch", pytest.param("native", marks=needs_native), pytest.param("triton", marks=needs_triton)]
KINDS_AND_BACKENDS = [  # for tiny models, which are on the CPU: kernels are slow there and know of no kinds
    *[(kind, "torch") for kind in ("opt", "llama")],
    *[pytest.param(kind, "native", marks=needs_native) for kind in ("opt", "llama")],
    *([pytest.param("llama", "triton", marks=needs_triton)] if DEVICE.type == "cpu" else []),
]


def device_of(backend):
    """The kernels' device for `triton`; everything else is tested on the CPU."""
    return DEVICE if backend == "triton" else torch.device("cpu")
