"""A trained adapter: saved in PEFT's own format, or subtracted from the weights as a task vector (arXiv 2212.04089)."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import torch

from fastforget.errors import FastforgetError
from fastforget.files import replaced_together
from fastforget.joined import save_joined
from fastforget.objectives.task_vector import check_strength
from fastforget.shards import is_sharded

ADAPTER_NAME = "unlearn"  # of ours, where the model to be unlearned is itself an adapter
ADDED_TO_THE_BASE = (True, False, "gaussian", "orthogonal", "eva")  # initialisations that leave the base as it is


def save_adapter(model: Any, tokenizer: Any, folder: str | os.PathLike[str]) -> None:
    """Save the adapter (PEFT's format) and the tokenizer into a folder, all at once: never a half-written adapter.

    Files of the same names in the folder are replaced, others stay. Where several LoRA adapters are on, ours on top of
    a fine-tuning adapter say, what is saved is all of them as one: plain PEFT then loads the model that was trained. A
    model card is not among the files: jobs write one of what they measured.

    Raises:
        FastforgetError: a weight of the adapter is NaN or infinite, several are on that cannot be joined, or FSDP2
            shards it; nothing is written.
    """
    if is_sharded(model):
        raise FastforgetError(
            "each process holds a part of this adapter: gather it in all of them (get_model_state_dict of "
            "torch.distributed.checkpoint.state_dict), and let one of them save it, as examples/fsdp2.py does"
        )
    check_finite(model)
    names = list(model.active_adapters)
    for name in names if len(names) > 1 else ():
        check_linear(name, model.peft_config[name], "joined with the others that are on")
    with replaced_together(Path(folder)) as scratch:
        if len(names) > 1:
            save_joined(model, names, scratch)
        else:
            model.save_pretrained(scratch, selected_adapters=names, save_embedding_layers=False)
            for path in [*scratch.glob(f"{names[0]}/*")]:  # where PEFT puts those that are not called "default"
                path.replace(scratch / path.name)
        if tokenizer is not None:
            tokenizer.save_pretrained(scratch)
        for path in [*scratch.iterdir()]:
            if path.is_dir():
                shutil.rmtree(path)
        (scratch / "README.md").unlink(missing_ok=True)  # PEFT's model card is a form that nobody has filled in


def check_finite(model: Any) -> None:
    """Raise FastforgetError where a weight of an adapter is NaN or infinite."""
    prefix = getattr(model.base_model, "prefix", "lora_")
    for name, parameter in model.named_parameters():
        if (parameter.requires_grad or prefix in name) and not bool(parameter.isfinite().all()):
            raise FastforgetError(
                f"{name} holds NaN or infinite values, so the adapter is broken and is not saved: load the last good "
                "one, and train at a lower learning rate"
            )


@torch.no_grad()
def task_vector(model: Any, alpha: float = 1.0, *, adapter: str | None = None) -> Any:
    """Negate an adapter that was fine-tuned on the forget set, in place, so that it subtracts what it learned.

    The weights with the adapter are then W - alpha * s * B A (s is LoRA's scale) where they were W + s * B A: task
    negation, exact, by multiplying B with -alpha. `save_adapter` saves the result as any other adapter. A second call
    with alpha = 1 takes the first one back.

    Args:
        model: a PeftModel with the adapter in it, not merged.
        alpha: the strength; 1 goes as far to the other side of W as fine-tuning went.
        adapter: which one; without it ours, or the only active one.

    Returns:
        The model itself.

    Raises:
        FastforgetError: no LoRA adapter of this name, several active ones, one that is merged, or one whose effect on
            the weights is not s * B A alone (DoRA, trained biases or other modules, PiSSA and the like).
    """
    check_strength(alpha)
    if not hasattr(model, "peft_config"):
        raise FastforgetError("task_vector negates an adapter, and this model has no PEFT adapter")
    name = adapter if adapter is not None else sole_adapter(model)
    if name not in model.peft_config:
        raise FastforgetError(f"the model has no adapter {name!r}: it has {', '.join(model.peft_config)}")
    check_linear(name, model.peft_config[name], "subtracted as a task vector")
    negated = 0
    for module in model.modules():
        if name in getattr(module, "merged_adapters", ()):
            raise FastforgetError(f"adapter {name!r} is merged into the weights: unmerge it first (unmerge_adapter())")
        if name in getattr(module, "lora_B", ()):
            for parameter in module.lora_B[name].parameters():  # with lora_bias also its bias
                parameter.mul_(-alpha)
                negated += 1
        if name in getattr(module, "lora_embedding_B", ()):
            module.lora_embedding_B[name].mul_(-alpha)
            negated += 1
    if not negated:
        raise FastforgetError(f"adapter {name!r} has no LoRA weights in this model")
    return model


def sole_adapter(model: Any) -> str:
    """Return the name of the adapter that is meant where none is named: ours, or the only active one."""
    if ADAPTER_NAME in model.peft_config:
        return ADAPTER_NAME
    active = list(model.active_adapters)
    if len(active) != 1:
        raise FastforgetError(f"several adapters are active ({', '.join(active)}): name the one to negate")
    return active[0]


def check_linear(name: str, config: Any, what: str) -> None:
    """Raise, saying `what` it cannot be, where an adapter does another thing to the weights than to add s * B A."""
    reasons = [
        (getattr(config.peft_type, "value", config.peft_type) != "LORA", "it is no LoRA adapter"),
        (getattr(config, "use_dora", False), "DoRA rescales the whole weight"),
        (getattr(config, "bias", "none") != "none", "it trains biases of the base (bias='none' does not)"),
        (bool(getattr(config, "modules_to_save", None)), "it holds whole modules (modules_to_save)"),
        (getattr(config, "trainable_token_indices", None) is not None, "it trains rows of the embeddings"),
        (
            getattr(config, "init_lora_weights", True) not in ADDED_TO_THE_BASE,
            f"init_lora_weights={getattr(config, 'init_lora_weights', True)!r} changes the base weights",
        ),
    ]
    for refused, why in reasons:
        if refused:
            raise FastforgetError(f"adapter {name!r} cannot be {what}: {why}")
