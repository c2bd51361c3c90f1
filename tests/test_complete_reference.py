"""reference='cache': what a model said before it trained, where nothing that is left in memory is that model."""

import copy

import accelerate
import peft
import pytest
import torch
from accelerate.state import AcceleratorState, GradientState
from helpers import adapter_of, assert_gradients, make_batch, stack_of, tiny_model
from integrations.loops import assert_same_weights
from processes import in_processes
from test_adapter_loops import adapted, batches, moved, trained, written_out
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import fastforget as ff
from fastforget.shards import whole


def full():
    """All weights train but the head's, with which KL compares distributions."""
    model = tiny_model("llama")
    model.get_output_embeddings().requires_grad_(False)
    return moved(model)


def with_biases():
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "fc1"], bias="all")
    torch.manual_seed(1)
    return moved(peft.get_peft_model(tiny_model("opt", dropout=0.0), config))


MODELS = {
    "full fine-tuning": full,
    "LoRA with trained biases": with_biases,
    "PiSSA": lambda: adapted(peft.LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights="pissa")),
}


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("folder", [False, True], ids=["memory", "folder"])
def test_five_steps_are_those_against_a_copy(kind, folder, tmp_path):
    models = [MODELS[kind]() for _ in range(2)]
    reference = copy.deepcopy(models[1]).eval().requires_grad_(False)
    # AdamW would make an update of a weight whose gradient is 0 but for rounding, a key's bias say
    expected = written_out(models[1], reference, torch.optim.SGD(trained(models[1]), lr=1e-2))
    options = {"reference_cache_folder": tmp_path, "reference_cache_bytes": 10_000} if folder else {}
    terms = [ff.NPO(), ff.KL()]
    step = ff.UnlearnStep(models[0], torch.optim.SGD, terms=terms, reference="cache", lr=1e-2, **options)
    assert step.cache_reference((batches(number) for number in range(5)), micro_batch=2) == 25
    forwards = step.loss.reference.forwards
    losses = [float(step(*batches(number), micro_batch=1).loss) for number in range(5)]
    assert losses == pytest.approx(expected, rel=1e-5)
    assert_same_weights(*models)
    assert step.loss.reference.forwards == forwards
    assert (step.loss.reference.bytes_used < 10_000) == folder
    if folder:  # another run finds all of it, without asking the model
        again = ff.UnlearnLoss(MODELS[kind](), terms, reference="cache", reference_cache_folder=tmp_path)
        assert float(again(*batches(0)).loss.detach()) == pytest.approx(expected[0], rel=1e-5)
        assert again.reference.forwards == 0


def test_terms_of_log_probs_with_a_head_that_trains_and_with_companions():
    def sides(number):
        forget, retain = batches(number)
        return {**forget, "mismatch": make_batch(4, 100 + number), "refusal": make_batch(3, 200 + number)}, retain

    models = [moved(tiny_model("llama")) for _ in range(2)]
    reference = copy.deepcopy(models[1]).requires_grad_(False)
    terms = [ff.KTO(), ff.DPO(), ff.HiddenMSE(layer=1), ff.CE()]
    steps = [
        ff.UnlearnStep(model, torch.optim.SGD, terms=terms, reference=given, lr=0.01)
        for model, given in zip(models, ("cache", reference), strict=True)
    ]
    steps[0].cache_reference([sides(0), sides(1)])
    for number in (0, 1):
        ours, theirs = (step(*sides(number)) for step in steps)
        assert float(ours.loss) == pytest.approx(float(theirs.loss), rel=1e-5)
    assert_same_weights(*models)


def wide(batch):
    """The same rows with more padding."""
    return {
        key: torch.nn.functional.pad(value, (0, 3), value=-100 if key == "labels" else 0)
        for key, value in batch.items()
    }


def test_an_example_is_known_by_its_content_in_any_batch():
    model = full()
    step = ff.UnlearnStep(model, torch.optim.SGD, terms=[ff.NPO(), ff.KL()], reference="cache", lr=0.1)
    forget, retain = batches(0)
    assert step.cache_reference([(forget, None)]) == 3
    flat = {key: torch.cat([retain[key]] * 2) for key in retain} | {"role": torch.tensor([1, 1, 1, 1])}
    assert step.cache_reference([flat]) == 5
    step({key: value.flip(0) for key, value in forget.items()}, wide(retain))
    step(forget, retain)


def test_what_is_not_there_is_said():
    step = ff.UnlearnStep(full(), torch.optim.SGD, terms=[ff.NPO(), ff.KL()], reference="cache", lr=0.1)
    step.cache_reference([batches(0)])
    forget, retain = batches(0)
    with pytest.raises(ff.FastforgetError, match="row 0 of the forget batch is not in the cache, which knows 5 examp"):
        step(batches(1)[0], retain)
    with pytest.raises(ff.FastforgetError, match=r"row 0 of the retain batch.*each side on its own side"):
        step(forget, forget)
    assert all(parameter.grad is None for parameter in step.model.parameters())
    step(forget, retain)
    with pytest.raises(ff.FastforgetError, match="cache_reference: the model has been trained already"):
        step.cache_reference([batches(1)])
    loss = step.loss
    with pytest.raises(ff.FastforgetError, match="the model has changed since the first examples were cached"):
        loss.cache_reference([batches(1)])
    step.loss.backbone.model.lm_head.register_forward_hook(lambda *_: None)
    with pytest.raises(ff.FastforgetError, match="was put on the head since the reference was cached"):
        step(forget, retain)


