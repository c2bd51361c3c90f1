"""The C++ tile passes by themselves, against the plain torch passes in float64 on the same tiles.

On each instruction set that this machine has (`tile_problems.py`).
"""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_device import needs_native
from tile_problems import (
    PLAIN,
    close,
    coupled_sweep,
    finished,
    gradient_sweep,
    label_sweep,
    paired_sweep,
    problems,
    size,
)

from fastforget.backends import fields
from fastforget.backends.native import NativePasses
from fastforget.backends.native.passes import DTYPES
from fastforget.backends.protocol import (
    COUPLED_ACCUMULATORS,
    FLOAT16_SCALE,
    GRADIENT_COEFFICIENTS,
    LAZY,
    RECENTRE,
)
from fastforget.backends.torch_passes import TorchPasses

pytestmark = needs_native
DRAWS = settings(max_examples=60, deadline=None, derandomize=True)
DTYPES_OF = st.sampled_from(list(DTYPES))


@given(problem=problems(), moments=st.booleans(), dtype=DTYPES_OF, row_dtype=DTYPES_OF | st.none())
@DRAWS
def test_label_tiles(instructions, problem, moments, dtype, row_dtype):
    logits, labels, logit_map, layout, _ = problem
    logits = logits.to(dtype).float()
    found, grad = label_sweep(NativePasses(), logits, labels, logit_map, moments, row_dtype, dtype, **layout)
    truth, _ = label_sweep(TorchPasses(), logits, labels, logit_map, moments, None, torch.float64, **layout)
    whole, _ = finished(logits, logit_map)
    others, slope = finished(logits, logit_map, labels)
    step = 4e-7 * size(whole)
    ours, theirs = (fields.LabelResult.of(each) for each in (found, truth))
    assert close(ours.logp, theirs.logp, step + 4e-7 * theirs.logp.abs())
    assert close(ours.log_not, theirs.log_not, step + 4e-7 * theirs.log_not.abs())
    assert ((found[0] - others.amax(1)).abs() <= LAZY).logical_or(found[0] == others.amax(1)).all()
    if moments:
        names = ("entropy", "logp_var", "others_entropy", "logit_mean", "max_logit")
        ours, theirs = (fields.label_fields(each, labels, names, logits.shape[1]) for each in (found, truth))
        for name in names:
            assert close(ours[name], theirs[name], 4 * step * (size(whole) if name == "logp_var" else 1.0)), name
        best = others.gather(1, found[9].long()[:, None])[:, 0]
        assert close(best, others.amax(1), step)
    if row_dtype is not None:
        scale = FLOAT16_SCALE if row_dtype == torch.float16 else 1.0
        share = torch.where(found[1] == 0, 0.0, 1.0 / found[1])[:, None]
        expected = others.softmax(1).nan_to_num(0.0)
        largest, rounding = expected.amax(1, keepdim=True), torch.finfo(row_dtype).eps
        expected = expected * slope
        smallest = 2.0**-24 / scale * share  # what float16 flushes to
        assert ((grad.double() / scale * share - expected).abs() <= (rounding + step) * largest + smallest).all()


@pytest.mark.parametrize("vocabulary", [1, 2, 509, 5003])
@pytest.mark.parametrize("label_probability", [1e-12, 0.5, 1 - 1e-9])
def test_extreme_probabilities(instructions, vocabulary, label_probability):
    """p_y = 1e-12 and 1 - p_y = 1e-9 keep their digits, in tiles longer than a block of the C++ too."""
    logits = torch.zeros(1, vocabulary)
    if vocabulary > 1:
        logits[0, 1] = math.log(label_probability / (1 - label_probability) * (vocabulary - 1))
    labels, layout = torch.tensor([min(1, vocabulary - 1)]), {"columns": 4096, "exact": True, "in_place": True}
    accumulators, grad = label_sweep(NativePasses(), logits, labels, PLAIN, True, torch.float32, **layout)
    found, truth = fields.LabelResult.of(accumulators), logits.double().log_softmax(1)
    others, _ = finished(logits, PLAIN, labels)
    assert float(found.logp) == pytest.approx(float(truth[0, labels[0]]), rel=1e-6)
    assert float(found.log_not) == pytest.approx(float(others.logsumexp(1) - logits.double().logsumexp(1)), rel=1e-6)
    assert torch.allclose(grad / accumulators[1].clamp(min=1e-30), others.softmax(1).nan_to_num(0.0), rtol=1e-6, atol=0)
    names = ("logp_mean", "others_entropy")
    mean, entropy = fields.label_fields(accumulators, labels, names, vocabulary).values()
    assert float(mean) == pytest.approx(float((truth.exp() * truth).sum()), rel=1e-6, abs=1e-12)
    assert float(entropy) == pytest.approx(math.log(max(vocabulary - 1, 1)), rel=1e-6)


