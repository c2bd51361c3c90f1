"""What tensors without values would take: storages counted, fused attention emulated, sizes of quantised layers."""

from __future__ import annotations

import contextlib
import functools
import weakref
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fastforget.errors import FastforgetError
from fastforget.models import one_line

NF4_BLOCK, NF4_OUTER_BLOCK = 64, 256  # weights that share a scale, and scales that share one of theirs
# what a compiled layer keeps: results of these; all else is computed again from them in its backward pass
PRODUCTS = ("mm", "addmm", "bmm", "baddbmm", "convolution", "empty", "new_empty", "empty_like", "_scaled_dot_product")


class LiveBytes(TorchDispatchMode):
    """Adds up the storages that operations make, as long as they are alive.

    Args:
        existing: tensors that were there before and do not count.

    Attributes:
        live, peak: bytes now, and the most there were.
    """

    def __init__(self, existing: Iterable[Tensor]) -> None:
        super().__init__()
        self.live = self.peak = 0
        self._existing = {storage_of(tensor) for tensor in existing}
        self._alive: dict[int, weakref.ref[Any]] = {}
        self._products: set[int] = set()  # written by a product
        self._saved: set[int] = set()  # kept by autograd

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        is_product = function.overloadpacket.__name__.startswith(PRODUCTS)
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                self._count(tensor, is_product)
        return result

    def _count(self, tensor: Tensor, is_product: bool) -> None:
        storage, key = tensor.untyped_storage(), storage_of(tensor)
        if key in self._existing:
            return
        if key not in self._alive:
            size = storage.nbytes()
            self._alive[key] = weakref.ref(storage, functools.partial(self._freed, key, size))
            self.live += size
            self.peak = max(self.peak, self.live)
        if is_product:
            self._products.add(key)

    def _freed(self, key: int, size: int, _: object) -> None:
        self.live -= size
        del self._alive[key]
        self._products.discard(key)
        self._saved.discard(key)

    @contextlib.contextmanager
    def noting_saved(self) -> Iterator[None]:
        """Note which storages autograd keeps in the block."""

        def pack(tensor: Tensor) -> Tensor:
            self._saved.add(storage_of(tensor))
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            yield

    def saved_products(self) -> int:
        """Count the bytes of what autograd keeps and a product wrote."""
        sizes = {key: reference() for key, reference in self._alive.items() if key in self._saved & self._products}
        return sum(storage.nbytes() for storage in sizes.values() if storage is not None)


def storage_of(tensor: Tensor) -> int:
    """Identify a tensor's storage as long as it is alive."""
    return tensor.untyped_storage()._cdata


class KeptAttention(torch.autograd.Function):
    """What a GPU's attention allocates and keeps for its backward pass: query, key, value, output and logsumexp."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
        batch, heads, length, _ = query.shape
        output = query.new_empty(batch, length, heads, value.shape[-1]).transpose(1, 2)
        logsumexp = query.new_empty(batch, heads, length, dtype=torch.float32)
        bias = None if mask is None else query.new_empty(mask.shape)  # a mask of bool is made one to be added
        ctx.save_for_backward(query, key, value, output, logsumexp, bias)
        return output

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, *_ = ctx.saved_tensors
        return torch.empty_like(query), torch.empty_like(key), torch.empty_like(value), None


def attention_on(device: torch.device) -> Callable[..., Tensor]:
    """Make what takes the place of `torch.nn.functional.scaled_dot_product_attention`, as it is on a device."""
    unfused = F.scaled_dot_product_attention

    @functools.cache
    def fuses(
        dtype: torch.dtype, heads: tuple[int, int], widths: tuple[int, int], masked: bool, causal: bool, grouped: bool
    ) -> bool:
        sizes = zip((heads[0], heads[1], heads[1]), (widths[0], widths[0], widths[1]), strict=True)
        query, key, value = (torch.zeros(1, count, 2, width, dtype=dtype, device="cpu") for count, width in sizes)
        mask = torch.ones(1, 1, 2, 2, dtype=torch.bool, device="cpu") if masked else None
        choice = torch._fused_sdp_choice(query, key, value, mask, is_causal=causal, enable_gqa=grouped)
        return choice != SDPBackend.MATH.value

    def attention(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Tensor:
        kind = (query.shape[1], key.shape[1]), (query.shape[-1], value.shape[-1]), attn_mask is not None
        if device.type == "cpu" and not fuses(query.dtype, *kind, is_causal, enable_gqa):
            return unfused(query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa)
        return KeptAttention.apply(query, key, value, attn_mask)

    return attention


def attention_mask(
    *,
    batch_size: int,
    kv_length: int,
    q_length: int = 0,
    device: Any = None,
    local_size: int | None = None,
    cache_position: Tensor | None = None,
    padded: bool,
    **_: Any,
) -> Tensor | None:
    """In place of transformers' mask: none where attention can be causal by itself, as transformers decides it."""
    if cache_position is not None:  # transformers 5.0 and its next give this for length and device
        q_length, device = len(cache_position), cache_position.device
    if not padded and (local_size is None or kv_length < local_size):
        return None
    return torch.ones(batch_size, 1, q_length, kv_length, dtype=torch.bool, device=device)


class KeptInput(torch.autograd.Function):
    """What bitsandbytes' 8-bit product keeps for its backward pass: its input."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, out_features: int) -> Tensor:
        ctx.save_for_backward(x)
        return x.new_empty((*x.shape[:-1], out_features))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return torch.empty_like(ctx.saved_tensors[0]), None


def keep_input(layer: nn.Module, x: Tensor) -> Tensor:
    """In place of a quantised layer's forward."""
    return KeptInput.apply(x, features(layer)[0])


@contextlib.contextmanager
def refused_on_values(model: Any) -> Iterator[None]:
    """Say whose forward cannot run without values."""
    try:
        yield
    except FastforgetError:
        raise
    except (RuntimeError, NotImplementedError, TypeError, ValueError) as error:
        name = type(model.get_base_model()).__name__
        raise FastforgetError(
            f"{name} cannot be planned for: its forward does not run without values ({one_line(error)})"
        ) from error


def quantisable(causal_lm: Any) -> list[Any]:
    """Return the layers that transformers quantises: all linear ones but the head."""
    from transformers.pytorch_utils import Conv1D

    head = causal_lm.get_output_embeddings()
    return [each for each in causal_lm.modules() if type(each) in (nn.Linear, Conv1D) and each is not head]


def features(layer: Any) -> tuple[int, int]:
    """Outputs and inputs of a linear layer (transformers' Conv1D keeps (in, out))."""
    return tuple(layer.weight.shape) if isinstance(layer, nn.Linear) else tuple(reversed(layer.weight.shape))  # type: ignore[return-value]


def quantised_bytes(layer: nn.Module, bits: int) -> int:
    """Count a layer's weight as bitsandbytes stores it: int8 with a float32 a row, or NF4 with coded scales."""
    out_features, in_features = features(layer)
    count = out_features * in_features
    if bits == 8:
        return count + out_features * torch.float32.itemsize
    scales = -(-count // NF4_BLOCK)
    codes = (16 + 256) * torch.float32.itemsize
    return -(-count // 2) + scales + -(-scales // NF4_OUTER_BLOCK) * torch.float32.itemsize + codes
