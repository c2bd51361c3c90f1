"""A head whose rows lie in several processes gives what the whole one gives: values, gradients, and clear refusals."""

import pytest
import torch
from helpers import VOCABULARY
from processes import in_processes

import fastforget as ff
from fastforget.vocabulary import VocabularyShard

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="forks, which autograd's threads for GPUs forbid")

FIELDS = ("logp", "lse", "label_logit", "log_not_label")
BOUNDS = {2: (0, 200, VOCABULARY), 4: (0, 7, 8, 250, VOCABULARY)}


def problem(softcap, dtype=torch.float32, spread=1.0):
    """Rows whose label lies in each shard, some of them memorised; a reference near, and one far away."""
    generator = torch.Generator().manual_seed(3)
    weight = torch.randn(VOCABULARY, 24, generator=generator)
    bias = torch.randn(VOCABULARY, generator=generator)
    labels = torch.tensor([0, 3, 7, 8, 100, 199, 200, 249, 250, 319, -100, 5])
    hidden = spread * torch.randn(len(labels), 24, generator=generator)
    hidden[::3] += 3.0 * weight[labels[::3].clamp(min=0)]
    near = hidden + 1e-3 * torch.randn(hidden.shape, generator=generator)
    far = spread * torch.randn(hidden.shape, generator=generator)
    head = {"scale": 0.7, "softcap": softcap}
    return [each.to(dtype) for each in (weight, bias, hidden, near, far)], labels, head


def computed(tensors, labels, options, backend, shard=None):
    weight, bias, states, near, far = tensors
    if shard is not None:
        first, end = shard
        weight, bias = weight[first:end], bias[first:end]
        options = {**options, "shard": VocabularyShard(first, VOCABULARY)}
    head = ff.LMHead(weight, bias, **options)
    found = {}
    hidden = states.clone().requires_grad_()
    stats = ff.token_stats(hidden, head, labels, outputs=FIELDS, backend=backend)
    for name in FIELDS:
        value = getattr(stats, name)
        (gradient,) = torch.autograd.grad((value * torch.arange(1.0, 13.0)).sum(), hidden, retain_graph=True)
        found |= {name: value.detach(), f"d {name}": gradient}
    for name, reference in (("near", near), ("far", far)):
        value = ff.divergence(hidden, reference, head, positions=torch.arange(9), backend=backend)
        (gradient,) = torch.autograd.grad(value[:9].sum(), hidden)
        found |= {f"KL {name}": value.detach(), f"d KL {name}": gradient}
    return found


def compute_shards(rank, count, problems, backends):
    shard = BOUNDS[count][rank : rank + 2]
    return [computed(*each, backend, shard) for each in problems for backend in backends]


PROBLEMS = [problem(None), problem(30.0), problem(None, spread=8.0), problem(None, torch.bfloat16)]


@pytest.mark.parametrize("count", [2, 4])
def test_shards_give_what_the_whole_head_gives(count, tmp_path, small_tiles):
    backends = ("native", "torch")
    results = in_processes(tmp_path, count, compute_shards, count, PROBLEMS, backends)
    expected = [computed(*each, backend) for each in PROBLEMS for backend in backends]
    for result in results:
        for found, wanted in zip(result, expected, strict=True):
            for name, value in wanted.items():
                rounding = 4e-3 if value.dtype == torch.bfloat16 else 2e-6  # of a gradient that comes in bfloat16
                error = float((found[name] - value).norm())
                assert error <= rounding * float(value.norm()), name
