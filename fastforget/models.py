"""Loading a causal LM: a frozen base in 8, 4, 16 or 32 bits, and a LoRA adapter on it."""

from __future__ import annotations

import contextlib
import os
import warnings
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fastforget import fusing
from fastforget.adapters import ADAPTER_NAME, check_linear
from fastforget.compiling import compile_layers
from fastforget.errors import FastforgetError
from fastforget.files import check_regular
from fastforget.hub import hub_or_cache
from fastforget.memory import checkpoint_layers
from fastforget.quiet import quiet_bitsandbytes, quiet_peft

BITS = (4, 8, 16, 32)
LORA_DEFAULTS = {
    "r": 32,
    "lora_dropout": 0.0,
    "bias": "none",
    "task_type": "CAUSAL_LM",
    "target_modules": "all-linear",
}


def load(
    name_or_path: str | os.PathLike[str],
    *,
    bits: int = 8,
    lora: Mapping[str, Any] | None = None,
    device: str | torch.device | None = None,
    adapter: str | os.PathLike[str] | None = None,
    allow_missing_weights: bool = False,
    fuse: bool = True,
    compile: bool = False,
    checkpointing: bool = False,
) -> Any:
    """Load a PeftModel: the frozen base in 8, 4, 16 or 32 bits, and a LoRA adapter that trains.

    Args:
        name_or_path: a local folder or a hub name; a folder that holds a PEFT adapter is loaded on its own base, kept
            frozen, and ours is stacked onto it; `save_adapter` joins both, so that the bare base carries the result.
        bits: 8 (bitsandbytes LLM.int8 without outlier columns), 4 (bitsandbytes NF4), 16 (bfloat16, or float16 on GPUs
            without it), or 32.
        lora: arguments of `peft.LoraConfig`; default r = 32, alpha = 2 r, and `target_modules="all-linear"`: with less,
            the default preset does not get all of a text out of the demo's model (docs/demo.md).
        device: default the first GPU, else the CPU.
        adapter: load this saved adapter (to go on training) instead of a new one.
        allow_missing_weights: warn, instead of raising, where the checkpoint lacks weights of the model, which are then
            random numbers, or has others.
        fuse: run the adapted and the quantised layers fused (`fastforget.fuse`).
        compile: compile the decoder layers (`fastforget.compile_layers`).
        checkpointing: let decoder layers keep only their inputs for the backward pass, which computes the rest again:
            a third more time, and much less memory.

    Raises:
        FastforgetError: an unknown number of bits, a device that is not there, a model or adapter that cannot be loaded
            (no safetensors, code of its own: neither is run), one on the head, or a checkpoint whose weights are not
            those of the model.
    """
    quiet_bitsandbytes()  # which comes with peft
    import peft

    if bits not in BITS:
        raise FastforgetError(f"bits must be one of {', '.join(map(str, BITS))}, not {bits}")
    device = usable_device(device)
    base_path, stacked = str(name_or_path), None
    for folder in (name_or_path, adapter or name_or_path):
        check_regular(Path(folder))
    if is_adapter(name_or_path):
        with readable_errors(f"the adapter {name_or_path}"), hub_or_cache(name_or_path):
            stacked = peft.PeftConfig.from_pretrained(str(name_or_path))
        base_path = stacked.base_model_name_or_path
    if stacked is not None and adapter is not None:
        raise FastforgetError(
            f"{name_or_path} is itself an adapter, and training of a saved adapter on top of one cannot be resumed: "
            "merge it into its base first"
        )
    if stacked is not None:  # or it would be found out when both are to be saved as one
        check_linear(str(name_or_path), stacked, "unlearned in an adapter on top of it (merge it into its base first)")
        check_linear(ADAPTER_NAME, lora_config(lora), "stacked onto another")
    model = load_base(base_path, bits, device, allow_missing_weights)
    if adapter is not None:
        with readable_errors(f"the adapter {adapter}"), hub_or_cache(adapter), quiet_peft():
            model = peft.PeftModel.from_pretrained(model, str(adapter), is_trainable=True)
    elif stacked is not None:
        with readable_errors(f"the adapter {name_or_path}"), quiet_peft():
            model = peft.PeftModel.from_pretrained(model, str(name_or_path), is_trainable=False)
            model.add_adapter(ADAPTER_NAME, lora_config(lora))
            model.base_model.set_adapter(["default", ADAPTER_NAME])
            for name, parameter in model.named_parameters():
                parameter.requires_grad_(f".{ADAPTER_NAME}." in name)
    else:
        with readable_errors("the LoRA configuration"), quiet_peft():
            model = peft.get_peft_model(model, lora_config(lora))
    if fuse:
        fusing.fuse(model)
    if checkpointing:
        checkpoint_layers(model)
    if compile:
        compile_layers(model)
    return model


