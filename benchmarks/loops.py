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

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import fastforget as ff
from benchmarks.harness import Record, Step
from benchmarks.peers import floor
from benchmarks.problem import IGNORE_INDEX, Inputs, Setting

PAD = 1  # OPT's
SIDES = ("forget", "retain")
Batches = Mapping[str, Mapping[str, Tensor]]  # both sides, and "mismatch": forget prompts with retain answers
Backward = Callable[[Batches], Tensor]  # adds gradients; returns the whole loss, detached


def opt(width: int, layers: int, heads: int = 8, vocabulary: int = 50272) -> dict[str, Any]:
    """Make an OPT's config; transformers' own init_std leaves attention too uniform for an adapter to do anything."""
    common = {"hidden_size": width, "num_hidden_layers": layers, "num_attention_heads": heads, "vocab_size": vocabulary}
    own = {"ffn_dim": 4 * width, "word_embed_proj_dim": width, "max_position_embeddings": 512, "init_std": 0.05}
    return {"model_type": "opt", **common, **own}


def llama(width: int, layers: int, ffn: int, heads: int = 8, vocabulary: int = 128256) -> dict[str, Any]:
    """Make a Llama's config."""
    common = {"hidden_size": width, "num_hidden_layers": layers, "num_attention_heads": heads, "vocab_size": vocabulary}
    own = {"intermediate_size": ffn, "num_key_value_heads": min(heads, 8), "tie_word_embeddings": False}
    return {"model_type": "llama", **common, **own}


SHAPES = {
    "small": opt(512, 6),
    "opt-1.3b": opt(2048, 24, heads=32),
    "tiny": opt(64, 2, heads=4, vocabulary=320),
    "deep": llama(512, 24, 2048, vocabulary=16384),
    "wide": llama(256, 2, 1024, heads=4),
    "tiny-wide": llama(64, 2, 128, heads=4, vocabulary=600),
    "llama-3.1-8b": llama(4096, 32, 14336, heads=32),
}
LARGE = ("opt-1.3b", "llama-3.1-8b")  # of which a float64 copy is a burden


@dataclass(frozen=True)
class StepSetting:
    """One row of the benchmark. ragged: every second sequence is shorter, with padding. folder: the base's."""

    method: str = "grad_diff"
    shape: str = "small"
    bits: int = 32
    device: str = "cpu"
    sequences: int = 8  # of each side
    length: int = 128
    labelled: float = 0.4  # share of the tokens
    rank: int = 8
    batches: int = 2  # an epoch
    ragged: bool = False
    seed: int = 0
    folder: str = ""

    @property
    def name(self) -> str:
        """Name the row as it is printed."""
        size = SHAPES[self.shape]
        model = f"{self.shape} (D {size['hidden_size']}, {size['num_hidden_layers']} layers, V {size['vocab_size']})"
        batch = f"{self.sequences}+{self.sequences} sequences of {self.length}, {100 * self.labelled:.0f} % labelled"
        return f"{self.method}: {model}, {self.bits} bit, {batch}, {self.device}"


def make_base(given: Mapping[str, Any]) -> Record:
    """Save a model with random weights: time and memory do not depend on what it has learned; a task."""
    import transformers

    setting = StepSetting(**given)
    torch.manual_seed(setting.seed)
    # large ones are made and saved in 16 bit, on the device, where random numbers take seconds instead of minutes
    large = setting.shape in LARGE
    config = transformers.AutoConfig.for_model(**SHAPES[setting.shape])
    with torch.device(setting.device if large else "cpu"):
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16 if large else torch.float32)
    model.save_pretrained(setting.folder)
    return {}


def load_policy(setting: StepSetting) -> Any:
    """Load the base with its LoRA adapter, in training mode; all of it is touched, so that none is read in later.

    Its layers are PEFT's and bitsandbytes' own, for every contestant: what fusing them brings is benchmarks.linear's.
    """
    model = ff.load(setting.folder, bits=setting.bits, lora={"r": setting.rank}, device=setting.device, fuse=False)
    for parameter in model.train().parameters():
        parameter.detach().sum()
    return model


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


def ours(step: ff.UnlearnStep, *, cached: bool) -> Backward:
    """Make `UnlearnStep`'s. cached: later epochs; otherwise what the reference said is forgotten before each step."""

    def backward(batches: Batches) -> Tensor:
        reference = step.loss.reference
        if not cached and reference is not None:
            reference.clear()
        other = batches["mismatch"]  # also in place of a refusal, for those that look at one
        return step.backward(*({**batches[side], "refusal": other, "mismatch": other} for side in SIDES)).loss

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
