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


def compiled_pair(folder, backend, bits=8):
    """A compiled model, and one that is not."""
    model, plain = load_perturbed(folder, bits), load_perturbed(folder, bits)
    assert ff.compile_layers(model, backend=backend, progress=None)
    return model, plain


@pytest.fixture(scope="module")
def counter():
    """A backend that counts what it compiles."""
    return CompileCounterWithBackend("aot_eager")


@pytest.fixture(scope="module")
def pair(tiny, counter):
    torch._dynamo.reset()
    return compiled_pair(tiny["llama"], counter)


def test_gradients_of_the_step(pair, batch, counter):
    """With the reference and micro-batches; other lengths and numbers of padded rows compile nothing more."""
    model, plain = pair
    assert model.state_dict().keys() == plain.state_dict().keys()
    counts = []
    for width, micro_batch in ((20, None), (33, None), (20, 2)):
        sides = batch(4, 1, width), batch(4, 2, width)
        for side in sides:
            side["attention_mask"][:, -1] = 0
        found = step_gradients(model, *sides, micro_batch=micro_batch)
        assert_close(found, step_gradients(plain, *sides, micro_batch=micro_batch))
        counts.append(counter.frame_count)
    assert counts[0] == counts[1] == counts[2] > 0


def test_hooks_that_come_later(pair, batch):
    """Of a layer (RMU's, which ends the forward there) and inside one; and they go again."""
    sides = batch(3, 1), batch(2, 2)
    for layer in (0, 1):
        terms = ff.preset("rmu", layer=layer)
        assert_close(*(step_gradients(model, *sides, terms) for model in pair))
    found = []
    for model in pair:
        inner = stack_of(model)[1].self_attn.q_proj.lora_A["default"]
        handle = inner.register_forward_hook(lambda _module, _inputs, output: 2 * output)
        found.append(step_gradients(model, *sides))
        handle.remove()
    assert_close(*found)
    without = [step_gradients(model, *sides) for model in pair]
    assert_close(*without)
    changed = next(name for name in without[0] if "layers.1.self_attn.q_proj.lora_B" in name)
    assert not torch.allclose(found[0][changed], without[0][changed])


def test_generation_is_not_compiled(pair, counter):
    count = counter.frame_count
    ids = torch.arange(5, 17)[None]
    with torch.no_grad():
        texts = [model.generate(input_ids=ids, max_new_tokens=8, do_sample=False) for model in pair]
    assert torch.equal(*texts) and counter.frame_count == count


def test_a_copy_runs_over_its_own_weights(pair, batch):
    model, _ = pair
    other = copy.deepcopy(model)
    layer, original = stack_of(other)[0], stack_of(model)[0]
    assert CompiledForward.has_replaced(layer) and layer.forward.__self__.layer() is layer
    assert layer.forward.__self__.run.__self__ is stack_of(other)[1].forward.__self__.run.__self__
    assert layer.forward.__self__.run.__self__ is not original.forward.__self__.run.__self__
    assert not layer.forward.__self__.run.__self__.compiled and original.forward.__self__.run.__self__.compiled


def test_nothing_of_the_trial_remains(tiny):
    model = load_perturbed(tiny["llama"]).eval()
    parameter = next(each for each in model.parameters() if each.requires_grad)
    parameter.grad = torch.ones_like(parameter)
    before = parameter.grad, torch.get_rng_state(), [each.training for each in model.modules()]
    lines = []
    assert ff.compile_layers(model, backend="eager", progress=lines.append)
    assert [line.split()[0] for line in lines] == ["Compiling", "Compiled"] and "2 decoder layers" in lines[0]
    assert parameter.grad is before[0] and torch.equal(parameter.grad, torch.ones_like(parameter))
    assert sum(each.grad is not None for each in model.parameters()) == 1
    assert torch.equal(torch.get_rng_state(), before[1])
    assert [each.training for each in model.modules()] == before[2]
    assert ff.compile_layers(model, backend="nothing compiles again", progress=lines.append) and len(lines) == 2


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
def test_layers_fused_after_they_were_compiled(tiny, batch):
    model = load_perturbed(tiny["llama"], 8)
    ff.unfuse(model)
    ff.compile_layers(model, backend="aot_eager", progress=None)
    sides = batch(3, 1), batch(2, 2)
    found = step_gradients(model, *sides)  # the step fuses
    assert_close(found, step_gradients(load_perturbed(tiny["llama"], 8), *sides))


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("bits", [32, 8, 4])
@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_every_gradient_of_every_architecture(tmp_path, batch, kind, bits):
    """Checkpointed, compiled (in 8 bit by inductor, otherwise without the C++ compiler), and both: as neither."""
    torch._dynamo.reset()
    folder = save_architecture(kind, tmp_path / kind)
    plain, checkpointed = load_perturbed(folder, bits), load_perturbed(folder, bits)
    checkpoint_layers(checkpointed)
    terms = [ff.NPO(beta=0.1), ff.KL(weight=1.0, on="retain"), ff.CE(weight=0.5, on="retain")]
    sides = batch(3, 1), batch(2, 2)
    expected = step_gradients(plain, *sides, terms)
    assert all(float(gradient.norm()) > 0 for gradient in expected.values())
    assert_close(step_gradients(checkpointed, *sides, terms), expected, 1e-6)
    for each in (plain, checkpointed):
        assert ff.compile_layers(each, backend="inductor" if bits == 8 else "aot_eager", progress=None)
        assert_close(step_gradients(each, *sides, terms), expected)
    assert_close(step_gradients(plain, *sides, terms, micro_batch=1), expected)
