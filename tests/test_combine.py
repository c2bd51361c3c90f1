"""Combining the gradients of both sides: the formulas in float64, accumulation, scalers, and what is refused."""

import warnings

import pytest
import torch
from helpers import assert_gradients, gradients

import fastforget as ff
from fastforget.combine import combined

SHAPES = ((3, 4), (5,), (2, 2))


def textbook(how, f, r):
    """The two formulas on whole vectors, float64."""
    if how == "mgda":
        share = float(((r - f) @ r) / ((f - r) @ (f - r)))
        share = min(max(share, 0.0), 1.0)
        return share * f + (1 - share) * r
    if f @ r >= 0:
        return f + r
    return (f - (f @ r) / (r @ r) * r) + (r - (f @ r) / (f @ f) * f)


def vectors(case):
    generator = torch.Generator().manual_seed(case)
    f, r = (torch.randn(21, generator=generator, dtype=torch.float64) for _ in range(2))
    return {
        0: (f, r),
        1: (f, -0.7 * f + 0.2 * r),  # in conflict
        2: (f, 0.9 * f + 0.2 * r),  # in agreement
        3: (f, 4.0 * f + 0.1 * r),  # one much longer, the same way: MGDA takes the shorter
        4: (5.0 * f, f),
        5: (f, -2.0 * f),  # opposite: nothing is left
    }[case]


def parts(vector, dtype=torch.float64):
    pieces = vector.split([12, 5, 4])
    return [piece.reshape(shape).to(dtype) for piece, shape in zip(pieces, SHAPES, strict=True)]


def flat(gradients):
    return torch.cat([gradient.flatten().double() for gradient in gradients])


@pytest.mark.parametrize("how", ["mgda", "pcgrad"])
@pytest.mark.parametrize("case", range(6))
def test_combinations_follow_the_textbook(how, case):
    f, r = vectors(case)
    expected = textbook(how, f, r)
    found = flat(combined(how, parts(f), parts(r)))
    assert torch.allclose(found, expected, rtol=1e-12, atol=1e-12)
    single = flat(combined(how, parts(f, torch.float32), parts(r, torch.float32)))
    assert torch.allclose(single, expected, rtol=1e-4, atol=1e-5)
    scaled = flat(combined(how, parts(1024 * f), parts(1024 * r)))
    assert torch.allclose(scaled, 1024 * expected, rtol=1e-12, atol=1e-9), "homogeneous"


@pytest.mark.parametrize("case", range(6))
def test_mgda_is_the_shortest_vector_between_and_hurts_no_side(case):
    f, r = vectors(case)
    found = flat(combined("mgda", parts(f), parts(r)))
    grid = [share * f + (1 - share) * r for share in torch.linspace(0, 1, 1001, dtype=torch.float64)]
    assert float(found.norm()) <= min(float(each.norm()) for each in grid) + 1e-12
    square = float(found @ found)
    assert float(found @ f) >= square - 1e-9 and float(found @ r) >= square - 1e-9


def test_zero_equal_missing_and_broken_gradients():
    f, r = vectors(1)
    zero = torch.zeros_like(f)
    assert torch.equal(flat(combined("pcgrad", parts(f), parts(zero))), f)
    assert torch.equal(flat(combined("mgda", parts(f), parts(zero))), zero), "its minimum norm"
    assert torch.allclose(flat(combined("mgda", parts(f), parts(f))), f)
    assert torch.allclose(flat(combined("pcgrad", parts(f), parts(f))), 2 * f)
    one_missing = [parts(f)[0], None, None]
    for how in ("mgda", "pcgrad"):
        padded = torch.cat([f[:12], zero[12:]])
        found = combined(how, one_missing, [*parts(r)[:2], None])
        assert found[2] is None
        assert torch.allclose(flat(found[:2]), textbook(how, padded, torch.cat([r[:17], zero[17:]]))[:17], atol=1e-12)
        for value in (torch.inf, torch.nan):
            broken = f.clone()
            broken[3] = value
            for pair in ((broken, r), (r, broken), (broken, zero)):
                assert not flat(combined(how, *map(parts, pair))).isfinite().all(), (how, value)


def test_16_bit_gradients_are_combined_in_float32():
    f, r = vectors(1)
    for dtype in (torch.bfloat16, torch.float16):
        found = combined("pcgrad", parts(f, dtype), parts(r, dtype))
        assert {each.dtype for each in found} == {dtype}
        expected = textbook("pcgrad", flat(parts(f, dtype)), flat(parts(r, dtype)))
        error = (flat(found) - expected).abs()
        assert (error <= torch.finfo(dtype).eps * expected.abs() + 1e-6).all()


def side_gradients(model, forget, retain):
    """{name: gradient} of the forget and of the retain terms of grad_diff, each alone, as by plain autograd."""
    found = []
    for term, side in ((ff.NegatedCE(), (forget, None)), (ff.CE(), (forget, retain))):
        model.zero_grad()
        ff.UnlearnLoss(model, [term])(*side).loss.backward()
        found.append(gradients(model))
    model.zero_grad()
    return found


def expected_gradients(how, f, r):
    names = list(f)
    both = textbook(how, *(torch.cat([each[name].flatten().double() for name in names]) for each in (f, r)))
    return dict(zip(names, both.split([f[name].numel() for name in names]), strict=True))


