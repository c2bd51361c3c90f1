"""Put `linear.py` into a model's LoRA layers and bitsandbytes linears, and take it out again.

Only the `forward` of single layers is replaced, on the instances: PEFT's modules, names, weights, merging, saving,
adapters and `disable_adapter` stay its own, and bitsandbytes' weights too. At each call a layer looks whether the fused
product still is what its class would compute (adapters change, are merged, get dropout); else its class computes it.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fastforget.frozen_weight import FLOATS, free_buffers, weight_of
from fastforget.linear import frozen_linear

# by name, so that neither library is imported for a model that has none of its layers; a subclass may compute anything
BITSANDBYTES = {f"bitsandbytes.nn.modules.{name}" for name in ("Linear8bitLt", "Linear4bit", "LinearNF4", "LinearFP4")}
BASES = {*BITSANDBYTES, "torch.nn.modules.linear.Linear", "transformers.pytorch_utils.Conv1D"}
LORA = {"peft.tuners.lora.layer.Linear", "peft.tuners.lora.bnb.Linear8bitLt", "peft.tuners.lora.bnb.Linear4bit"}


@dataclass(frozen=True)
class FuseReport:
    """What `fuse` did.

    Attributes:
        taken: names of the layers that run fused now; the quantised linear inside an adapter's layer has its own.
        refused: name -> why not, of every other adapter layer and bitsandbytes linear.
    """

    taken: tuple[str, ...]
    refused: dict[str, str]


class LayerForward:
    """What replaces a layer's `forward` on the instance: a function of the layer and its arguments.

    It holds the layer weakly, so that a model's memory is freed with its last reference. A copy's is of the copy. The
    layer gets the bound method `forward`, of which torch.compile looks at the function only, the same for all layers:
    any other callable would cost a graph for each.
    """

    def __init__(self, run: Callable[..., Any], layer: nn.Module) -> None:
        self.__setstate__((run, layer))

    @classmethod
    def replace(cls, layer: nn.Module, run: Callable[..., Any]) -> None:
        """Let a layer's `forward` be `run`."""
        layer.forward = cls(run, layer).forward

    @classmethod
    def has_replaced(cls, layer: nn.Module) -> bool:
        """Tell whether a layer's `forward` is one of this kind."""
        return isinstance(getattr(vars(layer).get("forward"), "__self__", None), cls)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Call the function with the layer before its arguments."""
        return self.run(self.layer(), *args, **kwargs)

    def __getstate__(self) -> tuple[Callable[..., Any], nn.Module | None]:
        return self.run, self.layer()

    def __setstate__(self, state: tuple[Callable[..., Any], nn.Module]) -> None:
        self.run, layer = state
        self.layer = weakref.ref(layer)


class FusedForward(LayerForward):
    """That of a fused layer."""


def fuse(model: nn.Module) -> FuseReport:
    """Let every PEFT LoRA layer and bitsandbytes linear that can be served run `linear.frozen_linear`.

    Products with a quantised weight then are exact in the activations on every device, the adapter's run in the
    activations' dtype, and the backward pass keeps less. Layers that are fused already stay so: call it again after
    adding adapters to other layers.
    """
    taken, refused = [], {}
    for name, module in model.named_modules():
        run = forward_of(module)
        if run is None:
            continue
        reason = why_not_lora(module) if run is lora_forward else why_not_base(module)
        if reason is None and not is_fused(module) and "forward" in vars(module):
            reason = "something else has replaced its forward"
        if reason is not None:
            refused[name] = reason
            continue
        taken.append(name)
        if not is_fused(module):
            FusedForward.replace(module, run)
    return FuseReport(tuple(taken), refused)


def unfuse(model: nn.Module) -> None:
    """Give every layer its own `forward` back, and free the buffers that casts went to."""
    for module in model.modules():
        if is_fused(module):
            del module.forward
    free_buffers()


def is_fused(module: nn.Module) -> bool:
    """Tell whether `fuse` has taken this layer."""
    return FusedForward.has_replaced(module)


def name_of(kind: type) -> str:
    """Return a class's name, with where it was defined."""
    return f"{kind.__module__}.{kind.__qualname__}"