@pytest.mark.parametrize("order", [1, -1])
@pytest.mark.parametrize("row_dtype", list(DTYPES))
def test_tops_that_move_inside_a_long_tile(instructions, order, row_dtype):
    """Rows written before the top moved are brought to it; a far lower block does not spoil the moments."""
    logits = torch.cat([torch.full((1, 2048), at) for at in (-100.0, 0.0, 35.0, 200.0)][::order], 1)
    logits += 0.1 * torch.randn(1, 8192, generator=torch.Generator().manual_seed(0))
    labels, layout = torch.tensor([5000]), {"columns": 8192, "exact": True, "in_place": True}
    accumulators, grad = label_sweep(NativePasses(), logits, labels, PLAIN, True, row_dtype, **layout)
    expected, truth = finished(logits, PLAIN, labels)[0].softmax(1), logits.double().log_softmax(1)
    scale = FLOAT16_SCALE if row_dtype == torch.float16 else 1.0
    error = (grad / scale / accumulators[1] - expected).abs()
    assert (error <= (torch.finfo(row_dtype).eps + 2e-5) * expected + 1e-8).all()
    entropy = fields.label_fields(accumulators, labels, ("entropy",), 8192)["entropy"]
    assert float(entropy) == pytest.approx(float(-(truth.exp() * truth).sum()), rel=1e-6)


@given(problem=problems(), noise=st.sampled_from([0.0, 1e-3, 0.1, 3.0]), data=st.data())
@DRAWS
def test_paired_tiles(instructions, problem, noise, data):
    """Accumulators and rows are those of the base and shift that the pass chose; and KL is that of float64."""
    reference, labels, logit_map, layout, generator = problem
    policy = reference + noise * torch.randn(reference.shape, generator=generator) if noise else reference
    if data.draw(st.booleans()):  # in another order: one-hot in other tiles than the reference
        policy = policy[:, torch.randperm(policy.shape[1], generator=generator)]
    labels = labels - reference.shape[1] * torch.randint(2, labels.shape, generator=generator)
    shift = torch.randn(len(labels), generator=generator) if data.draw(st.booleans()) else None
    row_dtype = data.draw(st.sampled_from([torch.float32, torch.float32, torch.bfloat16, torch.float16]))
    arguments = policy, reference, labels, logit_map, shift
    found, first, second = paired_sweep(NativePasses(), *arguments, row_dtype, torch.float32, **layout)
    truth, *_ = paired_sweep(TorchPasses(), *arguments, torch.float64, torch.float64, **layout)
    (p, slope), (q, _) = (finished(each, logit_map, labels) for each in (policy, reference))
    values = [fields.paired_result(each, labels, 0.0, False).value for each in (found, truth)]
    step = 1e-6 * size(torch.cat([p, q]))
    base, moved = (found[name][:, None].nan_to_num(neginf=0.0) for name in (5, 6))
    apart = found[6] - (p.logsumexp(1) - q.logsumexp(1)).nan_to_num(0.0)
    allowed = torch.where(values[1] < 1e-2, values[1].sqrt(), 1.0 + values[1]) + 0.5 * apart.square()
    assert close(values[0], values[1], step * allowed + 1e-12)
    if shift is None:
        assert (apart.abs() <= RECENTRE + 1e-4)[p.isfinite().any(1) & q.isfinite().any(1)].all()
        assert noise or policy is not reference or not values[0].any(), "of p = q exactly 0"
    e, gap = (q - base).exp(), torch.where((p == -torch.inf) & (q == -torch.inf), 0.0, p - q - moved)
    absent = e == 0
    row = torch.where(absent, (p - base - moved).exp(), e * torch.expm1(gap))
    excess = torch.where(absent, row, row - (e * gap).nan_to_num(0.0))
    scale = FLOAT16_SCALE if row_dtype == torch.float16 else 1.0
    largest = torch.maximum(e, row.abs())
    assert close(found[7], row.sum(1), step * largest.sum(1))
    known = excess.sum(1).isfinite()
    assert close(
        found[8][known], excess.sum(1)[known], (step * (largest * (1 + gap.abs())).nan_to_num(0.0).sum(1))[known]
    )
    allowed = (torch.finfo(row_dtype).eps + step) * largest.amax(1, keepdim=True) + 1e-7
    assert close(first / scale, row * slope, allowed)
    if shift is None:
        assert close(second / scale, e * slope, allowed)


