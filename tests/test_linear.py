"""frozen_linear against float64, whatever the weight is stored as; its buffers, and what it saves."""

import math
import os
from concurrent.futures import ThreadPoolExecutor

import bitsandbytes as bnb
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from transformers.pytorch_utils import Conv1D

import fastforget as ff
from fastforget import frozen_weight
from fastforget.frozen_weight import buffer_bytes, cast_buffer, free_buffers, tiles, weight_of
from fastforget.linear import frozen_linear, frozen_linear_op

MORE = int(os.environ.get("FASTFORGET_DRAWS", "1"))  # make proof draws 20 times as many
STORAGES = ("int8", "nf4", "nf4-double", "float32", "bfloat16", "float16", "conv1d")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
ROUNDING = {torch.float32: 2**-24, torch.bfloat16: 2**-8, torch.float16: 2**-11}


@pytest.fixture(autouse=True)
def no_buffers():
    free_buffers()


def layer_of(storage, out_features, in_features, bias=False, seed=0):
    """A frozen layer, and its weight in float64."""
    torch.manual_seed(seed)
    linear = nn.Linear(in_features, out_features, bias=bias).requires_grad_(False)
    state = linear.state_dict()
    if storage == "int8":
        layer = bnb.nn.Linear8bitLt(in_features, out_features, bias=bias, has_fp16_weights=False)
    elif storage.startswith("nf4"):
        layer = bnb.nn.LinearNF4(in_features, out_features, bias=bias, compress_statistics=storage != "nf4")
    elif storage == "conv1d":
        layer = Conv1D(out_features, in_features)
        layer.weight.data = linear.weight.T.contiguous()
        layer.bias = linear.bias
        return layer.requires_grad_(False), linear.weight.double()
    else:
        linear.weight.data = linear.weight.to(getattr(torch, storage))
        return linear, linear.weight.double()
    layer.load_state_dict(state)
    layer = layer.to("cpu").requires_grad_(False)
    if storage == "int8":
        return layer, layer.weight.data.double() * layer.weight.SCB.double()[:, None] / 127
    kept = layer.weight.quant_state
    blocks = kept.absmax
    if kept.nested:
        outer = kept.state2.absmax.repeat_interleave(256)[: len(blocks)]
        blocks = kept.state2.code.double()[blocks.long()].view(-1) * outer + kept.offset
    packed = layer.weight.data.view(-1)
    codes = torch.stack([packed >> 4, packed & 15], 1).view(-1)[: out_features * in_features]
    values = kept.code.double()[codes.long()] * blocks.double().repeat_interleave(kept.blocksize)[: len(codes)]
    return layer, values.view(out_features, in_features)


def factors(rank, layer, seed=1):
    generator = torch.Generator().manual_seed(seed)
    out_features, in_features = weight_of(layer)[2:4]
    a = torch.randn(rank, in_features, generator=generator) / math.sqrt(in_features)
    b = torch.randn(out_features, rank, generator=generator)
    return a.requires_grad_(), b.requires_grad_()


def run(function, inputs, upstream):
    """[y, and the gradients over the inputs], in float64."""
    leaves = [None if each is None else each.detach().requires_grad_() for each in inputs]
    y = function(*leaves)
    y.backward(upstream.to(y.dtype))
    return [y.detach().double(), *(leaf.grad.double() for leaf in leaves if leaf is not None)]


def compare(layer, weight, x, rank, scaling=1.5):
    """[(fused errors, unfused errors, scale)] of y, dx, dA, dB; all errors are against float64."""
    dtype, bias = x.dtype, layer.bias
    a, b = factors(rank, layer) if rank else (None, None)
    upstream = torch.randn(*x.shape[:-1], weight.shape[0], generator=torch.Generator().manual_seed(2)).to(dtype)

    def unfused(x, a=None, b=None, kind=dtype):
        y = F.linear(x, weight.to(kind), None if bias is None else bias.to(kind))
        return y if a is None else y + scaling * F.linear(F.linear(x, a.to(kind)), b.to(kind))

    fused = run(lambda x, a, b: frozen_linear(x, weight_of(layer), bias, a, b, scaling), (x, a, b), upstream)
    eager = run(unfused, (x, a, b), upstream)
    wide = [None if each is None else each.detach().double() for each in (x, a, b)]
    truth = run(lambda *each: unfused(*each, kind=torch.float64), wide, upstream)

    # the length of a product's operands bounds its terms; x A^T and dy B are products too, and may cancel
    longest = lambda rows: rows.flatten(0, -2).norm(dim=-1).max()  # noqa: E731
    flat, grad, matrix = wide[0].flatten(0, -2), upstream.double().flatten(0, -2), weight
    if rank:
        matrix = weight.abs() + scaling * wide[2].abs() @ wide[1].abs()
    shift = 0.0 if bias is None else float(bias.abs().max())
    scales = [longest(flat) * longest(matrix) + shift, longest(grad) * longest(matrix.T)]
    if rank:
        scales.append(scaling * grad.norm() * longest(wide[2].T) * longest(flat.T))
        scales.append(scaling * longest(grad.T) * flat.norm() * longest(wide[1]))
    return [
        (ours - exact, theirs - exact, float(scale))
        for ours, theirs, exact, scale in zip(fused, eager, truth, scales, strict=True)
    ]


