"""What a model makes of the same tokens laid out otherwise: padded on the left, or packed in one row.

Models differ in what they make of `position_ids`, and say so nowhere, so each is tried on a few tokens.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastforget.batch import positions_without_padding

TOKENS = 16  # of a document that is tried
PADDING = 3
MOVED = 0.05  # of the logits' norm: less is rounding (0.02 in bfloat16), one position further is more
SEEN = 1e-4  # of the logits' norm: more is another document that was seen, as masked ones are multiplied with 0
Trial = Callable[[dict[str, Tensor]], Tensor]  # inputs (1, T) -> logits (1, T, V), float32


def names_positions(causal_lm: Any) -> bool:
    """Tell whether a model has an argument `position_ids`."""
    forwards = (causal_lm.forward, causal_lm.base_model.forward)
    return all("position_ids" in inspect.signature(forward).parameters for forward in forwards)


def moved_by_padding(trial: Trial, causal_lm: Any) -> float:
    """Say how far left padding moves logits, as a share of their norm, where `position_ids` count without it."""
    alone = document_of(causal_lm)
    mask = F.pad(torch.ones_like(alone), (PADDING, 0))
    padded = {"input_ids": F.pad(alone, (PADDING, 0)), "attention_mask": mask}
    padded["position_ids"] = positions_without_padding(mask)
    logits = trial({"input_ids": alone, "attention_mask": torch.ones_like(alone)})
    return float((trial(padded)[:, PADDING:] - logits).norm() / logits.norm())


def documents_stay_apart(trial: Trial, causal_lm: Any) -> bool:
    """Tell whether logits do not change with what stands before a document in its row."""
    document = document_of(causal_lm)
    places = torch.arange(TOKENS, device=document.device)[None]
    alone = trial({"input_ids": document, "position_ids": places})

    def behind(other: Tensor) -> Tensor:
        row = torch.cat([other, document], dim=1)
        return trial({"input_ids": row, "position_ids": torch.cat([places, places], dim=1)})[:, TOKENS:]

    first, second = behind(document_of(causal_lm, 2)), behind(document_of(causal_lm, 1 + TOKENS))
    norm = alone.norm()
    return bool((first - alone).norm() < MOVED * norm and (second - first).norm() < SEEN * norm)


def longest_row(config: Any) -> float:
    """Say how many tokens a row may have whose places within it count, whatever `position_ids` say.

    The trial's documents are too short to show it.
    """
    if getattr(config, "attn_temperature_tuning", False):  # Llama 4 sharpens attention from this place in the row on
        return config.floor_scale - 1
    if config.model_type == "gpt_neo":  # its mask is a buffer
        return config.max_position_embeddings
    return math.inf


def document_of(causal_lm: Any, first: int = 1) -> Tensor:
    """Return a few tokens (1, T) of a model's vocabulary, on its device."""
    embedding = causal_lm.get_input_embeddings().weight
    return (torch.arange(first, first + TOKENS, device=embedding.device) % embedding.shape[0])[None]


def packing_pays(config: Any, packed: torch.Size, padded: torch.Size) -> bool:
    """Tell whether a model computes one row of N tokens (1, N) in less than padded rows (B, T).

    FlashAttention and flex attention compute each document's own pairs of tokens; others all pairs of a row, the masked
    ones too. A pair takes 4 D operations, and a token about 24 D² in the layers' products.
    """
    if any(name in str(config._attn_implementation) for name in ("flash", "flex")):
        return True

    def operations(rows: int, width: int) -> int:
        return rows * width * (6 * config.hidden_size + width)

    return operations(*packed) < operations(*padded)
