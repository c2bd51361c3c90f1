"""Processes with shards of one model (FSDP2) are one: losses, gradients, weights and scalars."""

import contextlib
import copy
import io
import math
import runpy
from pathlib import Path

import pytest
import torch
from conftest import FORGET_TEXT, RETAIN_TEXT
from helpers import (
    BreaksAt,
    adapter_of,
    assert_gradients,
    gradients,
    load_perturbed,
    make_batch,
    same,
    stack_of,
    tiny_model,
)
from integrations.loops import flat, rows
from peft import PeftModel
from processes import calls_with_mismatched, five_steps, in_processes, merged, micro_batches
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, FullyShardedDataParallel, fully_shard
from transformers import AutoModelForCausalLM

import fastforget as ff
from fastforget.collectives import ProcessFailedError, attempt
from fastforget.data.examples import Example
from fastforget.evaluate.leakage import mean_nll
from fastforget.memory import checkpoint_layers
from fastforget.shards import local, reshard, whole

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="forks, which autograd's threads for GPUs forbid")

TERMS = [ff.NPO(weight=0.5), ff.DualCE(), ff.KL(weight=0.7)]


def shard_layers(model, **options):
    for layer in stack_of(model):
        fully_shard(layer, **options)
    return model


def shard(model, mesh=None, **options):
    return fully_shard(shard_layers(model, mesh=mesh, **options), mesh=mesh, **options)


def whole_of(tensors):
    return {name: whole(tensor) for name, tensor in tensors.items()}


def train(rank, folder, shape):
    mesh = init_device_mesh("cpu", shape, mesh_dim_names=("replicas", "shards")[-len(shape) :])
    model = shard(load_perturbed(folder), mesh)
    step = ff.UnlearnStep(model, torch.optim.AdamW, terms=TERMS, lr=1e-3)
    losses, scalars = five_steps(step, lambda number: micro_batches(number, rank))
    return whole_of(adapter_of(model)), losses, scalars


@pytest.mark.parametrize("shape", [(2,), (4,), pytest.param((2, 2), marks=pytest.mark.slow)])
def test_five_steps_over_shards_are_those_of_one_process(shape, tiny, tmp_path):
    count = math.prod(shape)
    results = in_processes(tmp_path, count, train, tiny["llama"], shape)
    model = load_perturbed(tiny["llama"])
    step = ff.UnlearnStep(model, torch.optim.AdamW, terms=TERMS, lr=1e-3)
    expected, expected_scalars = five_steps(
        step, lambda number: [batch for rank in range(count) for batch in micro_batches(number, rank)]
    )
    for weights, losses, scalars in results:
        assert losses == results[0][1] == pytest.approx(expected, rel=1e-5)
        assert scalars == results[0][2] == pytest.approx(expected_scalars, rel=1e-5)
        assert_gradients(weights, adapter_of(model))


def sides(number, rank):
    """Rows of each side for a process: of uneven numbers, and none to forget for the second one at odd steps."""
    forgets = (5, 0 if number % 2 else 1)[rank]
    return rows(forgets, 50 * number + rank), rows(2 + rank, 50 * number + rank + 20)


def batch_for(number, ranks):
    pairs = [sides(number, rank) for rank in ranks]
    return flat([row for forget, _ in pairs for row in forget], [row for _, retain in pairs for row in retain])


@torch.no_grad()
def evaluate(model):
    """Run a forward, which leaves the weights of a root gathered, whatever becomes of the shards."""
    model(input_ids=torch.ones((1, 3), dtype=torch.int64))


def fine_tune(tied, ranks):
    """Full fine-tuning with micro-batches and clipping: losses, norms, and the weights after three steps."""
    model = tiny_model("llama").train()
    if tied:
        model.lm_head.weight = model.model.embed_tokens.weight
    reference = copy.deepcopy(model).requires_grad_(False)
    if len(ranks) == 1:
        shard(model)
        if tied:
            shard(reference)
    parameters = list(model.parameters())
    evaluate(model)
    terms = [ff.NPO(weight=0.5, beta=0.5), ff.CE()]
    step = ff.UnlearnStep(model, torch.optim.SGD, terms=terms, reference=reference, lr=0.05, momentum=0.9)
    figures = []
    for number in range(3):
        figures.append(float(step.backward(batch_for(number, ranks), micro_batch=2).loss))
        figures.append(float(whole(torch.nn.utils.clip_grad_norm_(parameters, 1.0))))
        evaluate(model)
        step.step()
        step.zero_grad()
    reshard(model)
    return whole_of(adapter_of(model)), figures


