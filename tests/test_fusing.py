"""ff.fuse: the step's gradients, and everything of PEFT's that must stay as it is."""

import copy
import gc
import pickle
import weakref

import bitsandbytes as bnb
import peft
import pytest
import torch
from architectures import ARCHITECTURES, save_architecture
from helpers import assert_gradients, gradients, make_batch
from torch import nn

import fastforget as ff
from fastforget.fusing import is_fused
from fastforget.loss import UnlearnLoss


@pytest.fixture(scope="session")
def folders(tmp_path_factory):
    """{kind: folder of a tiny model}"""
    return {kind: save_architecture(kind, tmp_path_factory.mktemp(kind)) for kind in ARCHITECTURES}


def load(folder, bits=8, fuse=True, perturbed=True, **lora):
    """A model in training mode; perturbed: its adapter is not at its initial zero."""
    torch.manual_seed(1)  # PEFT draws lora_A
    lora = {"r": 4, "target_modules": "all-linear", **lora}
    model = ff.load(folder, bits=bits, lora=lora, device="cpu", fuse=fuse).train()
    if perturbed:
        perturb(model)
    return model


def perturb(model, adapter="default", seed=2):
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if f"lora_B.{adapter}" in name:
            parameter.data.copy_(0.05 * torch.randn(parameter.shape, generator=generator))


def in_float32(model):
    """A copy, not fused, whose quantised weights stand in plain float32 layers."""
    model = copy.deepcopy(model)
    ff.unfuse(model)
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, bnb.nn.Linear8bitLt):
                weight = child.weight.data.float() * (child.weight.SCB / 127)[:, None]
            elif isinstance(child, bnb.nn.Linear4bit):
                weight = bnb.functional.dequantize_4bit(child.weight.data, child.weight.quant_state).float()
            else:
                continue
            plain = nn.Linear(child.in_features, child.out_features, bias=child.bias is not None)
            plain.weight.data = weight
            if child.bias is not None:
                plain.bias.data = child.bias.data.clone()
            setattr(module, name, plain.requires_grad_(False))
    return model


def step_gradients(model, terms="npo", **options):
    step = ff.UnlearnStep(model, torch.optim.SGD, terms=terms, lr=0.0, **options)
    out = step.backward(make_batch(3, 1), make_batch(2, 2))
    return out, gradients(model)


def layer(model, name="q_proj"):
    return next(module for path, module in model.named_modules() if path.endswith(name))


@pytest.mark.parametrize("bits", [32, 8, 4])
@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_gradients_of_the_step(folders, kind, bits):
    """Those of the same weights in float32 through PEFT's own layers."""
    model = load(folders[kind], bits)
    report = ff.fuse(model)
    stacked = any(type(module).__name__ == "ParamWrapper" for module in model.modules())  # matrices; not in PEFT 0.18
    assert set(report.refused.values()) == ({"it is a peft.tuners.lora.layer.ParamWrapper"} if stacked else set())
    assert not stacked or kind == "mixtral"
    adapted = {name for name, module in model.named_modules() if hasattr(module, "lora_A")}
    assert len(report.taken) >= 8 and adapted <= {*report.taken, *report.refused}
    plain = in_float32(model)
    terms = [ff.NPO(beta=0.1), ff.KL(weight=1.0, on="retain"), ff.CE(weight=0.5, on="retain")]
    out, found = step_gradients(model, terms)
    expected_out, expected = step_gradients(plain, terms, fuse=False)
    assert not any(map(is_fused, plain.modules()))
    torch.testing.assert_close(out.loss, expected_out.loss, rtol=1e-5, atol=1e-6)
    assert_gradients(found, expected)