def is_adapter(folder: str | os.PathLike[str]) -> bool:
    """Tell whether a folder holds a PEFT adapter."""
    return os.path.isfile(Path(folder) / "adapter_config.json")


def has_tokenizer(folder: str | os.PathLike[str]) -> bool:
    """Tell whether a folder holds a tokenizer; a name that is too long for a file is none."""
    return os.path.isfile(Path(folder) / "tokenizer_config.json")


def base_of(name_or_path: str | os.PathLike[str]) -> str:
    """Return the name of the model that an adapter was trained on; of a whole model, its own."""
    if not is_adapter(name_or_path):
        return str(name_or_path)
    quiet_bitsandbytes()  # which comes with peft
    import peft

    with readable_errors(f"the adapter {name_or_path}"):
        return str(peft.PeftConfig.from_pretrained(str(name_or_path)).base_model_name_or_path)


def usable_device(device: str | torch.device | None) -> torch.device:
    """Return the device named, or the first GPU, else the CPU; raise FastforgetError where it cannot be used."""
    try:
        chosen = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        torch.zeros(1, device=chosen).item()
    except (RuntimeError, AssertionError, TypeError) as error:  # an AssertionError where torch was built without CUDA
        raise FastforgetError(f"device {str(device)!r} cannot be used: {one_line(error)}") from error
    return chosen


def lora_config(lora: Mapping[str, Any] | None) -> Any:
    """Make a peft.LoraConfig from the user's arguments over our defaults."""
    import peft

    options = {**LORA_DEFAULTS, **(lora or {})}
    options.setdefault("lora_alpha", 2 * options["r"])
    try:
        return peft.LoraConfig(**options)
    except (TypeError, ValueError) as error:
        raise FastforgetError(f"the LoRA configuration is not valid: {one_line(error)}") from error


def load_base(name_or_path: str, bits: int, device: torch.device, allow_missing_weights: bool = False) -> nn.Module:
    """Load the frozen base model in evaluation mode, nothing of it trainable; raise and warn as `load` does."""
    import transformers

    options: dict[str, Any] = {"dtype": base_dtype(bits, device), "device_map": {"": device}}
    if bits in (4, 8):
        # threshold 0: outlier columns are chosen over the whole batch, so with them a batch-mate would move other rows
        options["quantization_config"] = transformers.BitsAndBytesConfig(
            load_in_8bit=bits == 8,
            load_in_4bit=bits == 4,
            llm_int8_threshold=0.0,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=options["dtype"],
        )
    quiet_bitsandbytes()
    check_regular(Path(name_or_path))
    with readable_errors(f"the model {name_or_path}"), hub_or_cache(name_or_path):
        # weights of another shape are let through here, and named below with the others
        model, info = transformers.AutoModelForCausalLM.from_pretrained(
            name_or_path,
            output_loading_info=True,
            ignore_mismatched_sizes=True,
            trust_remote_code=False,  # without it transformers asks on standard input
            use_safetensors=True,  # the other format is pickle
            **options,
        )
    check_weights(name_or_path, model, info, allow_missing_weights)
    disable_dropout(model)
    # not prepare_model_for_kbit_training: it casts embeddings and head to float32 (2 GB more for an 8B model)
    return model.requires_grad_(False)