@given(problem=problems(), noise=st.sampled_from([0.0, 1e-3, 3.0]), kind=st.sampled_from(["reverse_kl", "jsd"]))
@DRAWS
def test_coupled_tiles(instructions, problem, noise, kind):
    reference, labels, logit_map, layout, generator = problem
    policy = reference + noise * torch.randn(reference.shape, generator=generator)
    labels = labels - reference.shape[1] * torch.randint(2, labels.shape, generator=generator)
    (p, _), (q, _) = (finished(each, logit_map) for each in (policy, reference))
    if not (p.isfinite().any(1) & q.isfinite().any(1)).all():
        return
    tops, lses = [z.amax(1) for z in (p, q)], [z.logsumexp(1) for z in (p, q)]
    centre = torch.randn(len(p), generator=generator)
    pairs = zip(tops, lses, strict=True)
    rows = [each for top, lse in pairs for each in (top, lse - top)] + [lses[0] - lses[1], centre]
    arguments = kind, policy, reference, labels, logit_map, torch.stack(rows).float()
    layout["in_place"] = True
    (found, *written), (truth, *expected) = (
        coupled_sweep(passes, *arguments, dtype, dtype, **layout)
        for passes, dtype in ((NativePasses(), torch.float32), (TorchPasses(), torch.float64))
    )
    step = 2e-6 * size(torch.cat([p, q]))
    for ours, theirs in zip(written, expected, strict=True):
        assert close(ours, theirs, step * (1 + theirs.abs()))
    for name, ours, theirs in zip(COUPLED_ACCUMULATORS, found, truth, strict=True):
        near = name.startswith("from") and noise < 1
        assert close(ours, theirs, step * (1e-4 + theirs if near else 1 + theirs.abs()))


@given(problem=problems(), dtype=DTYPES_OF, row_dtype=DTYPES_OF)
@DRAWS
def test_gradient_tiles(instructions, problem, dtype, row_dtype):
    """Also over a model's own 16-bit logits, in place."""
    logits, labels, logit_map, layout, generator = problem
    logits = logits.to(dtype).float()
    argmax = torch.randint(-1, logits.shape[1], labels.shape, generator=generator)
    others = finished(logits, logit_map, labels)[0]
    coefficients = torch.randn(len(GRADIENT_COEFFICIENTS), len(labels), generator=generator)
    coefficients[0] = others.amax(1).nan_to_num(neginf=0.0) - 3
    coefficients[1] = 1.0 / (others - coefficients[0][:, None]).exp().sum(1).clamp(min=1.0)
    projected = torch.randn(logits.shape, generator=generator) if layout["columns"] != 32 else None
    arguments = logits, projected, labels, argmax, logit_map, coefficients
    rows = gradient_sweep(NativePasses(), *arguments, row_dtype, dtype, **layout)
    expected = gradient_sweep(TorchPasses(), *arguments, torch.float64, torch.float64, **layout)
    step = torch.finfo(row_dtype).eps + 4e-6 * size(finished(logits, logit_map)[0])
    assert close(rows, expected, step * (1 + expected.abs()))


FAR = {
    "policy comes far below": ((-torch.inf, -800.0, -790.0), (0.0, 1.0, 2.0)),
    "policy comes far above": ((-torch.inf, 800.0, 790.0), (0.0, 1.0, 2.0)),
    "reference comes far below": ((0.0, 1.0, 2.0), (-torch.inf, -800.0, -790.0)),
    "reference comes far above": ((0.0, 1.0, 2.0), (-torch.inf, 800.0, 790.0)),
    "one after the other": ((-torch.inf, -torch.inf, -500.0), (-torch.inf, 300.0, 302.0)),
    "large bases": ((1e4, 1e4 + 3, 1e4 - 2), (1e4, 1e4 + 1, 1e4 + 2)),
    "large bases far apart": ((1e4, 1e4 + 3, 1e4 - 2), (-1e4, -1e4 + 1, -1e4 + 2)),
}


@pytest.mark.parametrize("given", [False, True])
@pytest.mark.parametrize("case", FAR)
def test_paired_bases_that_move_far(instructions, case, given):
    """Rows, their sum and the gradients' embedding are those of float64 at the base and shift that were chosen."""
    generator = torch.Generator().manual_seed(3)
    policy, reference = (
        (torch.tensor(each).repeat_interleave(16) + torch.randn(3, 48, generator=generator)) for each in FAR[case]
    )
    labels = torch.tensor([-1, 5, 40])
    (p, _), (q, _) = (finished(each, PLAIN, labels) for each in (policy, reference))
    shift = (p.logsumexp(1) - q.logsumexp(1)).float() if given else None
    layout = {"columns": 16, "exact": True, "in_place": True}
    arguments = policy, reference, labels, PLAIN, shift, torch.float32, torch.float32
    found, first, second = paired_sweep(NativePasses(), *arguments, **layout)
    base, moved = found[5][:, None], found[6][:, None]
    assert torch.equal(moved, moved.float().double()) and torch.equal(base, base.float().double())
    e, above = (q - base).exp(), (p - base - moved).exp()
    assert e.sum(1).log().abs().max() < LAZY + math.log(48), "neither side's rows vanish"
    largest = torch.maximum(e, above)
    assert close(first, above - e, 2e-6 * largest)
    assert close(found[7], (above - e).sum(1), 2e-6 * largest.sum(1))
    if not given:
        assert close(second, e, 2e-6 * e)
    gap = torch.where(e == 0, 0.0, p - q - moved)
    excess = torch.where(e > 0, above - e - e * gap, above).sum(1)
    allowed = (largest * (1 + gap.abs().nan_to_num(posinf=0.0))).sum(1)
    assert close(found[8], excess, 2e-6 * allowed + 2e-7 * found[6].abs() * e.sum(1))  # gap_moment is of whole gaps
