"""A head whose rows lie in several processes gives what the whole one gives: values, gradients, and clear refusals."""

import pytest
import torch
import torch.distributed as dist
from helpers import VOCABULARY, adapter_of, assert_gradients, load_perturbed, make_batch, stack_of
from processes import in_processes, messages_of
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

import fastforget as ff
from fastforget.backbone import Backbone
from fastforget.backends import protocol, tiling

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="forks, which autograd's threads for GPUs forbid")

FIELDS = ("logp", "lse", "label_logit", "log_not_label")
MOMENTS = tuple(field.name for field in protocol.FIELDS if field.needs == "moments")
ROWS = 264
BOUNDS = {2: (0, 200, VOCABULARY), 4: (0, 7, 8, 250, VOCABULARY)}


def problem(softcap, dtype=torch.float32, spread=1.0, sayable=VOCABULARY):
    """Rows with labels at both ends of each shard, and beyond; a reference near, and one far away."""
    generator = torch.Generator().manual_seed(3)
    weight = torch.randn(VOCABULARY, 24, generator=generator)
    bias = torch.randn(VOCABULARY, generator=generator)
    labels = torch.randint(0, VOCABULARY, (ROWS,), generator=generator)
    labels[:11] = torch.tensor([0, 3, 7, 8, 100, 199, 200, 249, 250, 319, -100])
    labels = torch.where(labels < sayable, labels, 5)
    bias[sayable:] = -torch.inf
    hidden = spread * torch.randn(len(labels), 24, generator=generator)
    hidden[::3] += 3.0 * weight[labels[::3].clamp(min=0)]  # memorised
    near = hidden + 1e-3 * torch.randn(hidden.shape, generator=generator)
    far = spread * torch.randn(hidden.shape, generator=generator)
    head = {"scale": 0.7, "softcap": softcap}
    return [each.to(dtype) for each in (weight, bias, hidden, near, far)], labels, head


def computed(tensors, labels, options, backend, shard=None):
    weight, bias, states, near, far = tensors
    if shard is not None:
        first, end = shard
        weight, bias = weight[first:end], bias[first:end]
        options = {**options, "shard": ff.VocabularyShard(first, VOCABULARY)}
    head = ff.LMHead(weight, bias, **options)
    found = {}
    hidden = states.clone().requires_grad_()
    stats = ff.token_stats(hidden, head, labels, outputs=FIELDS, backend=backend)
    for name in FIELDS:
        value = getattr(stats, name)
        (gradient,) = torch.autograd.grad((value * torch.linspace(1.0, 2.0, ROWS)).sum(), hidden, retain_graph=True)
        found |= {name: value.detach(), f"d {name}": gradient}
    stats = ff.token_stats(states, head, labels, outputs=MOMENTS, backend=backend)
    found |= {name: getattr(stats, name) for name in MOMENTS}
    for name, reference in (("near", near), ("far", far)):
        value = ff.divergence(hidden, reference, head, positions=torch.arange(ROWS - 3), backend=backend)
        (gradient,) = torch.autograd.grad(value.sum(), hidden)
        found |= {f"KL {name}": value.detach(), f"d KL {name}": gradient}
    return found


def distance(found, value):
    """The norm of a difference, in which infinities are equal."""
    return float(torch.where(found == value, 0.0, found - value).norm())


def compute_shards(rank, count, problems, backends):
    shard = BOUNDS[count][rank : rank + 2]
    return [computed(*each, backend, shard) for each in problems for backend in backends]


PROBLEMS = [
    problem(None),
    problem(30.0),
    problem(None, spread=8.0),
    problem(None, torch.bfloat16),
    problem(None, sayable=BOUNDS[4][3]),  # one process has no token that can be said
]