@pytest.mark.parametrize(("kind", "training"), [("llama", True), ("opt", True), ("llama", False)])
@pytest.mark.parametrize("bits", [32, 16, 8, 4])
def test_divergence_from_the_reference_begins_at_zero(folders, bits, kind, training):
    model = load(folders[kind], bits, perturbed=False).train(training)
    batch = make_batch(3, 1)
    loss = UnlearnLoss(model, [ff.KL(weight=1.0, on="forget"), ff.KL(weight=1.0, on="retain")])
    out = loss(batch, make_batch(2, 2))
    assert {float(value) for value in out.terms.values()} == {0.0}
    with torch.no_grad(), model.disable_adapter():
        reference = model(input_ids=batch["input_ids"]).logits
    assert torch.equal(model(input_ids=batch["input_ids"]).logits, reference)


@pytest.mark.parametrize("bits", [32, 8, 4])
def test_merging_and_saving(folders, bits, tmp_path):
    """What plain PEFT writes and merges, bit for bit."""
    fused, plain = load(folders["opt"], bits), load(folders["opt"], bits, fuse=False)
    ids = make_batch(2, 3)["input_ids"]
    fused(input_ids=ids)
    for name, model in (("fused", fused), ("plain", plain)):
        model.save_pretrained(tmp_path / name)
    files = [(tmp_path / name / "adapter_model.safetensors").read_bytes() for name in ("fused", "plain")]
    assert files[0] == files[1]

    fused.merge_adapter()
    plain.merge_adapter()
    assert torch.equal(layer(fused).base_layer.weight.data, layer(plain).base_layer.weight.data)
    expected = in_float32(plain)(input_ids=ids).logits
    torch.testing.assert_close(fused(input_ids=ids).logits, expected, rtol=1e-5, atol=1e-5)
    fused.unmerge_adapter()
    plain.unmerge_adapter()
    merged, plain = fused.merge_and_unload(), plain.merge_and_unload()
    states = merged.state_dict(), plain.state_dict()
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(value, states[1][name]) for name, value in states[0].items())
    assert merged(input_ids=ids).logits.isfinite().all()


@pytest.mark.parametrize("bits", [32, 8])
def test_several_adapters(folders, bits):
    """One, the other, both and neither, one of them frozen, and other scales, as PEFT has them."""
    model = load(folders["llama"], bits)
    model.add_adapter("second", peft.LoraConfig(r=3, lora_alpha=9, target_modules=["q_proj", "down_proj"]))
    perturb(model, "second", seed=3)
    plain = in_float32(model)
    batch = make_batch(2, 3)
    for active in (["second"], ["default"], ["default", "second"]):
        outputs = []
        for each in (model, plain):
            each.base_model.set_adapter(active)
            each.zero_grad()
            loss = each(**batch).loss
            loss.backward()
            found = gradients(each)
            with torch.no_grad(), each.disable_adapter():
                outputs.append((found, loss.detach(), each(**batch).loss))
        assert_gradients(outputs[0][0], outputs[1][0])
        torch.testing.assert_close(outputs[0][1:], outputs[1][1:], rtol=1e-5, atol=1e-6)
    for each in (model, plain):
        for name, parameter in each.named_parameters():
            parameter.requires_grad_(".second." in name)
    _, found = step_gradients(model)  # its reference: the second adapter off, the first on
    _, expected = step_gradients(plain, fuse=False)
    assert_gradients(found, expected)


def test_adapter_of_each_row(folders):
    """Adapters that differ by row are PEFT's own product, over our quantised base."""
    model = load(folders["llama"], 8).eval()
    model.add_adapter("second", peft.LoraConfig(r=3, target_modules=["q_proj"]))
    perturb(model, "second", seed=3)
    ids = make_batch(2, 3)["input_ids"]
    mixed = model(input_ids=ids, adapter_names=["default", "__base__"]).logits
    model.set_adapter("default")
    torch.testing.assert_close(mixed[0], model(input_ids=ids).logits[0], rtol=1e-5, atol=1e-5)
    with model.disable_adapter():
        torch.testing.assert_close(mixed[1], model(input_ids=ids).logits[1], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "not reentrant"])
