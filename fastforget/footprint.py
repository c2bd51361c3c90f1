"""What a step keeps in memory, counted by running its passes on a model without weights.

The model is built from its config on torch's meta device, where tensors have shapes and no values. Its forward and
backward passes run there with the code that a job runs (transformers' layers, PEFT's adapter, `linear.py`'s products),
while a dispatch mode adds up the storages that are alive: what autograd keeps is counted, not derived from formulas.
Two things stand in for the real ones. Fused attention, which the meta device does not have, keeps query, key, value,
output and logsumexp; whether a CPU has one for these heads, torch is asked. And the sweep over the head, whose passes
are compiled, allocates the buffers that `tiling.py` gives it.
"""

from __future__ import annotations

import contextlib
import copy
import functools
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor

from fastforget import fusing, linear
from fastforget.backbone import Backbone
from fastforget.backends import tiling
from fastforget.backends.gradients import NEEDS_SWEEP
from fastforget.errors import FastforgetError
from fastforget.frozen_weight import FrozenWeight, tile_rows
from fastforget.head import LMHead
from fastforget.live_bytes import (
    NF4_BLOCK,
    LiveBytes,
    attention_mask,
    attention_on,
    features,
    keep_input,
    quantisable,
    quantised_bytes,
    refused_on_values,
)
from fastforget.loss_plan import ForwardPlan, StreamPlan
from fastforget.memory import checkpoint_layers
from fastforget.models import disable_dropout, lora_config, one_line
from fastforget.objectives import Field
from fastforget.reference import EMBEDDING, ReferenceRequest
from fastforget.reference_modes import reference_mode


@dataclass(frozen=True)
class BatchSize:
    """What goes through the model at once: rows of `length` tokens, `labelled` of all of them with a label.

    padded: whether attention takes a mask.
    """

    rows: int
    length: int
    labelled: int
    padded: bool


class PassBytes(NamedTuple):
    """Bytes of one pass, forward and backward, beyond what was there before it.

    Attributes:
        activations: what lives when its forward has ended.
        head: what the sweep over the head adds at most: its tile, gradients over hidden states, the reference's states.
        working: what else the highest moment adds, in the backward pass or in the reference's forward.
        compiled: an estimate of the activations of compiled layers: what products wrote, and each layer's input twice.
    """

    activations: int
    head: int
    working: int
    compiled: int

    @property
    def peak(self) -> int:
        """The highest moment of the pass."""
        return self.activations + self.head + self.working


def drawn(rand: Callable[..., Tensor], *size: Any, **options: Any) -> Tensor:
    """In place of `torch.rand`: a single number has a value, so that code can branch on it; it is at the upper end."""
    return torch.ones([], device="cpu") if size in (([],), ((),)) else rand(*size, **options)


