"""State on a disk: nested values and tensors in one safetensors file that knows its own digest.

The tensors are the file's; the values around them are JSON in its metadata, and so is a digest of both. No pickle.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from fastforget.errors import BrokenFileError, FastforgetError

VALUES, DIGEST = "values", "digest"
PLAIN = (bool, int, float, str, type(None))


def write_state(path: Path, state: Any) -> None:
    """Write nested lists, tuples, dicts, bytes, numbers and tensors into a file.

    Raises:
        FastforgetError: a value of another type.
        OSError, SafetensorError: the file cannot be written.
    """
    tensors: dict[str, Tensor] = {}
    values = json.dumps(pack(state, tensors))
    save_file(tensors, path, metadata={VALUES: values, DIGEST: digest_of(values, tensors)})


def read_state(path: Path) -> Any:
    """Read what `write_state` wrote, tensors on the CPU.

    Raises:
        BrokenFileError: there is no such file, or it is not, bit for bit, as it was written.
    """
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name).clone() for name in file.keys()}
        values = metadata[VALUES]
        if metadata[DIGEST] != digest_of(values, tensors):
            raise ValueError("its content and its digest differ")
        return unpack(json.loads(values), tensors)
    except (OSError, SafetensorError, KeyError, ValueError, TypeError, RuntimeError, RecursionError) as error:
        raise BrokenFileError(f"{path} is broken ({str(error).splitlines()[0] if str(error) else error!r})") from None


def digest_of(values: str, tensors: Mapping[str, Tensor]) -> str:
    """Return a digest of packed values, and of tensors with their names, dtypes and shapes."""
    digest = hashlib.sha256(values.encode())
    for name in sorted(tensors):
        update(digest, name, tensors[name])
    return digest.hexdigest()


def update(digest: Any, name: str, tensor: Tensor) -> None:
    """Add a named tensor to a digest, wherever it lies."""
    digest.update(f"{name}{tensor.dtype}{tuple(tensor.shape)}".encode())
    digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())


def pack(value: Any, tensors: dict[str, Tensor]) -> Any:
    """Return a value as JSON has it, with its tensors put into `tensors`; whatever JSON lacks is a dict of one key."""
    if isinstance(value, PLAIN):
        return value
    if isinstance(value, Tensor):
        name = str(len(tensors))
        tensors[name] = value.detach().to("cpu", copy=True).contiguous()
        return {"tensor": name}
    if isinstance(value, bytes):
        return {"bytes": value.hex()}
    if isinstance(value, list):
        return [pack(each, tensors) for each in value]
    if isinstance(value, tuple):
        return {"tuple": [pack(each, tensors) for each in value]}
    if isinstance(value, Mapping):
        return {"dict": [[pack(key, tensors), pack(each, tensors)] for key, each in value.items()]}
    raise FastforgetError(f"state holds a {type(value).__name__}, which cannot be saved: {value!r}")


def unpack(value: Any, tensors: Mapping[str, Tensor]) -> Any:
    """Return what `pack` took."""
    if isinstance(value, list):
        return [unpack(each, tensors) for each in value]
    if not isinstance(value, dict):
        return value
    ((kind, content),) = value.items()
    if kind == "tensor":
        return tensors[content]
    if kind == "bytes":
        return bytes.fromhex(content)
    if kind == "tuple":
        return tuple(unpack(each, tensors) for each in content)
    return {unpack(key, tensors): unpack(each, tensors) for key, each in content}