@pytest.mark.parametrize("bits", [32, 8, 4])
def test_checkpointing_trains_every_weight(folders, bits, reentrant):
    """A layer's forward then runs inside another's backward; nothing is left untrained (open-unlearning #178)."""
    model, plain = load(folders["llama"], bits), load(folders["llama"], bits)
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    _, found = step_gradients(model)
    _, expected = step_gradients(plain)
    assert_gradients(found, expected, 1e-6)
    model.zero_grad()
    trained = {name: each for name, each in model.named_parameters() if each.requires_grad}
    before = {name: each.detach().clone() for name, each in trained.items()}
    step = ff.UnlearnStep(model, torch.optim.AdamW, terms="npo", lr=1e-3)
    step(make_batch(3, 1), make_batch(2, 2))
    assert found.keys() == trained.keys()
    assert [name for name, each in trained.items() if torch.equal(each, before[name])] == []


def test_accelerated_model_keeps_its_dtypes(folders):
    """Under autocast hidden states are bfloat16 and the adapter's gradients float32, as of PEFT's layers."""
    model, plain = load(folders["llama"], 8), load(folders["llama"], 32, fuse=False)
    found = []
    for each in (model, plain):
        with torch.autocast("cpu", torch.bfloat16):
            out = layer(each)(torch.randn(2, 3, 64))
            out.float().sum().backward()
        found.append((out.dtype, layer(each).lora_A["default"].weight.grad.dtype))
    assert found[0] == found[1] == (torch.bfloat16, torch.float32)


def test_unfuse_and_fuse_again(folders):
    model = load(folders["opt"], 8, fuse=False)
    ids = make_batch(2, 3)["input_ids"]
    before = model(input_ids=ids).logits
    keys = {path: set(vars(module)) for path, module in model.named_modules()}
    report = ff.fuse(model)
    assert ff.fuse(model) == report
    ff.unfuse(model)
    assert {path: set(vars(module)) for path, module in model.named_modules()} == keys
    assert torch.equal(model(input_ids=ids).logits, before)
    assert len(ff.fuse(model).taken) == len(report.taken)


def test_the_step_fuses_unless_told_not_to(folders):
    for fuse in (True, False):
        model = load(folders["opt"], 8, fuse=False)
        step = ff.UnlearnStep(model, torch.optim.SGD, terms="grad_diff", lr=0.1, fuse=fuse)
        assert any(map(is_fused, model.modules())) is fuse
        restored = pickle.loads(pickle.dumps(step))
        other = load(folders["opt"], 8, fuse=False)
        restored.attach(other)
        assert any(map(is_fused, other.modules())) is fuse


@pytest.mark.parametrize("bits", [32, 8, 4])
def test_copies_and_pickles(folders, bits):
    """They run fused over weights of their own."""
    model = load(folders["llama"], bits)
    ids = make_batch(2, 3)["input_ids"]
    before = model(input_ids=ids).logits
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert is_fused(layer(other)) and layer(other).forward.__self__.layer() is layer(other)
        assert torch.equal(other(input_ids=ids).logits, before)
        layer(other).lora_B["default"].weight.data.zero_()
        assert not torch.equal(other(input_ids=ids).logits, before)
        assert torch.equal(model(input_ids=ids).logits, before)


def test_a_fused_layer_is_freed_with_its_last_reference(folders):
    model = load(folders["llama"], 8)
    reference = weakref.ref(layer(model))
    gc.collect()
    gc.disable()
    try:
        model.base_model.model.model.layers = nn.ModuleList()
        assert reference() is None
    finally:
        gc.enable()


def test_compiled_layer(folders):
    """torch.compile traces a fused decoder layer without a break, its backward pass included."""
    model, compiled = load(folders["llama"], 8), load(folders["llama"], 8)
    batch = make_batch(2, 3)
    compiled.base_model.model.model.layers[-1].compile(fullgraph=True, dynamic=True, backend="aot_eager")
    for each in (model, compiled):
        each(**batch).loss.backward()
    assert_gradients(gradients(compiled), gradients(model), 1e-6)


