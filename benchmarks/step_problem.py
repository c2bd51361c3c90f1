"""What the step's benchmark trains: models built from config with random weights, and batches of random tokens.

No weight is downloaded: time and memory do not depend on what a model has learned. The base is saved once, and every
process loads it as a user would, with `ff.load`.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import fastforget as ff

IGNORE_INDEX = -100
INIT_STD = 0.05  # transformers' 0.02 leaves attention so uniform that an adapter on it changes nothing
ADAPTER_STD = 0.2  # of LoRA's B when losses are compared: at its initial 0 the KL and most gradients are 0
PAD = 1  # OPT's


@dataclass(frozen=True)
class Shape:
    """A model's size."""

    kind: str  # "opt" or "llama"
    hidden: int
    layers: int
    heads: int
    ffn: int
    vocabulary: int
    kv_heads: int | None = None


SHAPES = {
    "small": Shape("opt", 512, 6, 8, 2048, 50272),
    "opt-1.3b": Shape("opt", 2048, 24, 32, 8192, 50272),
    "llama-3.1-8b": Shape("llama", 4096, 32, 32, 14336, 128256, kv_heads=8),
    "tiny": Shape("opt", 64, 2, 4, 128, 320),
}
FLOAT64_SHAPES = ("small", "tiny")  # those of which a float64 copy is no burden


@dataclass(frozen=True)
class StepSetting:
    """One row of the benchmark."""

    shape: str = "small"
    bits: int = 32
    device: str = "cpu"
    sequences: int = 8  # of each side
    length: int = 128
    labelled: float = 0.4  # share of the tokens
    rank: int = 8
    batches: int = 2  # an epoch
    ragged: bool = False  # every second sequence is shorter, with padding
    seed: int = 0

    @property
    def name(self) -> str:
        """As it is printed."""
        size = SHAPES[self.shape]
        model = f"{size.kind} {self.shape} (D {size.hidden}, {size.layers} layers, V {size.vocabulary})"
        batch = f"{self.sequences}+{self.sequences} sequences of {self.length}, {100 * self.labelled:.0f} % labelled"
        return f"{model}, {self.bits} bit, {batch}, {self.device}"


@dataclass(frozen=True)
class Batches:
    """What one step gets. `mismatch`: forget prompts with answers of the retain set."""

    forget: dict[str, Tensor]
    retain: dict[str, Tensor]
    mismatch: dict[str, Tensor]


def build_base(setting: StepSetting, folder: Path) -> None:
    """Save a model with random weights."""
    import transformers

    shape = SHAPES[setting.shape]
    common: dict[str, Any] = {"vocab_size": shape.vocabulary, "hidden_size": shape.hidden}
    common |= {"num_hidden_layers": shape.layers, "num_attention_heads": shape.heads}
    config: Any
    if shape.kind == "opt":
        config = transformers.OPTConfig(
            **common,
            ffn_dim=shape.ffn,
            word_embed_proj_dim=shape.hidden,
            max_position_embeddings=max(256, setting.length),
            init_std=INIT_STD,
        )
    else:
        config = transformers.LlamaConfig(
            **common,
            intermediate_size=shape.ffn,
            num_key_value_heads=shape.kv_heads,
            max_position_embeddings=max(256, setting.length),
            rope_parameters={"rope_type": "default", "rope_theta": 500000.0},
            initializer_range=0.02,
            tie_word_embeddings=False,
        )
    torch.manual_seed(setting.seed)
    # large ones are made and saved in 16 bit, on the device, where random numbers take seconds instead of minutes
    large = setting.shape not in FLOAT64_SHAPES
    with torch.device(setting.device if large else "cpu"):
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16 if large else torch.float32)
    model.save_pretrained(folder)


def load_policy(setting: StepSetting, folder: Path, *, perturbed: bool = False) -> Any:
    """The base with its LoRA adapter, in training mode; all of it touched, so that none is read in from disk later."""
    model = ff.load(folder, bits=setting.bits, lora={"r": setting.rank}, device=setting.device)
    model.train()
    for parameter in model.parameters():
        parameter.detach().sum()
    if perturbed:
        perturb(model, setting.seed)
    return model


def perturb(model: Any, seed: int) -> None:
    """Move the adapter away from its start, where it does nothing."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and "lora_B" in name:
            drawn = torch.randn(parameter.shape, generator=generator) * ADAPTER_STD
            parameter.data.copy_(drawn.to(parameter.dtype))


def epoch(setting: StepSetting) -> list[Batches]:
    """The batches of an epoch, on the CPU, as a loader gives them."""
    generator = torch.Generator().manual_seed(setting.seed)
    return [draw(setting, generator) for _ in range(setting.batches)]


def draw(setting: StepSetting, generator: torch.Generator) -> Batches:
    """Prompts without labels and answers with them. An answer of the mismatch batch is that of a retain example."""
    size = (setting.sequences, setting.length)
    prompt = setting.length - round(setting.length * setting.labelled)
    vocabulary = SHAPES[setting.shape].vocabulary
    forget, retain = (torch.randint(5, vocabulary, size, generator=generator) for _ in range(2))
    chosen = torch.randperm(setting.sequences, generator=generator)
    mismatch = torch.cat([forget[:, :prompt], retain[chosen, prompt:]], dim=1)
    lengths = [setting.length - (row % 2) * (setting.length - prompt) // 2 * setting.ragged for row in range(size[0])]
    return Batches(*(batch_of(ids, prompt, lengths) for ids in (forget, retain, mismatch)))


def batch_of(ids: Tensor, prompt: int, lengths: list[int]) -> dict[str, Tensor]:
    """input_ids, attention_mask and labels (B, T), as transformers takes them; padding on the right."""
    present = torch.arange(ids.shape[1])[None] < torch.tensor(lengths)[:, None]
    labels = ids.masked_fill(~present, IGNORE_INDEX)
    labels[:, :prompt] = IGNORE_INDEX
    return {"input_ids": ids.masked_fill(~present, PAD), "attention_mask": present.long(), "labels": labels}
