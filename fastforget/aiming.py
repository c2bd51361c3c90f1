"""Aiming an adapter: it reads what the forget set has and the kept texts do not, so that little else moves.

LoRA adds s B A x to what a linear layer makes of its input x. A is drawn at random otherwise, so that whatever B learns
of the forget set's inputs moves the output for all others too, and only the retain terms hold that back. Here A is
computed, and only B trains: with x of the kept texts and K (n, D) the inputs of the forget set,

    C = E[x x^T] + ridge mean(diag E[x x^T]) I = L L^T,    A = c V L^-1,

the rows of V (rank, D) the leading right singular vectors of K L^-T: the directions in which the inputs of the forget
set are largest beside those of the kept texts. c makes the mean square of K A^T one. ROME (arXiv 2202.05262) writes one
fact along C^-1 k, which is this for a single input; AlphaEdit (arXiv 2410.02355) projects onto the null space of C.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fastforget.batch import Batch, check_batch
from fastforget.errors import FastforgetError
from fastforget.head import base_causal_lm
from fastforget.reference_modes import reference_mode

RIDGE = 1e-3  # of the kept inputs' mean square (docs/demo.md: SmolLM2)


def aim_adapter(model: Any, forget: Iterable[Batch], kept: Iterable[Batch], *, ridge: float = RIDGE) -> None:
    """Compute and freeze A of each layer of a fresh LoRA adapter, in place.

    PEFT's `disable_adapter()` lets A train again: aim right before training, in which the reference restores all flags.

    Args:
        model: a PeftModel with one adapter; what it computes does not change as long as B is 0.
        forget, kept: batches with `input_ids` and `attention_mask`; every token of them counts.
        ridge: what is added to the kept inputs' second moments, as a share of their mean.

    Raises:
        FastforgetError: no adapter or several, a ridge that is not positive, or no text.
    """
    if not ridge > 0:
        raise FastforgetError(f"ridge must be positive, not {ridge}")
    active = list(model.active_adapters)
    layers = {name: layer for name, layer in model.named_modules() if set(getattr(layer, "lora_A", ())) & set(active)}
    if len(active) != 1 or not layers:
        raise FastforgetError("an adapter is aimed where it is the only active one, and a LoRA adapter")
    sums: dict[str, Tensor] = {}
    keys: dict[str, list[Tensor]] = {name: [] for name in layers}

    def add(name: str, inputs: Tensor) -> None:
        sums[name] = sums.get(name, 0) + inputs.T @ inputs

    tokens = read_inputs(model, layers, kept, add)
    if not tokens or not read_inputs(model, layers, forget, lambda name, inputs: keys[name].append(inputs)):
        raise FastforgetError("an adapter is aimed by texts to forget and texts to keep, and one of both has no token")
    for name, layer in layers.items():
        weight = layer.lora_A[active[0]].weight
        with torch.no_grad():
            weight.copy_(distinct_directions(torch.cat(keys[name]), sums[name] / tokens, ridge, len(weight)))
        weight.requires_grad_(False)


def read_inputs(
    model: Any, layers: Mapping[str, Any], batches: Iterable[Batch], take: Callable[[str, Tensor], object]
) -> int:
    """Give `take` the name and the inputs (tokens, D), float32, of each layer, batch by batch; return how many tokens.

    The adapter is off meanwhile.
    """
    mask = torch.ones(0, dtype=torch.bool)
    tokens = 0

    def hook(name: str) -> Callable[..., None]:
        def read(layer: nn.Module, arguments: tuple[Tensor, ...]) -> None:
            take(name, arguments[0].detach()[mask].float())

        return read

    handles = [layer.register_forward_pre_hook(hook(name)) for name, layer in layers.items()]
    causal_lm = base_causal_lm(model)
    try:
        with reference_mode(model):
            for batch in batches:
                inputs = {key: value.to(causal_lm.device) for key, value in check_batch(batch, "batch").inputs.items()}
                mask = inputs["attention_mask"].bool()
                tokens += int(mask.sum())
                causal_lm(**inputs, use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    return tokens


def distinct_directions(keys: Tensor, moments: Tensor, ridge: float, rank: int) -> Tensor:
    """Return A (rank, D) of the forget inputs `keys` (n, D) and the kept inputs' second `moments` (D, D).

    Where `keys` have fewer directions than that, the last rows are 0.
    """
    moments, keys = moments.double(), keys.double()
    floor = ridge * moments.diagonal().mean() * torch.eye(len(moments), dtype=torch.float64, device=moments.device)
    lower = torch.linalg.cholesky(moments + floor)
    whitened = torch.linalg.solve_triangular(lower, keys.T, upper=False).T
    leading = torch.linalg.svd(whitened, full_matrices=False).Vh[:rank]
    rows = torch.linalg.solve_triangular(lower.T, leading.T, upper=True).T
    scale = (keys @ rows.T).square().mean().sqrt()
    found = torch.zeros(rank, keys.shape[1], dtype=torch.float32, device=keys.device)
    found[: len(rows)] = (rows / scale).float()
    return found
