"""The float64 oracle: statistics and divergences of any backend against full logits, and problems to try them on.

The rule (DESIGN section 6b): per draw, error <= 1.5 x eager's error + 4 u scale; over many rows, RMS error <= 1.5 x
eager's. Eager is plain PyTorch on materialised float32 logits of the same product. A product in small tiles rounds
otherwise than a product of the whole, by as much as 1 000 u at logits of 1e4, so the random problems have products
that float32 holds exactly: what is compared is all that comes after. RMS errors are of ordinary products.
"""

import math
import os

import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from kernel_device import device_of

import fastforget as ff
from fastforget import backends
from fastforget.backends.fields import DIFFERENTIABLE, EMPTY
from fastforget.backends.fields import NAMES as OUTPUTS
from fastforget.backends.protocol import KnownReference

NOISES, SHIFTS = st.sampled_from([0.0, 1e-3, 1.0, 100.0]), st.sampled_from([0.0, -1.0, -10.0])
MORE = int(os.environ.get("FASTFORGET_DRAWS", "1"))  # make proof draws 20 times as many
DRAWS = settings(max_examples=30 * MORE, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
LOGITS = [name for name in OUTPUTS if not name.endswith("_embedding")]  # what a head that is the identity has


@st.composite
def problems(draw, most_rows=9):
    """Hidden states, head and labels of any shape, from uniform to one-hot distributions; see `on_grid`."""
    rows, width = draw(st.integers(1, most_rows)), draw(st.integers(1, 17))
    vocabulary = draw(st.sampled_from([1, 2, 7, 101, 257]))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 10**6)))
    dtype = draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float16]))
    sharpness = draw(st.sampled_from([0.0, 2.0**-8, 1.0, 32.0] + ([2.0**13] if dtype == torch.float32 else [])))
    weight = on_grid(torch.randn(vocabulary, width, generator=generator) / width**0.5, 2**-5).to(dtype)
    hidden = on_grid(torch.randn(rows, 2 * width, generator=generator), 2**-5).mul(sharpness).to(dtype)
    hidden = hidden[:, ::2]  # strided
    labels = torch.randint(0, vocabulary, (rows,), generator=generator)
    if draw(st.booleans()):  # memorised: the label is the likeliest token
        labels = (hidden.float() @ weight.float().T).argmax(dim=1)
    labels[torch.rand(rows, generator=generator) < draw(st.sampled_from([0.0, 0.4, 1.0]))] = -100
    bias = on_grid(torch.randn(vocabulary, generator=generator), 2**-4).to(dtype) if draw(st.booleans()) else None
    scale = draw(st.sampled_from([1.0, 0.0625]))
    softcap = draw(st.sampled_from([None, None, 30.0]))
    assert_exact(hidden, ff.LMHead(weight, bias, scale))
    return hidden, weight, bias, scale, softcap, labels, draw(st.booleans())


def on_grid(values, step):
    """Round to multiples of a power of two, so coarse that float32 sums the products of two such tensors in any order.

    The problems have at most 17 terms, weights of about 7 bits and states of at most 12.
    """
    return (values / step).round() * step


def assert_exact(hidden, head):
    logits = head.logits(hidden.double().contiguous())
    assert torch.equal(logits.float().double(), logits), "problems of this module have logits that float32 holds"


def evaluate(problem, backend, dtype=None, train=False):
    """All fields, and d (sum of u * field) for each differentiable field, u fixed random numbers."""
    hidden, weight, bias, scale, softcap, labels, with_positions = problem
    dtype, device = dtype or hidden.dtype, device_of(backend)
    hidden = hidden.detach().to(device, dtype).requires_grad_()
    weight = weight.to(device, dtype).clone().requires_grad_(train)
    bias = None if bias is None else bias.to(device, dtype).clone().requires_grad_(train)
    leaves = [leaf for leaf in (hidden, weight, bias) if leaf is not None and leaf.requires_grad]
    names = LOGITS if softcap else OUTPUTS
    positions = (labels != -100).nonzero()[:, 0] if with_positions else None
    head = ff.LMHead(weight, bias, scale, softcap)
    stats = ff.token_stats(hidden, head, labels, positions=positions, outputs=names, backend=backend)
    values, gradients = {}, {}
    for name in names:
        value = getattr(stats, name)
        values[name] = value.detach().cpu()
        if name not in DIFFERENTIABLE or (name == "log_not_label" and len(weight) == 1):
            continue
        upstream = upstream_of(name, value.shape, softcap).to(device, value.dtype)
        grads = torch.autograd.grad((value * upstream).sum(), leaves, retain_graph=True, allow_unused=True)
        for leaf, grad in zip(("hidden", "weight", "bias")[: len(grads)], grads, strict=True):
            gradients[name, leaf] = torch.zeros(1) if grad is None else grad.cpu()
    return values, gradients