@pytest.mark.parametrize("count", [2, 4])
def test_shards_give_what_the_whole_head_gives(count, tmp_path, monkeypatch):
    monkeypatch.setenv(tiling.OVERRIDE, "48x64")
    backends = ("native", "torch")
    results = in_processes(tmp_path, count, compute_shards, count, PROBLEMS, backends)
    for place, (tensors, labels, options) in enumerate(PROBLEMS):
        exact = computed([each.double() for each in tensors], labels, options, "eager")
        for number, backend in enumerate(backends):
            wholes = computed(tensors, labels, options, backend)
            for name, value in exact.items():
                found = [result[len(backends) * place + number][name] for result in results]
                assert all(torch.equal(each, found[0]) for each in found), name
                if name.endswith("argmax"):
                    assert torch.equal(found[0], wholes[name]) and bool((found[0] >= BOUNDS[count][1]).any())
                    continue
                errors = [distance(each.double(), value) for each in (found[0], wholes[name])]
                size = float(value[value.isfinite()].norm())
                assert errors[0] <= 1.5 * errors[1] + 2**-22 * size, (name, backend, errors)


def sharded_head(model, layout):
    """The head of a model, over all processes; what it puts out is their own logits, or all."""
    head = model.get_base_model().lm_head
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    return parallelize_module(head, mesh, ColwiseParallel(output_layouts=layout))


def train(folder, layout, passes="sequential"):
    model = load_perturbed(folder)
    if layout is not None:
        sharded_head(model, layout)
    terms = [ff.NPO(weight=0.5), ff.UNDIAL(), ff.Unlikelihood(), ff.KL(weight=0.7)]
    step = ff.UnlearnStep(model, torch.optim.AdamW, terms=terms, lr=1e-3, passes=passes)
    losses = [float(step(make_batch(3, 3 + number), make_batch(2, 50 + number)).loss) for number in range(3)]
    return adapter_of(model), losses, step.loss.backbone.head.shard is not None


def train_shards(rank, folder):
    Backbone.packing_pays = lambda *_: True
    return [train(folder, Replicate()), train(folder, Shard(-1)), train(folder, Shard(-1), "joint")]


def test_a_step_over_a_head_that_tensor_parallelism_shards(tiny, tmp_path):
    expected, expected_losses, _ = train(tiny["llama"], None)
    for results in in_processes(tmp_path, 2, train_shards, tiny["llama"]):
        for weights, losses, sharded in results:
            assert sharded and losses == pytest.approx(expected_losses, rel=1e-5)
            assert_gradients(weights, expected)


def refused(rank, folder):
    weight = torch.randn(10, 4)
    head = ff.LMHead(weight, shard=ff.VocabularyShard(10 * rank, 20))
    trains = ff.LMHead(torch.nn.Parameter(weight), shard=ff.VocabularyShard(10 * rank, 20))
    hidden, labels = torch.randn(3, 4, requires_grad=True), torch.tensor([1, 2, 19])
    model = load_perturbed(folder)
    sharded_head(model, Shard(-1))
    training = load_perturbed(folder)
    sharded_head(training, Shard(-1)).weight.requires_grad_(True)
    attempts = {
        "overlap": lambda: ff.LMHead(weight, shard=ff.VocabularyShard(9 * rank, 20)),
        "entropy": lambda: ff.token_stats(hidden, head, labels, outputs=("entropy",)),
        "embedding": lambda: ff.token_stats(hidden, head, labels, outputs=("expected_embedding",)),
        "jsd": lambda: ff.divergence(hidden, hidden, head, kind="jsd"),
        "trains": lambda: ff.token_stats(hidden, trains, labels),
        "eager": lambda: ff.token_stats(hidden, head, labels, backend="eager"),
        "anchor": lambda: ff.token_stats(hidden, head, labels, anchor="label"),
        "label": lambda: ff.token_stats(hidden, head, torch.tensor([1, 2, 20])),
        "training": lambda: ff.UnlearnStep(training, torch.optim.SGD, terms=[ff.NegatedCE()], lr=0.1),
        "term": lambda: ff.UnlearnStep(model, torch.optim.SGD, terms=[ff.MaxEntropy()], lr=0.1),
    }
    return messages_of(attempts)


