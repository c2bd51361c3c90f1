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
NAMES = {  # structures of the C++ passes, whose members are a table's names in its order
    "LabelAccumulators": protocol.LABEL_ACCUMULATORS,
    "PairedAccumulators": protocol.PAIRED_ACCUMULATORS,
    "CoupledNormalisers": protocol.COUPLED_NORMALISERS,
    "CoupledAccumulators": protocol.COUPLED_ACCUMULATORS,
    "GradientCoefficients": protocol.GRADIENT_COEFFICIENTS,
}


@pytest.mark.parametrize("name", ("BASIC_ACCUMULATORS", *CONSTANTS))
def test_constants_of_c_plus_plus(name):
    text = (ROOT / "csrc" / "passes.cpp").read_text(encoding="utf-8")
    found = re.search(rf"constexpr \w+ {name} = ([\d.]+)", text)
    assert found is not None and float(found.group(1)) == getattr(protocol, name)


@pytest.mark.skipif(WHY_NOT is not None, reason="no Triton")
@pytest.mark.parametrize("name", CONSTANTS)
def test_constants_of_triton(name):
    from fastforget_kernels import arithmetic

    assert getattr(arithmetic, name).value == getattr(protocol, name)


@pytest.mark.parametrize("structure", NAMES)
def test_names_of_c_plus_plus(structure):
    text = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "csrc").glob("*_tile.h"))
    [members] = re.findall(rf"^struct {structure} {{\n((?:    (?:double|float) .*;\n)*)", text, re.MULTILINE)
    assert tuple(re.findall(r"(\w+)(?: = -?[\w.]+)?[,;]", members)) == NAMES[structure]


def test_every_statistic_is_a_field_with_a_formula():
    named = {field.name for field in dataclasses.fields(ff.TokenStats)} - {"distance", "pull"}
    assert named == set(fields.NAMES)
    accumulators = torch.ones(len(protocol.LABEL_ACCUMULATORS), 2)
    basic = fields.label_fields(accumulators, torch.zeros(2, dtype=torch.long), fields.NAMES, 5)
    for statistic in protocol.FIELDS:
        made = {"tiles": fields.TILE_STATISTICS, "embedding": ("expected_embedding", "others_embedding")}
        assert statistic.name in made.get(statistic.needs, basic), statistic.name