def laid_out(layout, rows, width, dtype, seed):
    """x (..., width) of this layout."""
    values = torch.randn(2 * rows, 2 * width, generator=torch.Generator().manual_seed(seed)).to(dtype)
    return {
        "contiguous": values[:rows, :width].contiguous(),
        "row stride": values[:rows, :width],
        "both strides": values[::2, ::2],
        "transposed": values[:rows, :width].T.contiguous().T,
        "expanded": values[:1, :width].expand(rows, width),
        "three dimensions": values[:, :width].reshape(2, rows, width).transpose(0, 1),
    }[layout]


LAYOUTS = ("contiguous", "row stride", "both strides", "transposed", "expanded", "three dimensions")


@settings(max_examples=40 * MORE, deadline=None, derandomize=MORE == 1)  # make proof draws others each time
@given(
    storage=st.sampled_from(STORAGES),
    dtype=st.sampled_from(DTYPES),
    layout=st.sampled_from(LAYOUTS),
    rows=st.integers(1, 9),
    out_features=st.integers(1, 80),
    in_features=st.integers(1, 80),
    rank=st.integers(0, 5),
    bias=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_values_and_gradients(storage, dtype, layout, rows, out_features, in_features, rank, bias, seed):
    layer, weight = layer_of(storage, out_features, in_features, bias, seed)
    x = laid_out(layout, rows, in_features, dtype, seed)
    for ours, theirs, scale in compare(layer, weight, x, rank):
        assert ours.abs().max() <= 1.5 * theirs.abs().max() + 4 * ROUNDING[dtype] * scale


@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_error_over_many_rows(storage, dtype):
    """Root mean square over 256 rows: at most that of plain torch on the dequantised weight, half again."""
    layer, weight = layer_of(storage, 192, 320, bias=True)
    x = torch.randn(256, 320, generator=torch.Generator().manual_seed(3)).to(dtype)
    for ours, theirs, _ in compare(layer, weight, x, rank=8):
        assert ours.square().mean().sqrt() <= 1.5 * theirs.square().mean().sqrt()


@pytest.mark.parametrize("storage", ["int8", "nf4", "nf4-double", "bfloat16", "conv1d"])
def test_wide_weights_are_cast_in_bounded_tiles(storage, monkeypatch):
    layer, weight = layer_of(storage, 300, 48, bias=True)
    x = torch.randn(7, 48) if storage != "conv1d" else torch.randn(7, 48, dtype=torch.float64)
    whole = run(lambda x: frozen_linear(x, weight_of(layer), layer.bias), (x,), torch.ones(7, 300))
    free_buffers()
    monkeypatch.setattr(frozen_weight, "CAST_BYTES", 20_000)
    parts = []
    with cast_buffer(weight_of(layer), x.dtype) as buffer:
        for part, tile in tiles(weight_of(layer), x.dtype, buffer):
            parts.append(part)
            torch.testing.assert_close(tile.double(), weight[part], rtol=1e-6, atol=0)
    assert len(parts) > 1 and [part.start for part in parts[1:]] == [part.stop for part in parts[:-1]]
    assert parts[0].start == 0 and parts[-1].stop == 300
    tiled = run(lambda x: frozen_linear(x, weight_of(layer), layer.bias), (x,), torch.ones(7, 300))
    for one, other in zip(whole, tiled, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)
    assert 0 < buffer_bytes() <= 21_000


def test_float64_gradients():
    for storage in ("int8", "nf4", "float32"):
        layer, _ = layer_of(storage, 5, 8, bias=True)
        inputs = [each.detach().double().requires_grad_() for each in (torch.randn(3, 8), *factors(2, layer))]
        function = lambda x, a, b, layer=layer: frozen_linear(x, weight_of(layer), layer.bias, a, b, 0.5)  # noqa: E731
        assert torch.autograd.gradcheck(function, inputs)


def saved(function):
    """What a forward pass saves."""
    found = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: found.append(tensor) or tensor, lambda kept: kept):
        function()
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("storage", ["int8", "nf4-double", "float32"])
def test_what_is_saved(storage, dtype):
    """Beside references to weights: nothing without an adapter, with one x for A and x Aᵀ for B."""
    layer, _ = layer_of(storage, 96, 64)
    a, b = factors(4, layer)
    weight, x = weight_of(layer), torch.randn(2, 5, 64, dtype=dtype, requires_grad=True)
    own = {each.untyped_storage().data_ptr() for each in (*weight, a, b) if isinstance(each, torch.Tensor)}

    def shapes(*adapter):
        kept = saved(lambda: frozen_linear(x, weight, None, *adapter))
        return [tuple(each.shape) for each in kept if each.untyped_storage().data_ptr() not in own]

    assert shapes() == []
    assert shapes(a, b) == [(2, 5, 64), (10, 4)]
    assert shapes(a, b.detach()) == [(2, 5, 64)]
    assert shapes(a.detach(), b) == [(10, 4)]
    assert shapes(a.detach(), b.detach()) == []


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_adapters_keep_their_dtype(dtype):
    layer, _ = layer_of("int8", 6, 8)
    a, b = factors(2, layer)
    x = torch.randn(3, 8, dtype=dtype)
    y = frozen_linear(x, weight_of(layer), None, a, b)
    y.sum().backward()
    assert y.dtype == dtype and a.grad.dtype == b.grad.dtype == torch.float32 and x.grad is None