def written_rows(problem):
    """Per field, what its gradient writes over the (capped) logits, (N, V) in float64, before anything cancels.

    `evaluate`'s upstream gradient is in it. An absolute 2^-50 stands for the rounding of the float64 oracle itself.
    """
    hidden, weight, bias, scale, softcap, labels, _ = problem
    kept = labels != -100
    head = ff.LMHead(weight.double(), None if bias is None else bias.double(), scale, softcap)
    logits = head.logits(hidden.double())
    probs = logits.softmax(1)
    onehot = torch.zeros_like(logits).scatter_(1, labels.clamp(min=0)[:, None], 1.0)
    unit = logits.masked_fill(onehot.bool(), -torch.inf).softmax(1).nan_to_num(0.0) + onehot
    label_prob, other_prob = (probs * onehot).sum(1, keepdim=True), (probs * (1 - onehot)).sum(1, keepdim=True)
    offsets = (logits - logits.amax(1, keepdim=True)).abs()
    rows = {
        "logp": other_prob * unit,
        "log_not_label": label_prob * unit,
        "lse": other_prob * unit + onehot,
        "label_logit": onehot,
        "max_logit": (offsets == 0).double(),
        "logit_mean": torch.full_like(logits, 1 / logits.shape[1]),
        "entropy": probs * (offsets + (probs * offsets).sum(1, keepdim=True)),
    }
    rows = {name: row * upstream_of(name, (len(hidden),), softcap).abs()[:, None] for name, row in rows.items()}
    upstream = upstream_of("expected_embedding", hidden.shape, softcap).double().abs()
    projected = scale * upstream @ weight.double().abs().T
    rows["expected_embedding"] = probs * (projected + (probs * projected).sum(1, keepdim=True))
    return {name: row * kept[:, None] + 2**-26 for name, row in rows.items()}, logits[kept], probs[kept]


def upstream_of(name, shape, softcap=None):
    """The fixed random numbers that `evaluate` multiplies a field with."""
    names = LOGITS if softcap else OUTPUTS
    index = names.index(name) if name in names else 0
    return torch.randn(shape, generator=torch.Generator().manual_seed(index))


def worst(result, oracle):
    """The largest error; what is infinite in truth must be so, and nothing else may be."""
    finite = oracle.isfinite()
    assert torch.equal(result.isfinite(), finite)
    return float((result.double() - oracle)[finite].abs().max()) if finite.any() else 0.0


def check(problem, backend, train=False):
    """error <= 1.5 x eager's + 4 u scale, for every field and gradient (a gradient may be rounded to its dtype too)."""
    hidden, weight, _, factor, _, labels, _ = problem
    oracle, eager, ours = (
        evaluate(problem, name, dtype, train)
        for name, dtype in (("eager", torch.float64), ("eager", None), (backend, None))
    )
    kept = labels != -100
    rows, logits, probs = written_rows(problem)
    norms = weight.double().norm(dim=1)
    largest = max(1.0, float(logits.abs().max())) if kept.any() else 1.0
    for name, expected in oracle[0].items():
        value = ours[0][name]
        assert (value[~kept] == EMPTY[name]).all()
        if name in ("argmax", "others_argmax"):  # ties may break either way
            among = logits if name == "argmax" else logits.scatter(1, labels[kept][:, None], -torch.inf)
            picked = among.gather(1, value[kept, None])[:, 0]
            assert (picked >= among.amax(1) - 4 * 2**-24 * largest).all()
            continue
        size = max(largest, float(expected.abs().nan_to_num(0.0, neginf=0.0).max()))
        unit = 2**-24
        if name.endswith("_embedding"):
            size = max(1.0, 2 * factor * float(norms.max()))
            unit = torch.finfo(hidden.dtype).eps / 2 if backend == "triton" and name == "others_embedding" else unit
        error, theirs = worst(value, expected), worst(eager[0][name], expected)
        assert error <= 1.5 * theirs + 4 * unit * size, (name, error, theirs, size)
    written = hidden.dtype if backend == "triton" and not train else torch.float32  # what rows are rounded to
    unit = torch.finfo(written).eps / 2
    for (name, leaf), expected in oracle[1].items():
        row = rows[name]
        if leaf == "hidden":
            size = factor * float((row @ norms).max())
        elif leaf == "weight":
            size = factor * float((row.T @ hidden.double().norm(dim=1)).max())
            if name == "expected_embedding":  # it is itself a product with the weight
                upstream = upstream_of(name, hidden.shape)[kept].double().norm(dim=1)
                size += factor * float((probs.T @ upstream).max())
        else:
            size = float(row.sum(0).max())
        rounding = 0.0 if hidden.dtype == torch.float32 else torch.finfo(hidden.dtype).eps / 2
        rounding *= float(expected.abs().max())
        error, theirs = worst(ours[1][name, leaf], expected), worst(eager[1][name, leaf], expected)
        assert error <= 1.5 * theirs + 4 * unit * size + rounding, (name, leaf, error, theirs, size)


