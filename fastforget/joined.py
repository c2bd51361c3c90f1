"""Several LoRA adapters as one, so that plain PEFT loads the model that they make together.

s1 B1 A1 + s2 B2 A2 is [s1 B1, s2 B2] times A1 above A2: exact, an adapter whose rank is the sum of theirs.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from fastforget.errors import FastforgetError

WEIGHTS = "adapter_model.safetensors"  # as PEFT calls it
KEY = re.compile(r"(base_model\.model\.(.+)\.lora_(?:embedding_)?)([AB])(\.weight)?")  # of PEFT's state dicts


def save_joined(model: Any, names: Sequence[str], folder: Path) -> None:
    """Save LoRA adapters of a PeftModel as one, in PEFT's format and float32.

    Raises:
        FastforgetError: weights that are no product of two matrices.
    """
    import peft

    parts = [factors(model, name) for name in names]
    ranks = [max(len(a) for a, _ in part.values()) for part in parts]
    starts = [sum(ranks[:place]) for place in range(len(ranks))]
    tensors: dict[str, Tensor] = {}
    for part, start in zip(parts, starts, strict=True):
        for (before, behind), (a, b) in part.items():
            a_name, b_name = f"{before}A{behind}", f"{before}B{behind}"
            if a_name not in tensors:  # a layer that some of them leave alone has zeros in their places
                tensors |= {a_name: torch.zeros(sum(ranks), a.shape[1]), b_name: torch.zeros(len(b), sum(ranks))}
            tensors[a_name][start : start + len(a)] = a
            tensors[b_name][:, start : start + len(a)] = b
    last = model.peft_config[names[-1]]
    config = peft.LoraConfig(
        r=sum(ranks),
        lora_alpha=sum(ranks),  # the factor of each is in its B
        target_modules=sorted({match[2] for match in map(KEY.fullmatch, tensors) if match}),
        task_type=last.task_type,
        base_model_name_or_path=last.base_model_name_or_path or model.get_base_model().name_or_path,
        fan_in_fan_out=last.fan_in_fan_out,
        inference_mode=True,
    )
    config.save_pretrained(str(folder))
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})


def factors(model: Any, name: str) -> dict[tuple[str, str], tuple[Tensor, Tensor]]:
    """Return A (r, in) and s B (out, r) of each layer of an adapter, float32, by what stands around A in its name."""
    import peft

    if getattr(model.peft_config[name], "target_parameters", None):
        raise FastforgetError(f"adapter {name!r} cannot be joined with others: it adapts parameters, not layers")
    weights = peft.get_peft_model_state_dict(model, adapter_name=name, save_embedding_layers=False)
    found = {}
    for key, a in weights.items():
        match = KEY.fullmatch(key)
        if match is None or a.dim() != 2:
            raise FastforgetError(f"adapter {name!r} cannot be joined with others: {key} is no matrix of a product")
        before, layer, which, behind = match.groups(default="")
        if which == "A":
            b = weights[f"{before}B{behind}"].detach().float().cpu()
            scale = model.get_base_model().get_submodule(layer).scaling[name]
            found[before, behind] = (a.detach().float().cpu(), scale * b)
    return found
