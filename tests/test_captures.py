"""Every forward is a call of the model that the user gave: wrappers work, hooks fire, nothing is left in it."""

import warnings

import accelerate
import pytest
import torch
from accelerate.state import AcceleratorState, GradientState
from helpers import assert_gradients, gradients, make_batch, prepared, stack_of, tiny_model, token_log_probs
from torch._dynamo.testing import CompileCounterWithBackend
from transformers import Trainer, TrainingArguments

import fastforget as ff
from fastforget.backbone import Backbone
from fastforget.head import base_causal_lm

TERMS = {
    "to the head": lambda: [ff.NPO()],
    "to a layer": lambda: ff.preset("rmu", layer=0),
    "both": lambda: [ff.EmbeddingDistance(layer=0, metric="cosine"), ff.NegatedCE()],
}


@pytest.fixture
def accelerator():
    """accelerator(...) -> a fresh one, though Accelerate keeps its state for the whole process."""

    def reset():
        AcceleratorState._reset_state(True)
        GradientState._reset_state()

    reset()
    yield lambda **options: accelerate.Accelerator(cpu=True, **options)
    reset()


@pytest.fixture
def one_process():
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def gradients_of(model, inner, terms, **options):
    inner.zero_grad()
    step = ff.UnlearnStep(model, torch.optim.SGD, terms=terms, lr=0.1, **options)
    out = step.backward(make_batch(3, 1), make_batch(3, 2))
    return float(out.loss), gradients(inner)


def dtypes_of(module):
    """The dtypes that a module puts out, as it runs."""
    seen = []
    module.register_forward_hook(lambda _module, _inputs, output: seen.append(output.dtype))
    return seen


@pytest.mark.parametrize(
    ("terms", "in_place"), [("both", True), pytest.param("to the head", False, marks=pytest.mark.slow)]
)
def test_a_compiled_model_runs_its_graphs_and_compiles_once(model, terms, in_place):
    expected = gradients_of(model, model, TERMS[terms](), fuse=False)
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("eager")
    compiled = model
    if in_place:
        model.compile(backend=counter, dynamic=False)
    else:
        compiled = torch.compile(model, backend=counter, dynamic=False)
    step = ff.UnlearnStep(compiled, torch.optim.SGD, terms=TERMS[terms](), lr=0.0, fuse=False)
    counts = []
    for _ in range(3):
        model.zero_grad()
        out = step.backward(make_batch(3, 1), make_batch(3, 2))
        counts.append(counter.frame_count)
    assert counts[0] > 0 and counts[1:] == counts[:1] * 2, "graphs that one step made serve the next"
    assert float(out.loss) == pytest.approx(expected[0], rel=1e-5)
    assert_gradients(gradients(model), expected[1])
    with torch.no_grad():
        assert compiled(input_ids=make_batch(2, 1)["input_ids"]).logits.shape[-1] == 320, "its head is its own again"


def test_accelerate_computes_in_its_precision(model, accelerator):
    single = gradients_of(model, model, [ff.NPO(), ff.KL()])
    prepared_model = accelerator(mixed_precision="bf16").prepare(model)
    projection, layer = dtypes_of(stack_of(model)[0].self_attn.q_proj), dtypes_of(stack_of(model)[1].mlp.act_fn)
    loss, half = gradients_of(prepared_model, model, [ff.NPO(), ff.KL()])
    assert set(projection) == set(layer) == {torch.bfloat16}
    assert loss == pytest.approx(single[0], rel=2e-2) and loss != single[0]
    assert_gradients(half, single[1], 0.1)


def test_a_fresh_adapter_is_its_reference_in_any_precision(tiny, accelerator):
    prepared_model = accelerator(mixed_precision="bf16").prepare(ff.load(tiny["llama"], bits=32).train())
    assert float(ff.UnlearnLoss(prepared_model, [ff.KL(on="forget")])(make_batch(3, 1)).loss.detach()) == 0.0


