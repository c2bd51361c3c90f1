"""What C++ and Triton repeat of `protocol.py` is what stands there."""

import dataclasses
import re
from pathlib import Path

import pytest
import torch
from kernel_device import WHY_NOT

import fastforget as ff
from fastforget.backends import fields, protocol

ROOT = Path(ff.__file__).parents[1]
CONSTANTS = ("LAZY", "FLOAT16_SCALE", "RECENTRE", "NEAR_SHIFT")
SIZES = {  # rows of the tables: how the C++ passes count them
    "label_tile.h": (len(protocol.LABEL_ACCUMULATORS), protocol.BASIC_ACCUMULATORS),
    "paired_tile.h": (len(protocol.PAIRED_ACCUMULATORS),),
    "coupled_tile.h": (len(protocol.COUPLED_NORMALISERS), len(protocol.COUPLED_ACCUMULATORS)),
    "gradient_tile.h": (len(protocol.GRADIENT_COEFFICIENTS),),
}


@pytest.mark.parametrize("name", CONSTANTS)
def test_constants_of_c_plus_plus(name):
    text = (ROOT / "csrc" / "tile_passes.h").read_text(encoding="utf-8")
    found = re.search(rf"constexpr \w+ {name} = ([\d.]+)", text)
    assert found is not None and float(found.group(1)) == getattr(protocol, name)


@pytest.mark.skipif(WHY_NOT is not None, reason="no Triton")
@pytest.mark.parametrize("name", CONSTANTS)
def test_constants_of_triton(name):
    from fastforget_kernels import arithmetic

    assert getattr(arithmetic, name).value == getattr(protocol, name)


@pytest.mark.parametrize("file", SIZES)
def test_rows_of_c_plus_plus(file):
    text = (ROOT / "csrc" / file).read_text(encoding="utf-8")
    counts = {
        int(number)
        for line in re.findall(r"for \(int k = 0; k < ([^;]*);", text)
        for number in re.findall(r"\d+", line)
    }
    assert counts >= set(SIZES[file]), counts


def test_every_statistic_is_a_field_with_a_formula():
    named = {field.name for field in dataclasses.fields(ff.TokenStats)} - {"distance", "pull"}
    assert named == set(fields.NAMES)
    accumulators = torch.ones(len(protocol.LABEL_ACCUMULATORS), 2)
    basic = fields.label_fields(accumulators, torch.zeros(2, dtype=torch.long), fields.NAMES, 5)
    for statistic in protocol.FIELDS:
        made = {"tiles": fields.TILE_STATISTICS, "embedding": ("expected_embedding", "others_embedding")}
        assert statistic.name in made.get(statistic.needs, basic), statistic.name
