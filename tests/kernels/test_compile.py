"""The kernels, compiled ahead of time for GPUs that are not here, and that nothing else is launched.

Triton cannot compile in a process that interprets, as this one may: what compiles is
`python -m fastforget_kernels.compiling`, which also writes the table in kernels/README.md.
"""

import importlib.util
import itertools
import os
import subprocess
import sys

import pytest
import torch
from kernel_device import DEVICE, needs_triton

import fastforget as ff

if importlib.util.find_spec("triton") is None:
    pytest.skip("Triton is not installed, so there are no kernels to compile", allow_module_level=True)

import triton

from fastforget_kernels import cast_weight, compiling, launching

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
VOCABULARY, WIDTH, ROWS = 40, 16, 5
MOST = 40  # configurations a target
HEADS = ({}, {"bias": True}, {"softcap": 5.0}, {"bias": True, "bias_dtype": torch.float32, "softcap": 5.0})
AGAINST = ("anchor", "centres", "both", "")


def where_kernels_run(test):
    """A launch needs a GPU or the interpreter; compiling needs neither."""
    for mark in needs_triton:
        test = mark(test)
    return test


@pytest.fixture
def as_on_a_gpu(monkeypatch):
    """The block sizes of a GPU."""
    monkeypatch.setattr(launching, "interpreting", lambda: False)
    for module in compiling.MODULES:
        module.options.cache_clear()
    yield
    for module in compiling.MODULES:
        module.options.cache_clear()


each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
each_head = pytest.mark.parametrize("head", HEADS, ids=lambda head: "-".join(head) or "plain")


@pytest.mark.timeout(900)  # minutes only where Triton's cache holds nothing yet and the processors are shared
@pytest.mark.parametrize("stride", [13, pytest.param(1, marks=pytest.mark.slow)])
def test_every_configuration_compiles(as_on_a_gpu, stride):
    """For every target: it builds, spills nothing on sm_90, fits shared memory, and is what kernels/README.md says."""
    variants = compiling.all_variants()
    names = {(variant.kernel.__name__, *compiling.cells(variant)) for variant in variants}
    assert len(names) == len(variants) <= MOST
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "fastforget_kernels.compiling", "--stride", str(stride)]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    lines, written = run.stdout.strip().splitlines(), compiling.parts_of_readme()[1].splitlines()
    same = f"Triton {triton.__version__} " in written[0]  # another version's figures are not comparable
    assert run.returncode == 0 or (not same and "spills 8 bytes" in run.stdout), run.stdout + run.stderr
    figures = [cell for line in lines if line[:4] in ("| fp", "| bf", "| i8") for cell in line.split(" | ")[2:-1]]
    assert len(figures) == len(variants[::stride]) * len(compiling.FORMS)
    assert all(int(figure.split(" / ")[0]) > 0 for figure in figures)
    if same:
        assert set(lines[1:]) <= set(written), "python -m fastforget_kernels.compiling --table"
        assert stride != 1 or written[1:] == lines[1:], "python -m fastforget_kernels.compiling --table"


def test_table_has_a_row_for_every_configuration(as_on_a_gpu):
    lines = compiling.parts_of_readme()[1].splitlines()
    rows = [line.split(" | ")[:2] for line in lines if line.startswith("| ") and "dtypes" not in line]
    rows = [names for names in rows if names[0] != "| ---"]
    variants = compiling.all_variants()
    assert rows == [[f"| {dtypes}", flags] for dtypes, flags in map(compiling.cells, variants)]
    assert list(dict.fromkeys(map(compiling.heading, variants))) == [line for line in lines if line.startswith("**")]
    assert [variant for variant in variants if not variant.traffic] == []


class Recorded:
    """A kernel that notes what it is launched with, and is not; indices that it would find are 0."""

    def __init__(self, kernel, launches):
        self.arg_names, self.__name__, self.launches = kernel.arg_names, kernel.__name__, launches

    def __getitem__(self, grid):
        def launch(*arguments, **options):
            given = dict(zip(self.arg_names, arguments, strict=False))
            given |= {name: value for name, value in options.items() if name in self.arg_names}
            assert set(given) == set(self.arg_names)
            chosen = {name: value for name, value in options.items() if name not in self.arg_names}
            self.launches.append((self.__name__, given, chosen))
            if "accumulators" in given:
                given["accumulators"].zero_()

        return launch


@pytest.fixture
def launches(monkeypatch, as_on_a_gpu):
    """What is launched."""
    found = []
    for module in compiling.MODULES:
        for name in [name for name in vars(module) if name.endswith("_kernel") and name != "tile_kernel"]:
            monkeypatch.setattr(module, name, Recorded(getattr(module, name), found))
    return found