def realistic(seed=0, rows=320, width=96, vocabulary=5003):
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(vocabulary, width, generator=generator) / width**0.5
    hidden = 3 * torch.randn(rows, width, generator=generator)
    labels = torch.randint(0, vocabulary, (rows,), generator=generator)
    labels[::2] = (hidden[::2] @ weight.T).argmax(dim=1)
    return hidden, weight, labels


def divergence_of(hidden, ref_hidden, weight, softcap, kind, backend, dtype, **shift):
    hidden, ref_hidden, weight = (each.detach().to(device_of(backend), dtype) for each in (hidden, ref_hidden, weight))
    value = ff.divergence(
        hidden.requires_grad_(), ref_hidden, ff.LMHead(weight, softcap=softcap), kind, backend=backend, **shift
    )
    return value.detach().cpu(), torch.autograd.grad(value.sum(), hidden)[0].cpu()


def divergence_rows(logits, ref_logits, kind):
    """What the gradient writes over the logits, (N, V) in float64, with the rounding of its float32 log-probs."""
    log_p, log_q = logits.log_softmax(1), ref_logits.log_softmax(1)
    inputs = log_p.exp() * (1 + log_p.abs()) + log_q.exp() * (1 + log_q.abs())
    if kind == "forward_kl":
        return inputs
    log_to = log_q if kind == "reverse_kl" else torch.logaddexp(log_p, log_q) - math.log(2)
    return inputs + log_p.exp() * (log_to.abs() + (log_p.exp() * (log_p - log_to)).sum(1, keepdim=True).abs())


def known_divergence(hidden, ref_hidden, weight, labels, shift, backend):
    """Forward KL with what the reference's cache holds: (value, gradient, log p_y)."""
    hidden, ref_hidden, weight, labels = (each.to(device_of(backend)) for each in (hidden, ref_hidden, weight, labels))
    computes, head = backends.backend_of(backend, hidden.device), ff.LMHead(weight)
    cached = computes.token_stats(ref_hidden, labels, head, ("others_embedding", "others_argmax"))
    known = KnownReference(cached["others_embedding"].to(hidden.dtype), cached["others_argmax"])
    hidden = hidden.detach().requires_grad_()
    value, logp = computes.divergence(
        hidden, ref_hidden, head, "forward_kl", labels=labels, label_shift=shift, known=known
    )
    return value.detach().cpu(), torch.autograd.grad(value.sum(), hidden)[0].cpu(), logp.cpu()


def check_divergence(kind, problem, noise, shift, backend, known=False):
    """error <= 1.5 x eager's + 4 u scale, value and gradient; the reference's label logits shifted, where labelled."""
    hidden, weight, _, _, softcap, labels, _ = problem
    if known:
        softcap, labels = None, labels.clamp(min=0)
    generator = torch.Generator().manual_seed(0)
    ref_hidden = hidden.float() + noise * torch.randn(hidden.shape, generator=generator)
    ref_hidden = on_grid(ref_hidden, 2.0 ** (math.frexp(float(ref_hidden.abs().max()))[1] - 12)).to(hidden.dtype)
    assert_exact(ref_hidden, ff.LMHead(weight))
    oracle, eager, ours = (
        divergence_of(hidden, ref_hidden, weight, softcap, kind, name, dtype, labels=labels, label_shift=shift)
        for name, dtype in (("eager", torch.float64), ("eager", hidden.dtype), (backend, hidden.dtype))
    )
    if known:
        ours = known_divergence(hidden, ref_hidden, weight, labels, shift, backend)
    assert (ours[0] >= 0).all()
    head = ff.LMHead(weight.double(), softcap=softcap)
    logits, ref_logits = head.logits(hidden.double()), head.logits(ref_hidden.double())
    for row, label in enumerate(labels.tolist()):
        if label >= 0:
            ref_logits[row, label] += shift
    sizes = [max(1.0, float(logits.abs().max()), float(ref_logits.abs().max()), float(oracle[0].max()))]
    rows = divergence_rows(logits, ref_logits, kind) + 2**-26  # the oracle's own rounding
    sizes.append(float((rows @ weight.double().norm(dim=1)).max()))
    rounding = 0.0 if hidden.dtype == torch.float32 else torch.finfo(hidden.dtype).eps / 2
    written = hidden.dtype if backend == "triton" or known else torch.float32  # what rows are rounded to, or cached
    units = (2**-24, torch.finfo(written).eps / 2)
    for part in (0, 1):
        error, theirs = worst(ours[part], oracle[part]), worst(eager[part], oracle[part])
        allowed = 1.5 * theirs + 4 * units[part] * sizes[part] + part * rounding * float(oracle[1].abs().max())
        assert error <= allowed, (part, error, theirs, sizes)