def check_weights(name_or_path: str, model: nn.Module, info: Mapping[str, Any], allow_missing: bool) -> None:
    """Raise (or, where that is allowed, warn) unless a checkpoint held the model's weights and no others.

    Args:
        info: what transformers says of its loading; tied weights and buffers that a model computes are not in it.
    """
    reshaped = [
        f"{name} {tuple(stored)} instead of {tuple(wanted)}" for name, stored, wanted in info["mismatched_keys"]
    ]
    packed = unusable(model)
    faults = (
        ("missing, and would be random numbers", info["missing_keys"]),
        ("of another shape, and would be random numbers", reshaped),
        ("of another shape than its quantised layer", [name for name in packed if name not in info["missing_keys"]]),
        ("no weights of this model", sorted(set(info["unexpected_keys"]) - computed_buffers(model))),
    )
    misfits = [
        f"{len(names)} {'is' if len(names) == 1 else 'are'} {what}: {few(names)}" for what, names in faults if names
    ]
    if not misfits:
        return
    message = f"the weights of {name_or_path} do not fit its config.json: {'; '.join(misfits)}"
    with_bits = " and --bits 32 or 16, as quantised layers cannot hold random numbers" if packed else ""
    if packed or not allow_missing:
        raise FastforgetError(
            f"{message}. Get the whole checkpoint of this architecture, or allow it with --allow-missing-weights "
            f"(allow_missing_weights=True){with_bits}"
        )
    warnings.warn(message, stacklevel=4)


def computed_buffers(model: nn.Module) -> set[str]:
    """Return the names that old checkpoints give buffers which the model computes itself, with its prefix and without.

    OpenAI's GPT-2 has its causal masks among the weights (`h.0.attn.bias`), which transformers 5.0 calls unexpected.
    """
    names = {name for name, _ in model.named_buffers()} - set(model.state_dict())
    prefix = f"{getattr(model, 'base_model_prefix', '')}."
    return names | {name.removeprefix(prefix) for name in names}


def unusable(model: nn.Module) -> list[str]:
    """List the weights of quantised layers that were never quantised (they were missing) or have another shape.

    Of the shapes of those transformers says nothing.
    """
    unquantised = []
    for name, module in model.named_modules():
        if not isinstance(module, nn.Linear) or not type(module).__module__.startswith("bitsandbytes"):
            continue
        weight: Any = module.weight
        state = getattr(weight, "quant_state", None)  # 4 bit: the weight itself is packed
        shape = tuple(weight.shape if state is None else state.shape)
        wanted = (module.out_features, module.in_features)
        if shape != wanted:
            unquantised.append(f"{name}.weight {shape} instead of {wanted}")
        elif not hasattr(weight, "CB") and state is None:
            unquantised.append(f"{name}.weight")
    return unquantised


def few(names: Collection[str], shown: int = 3) -> str:
    """Join the first names, in order, and how many more there are."""
    first = ", ".join(sorted(names)[:shown])
    return first if len(names) <= shown else f"{first} and {len(names) - shown} more"


def disable_dropout(model: nn.Module) -> None:
    """Switch off dropout in the base: with it the model differs from its own reference before anything was learned.

    In modules, and in attributes that functions look at (OPT's `dropout`, `attention_dropout`, `layerdrop`).
    """
    for module in model.modules():
        if isinstance(module, nn.modules.dropout._DropoutNd):
            module.p = 0.0
        for name, value in vars(module).items():
            if isinstance(value, float) and (name.endswith("dropout") or name in ("layerdrop", "dropout_prob")):
                setattr(module, name, 0.0)


def load_tokenizer(name_or_path: str | os.PathLike[str]) -> Any:
    """Load the model's tokenizer, with a padding token (the end-of-text token where it has none of its own)."""
    import transformers

    path = str(name_or_path)
    check_regular(Path(path))
    if not has_tokenizer(path):
        path = base_of(path)
    with readable_errors(f"the tokenizer of {path}"), hub_or_cache(path):
        tokenizer = transformers.AutoTokenizer.from_pretrained(path, trust_remote_code=False)
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def base_dtype(bits: int, device: torch.device) -> torch.dtype:
    """Choose the dtype of what is not quantised."""
    if bits == 32 or (device.type == "cpu" and bits != 16):
        return torch.float32
    if device.type == "cuda" and not torch.cuda.is_bf16_supported(including_emulation=False):
        return torch.float16
    return torch.bfloat16


@contextlib.contextmanager
def readable_errors(what: str) -> Any:
    """Turn the many errors of loading into one line: a folder may hold anything, and libraries raise anything of it."""
    try:
        yield
    except FastforgetError:
        raise
    except Exception as error:
        raise FastforgetError(f"could not load {what}: {one_line(error)}") from error


def one_line(error: BaseException) -> str:
    """Return the first line of an error's message, with its kind where that says more than the message."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    kind = type(error).__name__
    if not lines:
        return kind
    return lines[0] if isinstance(error, OSError | ValueError | RuntimeError | ImportError) else f"{kind}: {lines[0]}"