def assert_same(model, expected):
    ours = gradients(model)
    assert ours.keys() == expected.keys()
    length = torch.cat(list(expected.values())).norm()
    for name, gradient in ours.items():
        assert float((gradient.flatten().double() - expected[name]).norm() / length) < 1e-5, name


@pytest.mark.parametrize("how", ["mgda", "pcgrad"])
def test_a_step_combines_the_sides_however_the_batch_is_cut(model, batch, how):
    forget = batch(4, 1)
    retain = {key: torch.cat([value[:3], batch(2, 2)[key]]) for key, value in forget.items()}  # in conflict
    f, r = side_gradients(model, forget, retain)
    assert sum(float((f[name] * r[name]).sum()) for name in f) < 0
    expected = expected_gradients(how, f, r)
    step = ff.UnlearnStep(model, torch.optim.SGD, terms="grad_diff", lr=0.1, combine=how)
    for micro_batch in (None, 1, 3):
        step.backward(forget, retain, micro_batch=micro_batch)
        assert_same(model, expected)
        step.zero_grad()

    def rows(part, start, stop):
        return {key: value[start:stop] for key, value in part.items()}

    pieces = [
        (rows(forget, 0, 1), rows(retain, 0, 3)),
        (rows(forget, 1, 4), None),
        (rows(forget, 0, 0), rows(retain, 3, 5)),
    ]
    counts = ff.count_labels(pieces)
    for clear in (step.zero_grad, lambda: step.zero_grad(set_to_none=False), model.zero_grad):
        for piece in pieces:
            step.backward(*piece, counts=counts)
        assert_same(model, expected)
        clear()
    step.backward(forget, retain)
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1e-3)
    clipped = gradients(model)
    assert float(torch.cat([each.flatten() for each in clipped.values()]).norm()) == pytest.approx(1e-3, rel=1e-3)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters() if name in clipped}
    step.step()
    for name, value in before.items():
        assert torch.allclose(model.get_parameter(name), value - 0.1 * clipped[name]), name
    step.zero_grad()
    assert step(forget, retain).loss.isfinite() and step.param_groups[0]["unlearn_steps"] == 2


def test_sum_is_the_plain_sum(model, batch):
    f, r = side_gradients(model, batch(3, 1), batch(3, 2))
    ff.UnlearnStep(model, torch.optim.SGD, terms="grad_diff", lr=0.1, combine="sum").backward(batch(3, 1), batch(3, 2))
    assert_gradients(gradients(model), {name: gradient + r[name] for name, gradient in f.items()})


@pytest.mark.parametrize("how", ["sum", "mgda", "pcgrad"])
def test_grad_scaler(model, batch, how):
    step = ff.UnlearnStep(model, torch.optim.SGD, terms="grad_diff", lr=0.1, combine=how)
    step.backward(batch(2, 1), batch(2, 2))
    plain = gradients(model)
    step.zero_grad()
    scaler = torch.amp.GradScaler("cpu", init_scale=256.0)
    step.backward(batch(2, 1), batch(2, 2), backward=lambda loss: scaler.scale(loss).backward())
    scaler.unscale_(step)
    assert_gradients(gradients(model), plain)
    scaler.step(step)
    scaler.update()
    step.zero_grad()
    assert step.param_groups[0]["unlearn_steps"] == 1
    step.backward(batch(2, 1), batch(2, 2), backward=lambda loss: (loss * torch.inf).backward())
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    scaler.unscale_(step)
    scaler.step(step)
    assert all(torch.equal(parameter, before[name]) for name, parameter in model.named_parameters()), "skipped"
    step.zero_grad()
    step.step()
    assert step.param_groups[0]["unlearn_steps"] == 1, "no backward is pending"


def test_gradients_that_are_not_its_own_are_refused(model, batch):
    step = ff.UnlearnStep(model, torch.optim.SGD, terms="grad_diff", lr=0.1, combine="pcgrad")
    ff.UnlearnLoss(model, "grad_ascent")(batch(2, 1)).loss.backward()
    with pytest.raises(ff.FastforgetError, match=r"\.grad holds others.*clear it first"):
        step.backward(batch(2, 1), batch(2, 2))
    step.zero_grad()
    counts = ff.count_labels([(batch(2, 1), batch(2, 2))] * 2)
    step.backward(batch(2, 1), batch(2, 2), counts=counts)
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1e-3)
    with pytest.raises(ff.FastforgetError, match="clip after the last micro-batch only"):
        step.backward(batch(2, 1), batch(2, 2), counts=counts)


def test_what_cannot_be_combined_is_said_at_once(model):
    with pytest.raises(ff.FastforgetError, match="combine must be one of sum, mgda, pcgrad, not 'max'"):
        ff.UnlearnStep(model, torch.optim.SGD, terms="npo", lr=0.1, combine="max")
    with pytest.raises(ff.FastforgetError, match="there is no term on the retain set"):
        ff.UnlearnStep(model, torch.optim.SGD, terms="grad_ascent", lr=0.1, combine="pcgrad")
    with pytest.warns(UserWarning, match="a fresh adapter gives kl no gradient"):
        ff.UnlearnStep(model, torch.optim.SGD, terms=ff.preset("npo", retain="kl"), lr=0.1, combine="mgda")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ff.UnlearnStep(model, torch.optim.SGD, terms=ff.preset("npo", retain="ce+kl"), lr=0.1, combine="mgda")
