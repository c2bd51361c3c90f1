"""ff.compile_layers: the gradients of layers that are not compiled, and everything around a layer as it is."""

import copy
import warnings

import pytest
import torch
from architectures import ARCHITECTURES, save_architecture
from helpers import gradients, load_perturbed, stack_of
from torch._dynamo.testing import CompileCounterWithBackend

import fastforget as ff
from fastforget.compiling import CompiledForward
from fastforget.memory import checkpoint_layers


@pytest.fixture(autouse=True)
def own_graphs():
    """Compiled code of other tests counts against no limit of this one's."""
    torch._dynamo.reset()


def step_gradients(model, forget, retain, terms="npo", **options):
    step = ff.UnlearnStep(model, torch.optim.SGD, terms=terms, lr=0.0)
    step.backward(forget, retain, **options)
    found = gradients(model)
    step.zero_grad()
    return found


def assert_close(found, expected, tolerance=1e-5):
    assert found.keys() == expected.keys() != set()
    for name, gradient in found.items():
        assert float((gradient - expected[name]).norm()) <= tolerance * float(expected[name].norm()), name


def compiled_pair(folder, bits=8, backend="aot_eager"):
    """A compiled model, one that is not, and the counter of what is compiled."""
    model, plain = load_perturbed(folder, bits), load_perturbed(folder, bits)
    counter = CompileCounterWithBackend(backend)
    assert ff.compile_layers(model, backend=counter, progress=None)
    assert counter.frame_count > 0
    return model, plain, counter


@pytest.mark.parametrize("bits", [32, 8])
def test_gradients_of_the_step(tiny, batch, bits):
    """With the reference, other lengths, micro-batches and checkpointing; other lengths compile nothing more."""
    model, plain, counter = compiled_pair(tiny["llama"], bits)
    assert model.state_dict().keys() == plain.state_dict().keys()
    counts = []
    for width in (20, 33):
        sides = batch(3, 1, width), batch(4, 2, width)
        assert_close(step_gradients(model, *sides), step_gradients(plain, *sides))
        counts.append(counter.frame_count)
    assert counts[0] == counts[1]
    assert_close(step_gradients(model, *sides, micro_batch=1), step_gradients(plain, *sides))
    checkpoint_layers(model)
    assert_close(step_gradients(model, *sides), step_gradients(plain, *sides))


def test_hooks_that_come_later(tiny, batch):
    """Of a layer (RMU's, which ends the forward there) and inside one; and what they see is what is differentiated."""
    model, plain, _ = compiled_pair(tiny["llama"])
    sides = batch(3, 1), batch(2, 2)
    for terms in ("npo", ff.preset("rmu", layer=0), ff.preset("rmu", layer=1), "npo"):
        assert_close(step_gradients(model, *sides, terms), step_gradients(plain, *sides, terms))
    found = []
    for each in (model, plain):
        called = []
        inner = stack_of(each)[1].self_attn.q_proj.lora_A["default"]
        handle = inner.register_forward_hook(
            lambda _module, _inputs, output, called=called: called.append(output.shape)
        )
        found.append((step_gradients(each, *sides), called))
        handle.remove()
    assert_close(found[0][0], found[1][0])
    assert found[0][1] == found[1][1] != []


def test_layers_fused_after_they_were_compiled(tiny, batch):
    model = load_perturbed(tiny["llama"], 8)
    ff.unfuse(model)
    ff.compile_layers(model, backend="aot_eager", progress=None)
    sides = batch(3, 1), batch(2, 2)
    found = step_gradients(model, *sides)  # the step fuses
    assert_close(found, step_gradients(load_perturbed(tiny["llama"], 8), *sides))


def test_nothing_of_a_trial_remains(tiny, batch):
    model = load_perturbed(tiny["llama"], 8).eval()
    parameter = next(each for each in model.parameters() if each.requires_grad)
    parameter.grad = torch.ones_like(parameter)
    before = parameter.grad, torch.get_rng_state(), [each.training for each in model.modules()]
    lines = []
    assert ff.compile_layers(model, backend="aot_eager", progress=lines.append)
    assert [line.split()[0] for line in lines] == ["Compiling", "Compiled"] and "2 decoder layers" in lines[0]
    assert parameter.grad is before[0] and torch.equal(parameter.grad, torch.ones_like(parameter))
    assert gradients(model).keys() == {next(name for name, each in model.named_parameters() if each is parameter)}
    assert torch.equal(torch.get_rng_state(), before[1])
    assert [each.training for each in model.modules()] == before[2]
    assert ff.compile_layers(model, backend="nothing compiles again", progress=lines.append) and len(lines) == 2