def test_trainer_computes_in_its_precision(model, accelerator, tmp_path):
    projection = dtypes_of(stack_of(model)[0].self_attn.q_proj)
    losses = []

    class Unlearning(Trainer):
        def compute_loss(self, wrapped, inputs, **_):
            losses.append(ff.UnlearnLoss(wrapped, [ff.NPO()])(inputs).loss)
            return losses[-1]

    batch = make_batch(4, 1)
    rows = [{key: value[row] for key, value in batch.items()} for row in range(4)]
    arguments = TrainingArguments(
        str(tmp_path),
        per_device_train_batch_size=2,
        max_steps=2,
        bf16=True,
        use_cpu=True,
        report_to=[],
        save_strategy="no",
    )
    Unlearning(model, arguments, train_dataset=rows).train()
    assert len(losses) == 2 and set(projection) == {torch.bfloat16}


@pytest.mark.parametrize("terms", TERMS)
def test_ddp_reduces_what_a_step_computes(model, one_process, terms):
    expected = gradients_of(model, model, TERMS[terms]())
    wrapped = torch.nn.parallel.DistributedDataParallel(model, find_unused_parameters=terms == "to a layer")
    reduced = []

    def hook(_state, bucket):
        reduced.append(len(bucket.gradients()))
        future = torch.futures.Future()
        future.set_result(bucket.buffer() * 3)
        return future

    wrapped.register_comm_hook(None, hook)
    loss, tripled = gradients_of(wrapped, model, TERMS[terms]())
    used = {name for name, gradient in expected[1].items() if gradient.any()}
    assert reduced and loss == pytest.approx(expected[0], rel=1e-6)
    assert used
    for name in used:
        assert not torch.equal(tripled[name], expected[1][name]), name


def test_users_hooks_fire_and_nothing_is_left_also_after_an_error(model, batch):
    calls = []
    model.register_forward_hook(lambda *_: calls.append("outermost"))
    base_causal_lm(model).register_forward_hook(lambda *_: calls.append("causal LM"))
    side = prepared(batch(2, 1))
    backbone = Backbone(model)
    backbone.states(side.inputs, side.positions)
    calls.clear()
    for layers in ((None,), (0,), (None, 0)):
        backbone.states(side.inputs, side.positions, layers)
    assert calls == ["causal LM", "outermost"] * 3
    modules = [base_causal_lm(model), base_causal_lm(model).get_output_embeddings(), *stack_of(model)]
    before = [dict(vars(module)) for module in modules]
    hooks = [dict(module._forward_hooks) for module in modules]
    broken = stack_of(model)[1].register_forward_hook(lambda *_: 1 / 0)
    for layers in ((None,), (1,), (None, 1)):
        with pytest.raises(ZeroDivisionError):
            backbone.states(side.inputs, side.positions, layers)
    broken.remove()
    assert [vars(module) for module in modules] == before
    assert [dict(module._forward_hooks) for module in modules] == hooks


def test_a_forward_that_was_replaced_already_is_put_back(model, batch):
    head = base_causal_lm(model).get_output_embeddings()
    own = head.forward
    head.forward = lambda hidden: own(hidden)
    mine = head.forward
    side = prepared(batch(2, 1))
    Backbone(model).states(side.inputs, side.positions)
    assert head.forward is mine


CHANGES = {
    "a hook on the head": lambda model, head: head.register_forward_hook(lambda _module, _inputs, logits: 2.0 * logits),
    "a hook before the head": lambda model, head: head.register_forward_pre_hook(
        lambda _module, given: (2.0 * given[0],)
    ),
    "a hook on the causal LM": lambda model, head: base_causal_lm(model).register_forward_hook(louder),
    "a hook on the PEFT model": lambda model, head: model.register_forward_hook(louder),
}


def louder(_module, _inputs, output):
    output.logits = 2.0 * output.logits
    return output


def own_nll(model, batch):
    _, logp, labelled = token_log_probs(model, batch)
    return float(-logp[labelled].mean().detach())


def own_kl(model, batch):
    """From the model with its adapter off, in the same state."""
    log_probs, _, labelled = token_log_probs(model, batch)
    with model.disable_adapter():
        reference, _, _ = token_log_probs(model, batch)
    return float((reference.exp() * (reference - log_probs)).sum(-1)[labelled].mean().detach())