@pytest.mark.parametrize("storage", ["int8", "nf4", "float32"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_autocast_is_that_of_a_linear_layer(storage, dtype):
    layer, _ = layer_of(storage, 6, 8, bias=True)
    plain = nn.Linear(8, 6, dtype=dtype)
    x, (a, b) = torch.randn(3, 8, dtype=dtype, requires_grad=True), factors(2, layer)
    with torch.autocast("cpu", torch.bfloat16):
        expected = plain(x).dtype
        y = frozen_linear(x, weight_of(layer), layer.bias, a, b)
        y.float().sum().backward()  # within: operands must not be cast again
    assert y.dtype == expected and x.grad.dtype == dtype and a.grad.dtype == torch.float32
    if dtype != torch.float64:
        alone = frozen_linear(x.to(torch.bfloat16), weight_of(layer), layer.bias, a, b)
        assert torch.equal(y, alone)


def test_no_rows():
    layer, _ = layer_of("int8", 6, 8, bias=True)
    a, b = factors(2, layer)
    x = torch.zeros(0, 4, 8, requires_grad=True)
    y = frozen_linear(x, weight_of(layer), layer.bias, a, b)
    y.sum().backward()
    assert y.shape == (0, 4, 6) and x.grad.shape == x.shape and not a.grad.any() and not b.grad.any()


def test_what_it_refuses():
    layer, _ = layer_of("int8", 6, 8)
    for x in (torch.zeros(3, 7), torch.zeros(3, 8, dtype=torch.int64)):
        with pytest.raises(ff.FastforgetError, match="a linear layer of 8 inputs got"):
            frozen_linear(x, weight_of(layer))


def test_layers_share_one_buffer():
    wide, _ = layer_of("int8", 96, 64)
    narrow, _ = layer_of("nf4", 32, 64)
    plain, _ = layer_of("float32", 96, 64)
    x = torch.randn(3, 64, requires_grad=True)
    for layer in (narrow, wide, narrow, plain):
        frozen_linear(x, weight_of(layer)).sum().backward()
    assert buffer_bytes() == 96 * 64 * 4
    frozen_linear(x.bfloat16(), weight_of(wide))
    assert buffer_bytes() == 96 * 64 * (4 + 2)
    free_buffers()
    assert buffer_bytes() == 0


def test_a_buffer_in_use_is_left_alone():
    layer, _ = layer_of("int8", 96, 64)
    x = torch.randn(3, 64)
    expected = frozen_linear(x, weight_of(layer))
    with cast_buffer(weight_of(layer), torch.float32) as buffer:
        buffer.fill_(7.0)
        assert torch.equal(frozen_linear(x, weight_of(layer)), expected)
        assert bool((buffer == 7.0).all())


def test_threads():
    layers = [layer_of("int8", 512, 256, seed=seed)[0] for seed in range(4)]
    x = torch.randn(64, 256)
    expected = [frozen_linear(x, weight_of(layer)) for layer in layers]

    def wrong(layer, right):
        return [index for index in range(40) if not torch.equal(frozen_linear(x, weight_of(layer)), right)]

    with ThreadPoolExecutor(len(layers)) as pool:
        assert list(pool.map(wrong, layers, expected)) == [[]] * len(layers)


def test_inference_mode_before_training():
    """A buffer made in inference mode could never be written outside of it."""
    layer, _ = layer_of("int8", 96, 64)
    x = torch.randn(3, 64, requires_grad=True)
    with torch.inference_mode():
        first = frozen_linear(x, weight_of(layer))
    second = frozen_linear(x, weight_of(layer))
    second.sum().backward()
    assert torch.equal(first, second)


@pytest.mark.parametrize("storage", ["int8", "nf4-double", "bfloat16"])
def test_compiled(storage):
    """torch.compile traces it whole, as one op each way, for several batch lengths; the op is well-formed."""
    layer, _ = layer_of(storage, 12, 8, bias=True)
    a, b = factors(2, layer)
    weight = weight_of(layer)
    function = lambda x, a, b: frozen_linear(x, weight, layer.bias, a, b, 0.5)  # noqa: E731
    compiled = torch.compile(function, fullgraph=True, dynamic=True, backend="aot_eager")
    for rows in (3, 5):
        x = torch.randn(2, rows, 8)
        upstream = torch.randn(2, rows, 12)
        for one, other in zip(run(function, (x, a, b), upstream), run(compiled, (x, a, b), upstream), strict=True):
            assert torch.equal(one, other)
    arguments = (x.requires_grad_(), a, b, layer.bias, 0.5, *weight)
    torch.library.opcheck(frozen_linear_op, arguments)
