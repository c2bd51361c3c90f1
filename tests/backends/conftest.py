"""Every backend and every instruction set that this machine has: FASTFORGET_CPU is read at each call."""

import pytest
from kernel_device import WHY_NOT_NATIVE, needs_triton

from fastforget.backends.native import library

HERE = library.instruction_set() if WHY_NOT_NATIVE is None else -1
MISSING = pytest.mark.skipif(True, reason="not on this machine")
SETS = [
    pytest.param(name, marks=[MISSING] if index > HERE else []) for index, name in enumerate(library.INSTRUCTION_SETS)
]


@pytest.fixture(params=SETS, scope="module")
def instructions(request):
    """Each instruction set in turn."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(library.OVERRIDE, request.param)
        assert library.status().instruction_set == request.param
        yield request.param


@pytest.fixture(params=["torch", *SETS, pytest.param("triton", marks=needs_triton)], scope="module")
def each_backend(request):
    """The name of each backend in turn, `native` once for each instruction set."""
    if request.param in library.INSTRUCTION_SETS:
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv(library.OVERRIDE, request.param)
            yield "native"
    else:
        yield request.param