def differ(rank, folder):
    """What is said where processes that share a vocabulary have other rows, labels or weights, or halve their rows."""

    def step_of(**options):
        model = load_perturbed(folder, seed=options.pop("seed", 1))
        sharded_head(model, Shard(-1))
        return ff.UnlearnStep(model, torch.optim.SGD, lr=0.1, **{"terms": [ff.NegatedCE()], **options})

    attempts = {
        "labels": lambda: step_of().backward(make_batch(2, 1 + rank)),
        "rows": lambda: step_of().backward(make_batch(2 + rank, 1)),
        "parts": lambda: step_of().backward(make_batch(2, 1), micro_batch=2 - rank),
        "weights": lambda: step_of(seed=1 + rank, terms=[ff.KL(on="forget")]).backward(make_batch(2, 1)),
        "auto": lambda: step_of().backward(make_batch(2, 1), micro_batch="auto"),
        "cache": lambda: step_of(terms="npo", reference_cache_folder=folder / "cache"),
    }
    return messages_of(attempts)


def test_processes_that_share_a_vocabulary_must_not_differ(tiny, tmp_path):
    for messages in in_processes(tmp_path, 2, differ, tiny["llama"]):
        for name in ("labels", "weights"):
            assert "differ in their hidden states or labels" in messages[name]
        for name in ("rows", "parts"):
            assert "share a vocabulary, and this one's batch is another one" in messages[name]
        assert messages["auto"].startswith("micro_batch='auto' does not work where weights are sharded")
        assert messages["cache"].startswith("reference_cache_folder:")


def hook(rank, folder):
    """A loss after one process has put a hook on its head, and what is said where the hook changes logits."""
    model = load_perturbed(folder)
    head = sharded_head(model, Shard(-1))
    step = ff.UnlearnStep(model, torch.optim.SGD, terms=[ff.NegatedCE()], lr=0.1)
    step(make_batch(2, 1))
    if rank == 1:
        head.register_forward_hook(lambda *_: None)
    loss = float(step(make_batch(2, 2)).loss)
    head.register_forward_hook(lambda _module, _inputs, logits: 2.0 * logits)
    with pytest.raises(ff.FastforgetError) as error:
        step.backward(make_batch(2, 1))
    return loss, str(error.value)


def test_hooks_on_a_sharded_head(tiny, tmp_path):
    (loss, message), (other, other_message) = in_processes(tmp_path, 2, hook, tiny["llama"])
    assert loss == other
    assert all("and of these each process may hold a part" in each for each in (message, other_message))


def fail(rank, folder):
    model = load_perturbed(folder)
    sharded_head(model, Shard(-1))
    step = ff.UnlearnStep(model, torch.optim.SGD, terms=[ff.NegatedCE()], lr=0.1)
    step(make_batch(2, 1))
    if rank == 1:
        stack_of(model)[1].register_forward_hook(lambda *_: 1 / 0)
    with pytest.raises((ff.FastforgetError, ZeroDivisionError)) as error:
        step.backward(make_batch(2, 1))
    return str(error.value)


def test_an_error_of_one_process_ends_those_that_share_a_vocabulary(tiny, tmp_path):
    message = "process 1 failed, so this one stops too: ZeroDivisionError: division by zero"
    assert in_processes(tmp_path, 2, fail, tiny["llama"]) == [message, "division by zero"]


def test_what_a_sharded_head_does_not_have_is_said(tiny, tmp_path):
    for messages in in_processes(tmp_path, 2, refused, tiny["llama"]):
        assert "10 rows from 0 on, of 20; 10 rows from 9 on, of 20" in messages["overlap"]
        assert messages["entropy"].startswith("entropy: of a head whose vocabulary is sharded")
        assert messages["embedding"].startswith("expected_embedding: a head whose vocabulary is sharded")
        assert messages["jsd"].startswith("jsd: a head whose vocabulary is sharded")
        assert messages["term"].startswith("logit_mean: of a head whose vocabulary is sharded")
        assert messages["trains"].startswith("the head trains") and messages["training"] == messages["trains"]
        assert "this needs all of it in each" in messages["eager"] and "this needs all of it" in messages["anchor"]
        assert "outside the vocabulary of 20" in messages["label"]