def test_generation_is_not_compiled(tiny):
    model, plain, counter = compiled_pair(tiny["llama"])
    count = counter.frame_count
    ids = torch.arange(5, 17)[None]
    texts = [each.eval().generate(input_ids=ids, max_new_tokens=8, do_sample=False) for each in (model, plain)]
    assert torch.equal(*texts) and counter.frame_count == count


def test_a_copy_is_compiled_over_its_own_weights(tiny, batch):
    model, plain, _ = compiled_pair(tiny["llama"])
    other = copy.deepcopy(model)
    sides = batch(3, 1), batch(2, 2)
    for each in other.parameters():
        if each.requires_grad:
            each.data.zero_()
    assert not any(float(each.norm()) for name, each in step_gradients(other, *sides).items() if "lora_A" in name)
    assert CompiledForward.has_replaced(stack_of(other)[0])
    assert_close(step_gradients(model, *sides), step_gradients(plain, *sides))


class Refusing:
    """A backend that compiles so many graphs, and no more."""

    def __init__(self, most):
        self.left = most

    def __call__(self, graph, inputs):
        self.left -= 1
        if self.left < 0:
            raise NotImplementedError("no compiler here")
        return graph.forward


@pytest.mark.parametrize("most", [0, 100])
def test_a_model_that_cannot_be_compiled(tiny, batch, most):
    """At once, or later, when something needs another graph: one warning, and right results."""
    model, plain = load_perturbed(tiny["llama"], 8), load_perturbed(tiny["llama"], 8)
    backend = Refusing(most)
    sides = batch(3, 1), batch(2, 2)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        compiled = ff.compile_layers(model, backend=backend, progress=None)
        backend.left = 0
        found = step_gradients(model, *sides, micro_batch=1)
    messages = [str(each.message) for each in caught if "cannot be compiled" in str(each.message)]
    assert compiled is (most > 0) and len(messages) == 1 and "no compiler here" in messages[0]
    assert_close(found, step_gradients(plain, *sides, micro_batch=1))


def test_a_layer_that_something_else_has_replaced(tiny):
    model = load_perturbed(tiny["llama"], 8)
    layer = stack_of(model)[1]
    layer.forward = own = layer.forward
    with pytest.warns(UserWarning, match="cannot be compiled.*something else has replaced"):
        assert not ff.compile_layers(model, backend="aot_eager", progress=None)
    assert layer.forward is own and "forward" not in vars(stack_of(model)[0])


def test_load_compiles(tiny, monkeypatch):
    calls = []
    monkeypatch.setattr("fastforget.models.compile_layers", calls.append)
    assert ff.load(tiny["llama"], compile=True) is calls[0] and len(calls) == 1


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_inductor(tiny, batch):
    model, plain, _ = compiled_pair(tiny["llama"], 8, "inductor")
    sides = batch(3, 1), batch(2, 2)
    assert_close(step_gradients(model, *sides), step_gradients(plain, *sides))


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("bits", [32, 8, 4])
@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_every_gradient_of_every_architecture(tmp_path, batch, kind, bits):
    """Compiled by inductor, checkpointed, and both: as neither."""
    folder = save_architecture(kind, tmp_path / kind)
    plain, checkpointed = load_perturbed(folder, bits), load_perturbed(folder, bits)
    checkpoint_layers(checkpointed)
    terms = [ff.NPO(beta=0.1), ff.KL(weight=1.0, on="retain"), ff.CE(weight=0.5, on="retain")]
    sides = batch(3, 1), batch(2, 2)
    expected = step_gradients(plain, *sides, terms)
    assert all(float(gradient.norm()) > 0 for gradient in expected.values())
    assert_close(step_gradients(checkpointed, *sides, terms), expected, 1e-6)
    for each in (plain, checkpointed):
        assert ff.compile_layers(each, progress=None)
        assert_close(step_gradients(each, *sides, terms), expected)
        assert_close(step_gradients(each, *sides, terms, micro_batch=1), expected)
