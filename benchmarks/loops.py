"""Training loops on models built from config with random weights: as others write them, ours, and what both need.

The peers are written from the papers' descriptions, the fair plain way: means over label tokens only (published code
averages its KL over prompt and padding, too), reference forwards without gradients, no key-value cache, one forward
for each thing that is needed, one backward over the sum of the terms, whose weights are 1. Each comes in two forms:
`loop` takes the softmaxes of its KL over all tokens and then masks, as loops are written; `loop_selected` selects the
label tokens first, which nobody does and which is a little faster. Goals are set against whichever is faster.

* `mismatch`, the method of arXiv 2310.10683: gradient ascent on the forget answers (eq. 2), cross-entropy on random
  answers to the forget prompts (eq. 3), KL(reference || model) on the retain set (eq. 5); the reference is a second
  full model. The answers are those of retain examples; the paper allows several a prompt, here it is one.
* `grad_diff`, GradDiff with a KL retain term as unlearning frameworks write it; the reference is a deep copy.

The reference of 8-bit models stays in training mode as the policy does: bitsandbytes computes something else in
evaluation mode, and then the KL of a model with itself is not 0. There is no dropout anywhere (`ff.load` removes it).
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastforget as ff
from benchmarks.harness import NotMeasured, Step
from benchmarks.peers import floor
from benchmarks.problem import IGNORE_INDEX, Inputs, Setting
from fastforget.models import base_dtype, disable_dropout, lora_config
from fastforget.quiet import quiet_bitsandbytes

PAD = 1  # OPT's
SIDES = ("forget", "retain")
Batches = Mapping[str, Mapping[str, Tensor]]  # both sides, and "mismatch": forget prompts with retain answers
Backward = Callable[[Batches], Tensor]  # adds gradients; returns the whole loss, detached


def opt(width: int, layers: int, heads: int = 8, vocabulary: int = 50272) -> dict[str, Any]:
    """Make an OPT's config; transformers' own init_std leaves attention too uniform for an adapter to do anything."""
    common = {"hidden_size": width, "num_hidden_layers": layers, "num_attention_heads": heads, "vocab_size": vocabulary}
    own = {"ffn_dim": 4 * width, "word_embed_proj_dim": width, "max_position_embeddings": 512, "init_std": 0.05}
    return {"model_type": "opt", **common, **own}


def llama(
    width: int, layers: int, ffn: int, heads: int = 8, vocabulary: int = 128256, kv: int = 8, tied: bool = False
) -> dict[str, Any]:
    """Make a Llama's config."""
    common = {"hidden_size": width, "num_hidden_layers": layers, "num_attention_heads": heads, "vocab_size": vocabulary}
    own = {"intermediate_size": ffn, "num_key_value_heads": min(heads, kv), "tie_word_embeddings": tied}
    return {"model_type": "llama", **common, **own}


SHAPES = {
    "small": opt(512, 6),
    "small-llama": llama(512, 6, 1408, vocabulary=49152, kv=4),
    "opt-1.3b": opt(2048, 24, heads=32),
    "tiny": opt(64, 2, heads=4, vocabulary=320),
    "tiny-llama": llama(64, 2, 128, heads=4, vocabulary=320, kv=2),
    "deep": llama(512, 24, 2048, vocabulary=16384),
    "wide": llama(256, 2, 1024, heads=4),
    "tiny-wide": llama(64, 2, 128, heads=4, vocabulary=600),
    "smollm2-135m": llama(576, 30, 1536, heads=9, vocabulary=49152, kv=3, tied=True),
    "llama-3.2-1b": llama(2048, 16, 8192, heads=32, tied=True),
    "llama-3.1-8b": llama(4096, 32, 14336, heads=32),
    "qwen2.5-7b": llama(3584, 28, 18944, heads=28, vocabulary=152064, kv=4) | {"model_type": "qwen2"},
}
LARGE = ("opt-1.3b", "smollm2-135m", "llama-3.2-1b", "llama-3.1-8b", "qwen2.5-7b")  # a float64 copy would be a burden
QUANTISED = (8, 4)


@dataclass(frozen=True)
class StepSetting:
    """One row of the benchmark. ragged: every second sequence is shorter, with padding."""

    method: str = "grad_diff"
    shape: str = "small"
    bits: int = 32
    device: str = "cpu"
    sequences: int = 8  # of each side
    length: int = 128
    labelled: float = 0.4  # share of the tokens
    rank: int = 8
    targets: str = "all-linear"  # of LoRA
    batches: int = 2  # an epoch
    ragged: bool = False
    seed: int = 0

    @property
    def name(self) -> str:
        """Name the row as it is printed."""
        size = SHAPES[self.shape]
        model = f"{self.shape} (D {size['hidden_size']}, {size['num_hidden_layers']} layers, V {size['vocab_size']})"
        batch = f"{self.sequences}+{self.sequences} sequences of {self.length}, {100 * self.labelled:.0f} % labelled"
        return f"{self.method}: {model}, {self.bits} bit, {batch}, {self.device}"


