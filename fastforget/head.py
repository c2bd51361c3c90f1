"""LMHead: how hidden states become logits, read off any Hugging Face causal LM."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from fastforget.errors import FastforgetError
from fastforget.shards import is_shard, local, whole
from fastforget.vocabulary import VocabularyShard


class LMHead:
    """The output head, `z = scale * h @ weight.T + bias`, then `softcap * tanh(z / softcap)` where there is a softcap.

    Args:
        weight: (V, D), floating point; the tensor itself is kept, so that a head that trains is seen to train.
            `None` makes the identity head: its "hidden states" are logits that a model has already produced.
        bias: (V,) or None.
        scale: the factor on `h @ weight.T` (Cohere's `logit_scale`, one over Granite's `logits_scaling`).
        softcap: the cap (Gemma 2: 30), or None.
        shard: where the rows of weight and bias lie in a vocabulary that several processes share, which all must make
            their heads at once.

    Raises:
        FastforgetError: shapes that do not fit or are empty, a quantised weight, a scale that is not finite, a softcap
            that is not positive and finite, or shards that are not one vocabulary.
    """

    def __init__(
        self,
        weight: Tensor | None,
        bias: Tensor | None = None,
        scale: float = 1.0,
        softcap: float | None = None,
        shard: VocabularyShard | None = None,
    ) -> None:
        if weight is not None:
            if not isinstance(weight, Tensor) or weight.dim() != 2:
                given = tuple(weight.shape) if isinstance(weight, Tensor) else f"a {type(weight).__name__}"
                raise FastforgetError(f"the head's weight must be a tensor (V, D), not {given}")
            if not weight.is_floating_point() or weight.element_size() < 2:
                raise FastforgetError(
                    f"the head's weight is {weight.dtype}: a quantised head cannot be read; leave it out of the "
                    "quantisation (llm_int8_skip_modules=['lm_head']; fastforget.load does)"
                )
            if not weight.numel():
                raise FastforgetError(f"the head's weight is {tuple(weight.shape)}: V and D must be at least 1")
            if bias is not None and not (
                isinstance(bias, Tensor) and bias.is_floating_point() and bias.shape == weight.shape[:1]
            ):
                kind = f"{bias.dtype} {tuple(bias.shape)}" if isinstance(bias, Tensor) else f"a {type(bias).__name__}"
                raise FastforgetError(f"the head's bias must be floating point ({weight.shape[0]},), not {kind}")
            if shard is not None:
                shard.check(len(weight), weight.device)
        elif bias is not None or scale != 1.0 or softcap is not None or shard is not None:
            raise FastforgetError("an identity head (weight=None) takes no bias, scale, softcap or shard")
        if softcap is not None and not 0 < softcap < math.inf:
            raise FastforgetError(f"softcap must be positive and finite, or None, not {softcap}")
        if not math.isfinite(scale):
            raise FastforgetError(f"scale must be finite, not {scale}")
        self.weight: Any = weight  # None where the head is the identity
        self.bias = bias
        self.scale = float(scale)
        self.softcap = None if softcap is None else float(softcap)
        self.shard = shard

    @property
    def is_identity(self) -> bool:
        """True where the hidden states are already logits."""
        return self.weight is None

    @property
    def trainable(self) -> bool:
        """True where the weight or the bias wants a gradient."""
        return any(tensor is not None and tensor.requires_grad for tensor in (self.weight, self.bias))

    @property
    def vocabulary(self) -> int:
        """The number of tokens, those of other processes included."""
        return len(self.weight) if self.shard is None else self.shard.vocabulary

    def own_labels(self, labels: Tensor) -> Tensor:
        """Labels (n,) as numbers of the weight's rows; one past the last for those of other processes, -1 for none."""
        return labels if self.shard is None else self.shard.own_labels(labels, len(self.weight))

    @property
    def own_tokens(self) -> slice:
        """The tokens whose rows this process holds."""
        return slice(None) if self.shard is None else slice(self.shard.first, self.shard.first + len(self.weight))

    def check_whole(self, what: str) -> None:
        """Raise where other processes hold rows of the weight, without which there is no such thing."""
        if self.shard is not None:
            raise FastforgetError(
                f"{what}: the head's vocabulary is sharded over processes, and this needs all of it in each; gather "
                "the weight first, or use the statistics and divergences that a sharded head has"
            )

    def check_frozen_shard(self) -> None:
        """Raise for a part of a head that trains, for which there is no gradient."""
        if self.trainable:
            raise FastforgetError(
                "the head trains, and its vocabulary is sharded over processes, which has no gradient for it: freeze "
                "it (requires_grad_(False))"
            )

    def logits(self, hidden: Tensor) -> Tensor:
        """All logits (..., V) of hidden (..., D), differentiable, in float32 (float64 for float64 states).

        Raises:
            FastforgetError: other processes hold rows of the weight.
        """
        self.check_whole("logits")
        return self.own_logits(hidden)

    def own_logits(self, hidden: Tensor) -> Tensor:
        """As `logits`, of the tokens whose rows this process holds."""
        dtype = torch.promote_types(hidden.dtype, torch.float32)
        logits = hidden.to(dtype)
        if self.weight is not None:
            logits = (logits @ self.weight.to(dtype).T) * self.scale
        if self.bias is not None:
            logits = logits + self.bias.to(dtype)
        if self.softcap is not None:
            logits = torch.tanh(logits / self.softcap) * self.softcap
        return logits

    def to(self, dtype: torch.dtype) -> LMHead:
        """A copy in another dtype (the oracle is a head in float64)."""
        weight = None if self.weight is None else self.weight.to(dtype)
        bias = None if self.bias is None else self.bias.to(dtype)
        return LMHead(weight, bias, self.scale, self.softcap, self.shard)

    def is_frozen_copy_of(self, other: LMHead) -> bool:
        """Whether both have the same weight, and this one does not train; all processes with shards must ask."""
        if self.trainable or self.weight.shape != other.weight.shape:
            return False
        weight = whole(self.weight)
        return torch.equal(weight, whole(other.weight).to(weight))

    def own_part(self) -> LMHead:
        """A copy with this process's rows alone, where tensor parallelism shards the weight over the vocabulary.

        Raises:
            FastforgetError: it is sharded otherwise, or trains.
        """
        if self.weight is None or not is_shard(self.weight):
            return self
        self.check_frozen_shard()
        mesh, placements = self.weight.device_mesh, self.weight.placements
        if mesh.ndim != 1 or not placements[0].is_shard(0):
            raise FastforgetError(
                f"the head's weight is placed as {placements}: it must be whole in each process, or sharded over the "
                "vocabulary (dimension 0) in a mesh of one dimension"
            )
        rows, size = len(self.weight), mesh.size()
        shard = VocabularyShard(min(rows, mesh.get_local_rank() * -(-rows // size)), rows, mesh.get_group())
        bias = None if self.bias is None else local(self.bias)
        return LMHead(local(self.weight), bias, self.scale, self.softcap, shard)

    def gathered(self) -> LMHead:
        """A copy with the weight and bias whole, where each process holds a shard of them; all of them must call it."""
        bias = None if self.bias is None else whole(self.bias)
        return LMHead(whole(self.weight), bias, self.scale, self.softcap)

    @classmethod
    def from_model(cls, model: Any) -> LMHead:
        """Read weight, bias, scale and softcap off a causal LM (wrapped by PEFT or not).

        What is read is checked against the model's own logits on the first batch (see `fastforget.step`), because a
        config tells how logits are scaled only by convention.

        Raises:
            FastforgetError: no output embeddings, a quantised head, an adapter on the head, or prompt tuning.
        """
        causal_lm = base_causal_lm(model)
        embeddings = causal_lm.get_output_embeddings() if hasattr(causal_lm, "get_output_embeddings") else None
        if embeddings is None:
            raise FastforgetError(f"{type(causal_lm).__name__} has no output embeddings: a causal LM is needed")
        refuse_adapter_on_head(model, embeddings)
        scale, softcap = read_scale_and_softcap(causal_lm.config)
        bias = getattr(embeddings, "bias", None)
        if bias is not None and scale != 1.0:
            bias = bias * scale  # models scale what the head puts out, its bias included
        return cls(embeddings.weight, bias, scale, softcap)


def wrapped_module(model: nn.Module) -> nn.Module | None:
    """The module one level down in a wrapper of torch's (compiled, several devices); None where there is none."""
    if isinstance(model, DistributedDataParallel | nn.DataParallel):
        return model.module
    return model._modules.get("_orig_mod")  # of torch.compile's wrapper, whose class takes seconds to import


def unwrapped(model: Any) -> Any:
    """The model inside torch's wrappers: a PeftModel, or the transformers model itself."""
    inner = wrapped_module(model)
    return model if inner is None else unwrapped(inner)


def is_compiled(model: nn.Module) -> bool:
    """Whether torch.compile took the model, a wrapper of it, or what is inside."""
    inner = wrapped_module(model)
    compiled = "_orig_mod" in model._modules or model._compiled_call_impl is not None
    return compiled or (inner is not None and is_compiled(inner))


def base_causal_lm(model: Any) -> Any:
    """The transformers model inside torch's and PEFT's wrappers, adapters still injected."""
    model = unwrapped(model)
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def context_length(model: Any) -> int | None:
    """Return how many positions a transformers model has; None where its configuration does not say."""
    return getattr(model.config.get_text_config(), "max_position_embeddings", None)


def refuse_adapter_on_head(model: nn.Module, embeddings: nn.Module) -> None:
    """Raise where the head is not one frozen or trainable matrix, so that nothing wrong is computed instead."""
    for config in getattr(model, "peft_config", {}).values():
        if config.is_prompt_learning:
            raise FastforgetError("prompt tuning is not supported: its virtual tokens shift every label; use LoRA")
    wrapped = type(embeddings).__module__.startswith("peft.")
    if wrapped:
        raise FastforgetError(
            "there is an adapter on the output head: its logits are not those of one matrix, and its reference is not "
            "the frozen head; leave the head out of target_modules and modules_to_save"
        )


def read_scale_and_softcap(config: Any) -> tuple[float, float | None]:
    """The scale and softcap that a transformers config names, under the names that models give them."""
    config = config.get_text_config() if hasattr(config, "get_text_config") else config

    def value(*names: str) -> float | None:
        values = (getattr(config, name, None) for name in names)
        return next((float(number) for number in values if isinstance(number, int | float) and number), None)

    softcap = value("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")
    multiplier = value("logit_scale", "lm_head_multiplier")  # Cohere, MPT; Falcon-H1
    divisor = value("logits_scaling")  # Granite divides by it; HyperCLOVA X multiplies
    if multiplier is None and divisor is not None:
        multiplier = divisor if config.model_type == "hyperclovax" else 1.0 / divisor
    return (1.0 if multiplier is None else multiplier), softcap
