"""Where the Triton kernels run in these tests: on a GPU where there is one, else in Triton's interpreter on the CPU."""

import pytest
import torch

from fastforget.backends import why_not_triton

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
WHY_NOT = why_not_triton(DEVICE)
ON_GPU = [pytest.mark.gpu] if DEVICE.type == "cuda" else []  # there, `pytest -m gpu` chooses them
needs_triton = [
    *ON_GPU,
    pytest.mark.skipif(WHY_NOT is not None, reason=f"the kernels do not run here: {WHY_NOT}"),
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),  # of the interpreter's NumPy: infinities that are not chosen
]
OURS = ["chunked", pytest.param("triton", marks=needs_triton)]


def device_of(backend):
    """The kernels' device for `triton`; everything else is tested on the CPU."""
    return DEVICE if backend == "triton" else torch.device("cpu")