def fine_tune_shards(rank):
    return [fine_tune(tied, (rank,)) for tied in (False, True)]


def test_full_fine_tuning_over_shards_with_a_head_that_trains(tmp_path):
    for results in in_processes(tmp_path, 2, fine_tune_shards):
        for tied, (weights, figures) in enumerate(results):
            expected, expected_figures = fine_tune(tied, (0, 1))
            assert figures == pytest.approx(expected_figures, rel=1e-5)
            assert_gradients(weights, expected)


def push_states(ranks):
    """Gradients of a head that trains where what the second process has nothing of does not reach it."""
    model = tiny_model("llama").train()
    if len(ranks) == 1:
        shard(model)
    terms = [ff.EmbeddingDistance(anchor=torch.zeros(64), margin=1e3), ff.CE()]
    step = ff.UnlearnStep(model, torch.optim.SGD, terms=terms, lr=0.1)
    loss = float(step.backward(batch_for(1, ranks)).loss)
    return loss, whole_of(gradients(model))


def push_states_over_shards(rank):
    return push_states((rank,))


def test_a_head_that_trains_in_one_side_alone(tmp_path):
    expected_loss, expected = push_states((0, 1))
    for loss, found in in_processes(tmp_path, 2, push_states_over_shards):
        assert loss == pytest.approx(expected_loss, rel=1e-5)
        assert_gradients(found, expected)


def left_padded(batch):
    """The same rows with padding on the left, where the first tokens then have places of their own."""
    padded = {key: torch.cat([value[:, :1] * 0, value], 1) for key, value in batch.items() if key != "role"}
    padded["labels"][:, 0] = -100
    return {**padded, "role": batch["role"]}


def gradients_of_steps(folder, ranks, checkpointing):
    """Gradients of LoRA after calls of which one repeats a batch, pads on the left, or has nothing to forget."""
    model = load_perturbed(folder)
    if checkpointing:
        checkpoint_layers(model)
    if len(ranks) == 1:
        shard(model)
    found = {}
    terms = {"kl": [ff.UNDIAL(), ff.KL(weight=0.7)], "layer": ff.preset("rmu", layer=0, alpha=3.0)}
    for name, own in terms.items():
        step = ff.UnlearnStep(model, torch.optim.SGD, terms=own, lr=0.1)
        for place, numbers in enumerate(((0, 0), (1, 1), (0, 2), (2, 1))):  # the reference's cache has those seen
            parts = [batch_for(number, (rank,)) for rank, number in enumerate(numbers) if rank in ranks]
            if place == 2 and 1 in ranks:
                parts[-1] = left_padded(parts[-1])
            counts = ff.count_labels(parts)
            for part in parts:
                step.backward(part, micro_batch=3, counts=counts)
            found |= {(name, place, key): whole(each) for key, each in gradients(model).items()}
            step.zero_grad()
    return found


def gradients_with_companions(folder, ranks):
    """The loss and gradients of terms that compare answers; the second process has nothing to forget."""
    model = load_perturbed(folder)
    if len(ranks) == 1:
        shard(model)
    terms = [ff.DPO(), ff.RandomMismatch(), ff.CE()]
    step = ff.UnlearnStep(model, torch.optim.SGD, terms=terms, lr=0.1)
    forget = {**make_batch(3, 1), "refusal": make_batch(3, 2), "mismatch": make_batch(5, 3)}
    parts = [(forget if rank == 0 else None, make_batch(2 + rank, 4 + rank)) for rank in ranks]
    counts = ff.count_labels(parts)
    loss = sum(float(step.backward(*part, counts=counts, micro_batch=2).loss) for part in parts)
    return loss, {name: whole(gradient) for name, gradient in gradients(model).items()}


OTHERS = {"mgda": (TERMS, "mgda"), "pcgrad": (TERMS, "pcgrad"), "kto": ([ff.KTO(beta=0.5), ff.CE()], "sum")}


def train_others(folder, ranks):
    """Losses and weights after three steps of combined sides, and of KTO, whose mean is over the batch of all."""
    found = {}
    for name, (terms, combine) in OTHERS.items():
        model = load_perturbed(folder)
        if len(ranks) == 1:
            shard(model)
        step = ff.UnlearnStep(model, torch.optim.AdamW, terms=terms, lr=1e-3, combine=combine)
        losses = []
        for number in range(3):
            calls = [calls_with_mismatched(number, rank)[0] for rank in ranks]
            losses.append(float(step(merged(calls), micro_batch=2).loss))
        found[name] = losses, whole_of(adapter_of(model))
    return found