def forward_of(module: nn.Module) -> Callable[..., Tensor] | None:
    """Return what the layer would run fused; None where it is no layer of an adapter or of bitsandbytes."""
    home = type(module).__module__
    if home.startswith("peft.tuners.") and isinstance(getattr(module, "base_layer", None), nn.Module):
        return lora_forward
    return base_forward if home.startswith("bitsandbytes.") and isinstance(module, nn.Linear) else None


def base_forward(layer: nn.Module, x: Tensor) -> Tensor:
    """Return the forward of a bitsandbytes linear."""
    if why_not_base(layer) is not None:
        return type(layer).forward(layer, x)
    return frozen_linear(x, weight_of(layer), layer.bias)  # type: ignore[arg-type]


def lora_forward(layer: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """Return the forward of a LoRA layer; arguments other than x (adapters that differ by row, aLoRA) are PEFT's."""
    if args or kwargs or layer.merged or why_not_lora(layer) is not None:
        return type(layer).forward(layer, x, *args, **kwargs)
    names = [] if layer.disable_adapters else [name for name in layer.active_adapters if name in layer.lora_A]
    factors = [(layer.lora_A[name].weight, layer.lora_B[name].weight, layer.scaling[name]) for name in names]
    if len(factors) > 1:  # the sum of several is one of their joint rank
        joint_a = torch.cat([a for a, _, _ in factors])
        joint_b = torch.cat([b * scaling for _, b, scaling in factors], dim=1)
        factors = [(joint_a, joint_b, 1.0)]
    base = layer.base_layer
    return frozen_linear(x, weight_of(base), base.bias, *(factors[0] if factors else ()))


def why_not_base(layer: Any) -> str | None:
    """Why a linear layer cannot be served, or None."""
    kind = name_of(type(layer))
    if kind not in BASES:
        return f"it is a {kind}"
    weight, bias = layer.weight, layer.bias
    if weight.requires_grad or (bias is not None and bias.requires_grad):
        return "it trains"
    if kind == "bitsandbytes.nn.modules.Linear8bitLt":
        if layer.state.threshold > 0:
            return f"its outlier threshold is {layer.state.threshold:g}: outlier columns depend on the whole batch"
        if weight.dtype != torch.int8 or (weight.SCB is None and layer.state.SCB is None):
            return "it is not quantised"
    elif kind in BITSANDBYTES:
        state = getattr(weight, "quant_state", None)
        if state is None:
            return "it is not quantised"
        if getattr(state, "packing_format_for_cpu", False):
            return "an evaluation on the CPU has packed its weights anew, with some loss: load the model again"
    elif weight.dtype not in FLOATS:
        return f"its weight is stored as {weight.dtype}"
    return None


def why_not_lora(layer: Any) -> str | None:
    """Why a layer of an adapter cannot be served with the adapters that are active now, or None."""
    if name_of(type(layer)) not in LORA:
        return f"it is a {name_of(type(layer))}"
    base = layer.base_layer
    reason = why_not_base(base)
    if reason is not None:
        return f"of its base layer: {reason}"
    if not is_fused(base) and "forward" in vars(base):
        return "of its base layer: something else has replaced its forward"
    inside = [base]
    for name in layer.active_adapters:
        if name not in layer.lora_A:
            continue
        if name in layer.lora_variant:
            return f"adapter {name!r} is a {type(layer.lora_variant[name]).__name__}, not a low-rank product alone"
        if getattr(layer.lora_dropout[name], "p", 0.0) > 0:
            return f"adapter {name!r} has dropout {layer.lora_dropout[name].p:g}"
        if layer.lora_B[name].bias is not None:
            return f"adapter {name!r} has a bias"
        inside += [layer.lora_A[name], layer.lora_B[name]]
    if any(map(has_hooks, inside)):
        return "a module inside it has hooks, which would not be called"
    return None


def has_hooks(module: nn.Module) -> bool:
    """Tell whether anything is called around the module's forward or backward."""
    return bool(
        module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    )
