"""Nested values and tensors in one file: they come back as they were, or there is an error."""

import math

import pytest
import torch
from helpers import adapter_of, load_perturbed

import fastforget as ff
from fastforget.errors import BrokenFileError
from fastforget.state_file import read_state, write_state

STATE = {
    0: {"step": torch.tensor(3.0), "moment": torch.randn(3, 4).bfloat16(), "codes": torch.arange(7, dtype=torch.uint8)},
    "tuple": (1, (2.5, None, True)),
    b"key": [torch.empty(0, 2), "text ä", -0.0, math.inf],
    "transposed": torch.arange(6).reshape(2, 3).T,
    "nothing": {},
}


def equal(one, other):
    if isinstance(one, torch.Tensor):
        return one.dtype == other.dtype and one.shape == other.shape and torch.equal(one, other)
    if isinstance(one, dict):
        return list(one) == list(other) and all(equal(value, other[key]) for key, value in one.items())
    if isinstance(one, list | tuple):
        return type(one) is type(other) and len(one) == len(other) and all(map(equal, one, other))
    return repr(one) == repr(other)


def test_state_comes_back(tmp_path):
    write_state(tmp_path / "file", STATE)
    assert equal(read_state(tmp_path / "file"), STATE)
    with pytest.raises(ff.FastforgetError, match="state holds a object"):
        write_state(tmp_path / "other", [object()])


def test_no_flipped_bit_goes_unseen(tmp_path):
    path = tmp_path / "file"
    write_state(path, STATE)
    content = path.read_bytes()
    for place in range(len(content)):
        changed = bytearray(content)
        changed[place] ^= 1 << place % 8
        path.write_bytes(changed)
        try:
            found = read_state(path)
        except BrokenFileError as error:
            assert "\n" not in str(error)
        else:
            assert equal(found, STATE), place  # white space of the header
    for length in (0, 1, 8, 100, len(content) - 1):
        path.write_bytes(content[:length])
        with pytest.raises(BrokenFileError, match="is broken"):
            read_state(path)
    with pytest.raises(BrokenFileError):
        read_state(tmp_path / "nothing")


@pytest.mark.parametrize("name", ["SGD", "AdamW", "Adagrad", "AdamW8bit", "Lion8bit"])
def test_any_optimizer_continues_identically(tiny, batch, tmp_path, name):
    """Of torch and of bitsandbytes."""
    import bitsandbytes

    kind = getattr(torch.optim, name, None) or getattr(bitsandbytes.optim, name)
    more = {"momentum": 0.9} if name == "SGD" else {"min_8bit_size": 64} if "8bit" in name else {}

    def steps(seeds, model, state=None):
        step = ff.UnlearnStep(model, kind, terms="pdu", lr=1e-3, **more)
        if state is not None:
            step.load_state_dict(state)
        for seed in seeds:
            step(batch(2, seed), batch(2, seed + 10))
        return step

    whole, first = load_perturbed(tiny["llama"]), load_perturbed(tiny["llama"])
    steps(range(4), whole)
    write_state(tmp_path / "file", steps(range(2), first).state_dict())
    steps(range(2, 4), first, read_state(tmp_path / "file"))
    assert all(torch.equal(value, adapter_of(first)[name]) for name, value in adapter_of(whole).items())