@pytest.mark.parametrize("change", CHANGES)
def test_what_users_add_to_the_head_after_the_first_batch_is_seen(model, batch, change, tmp_path):
    """And what the reference's cache holds from before is not used for it; without it all is as it was."""
    loss = ff.UnlearnLoss(model, [ff.CE(on="forget"), ff.KL(on="forget")], reference_cache_folder=tmp_path)
    first, entries = loss(batch(3, 1)), {path.name for path in tmp_path.iterdir()}
    plain = {"ce": float(first.terms["ce"]), "kl": float(first.terms["kl"])}
    assert plain == pytest.approx({"ce": own_nll(model, batch(3, 1)), "kl": own_kl(model, batch(3, 1))}, rel=1e-4)
    handle = CHANGES[change](model, base_causal_lm(model).get_output_embeddings())
    expected = {"ce": own_nll(model, batch(3, 1)), "kl": own_kl(model, batch(3, 1))}
    assert abs(expected["ce"] - plain["ce"]) > 1e-2 and abs(expected["kl"] - plain["kl"]) > 1e-3
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # where the head can no longer be read
        for _ in range(2):
            found = loss(batch(3, 1)).terms
            assert {name: float(value) for name, value in found.items()} == pytest.approx(expected, rel=1e-4)
    assert {path.name for path in tmp_path.iterdir()} == entries, "no file is of another run's hooks"
    handle.remove()
    assert {name: float(value) for name, value in loss(batch(3, 1)).terms.items()} == pytest.approx(plain, rel=1e-5)


def test_a_forward_that_replaces_the_heads_after_the_first_batch_is_seen(model, batch):
    loss = ff.UnlearnLoss(model, [ff.CE(on="forget")])
    loss(batch(3, 1))
    head = base_causal_lm(model).get_output_embeddings()
    own = head.forward
    head.forward = lambda hidden: own(hidden).clamp(-1.0, 1.0)
    with pytest.warns(UserWarning, match="using the model's own logits"):
        found = float(loss(batch(3, 1)).loss.detach())
    assert found == pytest.approx(own_nll(model, batch(3, 1)), rel=1e-5)


@pytest.mark.parametrize("place", ["layer", "head"])
def test_a_hook_that_calls_the_model_again_takes_no_states_from_the_batch(model, batch, place):
    """From the first batch on the model's own logits are used; where it comes later, that is an error."""
    head = base_causal_lm(model).get_output_embeddings()
    calls = []

    def again(*_):
        if not calls:
            calls.append(1)
            model(input_ids=torch.full((3, 20), 7))
            calls.clear()

    expected = own_nll(model, batch(3, 1))
    loss = ff.UnlearnLoss(model, [ff.CE(on="forget")])
    loss(batch(3, 1))
    (head if place == "head" else stack_of(model)[0]).register_forward_hook(again)
    with pytest.warns(UserWarning, match="using the model's own logits"):
        found = ff.UnlearnLoss(model, [ff.CE(on="forget")])(batch(3, 1)).loss
    assert float(found.detach()) == pytest.approx(expected, rel=1e-5)
    if place == "layer":
        with pytest.raises(ff.FastforgetError, match="the model's head ran more than once in one forward"):
            loss(batch(3, 1))


def test_the_head_is_checked_once_where_nothing_changes(model, batch, monkeypatch):
    checks = []
    own = Backbone.check
    monkeypatch.setattr(Backbone, "check", lambda self, inputs: checks.append(1) or own(self, inputs))
    step = ff.UnlearnStep(model, torch.optim.SGD, terms="npo", lr=0.1)
    for seed in range(3):
        step(batch(2, seed), batch(2, 7), micro_batch=1)
        model.eval()
    assert len(checks) == 1


def test_what_follows_the_head_may_want_logits(batch):
    """Where it does, the model's own logits are used, and said to be."""
    model = tiny_model("llama")
    original = type(model).forward

    class Masked(type(model)):
        def forward(self, *arguments, **named):
            output = original(self, *arguments, **named)
            output.logits = output.logits + self.bias
            return output

    model.__class__, model.bias = Masked, torch.linspace(-3, 3, 320)
    side = prepared(batch(2, 1))
    with pytest.warns(UserWarning, match="using the model's own logits"):
        states = Backbone(model).states(side.inputs, side.positions)[None]
    own = model(**side.inputs).logits
    assert torch.equal(states, own[side.positions])