@st.composite
def state_problems(draw):
    """States, an anchor of each kind (on the states themselves too, and zero states), and 1 to 33 centres."""
    rows, width, count = draw(st.integers(1, 9)), draw(st.integers(1, 65)), draw(st.integers(1, 33))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 10**6)))
    dtype = draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float16]))
    size = draw(st.sampled_from([1e-3, 1.0, 100.0]))
    hidden = (size * torch.randn(rows, 2 * width, generator=generator)).to(dtype)[:, ::2]  # strided
    near = draw(st.sampled_from([0.0, 1e-4, 1e-2, 1.0]))
    anchor = (hidden.float() + near * size * torch.randn(rows, width, generator=generator)).to(dtype)
    if draw(st.booleans()):
        anchor = anchor[0]
    centres = size * torch.randn(count, width, generator=generator)
    if draw(st.booleans()):
        centres[-1] = hidden[0].float()  # a state that lies on its centre
    if draw(st.booleans()):
        hidden = hidden.clone()
        hidden[-1] = 0
    margin = draw(st.sampled_from([None, 0.3, 1.0, 1e-4]))
    return hidden, anchor, centres, draw(st.sampled_from(["l2", "cosine"])), margin


def state_distance(hidden, point, metric):
    """(distance, gradient) of one state, in float64, from the definition and its derivative."""
    h, a = hidden.double(), point.double()
    if metric == "l2":
        distance = (h - a).square().sum().sqrt()
        return distance, torch.zeros_like(h) if distance == 0 else (h - a) / distance
    if h.norm() == 0 or a.norm() == 0:
        return torch.ones((), dtype=torch.float64), torch.zeros_like(h)
    cosine = (h @ a) / (h.norm() * a.norm())
    return 1 - cosine, -(a / a.norm() - cosine * h / h.norm()) / h.norm()


def evaluate_states(problem, backend):
    """Values, and the gradient of their sums; each state is in one row only, so rows stay apart."""
    hidden, anchor, centres, metric, margin = problem
    hidden = hidden.detach().to(device_of(backend)).requires_grad_()
    values = ff.hidden_stats(hidden, anchor, centres, metric, margin, backend=backend)
    upstream = torch.linspace(-2.0, 3.0, len(hidden), device=hidden.device)
    grads = [torch.autograd.grad((value * upstream).sum(), hidden, retain_graph=True)[0].cpu() for value in values]
    return [value.detach().cpu() for value in values], grads, upstream.double().cpu()


def check_states(problem, backend):
    """error <= 1.5 x eager's + 4 u scale, for both distances and their gradients.

    A distance is formed from differences of exact inputs: its scale is its own size, whatever the size of the states.
    """
    hidden, anchor, centres, metric, margin = problem
    values, grads, upstream = evaluate_states(problem, backend)
    eager_values, eager_grads, _ = evaluate_states(problem, "eager")
    half = 0.0 if hidden.dtype == torch.float32 else torch.finfo(hidden.dtype).eps / 2
    for row, state in enumerate(hidden):
        distance, direction = state_distance(state, anchor[row] if anchor.dim() == 2 else anchor, metric)
        beyond = margin is not None and distance > margin
        if margin is not None and abs(float(distance) - margin) < 1e-5:
            continue  # on the margin itself either side is right
        expected = [(torch.tensor(margin, dtype=torch.float64) if beyond else distance, direction * (not beyond))]
        each = sorted((state_distance(state, centre, metric) for centre in centres), key=lambda pair: float(pair[0]))
        tie = len(each) > 1 and float(each[1][0] - each[0][0]) < 1e-5 * max(1.0, float(each[0][0]))
        expected.append((each[0][0], None if tie else each[0][1]))
        for which, (value, gradient) in enumerate(expected):
            error, theirs = (abs(float(v[which][row].double() - value)) for v in (values, eager_values))
            assert error <= 1.5 * theirs + 4 * 2**-24 * max(1.0, float(value)), (which, error, theirs)
            assert values[which].dtype == torch.float32 and grads[which].dtype == hidden.dtype
            assert grads[which].isfinite().all(), "finite also at distance 0 and for a state of length 0"
            if gradient is None:
                continue
            gradient = gradient * upstream[row]
            error, theirs = (float((g[which][row].double() - gradient).abs().max()) for g in (grads, eager_grads))
            length = float(state.double().norm())
            scale = 1.0 if metric == "l2" or length == 0 else max(1.0, 1 / length)
            scale *= float(upstream[row].abs())
            tolerance = 1.5 * theirs + 4 * 2**-24 * scale + half * float(gradient.abs().max()) + (half > 0) * 2**-24
            assert error <= tolerance, (which, error, theirs, scale)
