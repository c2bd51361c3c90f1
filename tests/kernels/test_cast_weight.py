"""The values of the kernel that casts int8 weights."""

import importlib.util

import pytest
import torch
from kernel_device import DEVICE, needs_triton

if importlib.util.find_spec("triton") is None:
    pytest.skip("Triton is not installed, so there are no kernels", allow_module_level=True)

from fastforget_kernels import cast_weight as module
from fastforget_kernels import launching

pytestmark = needs_triton


@pytest.mark.parametrize("shape", [(1, 1), (3, 5), (17, 33), (4, 64), (2, 5000)], ids=str)
@pytest.mark.parametrize("dtype", module.DTYPES, ids=str)
def test_values(dtype, shape):
    """Those of float32 arithmetic, rounded once; Triton's interpreter cuts bfloat16 off instead of rounding it."""
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(-128, 128, shape, generator=generator).to(torch.int8)
    scale = torch.rand(shape[0], generator=generator)
    out = torch.full((shape[0] + 1, shape[1]), 7.0, dtype=dtype, device=DEVICE)  # a row more: nothing writes there
    module.cast_weight(codes.to(DEVICE), scale.to(DEVICE), out[:-1])
    exact = codes * (scale / 127)[:, None]
    if dtype == torch.bfloat16 and launching.interpreting():
        exact = (exact.view(torch.int32) & -65536).view(torch.float32)
    assert torch.equal(out[:-1].cpu(), exact.to(dtype))
    assert bool((out[-1] == 7.0).all())