def load_policy(setting: StepSetting) -> Any:
    """Build a base with random weights and its LoRA adapter in training mode, the layers PEFT's and bitsandbytes' own.

    Time and memory do not depend on what it has learned. Layers are made without memory and filled, and quantised, one
    by one on the device: of a large model nothing else is ever there.
    """
    import peft
    import transformers

    device, config = torch.device(setting.device), transformers.AutoConfig.for_model(**SHAPES[setting.shape])
    dtype = base_dtype(setting.bits, device)
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype)
    generator = torch.Generator(device).manual_seed(setting.seed)
    std = config.init_std if config.model_type == "opt" else config.initializer_range
    for name, module in list(model.named_modules()):
        if next(module.buffers(recurse=False), None) is not None:  # a rotary embedding, which computes them
            model.set_submodule(name, type(module)(config).to(device))
            continue
        module.to_empty(device=device, recurse=False)
        for kind, parameter in module.named_parameters(recurse=False):
            if parameter.dim() > 1:
                parameter.data.normal_(std=std, generator=generator)
            else:
                parameter.data.fill_(kind == "weight")  # of a norm; biases are 0
        if setting.bits in QUANTISED and type(module) is nn.Linear and module is not model.get_output_embeddings():
            model.set_submodule(name, quantised(module, setting.bits, dtype))
    model.tie_weights()
    disable_dropout(model)
    model.is_loaded_in_8bit, model.is_loaded_in_4bit = setting.bits == 8, setting.bits == 4  # so PEFT knows its layers
    lora = {"r": setting.rank, "target_modules": setting.targets}
    torch.manual_seed(setting.seed)  # PEFT draws A
    return peft.get_peft_model(model.requires_grad_(False), lora_config(lora)).train()


def quantised(layer: nn.Linear, bits: int, dtype: torch.dtype) -> nn.Module:
    """Quantise a linear layer where it lies, as `fastforget.load` does."""
    quiet_bitsandbytes()
    from bitsandbytes import functional
    from bitsandbytes.nn import modules

    made: Any
    shape, weight = (layer.in_features, layer.out_features, layer.bias is not None), layer.weight.data
    if bits == 8:
        made = modules.Linear8bitLt(*shape, has_fp16_weights=False, threshold=0.0, device="meta")
        codes, scale, _ = functional.int8_vectorwise_quant(weight.half())
        made.weight = modules.Int8Params(codes, requires_grad=False, has_fp16_weights=False, CB=codes, SCB=scale)
    else:
        made = modules.Linear4bit(*shape, dtype, compress_statistics=True, quant_type="nf4", device="meta")
        packed, state = functional.quantize_4bit(weight, compress_statistics=True, quant_type="nf4")
        options: Any = {"quant_state": state, "quant_type": "nf4", "bnb_quantized": True, "module": made}
        made.weight, made.quant_state = modules.Params4bit(packed, requires_grad=False, **options), state
    made.bias = layer.bias
    return made


def shared_copy(model: Any) -> Any:
    """Copy a model's modules, but not its weights: what is done to the layers of one leaves the other alone."""
    states = [
        module.state for module in model.modules() if type(getattr(module, "state", None)).__name__ == "MatmulLtState"
    ]
    shared = [*model.parameters(), *model.buffers(), *states]
    return copy.deepcopy(model, {id(each): each for each in shared})


def compile_layers(model: Any) -> None:
    """Compile the decoder layers; NotMeasured where this version cannot."""
    try:
        from fastforget.compiling import compile_layers
    except ImportError:
        raise NotMeasured("this version does not compile layers") from None
    compile_layers(model)


