"""What the reference is: the model with its adapter off, or another model; and where that would be wrong."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from typing import Any

import torch

from fastforget.adapters import ADDED_TO_THE_BASE
from fastforget.backbone import Backbone, every_module, without_dropout
from fastforget.errors import FastforgetError

SWITCHED_WITH_THE_ADAPTER = ("modules_to_save", "trainable_tokens_delta")  # in names of weights, beside its own


def check_reference(model: Any) -> None:
    """Raise where switching the adapter off would not give the frozen model.

    Raises:
        FastforgetError: no PEFT adapter, one with a trained bias or whose initialisation rewrote the base, or trainable
            weights outside the adapter.
    """
    configs = getattr(model, "peft_config", None)
    if not configs:
        raise FastforgetError(
            "a term compares with the frozen model, which is the model with its adapter off, and this model has no "
            "PEFT adapter: load it with fastforget.load(...), give a frozen copy as reference=, or reference='cache', "
            "or use terms without a reference (grad_ascent, grad_diff)"
        )
    from peft.mapping import PEFT_TYPE_TO_PREFIX_MAPPING

    for name, config in configs.items():
        bias = getattr(config, "bias", "none")
        if bias != "none":
            raise FastforgetError(
                f"adapter {name!r} trains biases (bias={bias!r}): they stay changed when the adapter is off, so the "
                "reference would be wrong; use bias='none', or give a frozen copy as reference=, or reference='cache'"
            )
        initial = getattr(config, "init_lora_weights", True)
        if initial not in ADDED_TO_THE_BASE:
            raise FastforgetError(
                f"adapter {name!r} was made with init_lora_weights={initial!r}, which takes its start out of the base: "
                "with the adapter off the model is not the one to be compared with. Use init_lora_weights=True or "
                "'gaussian', or give a frozen copy of the original as reference=, or reference='cache'"
            )
    prefixes = {PEFT_TYPE_TO_PREFIX_MAPPING[config.peft_type] for config in configs.values()}
    for name, parameter in model.named_parameters():
        own = any(prefix in name for prefix in prefixes) or any(part in name for part in SWITCHED_WITH_THE_ADAPTER)
        if parameter.requires_grad and not own:
            raise FastforgetError(
                f"{name} trains but belongs to no adapter: training would change the reference; freeze it, or give a "
                "frozen copy as reference=, or reference='cache'"
            )


@contextlib.contextmanager
def reference_mode(model: Any) -> Iterator[None]:
    """The model as its own frozen reference: our adapter off, dropout off, no gradients; all of it restored.

    Adapters that are active but frozen belong to the model to be unlearned and stay on (stacked); those that train are
    ours and go off. PEFT turns `requires_grad` on again for adapter weights that the user froze: flags are put back.
    """
    modules = every_module(model)
    flags = [
        (parameter, parameter.requires_grad)
        for module in modules
        for parameter in module._parameters.values()
        if parameter is not None
    ]
    active = active_adapters(model, modules)
    frozen = [name for name in active if not adapter_trains(model, name)] if len(active) > 1 else []
    try:
        with torch.no_grad(), without_dropout(model):
            if frozen and len(frozen) < len(active):
                set_adapters(model, modules, frozen)
                try:
                    yield
                finally:
                    set_adapters(model, modules, active)
            else:
                with adapters_off(modules):
                    yield
    finally:
        for parameter, requires_grad in flags:
            if parameter.requires_grad is not requires_grad:
                parameter.requires_grad_(requires_grad)


def active_adapters(model: Any, modules: Iterable[Any]) -> list[str]:
    """The names of the adapters that are on: in a PeftModel, or in a model that has them without one."""
    if hasattr(model, "get_base_model"):
        return list(model.active_adapters)
    return list(dict.fromkeys(name for layer in tuner_layers(modules) for name in layer.active_adapters))


def set_adapters(model: Any, modules: Iterable[Any], names: list[str]) -> None:
    """Switch these adapters on, and others off; PEFT changes what trains."""
    if hasattr(model, "get_base_model"):
        model.base_model.set_adapter(names)
        return
    for layer in tuner_layers(modules):
        layer.set_adapter(names)


def tuner_layers(modules: Iterable[Any]) -> list[Any]:
    """The layers among the modules that PEFT put an adapter in."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    return [module for module in modules if isinstance(module, BaseTunerLayer)]


@contextlib.contextmanager
def frozen_mode(model: Any) -> Iterator[None]:
    """Another model as the reference: dropout off, no gradients."""
    with torch.no_grad(), without_dropout(model):
        yield


@contextlib.contextmanager
def adapters_off(modules: Iterable[Any]) -> Iterator[None]:
    """Switch off those PEFT layers among the modules that are on, as `disable_adapter()` does.

    That one surveys every weight first, 20 ms of host time for 64 layers with LoRA. Of PEFT's usual layers only the
    flag is set: without gradients it does not matter which weights require one.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer

    usual: list[Any] = []
    others: list[Any] = []
    for module in modules:
        switch = getattr(type(module), "enable_adapters", None)
        # transformers' own models have methods of these names
        if switch is not None and getattr(module, "disable_adapters", None) is False:
            (usual if switch is BaseTunerLayer.enable_adapters else others).append(module)
    try:
        for layer in usual:
            layer._disable_adapters = True
        for layer in others:
            layer.enable_adapters(False)
        yield
    finally:
        for layer in usual:
            layer._disable_adapters = False
        for layer in others:
            layer.enable_adapters(True)


def adapter_trains(model: Any, adapter: str) -> bool:
    """Whether any weight of this adapter wants a gradient."""
    return any(parameter.requires_grad for name, parameter in model.named_parameters() if f".{adapter}." in f"{name}.")


def check_separate(backbone: Backbone, frozen: Backbone, compared: bool) -> None:
    """Raise where a model of its own, or the model as it is now (`frozen` is `backbone`), cannot be a loss's reference.

    Raises:
        FastforgetError: another one trains, it shares weights that train with the model, or its head is another one,
            or trains, and a term compares whole distributions, which are computed with one head.
    """
    training = {id(each) for each in backbone.model.parameters() if each.requires_grad}
    if frozen is not backbone and any(each.requires_grad or id(each) in training for each in frozen.model.parameters()):
        raise FastforgetError("the reference has weights that train: give a frozen copy (requires_grad_(False))")
    if compared and not backbone.head.is_frozen_copy_of(frozen.head):
        raise FastforgetError(
            "a term compares whole distributions (KL, JensUn, UNDIAL), which takes one frozen head for the model and "
            "its reference, and here they differ or the model's trains: freeze the head (get_output_embeddings()), or "
            "use terms of the label's log-probs (npo, grad_diff)"
        )
