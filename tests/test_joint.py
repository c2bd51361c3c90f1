"""`passes="joint"`: both sides in one forward, packed where the model keeps documents apart, with the same results."""

import copy

import pytest
import torch
import transformers
from architectures import ARCHITECTURES, save_architecture
from helpers import assert_gradients, gradients, load_perturbed

import fastforget as ff
from fastforget.backbone import Backbone

SMALL = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "vocab_size": 320}
TERMS = {
    "npo": ff.preset("npo", beta=0.3),
    "dpo": ff.preset("dpo", beta=0.3, retain="ap"),
    "kto": ff.preset("kto", beta=0.3, retain="kl"),
    "rmu": ff.preset("rmu", layer=0),
    "layers and head": [*ff.preset("rmu", layer=0)[:1], ff.CE(on="retain")],
    "one side": [ff.NegatedCE()],
}


@pytest.fixture
def sides(batch):
    """(forget, retain) with companions; a row of each without a label, another padded on the left."""
    forget = batch(5, 1, width=14) | {"refusal": batch(5, 2, width=12, prompt=4), "mismatch": batch(7, 13, width=16)}
    retain = batch(4, 4, width=13) | {"refusal": batch(4, 5, width=15, prompt=7)}
    retain["attention_mask"][2, :4] = 0
    retain["labels"][2, :4] = -100
    return forget, retain


@pytest.fixture
def forwards(monkeypatch):
    """The inputs of each training forward up to the head."""
    seen = []
    original = Backbone.states

    def states(self, inputs, *arguments):
        if torch.is_grad_enabled():
            seen.append(inputs)
        return original(self, inputs, *arguments)

    monkeypatch.setattr(Backbone, "states", states)
    return seen


@pytest.fixture
def by_document(monkeypatch):
    """Attention that computes each document's own pairs of tokens alone, so that packing always pays."""
    monkeypatch.setattr(Backbone, "packing_pays", lambda *_: True)


def both(model, terms, sides, **options):
    """(output, gradients) of the passes one after the other, and of the joint one."""
    results = []
    for passes in ("sequential", "joint"):
        model.zero_grad()
        step = ff.UnlearnStep(model, torch.optim.SGD, terms=terms, lr=0.1, passes=passes)
        results.append((step.backward(*sides, **options), gradients(model)))
    return results


def assert_alike(results, bound=1e-5):
    (sequential, expected), (joint, found) = results
    assert_gradients(found, expected, bound)
    assert float(joint.loss) == pytest.approx(float(sequential.loss), rel=1e-5)
    for name in ("terms", "stats"):
        values, same = getattr(joint, name), getattr(sequential, name)
        assert values.keys() == same.keys()
        assert all(float(values[key]) == pytest.approx(float(same[key]), rel=1e-5, abs=1e-6) for key in same)


@pytest.mark.parametrize("name", TERMS)
def test_one_packed_forward_is_the_passes_apart(model, sides, name, forwards, by_document):
    sides[0]["labels"][3] = sides[0]["labels"][3] if name == "dpo" else -100  # of dpo each row is compared
    results = both(model, TERMS[name], sides)
    assert_alike(results)
    joint = forwards[-1]["input_ids"]
    assert joint.shape[0] == 1 and joint.shape[1] == forwards[-1]["position_ids"].shape[1]
    if name == "npo":
        rows = [sides[0]["attention_mask"][[0, 1, 2, 4]], sides[1]["attention_mask"]]
        assert joint.shape[1] == sum(int(mask.sum()) for mask in rows), "no padding, and no row without a label"
        assert len(forwards) == 3


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_architectures(tmp_path, kind, batch, by_document):
    model = load_perturbed(save_architecture(kind, tmp_path))
    assert Backbone(model).packs() == (kind != "opt")  # whose mask does not look at positions
    assert_alike(both(model, TERMS["npo"], (batch(4, 1), batch(3, 4, width=13))))


def test_it_packs_where_that_costs_less(model, batch, forwards):
    step = ff.UnlearnStep(model, torch.optim.SGD, terms=[ff.NPO(), ff.CE(on="retain")], lr=0.1, passes="joint")
    forget, retain = batch(4, 1), batch(3, 4)
    step.backward(forget, retain)
    for side in (forget, retain):
        side["attention_mask"][1:, 7:] = 0
        side["labels"][1:, 7:] = -100
    step.backward(forget, retain)
    assert [inputs["input_ids"].shape for inputs in forwards] == [(7, 20), (1, 2 * 14 + 5 * 7)]
    config = model.get_base_model().config
    config._attn_implementation = "flash_attention_2"
    assert step.loss.backbone.packing_pays(torch.Size((1, 7 * 20)), torch.Size((7, 20)))


def test_a_state_space_does_not_and_gets_one_padded_batch(batch, forwards):
    torch.manual_seed(0)
    config = transformers.Mamba2Config(
        **SMALL, num_heads=8, head_dim=16, state_size=8, n_groups=1, chunk_size=8, initializer_range=0.2
    )
    model = transformers.Mamba2ForCausalLM(config)
    assert not Backbone(model).packs()
    forwards.clear()
    sides = batch(4, 1), batch(3, 4, width=13)
    assert_alike(both(model, [ff.SimNPO(), ff.CE(on="retain")], sides))
    assert [inputs["input_ids"].shape for inputs in forwards] == [(4, 20), (3, 13), (7, 20)]


class SeesItsNeighbour(transformers.LlamaForCausalLM):
    """Attention over all of a row: what stands before a document reaches it."""

    def forward(self, input_ids=None, attention_mask=None, position_ids=None, **named):
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        return super().forward(input_ids, mask, position_ids, **named)


