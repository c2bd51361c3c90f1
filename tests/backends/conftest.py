"""`instructions` goes through each instruction set that this machine has: FASTFORGET_CPU is read at each call."""

import pytest
from kernel_device import WHY_NOT_NATIVE

from fastforget.backends.native import library

HERE = library.instruction_set() if WHY_NOT_NATIVE is None else -1
SETS = [
    pytest.param(name, marks=pytest.mark.skipif(index > HERE, reason="not on this machine"))
    for index, name in enumerate(library.INSTRUCTION_SETS)
]


@pytest.fixture(params=SETS, scope="module")
def instructions(request):
    """Each instruction set in turn."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(library.OVERRIDE, request.param)
        assert library.status().instruction_set == request.param
        yield request.param