@dataclass
class Skeleton:
    """A causal LM without weights, with its adapter.

    Args:
        config: transformers' config of the model.
        dtype: of activations, and of weights that are not quantised.
        lora: as in `fastforget.load`.
        device: what the job would run on, of which only the type counts.
        fused: whether the adapted layers run fused, else as PEFT's own.

    Raises:
        FastforgetError: a model that cannot be built from its config, or a LoRA configuration that does not fit it.
    """

    config: Any
    dtype: torch.dtype
    lora: dict[str, Any]
    device: torch.device
    fused: bool = True
    model: Any = field(init=False)
    _shallow: list[Skeleton] | None = None

    def __post_init__(self) -> None:
        import peft
        import transformers

        self._ready = self._checkpointed = False
        self._attention = attention_on(self.device)
        try:
            with torch.device("meta"):
                causal_lm = transformers.AutoModelForCausalLM.from_config(self.config, dtype=self.dtype)
                disable_dropout(causal_lm)
                self.quantisable = quantisable(causal_lm)
                self.model = peft.get_peft_model(causal_lm.requires_grad_(False), lora_config(self.lora))
        except (ValueError, RuntimeError, KeyError, AttributeError) as error:
            raise FastforgetError(f"the model cannot be built from its config: {one_line(error)}") from error
        for parameter in self.adapter:  # as they are after the first pass; they count as gradients
            parameter.grad = torch.empty_like(parameter)
        self.model.train()
        self.backbone = Backbone(self.model)
        self.backbone.checked = True  # there are no values to compare

    @contextlib.contextmanager
    def running(self, padded: bool) -> Iterator[None]:
        """What is computed in the block has shapes only."""
        from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
        from transformers.modeling_attn_mask_utils import AttentionMaskConverter

        def may_be_causal(*_: Any, **__: Any) -> bool:
            return not padded

        with contextlib.ExitStack() as stack:
            stack.enter_context(torch.device("meta"))
            stack.enter_context(mock.patch.object(F, "scaled_dot_product_attention", self._attention))
            # autocast, for which torch cannot be asked of this device
            stack.enter_context(mock.patch.object(linear, "product_dtype", lambda x: x.dtype))
            stack.enter_context(mock.patch.object(linear, "without_autocast", lambda x: contextlib.nullcontext()))
            stack.enter_context(mock.patch.object(torch, "is_autocast_enabled", lambda *_: False))
            own = functools.partial(attention_mask, padded=padded)
            stack.enter_context(mock.patch.dict(ALL_MASK_ATTENTION_FUNCTIONS._local_mapping, sdpa=own))
            # the way of OPT in transformers 5.0, which looks at the mask's values, and draws whether a layer is dropped
            stack.enter_context(mock.patch.object(AttentionMaskConverter, "_ignore_causal_mask_sdpa", may_be_causal))
            stack.enter_context(mock.patch.object(torch, "rand", functools.partial(drawn, torch.rand)))
            yield

    @property
    def adapter(self) -> list[Tensor]:
        """The parameters that train."""
        return [parameter for parameter in self.model.parameters() if parameter.requires_grad]

    @property
    def adapter_bytes(self) -> int:
        """Bytes of the parameters that train, float32."""
        return sum(parameter.nbytes for parameter in self.adapter)

    def shallow(self) -> list[Skeleton]:
        """Two models of its first layers, from which a deep one's bytes follow; itself where its layers do not repeat.

        Not of one layer alone: the lowest needs no gradient of its input, and so takes less than others.
        """
        if self._shallow is None:
            self._shallow = [self]
            stack = self.backbone.stack()
            kinds = getattr(self.text_config, "layer_types", None) or [""] * len(stack)
            made = [
                (kind, *(each.shape for each in layer.parameters())) for kind, layer in zip(kinds, stack, strict=True)
            ]
            period = next(size for size in range(1, len(made) + 1) if made == (made[:size] * len(made))[: len(made)])
            if len(made) > 4 * period:
                depths = (2 * period, 3 * period)
                self._shallow = [replace(self, config=self.first_layers(depth), _shallow=None) for depth in depths]
        return self._shallow

    def first_layers(self, count: int) -> Any:
        """Return the config of a model of so many layers."""
        config = copy.deepcopy(self.config)
        text = config.get_text_config()
        text.num_hidden_layers = count
        if getattr(text, "layer_types", None):
            text.layer_types = text.layer_types[:count]
        return config

    @property
    def text_config(self) -> Any:
        """The part of the config that is the language model's."""
        return self.config.get_text_config()

    def base_bytes(self, bits: int) -> int:
        """Count the bytes of the frozen base, with what `fastforget.load` does not quantise, and its buffers."""
        frozen = {id(each): each for each in self.model.parameters() if not each.requires_grad}
        total = sum(each.nbytes for each in (*frozen.values(), *self.model.buffers()))
        if bits in (4, 8):
            total += sum(quantised_bytes(layer, bits) - layer.weight.nbytes for layer in self.quantisable)
        return total

    def cast_bytes(self, bits: int) -> int:
        """Count the bytes of the buffer that quantised layers are cast into; on a CPU 4 bit takes a second one."""
        if bits not in (4, 8):
            return 0
        sizes = []
        for layer in self.quantisable:
            out_features, in_features = features(layer)
            weight = FrozenWeight(layer.weight, "int8", out_features, in_features, block=NF4_BLOCK * (bits == 4))
            sizes.append(tile_rows(weight, self.dtype) * in_features * self.dtype.itemsize)
        return max(sizes, default=0) * (2 if bits == 4 and self.device.type == "cpu" else 1)

    def make_ready(self) -> None:
        """Let the adapted layers run fused, and take note of a head that cannot be read; once."""
        if self._ready:
            return
        self._ready = True
        if self.fused:
            fusing.fuse(self.model)
        with self.running(padded=False), torch.no_grad():
            final = self.backbone.states(self.inputs(BatchSize(1, 2, 1, False)), self.positions(1))[None]
        if final.shape[-1] != self.backbone.head.weight.shape[1]:
            self.backbone.head = LMHead(None)

    def inputs(self, batch: BatchSize) -> dict[str, Tensor]:
        """Ids and mask of a batch."""
        ids = torch.zeros(batch.rows, batch.length, dtype=torch.int64)
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}

    def positions(self, labelled: int) -> tuple[Tensor, Tensor]:
        """Row and column of each kept token."""
        return torch.zeros(labelled, dtype=torch.int64), torch.zeros(labelled, dtype=torch.int64)

    def set_checkpointing(self, on: bool) -> None:
        """Switch gradient checkpointing of the decoder layers."""
        causal_lm = self.model.get_base_model()
        if on == self._checkpointed:
            return
        self._checkpointed = on
        if on:
            checkpoint_layers(causal_lm)
        else:  # its older name, as there
            disable = getattr(causal_lm, "activation_checkpointing_disable", None)
            (disable or causal_lm.gradient_checkpointing_disable)()
            causal_lm.disable_input_require_grads()

    def counting(self) -> LiveBytes:
        """Return what counts the storages made from here on."""
        tensors = [*self.model.parameters(), *self.model.buffers()]
        return LiveBytes([*tensors, *(each.grad for each in tensors if each.grad is not None)])

    def pass_bytes(self, forward: ForwardPlan, batch: BatchSize, checkpointing: bool) -> PassBytes:
        """Count one forward and its backward pass in the first epoch, when the reference runs too.

        Raises:
            FastforgetError: a model whose forward looks at values, which are not there.
        """
        self.make_ready()
        self.set_checkpointing(checkpointing)
        with refused_on_values(self.model), self.running(batch.padded), self.counting() as memory:
            inputs, positions = self.inputs(batch), self.positions(batch.labelled)
            with memory.noting_saved():
                states = self.backbone.states(inputs, positions, forward.layers)
            activations = memory.live
            layers = self.text_config.num_hidden_layers
            width = self.model.get_input_embeddings().weight.shape[1]
            compiled = memory.saved_products() + 2 * layers * batch.rows * batch.length * width * self.dtype.itemsize
            streams = list(forward.streams.values())
            known = not self.backbone.head.is_identity and self.backbone.head.softcap is None
            asked = [stream.reference_requests(known) for stream in streams]
            if any(asked):
                with reference_mode(self.model):
                    self.backbone.states(inputs, positions, forward.layers)
            before = memory.peak
            memory.peak = memory.live
            kept = [
                self.sweep(stream, requests, states, batch.labelled // len(streams))
                for stream, requests in zip(streams, asked, strict=True)
            ]
            head = memory.peak - activations
            memory.peak = max(before, memory.peak)
            torch.autograd.backward(list(states.values()), [torch.empty_like(state) for state in states.values()])
            del kept
        return PassBytes(activations, head, memory.peak - activations - head, compiled)

    def sweep(
        self, stream: StreamPlan, asked: Collection[ReferenceRequest], states: dict[int | None, Tensor], count: int
    ) -> list[Tensor]:
        """Allocate what the sweeps of a stream of `count` tokens take; returns what is kept for its backward pass."""
        head = self.backbone.head
        width = next(iter(states.values())).shape[-1]
        names = {request.name for request in asked if isinstance(request, Field)}
        if names:  # the reference's own sweep
            self.tile(count, 1, width)
        scalars = [each for each in asked if isinstance(each, Field) and each != EMBEDDING]
        said = [
            torch.empty(len(scalars), count),
            torch.empty(len(asked) - len(scalars), count, width, dtype=self.dtype),
        ]
        kept = []
        if stream.fields:
            tile = self.tile(count, 1, width)
            if stream.learns:
                kept.append(torch.empty(count, width, dtype=torch.float32))
                if NEEDS_SWEEP & set(stream.fields):
                    kept.append(torch.empty(count, width, dtype=torch.float32))
            del tile
        for _ in stream.divergences:
            tile = self.tile(count, 2, width)
            kept.append(torch.empty(count, width, dtype=torch.float32))
            if EMBEDDING not in asked and not head.is_identity:
                tile.append(torch.empty(tile[0].shape[0], width, dtype=torch.float32))
            del tile
        del said
        return kept

    def tile(self, count: int, buffers: int, width: int) -> list[Tensor]:
        """The buffers of a tile; and where a CPU casts a 16-bit head, its states and two parts of the weight: the next
        one is made before the last one goes."""
        head, itemsize = self.backbone.head, buffers * torch.float32.itemsize
        if head.is_identity:
            shape = tiling.whole_rows(count, width, self.device, itemsize)
            return [torch.empty(shape.rows, shape.columns) for _ in range(buffers)]
        casts = self.device.type == "cpu" and head.weight.dtype != torch.float32
        vocabulary = head.weight.shape[0]
        shape = tiling.tile_shape(count, vocabulary, self.device, itemsize, width if casts else 0)
        found = [torch.empty(shape.rows, tiling.aligned(shape.columns)) for _ in range(buffers)]
        if casts:
            found += [torch.empty(shape.rows, width) for _ in range(buffers)]
            found += [torch.empty(shape.columns, width) for _ in range(2 if shape.columns < vocabulary else 1)]
        return found

    def usual_bytes(self, batch: BatchSize, bits: int) -> tuple[int, int, int]:
        """Count the loop that people write: (activations, logits, working memory); before the layers are fused.

        GradDiff with a KL to a copy of the model, all logits of both sides in float32, one backward pass over the sum
        (`benchmarks/loops.py`). bitsandbytes' 8-bit layers keep their inputs.
        """
        causal_lm = self.model.get_base_model()
        logits = 0
        with contextlib.ExitStack() as stack:
            stack.enter_context(refused_on_values(self.model))
            stack.enter_context(self.running(batch.padded))
            if bits == 8:
                for layer in self.quantisable:
                    stack.enter_context(mock.patch.object(layer, "forward", functools.partial(keep_input, layer)))
            memory = stack.enter_context(self.counting())

            def log_probabilities() -> Tensor:
                nonlocal logits
                states = causal_lm.base_model(**self.inputs(batch), use_cache=False).last_hidden_state
                before = memory.live
                found = causal_lm.get_output_embeddings()(states).float().log_softmax(dim=-1)
                logits += memory.live - before
                return found

            labels = torch.zeros(batch.rows * batch.length, dtype=torch.int64)
            loss = -F.nll_loss(log_probabilities().flatten(0, 1), labels)
            with torch.no_grad():
                reference = log_probabilities()
            divergence = F.kl_div(log_probabilities(), reference, reduction="none", log_target=True).sum(dim=-1)
            loss = loss + divergence.mean()
            activations = memory.live
            loss.backward()
        return activations - logits, logits, memory.peak - activations


def at_depth(skeleton: Skeleton, count: Callable[[Skeleton], Sequence[int]]) -> list[int]:
    """Numbers of bytes, counted on a skeleton, or on two shallow ones and extrapolated to its depth."""
    shallow = skeleton.shallow()
    found = [count(each) for each in shallow]
    if len(found) == 1:
        return list(found[0])
    depths = [each.text_config.num_hidden_layers for each in (*shallow, skeleton)]
    steps = (depths[2] - depths[0]) / (depths[1] - depths[0])
    return [round(one + steps * (two - one)) for one, two in zip(*found, strict=True)]
