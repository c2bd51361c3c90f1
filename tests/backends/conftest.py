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


def name_of(request):
    if request.param in library.INSTRUCTION_SETS:
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv(library.OVERRIDE, request.param)
            yield "native"
    else:
        yield request.param


BACKENDS = ["torch", *SETS, pytest.param("triton", marks=needs_triton)]


@pytest.fixture(params=BACKENDS, scope="module")
def each_backend(request):
    """The name of each backend of ours in turn, `native` once for each instruction set."""
    yield from name_of(request)


@pytest.fixture(params=["eager", *BACKENDS], scope="module")
def any_backend(request):
    """As `each_backend`, and eager."""
    yield from name_of(request)