def others_over_shards(rank, folder):
    return train_others(folder, (rank,))


def test_combined_gradients_and_constants_of_a_batch_over_shards(tiny, tmp_path):
    expected = train_others(tiny["llama"], (0, 1))
    for found in in_processes(tmp_path, 2, others_over_shards, tiny["llama"]):
        for name, (losses, weights) in found.items():
            assert losses == pytest.approx(expected[name][0], rel=1e-5), name
            assert_gradients(weights, expected[name][1])


def companions_over_shards(rank, folder):
    return gradients_with_companions(folder, (rank,))


def test_companions_over_shards(tiny, tmp_path):
    expected_loss, expected = gradients_with_companions(tiny["llama"], (0, 1))
    for loss, found in in_processes(tmp_path, 2, companions_over_shards, tiny["llama"]):
        assert loss == pytest.approx(expected_loss, rel=1e-5)
        assert_gradients(found, expected)


def gradients_over_shards(rank, folder):
    return gradients_of_steps(folder, (rank,), True)


def test_gradients_with_caches_checkpointing_and_padding_of_their_own(tiny, tmp_path):
    expected = gradients_of_steps(tiny["llama"], (0, 1), False)
    for found in in_processes(tmp_path, 2, gradients_over_shards, tiny["llama"]):
        # FSDP2 gives weights of layers that a forward does not reach no gradient, as one process does
        assert_gradients(found, expected)


def nll_of(model):
    return mean_nll(model, [Example(tuple(range(first, first + 9)), 3) for first in (1, 20, 40)], batch_size=2)


def measured(rank, folder):
    return nll_of(shard(load_perturbed(folder)))


def test_evaluation_over_shards(tiny, tmp_path):
    expected = nll_of(load_perturbed(tiny["llama"]))
    assert in_processes(tmp_path, 2, measured, tiny["llama"]) == pytest.approx([expected] * 2, rel=1e-6)


def hooked(rank, folder):
    """The losses of steps before which one process puts a hook on its head."""
    model = shard(load_perturbed(folder))
    step = ff.UnlearnStep(model, torch.optim.SGD, terms=[ff.KL(on="forget"), ff.CE()], lr=0.1)
    losses = []
    for number in range(2):
        losses.append(float(step(batch_for(number, (rank,))).loss))
        if rank == 0:
            model.get_base_model().lm_head.register_forward_hook(lambda *_: None)
    return losses


def test_a_hook_on_the_head_of_one_process(tiny, tmp_path):
    first, second = in_processes(tmp_path, 2, hooked, tiny["llama"])
    assert first == second


def guarded(rank, folder):
    """A step that is skipped, an error that both have, and one in the middle of a forward, which ends both."""
    model = shard(load_perturbed(folder))
    step = ff.UnlearnStep(model, torch.optim.SGD, terms=[BreaksAt(step=2), ff.KL()], lr=0.1)
    good = whole_of(adapter_of(model))
    step(batch_for(0, (rank,)))
    moved = not same(whole_of(adapter_of(model)), good)
    step(batch_for(1, (rank,)))  # of whose loss the first process has a share that is NaN: the last update is undone
    step.guard.settle()
    kept = step.guard.skipped, moved and same(whole_of(adapter_of(model)), good)
    step = ff.UnlearnStep(model, torch.optim.SGD, terms=[ff.NegatedCE()], lr=0.1)
    step.backward(make_batch(2, rank))
    before, messages = gradients(model), []
    for bad in (rank == 0, rank == 1):
        with pytest.raises(ff.FastforgetError) as error:
            step.backward({"input_ids": torch.ones(1, 2)} if bad else make_batch(2, rank))
        messages.append(str(error.value))
        assert all(torch.equal(local(before[key]), local(each)) for key, each in gradients(model).items())
    calls = []
    with pytest.raises((ZeroDivisionError, ProcessFailedError)):  # of all of them, once there were gradients
        step.backward(
            make_batch(4, rank),
            micro_batch=2,
            backward=lambda loss: calls.append(loss.backward()) or 1 / (2 - len(calls)),
        )
    assert len(calls) == 2
    assert all(torch.equal(local(before[key]), local(each)) for key, each in gradients(model).items())
    loss = float(step.backward(make_batch(2, rank)).loss)
    if rank == 1:
        stack_of(model)[1].register_forward_hook(lambda *_: 1 / 0)
    with pytest.raises(ff.FastforgetError if rank == 0 else ZeroDivisionError) as last:
        step.backward(make_batch(2, rank))
    return kept, loss, messages, str(last.value)