def why_not_in_table(launch):
    """'' where one of the configurations is this launch; otherwise what sets it apart from the nearest one."""
    kernel, given, chosen = launch
    differences = []
    for variant in compiling.all_variants():
        if variant.kernel.__name__ != kernel:
            continue
        apart = {}
        for name, kind in variant.types().items():
            value = given[name]
            if kind == "constexpr":
                same = value == variant.options[name] and type(value) is type(variant.options[name])
            elif kind.startswith("*"):
                same = launching.POINTERS[value.dtype] == kind
                value = value.dtype
            else:
                same = type(value) is (float if kind.startswith("fp") else int)
            if not same:
                apart[name] = value
        if chosen != {"num_warps": variant.options["num_warps"]}:
            apart |= chosen
        differences.append(apart)
    nearest = min(differences, key=len)
    return f"{kernel}: no configuration with {nearest}" if nearest else ""


def check(launches, *kernels):
    """That all that was launched is in the table, and that these kernels were."""
    assert {why_not_in_table(launch) for launch in launches} <= {""}
    assert set(kernels) <= {kernel for kernel, _, _ in launches}


def random(*shape, dtype=torch.float32, seed=0, requires_grad=False):
    values = torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)
    return values.requires_grad_(requires_grad)


def head_of(dtype, *, bias=False, bias_dtype=None, softcap=None):
    bias = random(VOCABULARY, dtype=bias_dtype or dtype) if bias else None
    return ff.LMHead(random(VOCABULARY, WIDTH, dtype=dtype), bias, 1.0, softcap)


def states_of(dtype, requires_grad=False):
    return random(ROWS, WIDTH, dtype=dtype, seed=1, requires_grad=requires_grad)


def labels_of():
    return torch.tensor([0, 3, VOCABULARY - 1, -100, 7])


def against(which, dtype):
    states = states_of(dtype)
    found = {"anchor": states * 0.9} if which in ("anchor", "both") else {}
    return found | ({"centres": states[:3] * 1.1} if which in ("centres", "both") else {})


@where_kernels_run
@each_dtype
@each_head
def test_label_sweeps_launch_what_is_compiled(launches, dtype, head):
    """Statistics with and without moments and states, for a head of each dtype, and what their gradients launch."""
    for outputs, grad, which in itertools.product((("logp",), ("logp", "entropy")), (False, True), AGAINST):
        for head_dtype in {dtype, torch.float32}:
            given = {"outputs": outputs, "backend": "triton", **against(which, dtype)}
            stats = ff.token_stats(states_of(dtype, grad), head_of(head_dtype, **head), labels_of(), **given)
            if grad:
                sum(getattr(stats, name).sum() for name in outputs).backward()
    check(launches, "label_tile_kernel", "gradient_tile_kernel")


@where_kernels_run
@each_dtype
@each_head
def test_gradient_sweeps_launch_what_is_compiled(launches, dtype, head):
    """Expected embeddings, and a head that trains."""
    for train in (False, True):
        output_head = head_of(dtype, **head)
        output_head.weight.requires_grad_(train)
        outputs = ("logp", "logit_mean") if output_head.softcap else ("logp", "expected_embedding")
        stats = ff.token_stats(states_of(dtype, True), output_head, labels_of(), outputs=outputs, backend="triton")
        sum(getattr(stats, name).sum() for name in outputs).backward()
    check(launches, "gradient_tile_kernel")


@where_kernels_run
@each_dtype
def test_logits_of_a_model_launch_what_is_compiled(launches, dtype):
    for grad, which in itertools.product((False, True), AGAINST):
        logits = random(ROWS, VOCABULARY, dtype=dtype, seed=2, requires_grad=grad)
        hidden = states_of(dtype, grad) if which else None
        given = {"outputs": ("logp", "entropy"), "backend": "triton", **against(which, dtype)}
        stats = ff.token_stats_from_logits(logits, labels_of(), hidden, **given)
        if grad:
            (stats.logp.sum() + stats.entropy.sum()).backward()
    check(launches, "label_tile_kernel", "gradient_tile_kernel")


@where_kernels_run
@each_dtype
@each_head
def test_divergences_launch_what_is_compiled(launches, dtype, head):
    shifts = ({}, {"labels": labels_of(), "label_shift": -1.0})
    for kind, grad, shift in itertools.product(("forward_kl", "reverse_kl", "jsd"), (False, True), shifts):
        given = {"kind": kind, "backend": "triton", **shift}
        ff.divergence(states_of(dtype, grad), states_of(dtype) * 1.1, head_of(dtype, **head), **given)
    check(launches, "paired_tile_kernel", "coupled_tile_kernel")


@where_kernels_run
@each_dtype
def test_hidden_stats_launch_what_is_compiled(launches, dtype):
    for which, point_dtype, metric in itertools.product(AGAINST[:3], (torch.float32, dtype), ("l2", "cosine")):
        ff.hidden_stats(states_of(dtype), metric=metric, backend="triton", **against(which, point_dtype))
    check(launches, "state_rows_kernel")


@where_kernels_run
@each_dtype
def test_cast_weight_launches_what_is_compiled(launches, dtype):
    codes, scale = torch.zeros(2, 16, dtype=torch.int8), torch.zeros(2)
    cast_weight.cast_weight(codes, scale, torch.zeros(2, 16, dtype=dtype))
    check(launches, "cast_weight_kernel")