def test_what_cannot_be_is_said(tmp_path):
    def refusal(model, act, terms="npo", **options):
        with pytest.raises(ff.FastforgetError) as error:
            act(ff.UnlearnLoss(model, terms, **{"reference": "cache", **options}))
        return str(error.value)

    def cache(loss):
        loss.cache_reference([batches(0)])

    def cache_unknown(loss):
        forget, retain = batches(0)
        loss.cache_reference([({**forget, "scale": torch.ones(())}, retain)])

    assert "takes more than reference_cache_bytes=100" in refusal(full(), cache, reference_cache_bytes=100)
    assert "have inputs that belong" not in refusal(full(), cache_unknown)
    assert "has inputs that belong to no row" in refusal(full(), cache_unknown)
    assert "must be a model, 'cache' or None, not 'copy'" in refusal(full(), cache, reference="copy")
    assert "make the step or loss with reference='cache'" in refusal(
        full(), cache, reference=full().requires_grad_(False)
    )
    assert "one frozen head" in refusal(tiny_model("llama"), cache, [ff.KL(on="forget")])
    assert "give pairs (forget, retain)" in refusal(full(), lambda loss: loss.cache_reference([batches(0)[0]]))


def test_an_accelerator_and_another_attach_keep_what_is_known():
    for state in (lambda: AcceleratorState._reset_state(True), GradientState._reset_state):
        state()
    models = [full() for _ in range(2)]
    step = ff.UnlearnStep(models[0], torch.optim.SGD, terms=[ff.NPO(), ff.KL()], reference="cache", lr=0.1)
    step.cache_reference([batches(0), batches(1)])
    step.prepare(accelerate.Accelerator(cpu=True))
    reference = copy.deepcopy(models[1]).requires_grad_(False)
    other = ff.UnlearnStep(models[1], torch.optim.SGD, terms=[ff.NPO(), ff.KL()], reference=reference, lr=0.1)
    for number in range(2):
        step(*batches(number))
        other(*batches(number))
        step.attach(step.model, "cache")
    assert_same_weights(*models)
    AcceleratorState._reset_state(True)
    GradientState._reset_state()


def test_another_model_has_not_said_what_the_one_before_it_said():
    step = ff.UnlearnStep(full(), torch.optim.SGD, terms=[ff.NPO(), ff.KL()], reference="cache", lr=0.1)
    step.cache_reference([batches(0)])
    step.attach(full(), "cache")
    with pytest.raises(ff.FastforgetError, match="is not in the cache, which knows 0 examples"):
        step(*batches(0))


def test_a_folder_serves_without_memory(tmp_path):
    options = {"reference_cache_folder": tmp_path, "reference_cache_bytes": 0}
    loss = ff.UnlearnLoss(full(), [ff.NPO(), ff.KL()], reference="cache", **options)
    assert loss.cache_reference([batches(0)]) == 5
    kl = loss(*batches(0)).terms["kl"]
    assert float(kl) == pytest.approx(0.0, abs=1e-6)
    assert loss.reference.forwards == 2 and loss.reference.bytes_used == 0


def cache_alone(rank):
    """A process has nothing to cache, and another one has."""
    step = ff.UnlearnStep(DistributedDataParallel(full()), torch.optim.SGD, terms=[ff.KL()], reference="cache", lr=0.1)
    known = step.cache_reference([batches(0)] * rank)
    out = step.backward(*((None, batches(0)[1]) if rank else (None, None)))
    return known, float(out.loss)


@pytest.mark.skipif(torch.cuda.is_available(), reason="forks, which autograd's threads for GPUs forbid")
def test_a_process_with_nothing_to_cache_holds_up_no_other(tmp_path):
    first, second = in_processes(tmp_path, 2, cache_alone)
    assert (first[0], second[0]) == (0, 2) and first[1] == second[1] == pytest.approx(0.0, abs=1e-6)


def part(number, rank):
    """A process's rows of a batch; the second one has fewer batches, and none to forget in its first."""
    return (None if rank and not number else make_batch(3 - rank, 10 * number + rank)), make_batch(
        2, 50 + number + rank
    )


def fine_tune(ranks, reference):
    model = full()
    given = copy.deepcopy(model).requires_grad_(False) if reference is None else reference
    if len(ranks) == 1:
        for layer in stack_of(model):
            fully_shard(layer)
        fully_shard(model)
    terms = [ff.NPO(beta=0.5), ff.KL(weight=0.5)]
    step = ff.UnlearnStep(model, torch.optim.SGD, terms=terms, reference=given, lr=0.05, momentum=0.9)
    if reference == "cache":
        known = [(number, rank) for rank in ranks for number in range(3 - rank)]
        step.cache_reference((part(*each) for each in known), micro_batch=2)
    for number in (0, 1, 0):
        parts = [part(number, rank) for rank in ranks]
        counts = ff.count_labels(parts)
        for each in parts:
            step.backward(*each, counts=counts)
        step.step()
        step.zero_grad()
    return {name: whole(tensor) for name, tensor in adapter_of(model).items()}


def fine_tune_shards(rank):
    return fine_tune((rank,), "cache")


@pytest.mark.skipif(torch.cuda.is_available(), reason="forks, which autograd's threads for GPUs forbid")
def test_processes_with_shards_cache_what_they_see(tmp_path):
    expected = fine_tune((0, 1), None)
    assert_gradients(fine_tune((0, 1), "cache"), expected)
    for weights in in_processes(tmp_path, 2, fine_tune_shards):
        assert_gradients(weights, expected)