def perturb(model: Any, seed: int, std: float) -> None:
    """Draw LoRA's B anew: at its start, 0, the adapter does nothing."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and "lora_B" in name:
            drawn = torch.randn(parameter.shape, generator=generator) * std
            parameter.data.copy_(drawn.to(parameter.dtype))


def epoch(setting: StepSetting) -> list[Batches]:
    """Draw the batches of an epoch, on the CPU, as a loader gives them: prompts without labels, answers with them."""
    generator = torch.Generator().manual_seed(setting.seed)
    size = (setting.sequences, setting.length)
    prompt = setting.length - round(setting.length * setting.labelled)
    lengths = [setting.length - (row % 2) * (setting.length - prompt) // 2 * setting.ragged for row in range(size[0])]
    found: list[Batches] = []
    for _ in range(setting.batches):
        vocabulary = SHAPES[setting.shape]["vocab_size"]
        forget, retain = (torch.randint(5, vocabulary, size, generator=generator) for _ in SIDES)
        chosen = torch.randperm(setting.sequences, generator=generator)
        ids = {"forget": forget, "retain": retain}
        ids["mismatch"] = torch.cat([forget[:, :prompt], retain[chosen, prompt:]], dim=1)
        found.append({name: batch_of(drawn, prompt, lengths) for name, drawn in ids.items()})
    return found


def batch_of(ids: Tensor, prompt: int, lengths: Sequence[int]) -> dict[str, Tensor]:
    """Make input_ids, attention_mask and labels (B, T), as transformers takes them; padding on the right."""
    present = torch.arange(ids.shape[1])[None] < torch.tensor(lengths)[:, None]
    labels = ids.masked_fill(~present, IGNORE_INDEX)
    labels[:, :prompt] = IGNORE_INDEX
    return {"input_ids": ids.masked_fill(~present, PAD), "attention_mask": present.long(), "labels": labels}


def materialised(model: Any, reference: Any, *, mismatch: bool, select: bool) -> Backward:
    """Make both peers: full logits of every sequence, and a reference with weights of its own."""
    device = next(model.parameters()).device

    def logits_of(which: Any, batch: Mapping[str, Tensor]) -> Tensor:
        logits: Tensor = which(**without_labels(batch, device), use_cache=False).logits
        return logits.to(torch.promote_types(logits.dtype, torch.float32))

    def cross_entropy(batch: Mapping[str, Tensor]) -> Tensor:
        return F.cross_entropy(logits_of(model, batch).flatten(0, 1), next_labels(batch).to(device).flatten())

    def log_probabilities(which: Any, batch: Mapping[str, Tensor], kept: Tensor) -> Tensor:
        logits = logits_of(which, batch)
        return torch.log_softmax(logits[kept] if select else logits, dim=-1)

    def backward(batches: Batches) -> Tensor:
        retain = batches["retain"]
        loss = -cross_entropy(batches["forget"])
        if mismatch:
            loss = loss + cross_entropy(batches["mismatch"])
        kept = (next_labels(retain) != IGNORE_INDEX).to(device)
        with torch.no_grad():
            log_q = log_probabilities(reference, retain, kept)
        log_p = log_probabilities(model, retain, kept)
        divergence = F.kl_div(log_p, log_q, reduction="none", log_target=True).sum(dim=-1)
        loss = loss + (divergence if select else divergence[kept]).mean()
        loss.backward()
        return loss.detach()

    return backward


def bare(model: Any, mismatch: bool, products: Sequence[Step] = ()) -> Backward:
    """Make what a loop with frozen head and cached reference cannot leave out: the backbone's forwards and backwards,
    and the bare products with the head, if any are given. Its gradients are those of nothing."""
    device = next(model.parameters()).device

    def backward(batches: Batches) -> Tensor:
        for side in ("forget", "retain", "mismatch")[: 2 + mismatch]:
            inputs = without_labels(batches[side], device)
            states = model.get_base_model().base_model(**inputs, use_cache=False).last_hidden_state
            states.backward(torch.ones_like(states))
        for product in products:
            product()
        return torch.zeros(())

    return backward


def ours(step: ff.UnlearnStep, *, cached: bool, micro_batch: int | None = None) -> Backward:
    """Make `UnlearnStep`'s. cached: later epochs; otherwise what the reference said is forgotten before each step."""

    def backward(batches: Batches) -> Tensor:
        reference = step.loss.reference
        if not cached and reference is not None:
            reference.clear()
        other = batches["mismatch"]  # also in place of a refusal, for those that look at one
        sides = ({**batches[side], "refusal": other, "mismatch": other} for side in SIDES)
        return step.backward(*sides, micro_batch=micro_batch).loss

    return backward


def next_labels(batch: Mapping[str, Tensor]) -> Tensor:
    """(B, T): the label that each token predicts."""
    return F.pad(batch["labels"][:, 1:], (0, 1), value=IGNORE_INDEX)


def without_labels(batch: Mapping[str, Tensor], device: torch.device) -> dict[str, Tensor]:
    """Return what the model takes, on the device."""
    return {name: value.to(device, non_blocking=True) for name, value in batch.items() if name != "labels"}


def products_of(setting: StepSetting, model: Any) -> list[Step]:
    """Make two products for each batch with a cross-entropy, three for the KL: policy, reference, gradient."""
    shape, found = SHAPES[setting.shape], []
    count = setting.sequences * round(setting.length * setting.labelled)
    dtype = str(model.get_output_embeddings().weight.dtype).removeprefix("torch.")
    for loss in ("nll", "kl", "nll")[: 2 + (setting.method == "mismatch")]:
        given = Setting(loss, count, shape["hidden_size"], shape["vocab_size"], dtype=dtype, device=setting.device)
        # the reference's embedding is cached in later epochs
        found.append(floor(Inputs(given), "together" if setting.device == "cpu" else "unchunked", known=True))
    return found