def test_the_guard_and_errors_over_shards(tiny, tmp_path):
    first, second = in_processes(tmp_path, 2, guarded, tiny["llama"])
    assert first[0] == second[0] == (1, True)
    assert first[1] == second[1]
    assert "it has no 'labels'" in first[2][0] and second[2][0].startswith("process 0 failed, so this one stops too:")
    assert "it has no 'labels'" in second[2][1] and first[2][1].startswith("process 1 failed, so this one stops too:")
    assert second[3] == "division by zero"
    assert first[3] == "process 1 failed, so this one stops too: ZeroDivisionError: division by zero"


def refused(rank, folder):
    def refusal(model, micro_batch=None, **options):
        with pytest.raises(ff.FastforgetError) as error:
            ff.UnlearnStep(model, torch.optim.SGD, **{"terms": "npo", "lr": 0.1, **options}).backward(
                make_batch(2, 1), make_batch(2, 1), micro_batch=micro_batch
            )
        return str(error.value)

    def postponed(model):
        model.set_requires_gradient_sync(False)
        return model

    quantised = load_perturbed(folder, bits=8)
    fully_shard(quantised.get_base_model().model.norm)
    older = FullyShardedDataParallel(load_perturbed(folder), device_id=torch.device("cpu"), use_orig_params=True)
    alone = fully_shard(load_perturbed(folder), mesh=init_device_mesh("cpu", (2, 1), mesh_dim_names=("a", "b"))["b"])
    return {
        "quantised": refusal(quantised),
        "older": refusal(older),
        "alone": refusal(alone),
        "partly": refusal(shard_layers(tiny_model("llama")), terms=[ff.NegatedCE()]),
        "folder": refusal(shard(load_perturbed(folder)), reference_cache_folder=folder / "cache"),
        "combine": refusal(postponed(shard(load_perturbed(folder))), combine="pcgrad"),
        "offloaded": refusal(shard(load_perturbed(folder), offload_policy=CPUOffloadPolicy(pin_memory=False))),
        "joint": refusal(shard(load_perturbed(folder)), passes="joint"),
        "auto": refusal(shard(load_perturbed(folder)), micro_batch="auto"),
        "saving": str(attempt(lambda: ff.save_adapter(shard(load_perturbed(folder)), None, folder / "out"))[1]),
    }


def test_what_cannot_be_sharded_is_said(tiny, tmp_path):
    for messages in in_processes(tmp_path, 2, refused, tiny["llama"]):
        assert "is quantised, and FSDP2 would shard its codes" in messages["quantised"]
        assert "embed_tokens.weight trains, and FSDP2 does not shard it" in messages["partly"]
        assert messages["older"].startswith("FullyShardedDataParallel (FSDP1) flattens weights")
        assert "is sharded over 1 of 2 processes" in messages["alone"]
        assert messages["folder"].startswith("reference_cache_folder:")
        assert "each process holds a part of this adapter" in messages["saving"]
        assert "leave set_requires_gradient_sync(False) out" in messages["combine"]
        assert messages["offloaded"].startswith("FSDP2's CPUOffloadPolicy is not supported")
        assert messages["joint"].startswith("passes='joint' does not work under FSDP2")
        assert messages["auto"].startswith("micro_batch='auto' does not work where weights are sharded")


def run_example(rank, *arguments):
    """The lines that the example prints."""
    path = Path(__file__).parents[1] / "examples" / "fsdp2.py"
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        runpy.run_path(str(path))["main"](*arguments)
    return printed.getvalue().splitlines()


def test_the_example_saves_an_adapter_that_peft_loads(tiny, tmp_path):
    for name, text in (("forget.txt", FORGET_TEXT), ("retain.txt", RETAIN_TEXT)):
        (tmp_path / name).write_text(text)
    texts = [str(tmp_path / name) for name in ("forget.txt", "retain.txt")]
    first, second = in_processes(tmp_path, 2, run_example, str(tiny["llama"]), *texts, str(tmp_path / "out"))
    assert len(first) == 4 and all(line.startswith("loss") for line in first) and second == []
    base = AutoModelForCausalLM.from_pretrained(tiny["llama"])
    loaded = PeftModel.from_pretrained(base, tmp_path / "out")
    moved = [value for name, value in loaded.named_parameters() if "lora_B" in name]
    assert moved and all(float(value.detach().norm()) > 0 for value in moved)
