"""LMHead.from_model on models that scale or cap their logits, and the fallback to a model's own logits."""

import pytest
import torch
import transformers
from helpers import make_batch, tiny_model

import fastforget as ff
from fastforget.backbone import Backbone

SMALL = {
    "vocab_size": 320,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "max_position_embeddings": 64,
    "initializer_range": 0.3,
    "pad_token_id": 0,
}


def build(name):
    torch.manual_seed(0)
    if name in ("opt", "llama"):
        return tiny_model(name).eval()
    extra = {
        "gemma2": {"final_logit_softcapping": 3.0},
        "cohere": {"logit_scale": 0.25},
        "granite": {"logits_scaling": 4.0},
    }
    config = transformers.AutoConfig.for_model(name, **SMALL, **extra[name])
    return transformers.AutoModelForCausalLM.from_config(config).eval()


@pytest.mark.parametrize("name", ["opt", "llama", "gemma2", "cohere", "granite"])
def test_head_gives_the_models_own_logits(name, recwarn):
    model = build(name)
    batch = make_batch(2, 1)
    inputs = {key: batch[key] for key in ("input_ids", "attention_mask")}
    backbone = Backbone(model)
    every = torch.ones(2, 20).nonzero(as_tuple=True)
    with torch.no_grad():
        ours = backbone.head.logits(backbone.states(inputs, every)[None])
        own = model(**inputs).logits.flatten(0, 1).float()
    assert not backbone.head.is_identity and not [w for w in recwarn if "differ" in str(w.message)]
    assert torch.allclose(ours, own, rtol=1e-4, atol=1e-4)
    assert (backbone.head.softcap == 3.0) == (name == "gemma2")
    assert backbone.head.scale == (0.25 if name in ("cohere", "granite") else 1.0)


@pytest.mark.parametrize("factor", [1.5, 1.003])
def test_unknown_changes_of_logits_fall_back_to_the_models_own(tiny, factor):
    model = ff.load(tiny["llama"], bits=32, lora={"r": 4}).train()
    inner = model.get_base_model()
    forward = inner.forward

    def louder(*args, **kwargs):
        output = forward(*args, **kwargs)
        output.logits = output.logits * factor
        return output

    inner.forward = louder
    forget, retain = make_batch(2, 1), make_batch(2, 2)
    loss = ff.UnlearnLoss(model, "npo_mean")
    with pytest.warns(UserWarning, match="using the model's own logits"):
        out = loss(forget, retain)
    assert float(out.terms["kl"].detach()) == 0.0
    labels = retain["labels"][:, 1:]
    logits = inner(input_ids=retain["input_ids"], attention_mask=retain["attention_mask"]).logits[:, :-1]
    expected = torch.nn.functional.cross_entropy(logits[labels != -100], labels[labels != -100])
    assert float(out.terms["ce"]) == pytest.approx(float(expected.detach()), rel=1e-5)
    out.loss.backward()
    assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())
