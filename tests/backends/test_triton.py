"""What the Triton kernels do in one launch, and what their 16-bit rows cost near the reference.

The passes by themselves are tested in `kernels/test_tile_kernels.py`.
"""

import pytest
import torch
from kernel_device import device_of, needs_triton
from oracle import realistic

import fastforget as ff
from fastforget.stats import DIVERGENCES

pytestmark = needs_triton


@pytest.mark.parametrize("centre_count", [0, 1, 16, 33])
@pytest.mark.parametrize("metric", ["l2", "cosine"])
@pytest.mark.parametrize("outputs", [("logp",), ("logp", "entropy")])
def test_states_and_labels_in_one_pass_are_what_they_are_apart(centre_count, metric, outputs):
    """One launch for both, or two where moments are asked for as well: the same values and gradients."""
    hidden, weight, labels = realistic(rows=9, width=24, vocabulary=131)
    labels[4] = -100
    anchor = hidden + 0.1
    centres = torch.randn(centre_count, 24, generator=torch.Generator().manual_seed(1)) if centre_count else None
    results = []
    for backend in ("triton", "eager"):
        device = device_of(backend)
        leaf = hidden.to(device).clone().requires_grad_()
        stats = ff.token_stats(
            leaf,
            ff.LMHead(weight.to(device)),
            labels.to(device),
            outputs=outputs,
            anchor=anchor,
            centres=centres,
            metric=metric,
            margin=5.0,
            backend=backend,
        )
        fields = [stats.logp, stats.distance, *([] if centres is None else [stats.pull])]
        loss = sum((index + 1) * field.sum() for index, field in enumerate(fields))
        results.append([value.cpu() for value in (*fields, torch.autograd.grad(loss, leaf)[0])])
    for ours, theirs in zip(*results, strict=True):
        assert torch.allclose(ours, theirs, rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize(
    ("rows", "vocabulary", "noise"),
    [(6, 1009, 1e-3), *(pytest.param(32, 5003, noise, marks=pytest.mark.slow) for noise in (1e-3, 1e-2))],
)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", DIVERGENCES)
def test_divergence_near_the_reference_in_16_bit(dtype, noise, kind, rows, vocabulary):
    """At p = q + little, where every LoRA run begins: error <= 1.5 x eager's, both rounded to the operands' dtype."""
    generator = torch.Generator().manual_seed(5)
    weight = (torch.randn(vocabulary, 48, generator=generator) / 48**0.5).to(dtype)
    ref_hidden = (2 * torch.randn(rows, 48, generator=generator)).to(dtype)
    hidden = (ref_hidden.float() + noise * torch.randn(rows, 48, generator=generator)).to(dtype)
    truth = divergence_gradient(hidden.double(), ref_hidden.double(), weight.double(), kind, "eager")
    eager = divergence_gradient(hidden.float(), ref_hidden.float(), weight.float(), kind, "eager")
    ours = divergence_gradient(hidden, ref_hidden, weight, kind, "triton")
    rounded = eager.to(dtype).double()
    error, theirs = ((result.double() - truth).square().mean().sqrt() for result in (ours, rounded))
    assert error <= 1.5 * theirs, (float(error), float(theirs))


def divergence_gradient(hidden, ref_hidden, weight, kind, backend):
    hidden, ref_hidden, weight = (each.to(device_of(backend)) for each in (hidden, ref_hidden, weight))
    leaf = hidden.clone().requires_grad_()
    value = ff.divergence(leaf, ref_hidden, ff.LMHead(weight), kind, backend=backend)
    return torch.autograd.grad(value.sum(), leaf)[0].cpu()
