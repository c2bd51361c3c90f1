"""The Triton kernels, through the same public functions and against the same float64 oracle as `test_stats.py`.

Without a GPU they run in Triton's interpreter (`TRITON_INTERPRET=1`, set in conftest.py), with small blocks so that a
row has many; with one, on it, in bfloat16 too (the interpreter's bf16 is not to be trusted).
"""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_backends_states import problems as state_problems
from test_stats import DIFFERENTIABLE, DRAWS, check, problems, realistic

import fastforget as ff
from fastforget.backends import gemm, why_not_triton
from fastforget.stats import DIVERGENCES, OUTPUTS

pytestmark = [
    pytest.mark.skipif(why_not_triton(torch.device("cpu")) is not None, reason="no Triton, or no interpreter"),
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),  # NumPy's, of infinities that are chosen away
]