def test_a_model_whose_documents_see_each_other_is_found_out():
    torch.manual_seed(0)
    sizes = {"num_attention_heads": 4, "max_position_embeddings": 64}
    for dtype in (torch.float32, torch.bfloat16):  # and with weights so small that attention does little
        model = SeesItsNeighbour(transformers.LlamaConfig(**SMALL, **sizes)).to(dtype)
        assert not Backbone(model).packs()
        model = transformers.LlamaForCausalLM(model.config).to(dtype)
        assert Backbone(model).packs()


def row_placed_models():
    """Models in which a token's place in its row counts, whatever `position_ids` say, of few tokens from which on."""
    llama4 = transformers.Llama4TextConfig(
        **SMALL,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        intermediate_size_mlp=64,
        num_local_experts=2,
        initializer_range=0.2,
        no_rope_layers=[1, 0],
        floor_scale=48,
        pad_token_id=0,
    )
    size = {"vocab_size": 320, "hidden_size": 64, "num_layers": 2, "num_heads": 4, "window_size": 16}
    kinds = {"attention_types": [[["global", "local"], 1]], "bos_token_id": 1, "eos_token_id": 1}
    gpt_neo = transformers.GPTNeoConfig(**size, **kinds, max_position_embeddings=48)
    yield transformers.Llama4ForCausalLM(llama4), 47
    yield transformers.GPTNeoForCausalLM(gpt_neo), 48


def test_rows_are_no_longer_than_a_model_that_counts_places_in_them_bears(batch, forwards, by_document):
    torch.manual_seed(0)
    for model, longest in row_placed_models():
        backbone = Backbone(model)
        assert backbone.packs(longest) and not backbone.packs(longest + 1)
        assert_alike(both(model, [ff.SimNPO(), ff.CE(on="retain")], (batch(4, 1), batch(3, 4))))
        assert forwards[-1]["input_ids"].shape == (7, 20)


def test_memory_that_runs_out_halves_the_rows_of_both_sides(model, batch, forwards, monkeypatch):
    states = Backbone.states

    def run_out(self, inputs, *arguments):
        found = states(self, inputs, *arguments)
        if torch.is_grad_enabled() and len(inputs["input_ids"]) > 4:
            raise torch.OutOfMemoryError("out of memory")
        return found

    monkeypatch.setattr(Backbone, "states", run_out)
    step = ff.UnlearnStep(model, torch.optim.SGD, terms="grad_diff", lr=0.1, passes="joint")
    monkeypatch.setattr(step.loss.backbone, "_packs", False)
    with pytest.warns(UserWarning, match="memory ran out with 8 sequences at once; from here on 4 are"):
        step(batch(4, 1), batch(4, 4), micro_batch="auto")
    assert [len(inputs["input_ids"]) for inputs in forwards] == [8, 4, 4]


@pytest.mark.parametrize("change", ["hole", "positions", "another input"])
def test_rows_that_cannot_stand_in_one_are_padded(model, batch, change, forwards, by_document):
    forget, retain = batch(4, 1), batch(3, 4)
    if change == "hole":
        forget["attention_mask"][1, 8] = 0
    for side in (forget, retain) if change != "hole" else ():
        name = "position_ids" if change == "positions" else "cache_position_of_mine"
        side[name] = torch.arange(2, 22).repeat(len(side["input_ids"]), 1)
    if change == "another input":
        causal_lm = model.get_base_model()
        original = causal_lm.forward
        causal_lm.forward = lambda *given, cache_position_of_mine=None, **named: original(*given, **named)
    assert_alike(both(model, [ff.NPO(), ff.CE(on="retain")], (forget, retain)))
    assert forwards[-1]["input_ids"].shape == (7, 20)


def test_micro_batches_share_their_rows_between_the_sides(model, sides, forwards, by_document):
    (_, whole), (_, expected) = both(model, TERMS["npo"], sides)
    forwards.clear()
    model.zero_grad()
    step = ff.UnlearnStep(model, torch.optim.SGD, terms=TERMS["npo"], lr=0.1, passes="joint")
    step.backward(*sides, micro_batch=4)
    assert_gradients(gradients(model), whole)
    assert_gradients(expected, whole)
    assert [int((inputs["position_ids"] == 0).sum()) for inputs in forwards] == [4, 4, 1]


def test_accumulation_of_parts_of_one_side(model, batch, by_document):
    forget, retain = batch(5, 1), batch(4, 4)
    expected = both(model, TERMS["npo"], (forget, retain))[0][1]
    pieces = [(forget, None), ({key: value[:0] for key, value in forget.items()}, retain)]
    counts = ff.count_labels(pieces)
    model.zero_grad()
    step = ff.UnlearnStep(model, torch.optim.SGD, terms=TERMS["npo"], lr=0.1, passes="joint")
    for pair in pieces:
        step.backward(*pair, counts=counts)
    assert_gradients(gradients(model), expected)


def test_a_copied_step_stays_joint(tiny, sides, forwards):
    model = load_perturbed(tiny["opt"])
    step = ff.UnlearnStep(model, torch.optim.SGD, terms="grad_diff", lr=0.1, passes="joint")
    other = copy.deepcopy(step)
    other.attach(model)
    forwards.clear()
    other.backward(*sides)
    assert len(forwards) == 1


@pytest.mark.parametrize(
    "options, message", [({"passes": "both"}, "sequential, joint"), ({"passes": "joint", "combine": "mgda"}, "mgda")]
)
def test_what_cannot_be_joint_is_refused(model, options, message):
    with pytest.raises(ff.FastforgetError, match=message):
        ff.UnlearnStep(model, torch.optim.SGD, terms="grad_diff", lr=0.1, **options)