def refusals(folder, change=None, bits=8, **lora):
    """{name's last part: reason} after a change to a model that is not fused yet."""
    model = load(folder, bits, fuse=False, **lora)
    if change is not None:
        change(model)
    return {name.rsplit(".", 2)[-1]: reason for name, reason in ff.fuse(model).refused.items()}


def test_reasons(folders, tmp_path):
    llama = folders["llama"]
    queries = {"target_modules": ["q_proj"]}
    assert "DoraLinearVariant" in refusals(llama, **queries, use_dora=True)["q_proj"]
    assert refusals(llama, **queries, lora_dropout=0.1)["q_proj"] == "adapter 'default' has dropout 0.1"
    assert refusals(llama, bits=32, target_modules=["embed_tokens"]) == {
        "embed_tokens": "it is a peft.tuners.lora.layer.Embedding"
    }
    biased = refusals(folders["opt"], **queries, lora_bias=True)
    assert biased["q_proj"] == "adapter 'default' has a bias"

    def set_threshold(model):
        layer(model).base_layer.state.threshold = 6.0

    assert "outlier threshold is 6" in refusals(llama, set_threshold)["q_proj"]

    def train_base(model):
        layer(model).base_layer.weight.requires_grad_()

    assert refusals(llama, train_base, 32)["q_proj"] == "of its base layer: it trains"

    def add_hook(model):
        layer(model).base_layer.register_forward_hook(lambda *_: None)

    assert "hooks" in refusals(llama, add_hook)["q_proj"]

    def replace_forward(model):
        target = layer(model, "q_proj.base_layer")
        target.forward = target.forward

    found = refusals(llama, replace_forward)
    assert found["q_proj"] == "of its base layer: something else has replaced its forward"
    assert found["base_layer"] == "something else has replaced its forward"
    experts = load(folders["mixtral"], 32, target_modules=["q_proj"], target_parameters=["mlp.experts.gate_up_proj"])
    assert set(ff.fuse(experts).refused.values()) == {"it is a peft.tuners.lora.layer.ParamWrapper"}


def test_weights_packed_by_an_evaluation_on_the_cpu(folders):
    model = load(folders["llama"], 4, fuse=False).eval()
    with torch.no_grad():
        model(input_ids=make_batch(2, 3)["input_ids"])
    packed = getattr(layer(model).base_layer.weight.quant_state, "packing_format_for_cpu", False)
    refused = [reason for reason in ff.fuse(model).refused.values() if "packed its weights anew" in reason]
    assert bool(refused) is packed  # with AVX512-BF16 only
    model = load(folders["llama"], 4).eval()
    with torch.no_grad():
        model(input_ids=make_batch(2, 3)["input_ids"])
    assert not ff.fuse(model).refused


def test_what_changes_later_is_left_to_peft(folders):
    """Dropout, a variant or a hook that comes after fusing is not passed over."""
    model = load(folders["llama"], 8)
    ids = make_batch(2, 3)["input_ids"]
    called = []
    handle = layer(model).lora_A["default"].register_forward_hook(lambda *_: called.append(1))
    fallen_back = model(input_ids=ids).logits
    handle.remove()
    torch.testing.assert_close(model(input_ids=ids).logits, fallen_back, rtol=1e-5, atol=1e-5)
    assert called == [1]
    layer(model).lora_dropout["default"] = nn.Dropout(0.9)
    assert not torch.equal(layer(model)(torch.ones(1, 1, 64)), layer(model)(torch.ones(1, 1, 64)))
    model.add_adapter("dora", peft.LoraConfig(r=3, target_modules=["k_proj"], use_dora=True))
    perturb(model, "dora")
    model.set_adapter("dora")
    plain = in_float32(model)
    torch.testing.assert_close(model(input_ids=ids).logits, plain(input_ids=ids).logits, rtol=1e-4, atol=1e-4)
