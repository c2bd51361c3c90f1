"""Companion batches: which go through the model together, what is split with what, and what is refused."""

import copy
from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
import torch.nn.functional as F
from helpers import assert_gradients, gradients, load_perturbed, prepared

import fastforget as ff
from fastforget.batch import ROLES
from fastforget.loss_plan import stream_groups
from fastforget.objectives import Term
from fastforget.streams import join

MANY = {
    "dpo": ff.preset("dpo", beta=0.3, retain="ap"),
    "kto": ff.preset("kto", beta=0.3, retain="kl"),
    "flat and more": [*ff.preset("flat", divergence="kl"), *ff.preset("jensun"), ff.NegatedCE(weight=0.1)],
    "yao2023": ff.preset("yao2023"),
    "means over answers": ff.preset("idk", reduction="sequence", retain=None),
    **{name: ff.preset(name, reduction="sequence") for name in ("grad_diff", "ceu", "undial", "pdu")},
}


@pytest.fixture
def sides(batch):
    """(forget, retain) with every companion, each of another width."""
    forget = batch(5, 1, width=14) | {"refusal": batch(5, 2, width=12, prompt=4), "mismatch": batch(7, 13, width=16)}
    retain = batch(4, 4, width=13) | {"refusal": batch(4, 5, width=15, prompt=7)}
    return forget, retain


def part_of(whole, rows, mismatched=slice(None)):
    """Some rows of a side with its companions."""
    part = {key: value[rows] for key, value in whole.items() if isinstance(value, torch.Tensor)}
    for stream, chosen in (("refusal", rows), ("mismatch", mismatched)):
        if stream in whole:
            part[stream] = {key: value[chosen] for key, value in whole[stream].items()}
    return part


@pytest.fixture
def forwards(monkeypatch):
    """The (rows, width) of each forward of the model up to its head."""
    seen = []
    original = ff.loss.Backbone.states

    def states(self, inputs, positions, layers=(None,)):
        seen.append(tuple(inputs["input_ids"].shape))
        return original(self, inputs, positions, layers)

    monkeypatch.setattr(ff.loss.Backbone, "states", states)
    return seen


@pytest.mark.parametrize("name", MANY)
def test_micro_batches_give_the_gradients_of_the_whole(model, sides, name, forwards):
    step = ff.UnlearnStep(model, torch.optim.SGD, terms=MANY[name], lr=0.1)
    whole = step.backward(*sides)
    expected = gradients(model)
    for rows in (2, 3):
        step.zero_grad()
        forwards.clear()
        out = step.backward(*sides, micro_batch=rows)
        assert max(rows for rows, _ in forwards) <= rows
        assert_gradients(gradients(model), expected)
        assert float(out.loss) == pytest.approx(float(whole.loss), rel=1e-5)
        assert out.stats.keys() == whole.stats.keys() and out.terms.keys() == whole.terms.keys()


@pytest.mark.parametrize("name", [name for name in MANY if name != "kto"])  # each call has an estimate of its own
def test_accumulation_gives_the_gradients_of_the_whole(tiny, sides, name):
    model = load_perturbed(tiny["opt"])
    forget, retain = sides
    step = ff.UnlearnStep(model, torch.optim.SGD, terms=MANY[name], lr=0.1)
    step.backward(forget, retain)
    expected = gradients(model)
    step.zero_grad()
    pieces = [
        (part_of(forget, slice(0, 2), slice(0, 4)), part_of(retain, slice(0, 1))),
        (part_of(forget, slice(2, 5), slice(4, 7)), None),
        (part_of(forget, slice(0, 0), slice(0, 0)), part_of(retain, slice(1, 4))),
    ]
    counts = ff.count_labels(pieces)
    assert counts == ff.count_labels([(forget, retain)])
    for pair in pieces:
        step.backward(*pair, counts=counts)
    assert_gradients(gradients(model), expected)


def test_a_flat_batch_is_the_same(model, sides):
    forget, retain = sides
    whole = {"forget": forget, "retain": retain}
    streams = {(side, name): whole[side] if name == "answer" else whole[side][name] for side, name in ROLES}
    widest = max(part["input_ids"].shape[1] for part in streams.values())
    flat = {
        key: torch.cat(
            [
                F.pad(part[key], (0, widest - part[key].shape[1]), value=-100 if key == "labels" else 0)
                for part in streams.values()
            ]
        )
        for key in ("input_ids", "attention_mask", "labels")
    }
    flat["role"] = torch.cat([torch.full((len(part["labels"]),), ROLES[name]) for name, part in streams.items()])
    order = torch.cat([torch.arange(len(part["labels"])) for part in streams.values()]).argsort(stable=True)  # mixed
    flat = {key: value[order] for key, value in flat.items()}
    assert ff.count_labels([flat]) == ff.count_labels([sides])
    loss = ff.UnlearnLoss(model, [*MANY["dpo"], *MANY["yao2023"]])
    nested, same = loss(forget, retain), loss(flat)
    assert nested.terms.keys() == same.terms.keys()
    for name, value in nested.terms.items():
        assert float(same.terms[name]) == pytest.approx(float(value), rel=1e-5), name


def test_only_coupled_streams_share_a_forward(model, sides, forwards):
    cases = {
        ("grad_diff",): ([(5, 14), (4, 13)], {"forget_nll", "retain_nll"}),
        ("idk",): ([(5, 12), (4, 13)], {"forget_refusal_nll", "retain_nll"}),
        ("flat",): ([(6, 14), (4, 14)], {"forget_nll", "forget_refusal_nll"}),
        ("flat", "random_mismatch"): (
            [
                (6, 14),
                (4, 14),
                (7, 16),
                (4, 13),
            ],  # two streams in two parts, so that neither is larger than one of them
            {"forget_nll", "forget_refusal_nll", "forget_mismatch_nll", "retain_nll"},
        ),
        ("yao2023",): ([(5, 14), (7, 16), (4, 13), (4, 13)], {"forget_nll", "forget_mismatch_nll", "retain_nll"}),
    }
    for names, (expected, stats) in cases.items():
        terms = [term for name in names for term in ff.preset(name)]
        loss = ff.UnlearnLoss(model, terms)
        forwards.clear()
        out = loss(*sides)
        assert sorted(forwards) == sorted(expected), names  # the KL's second (4, 13) is the reference's
        assert set(out.stats) == stats


@pytest.mark.parametrize("kind", ["opt", "llama"])
@pytest.mark.parametrize("padding", ["left", "right", "both"])
def test_padding_on_either_side_is_the_same_batch(tiny, sides, kind, padding):
    """A stream that is padded on the left, and joined with a wider one, gives what it gives alone."""
    forget, _ = sides
    model = load_perturbed(tiny[kind])
    term = ff.DPO(beta=0.3)

    def rolled(batch):
        shift = (batch["attention_mask"] == 0).sum(dim=1).tolist()
        rows = {key: [row.roll(by) for row, by in zip(value, shift, strict=True)] for key, value in batch.items()}
        return {key: torch.stack(value) for key, value in rows.items()}

    answer = {key: value for key, value in forget.items() if key not in ("refusal", "mismatch")}
    refusal = forget["refusal"]
    if padding != "right":
        answer = rolled(answer)
        assert (answer["attention_mask"][0, :6] == 0).all()
    if padding == "both":
        refusal = {key: F.pad(value, (3, 4), value=-100 if key == "labels" else 0) for key, value in refusal.items()}
    out = ff.UnlearnLoss(model, [term])(answer | {"refusal": refusal})
    expected = ff.UnlearnLoss(model, [term])(forget)
    assert float(out.loss.detach()) == pytest.approx(float(expected.loss.detach()), rel=1e-5)


def test_join_keeps_every_kept_token(sides):
    forget, retain = sides
    extra = {"token_type_ids": torch.arange(5 * 12).view(5, 12), "rowwise": torch.arange(5)}
    parts = [
        prepared(forget | {"token_type_ids": torch.ones(5, 14, dtype=torch.long), "rowwise": torch.zeros(5)}),
        prepared(forget["refusal"] | extra),
    ]
    inputs, positions = join(parts)
    assert inputs["input_ids"].shape == (10, 14)
    kept = torch.cat([part.inputs["input_ids"][part.positions] for part in parts])
    assert torch.equal(inputs["input_ids"][positions], kept)
    assert torch.equal(inputs["token_type_ids"][5:, :12], extra["token_type_ids"])
    assert not inputs["attention_mask"][5:, 12:].any() and torch.equal(inputs["rowwise"][5:], extra["rowwise"])
    for other in (retain["refusal"], retain["refusal"] | {"rowwise": torch.ones(4, 3)}, {**forget, "rowwise": 2.0}):
        with pytest.raises(ff.FastforgetError, match="'rowwise' do not fit together"):
            join([prepared({**retain, "rowwise": torch.ones(4)}), prepared(other)])


def without(batch, *keys):
    return {key: value for key, value in batch.items() if key not in keys}


def beyond(batch):
    return batch | {"labels": batch["labels"].clamp(min=0) + 1000}


def unlabelled(batch, row):
    changed = copy.deepcopy(batch)
    changed["labels"][row] = -100
    return changed


@pytest.mark.parametrize(
    ("preset", "change", "message"),
    [
        ("dpo", lambda f, r: (without(f, "refusal"), r), r"need forget\['refusal'\], .* has none: dpo\..*same prompts"),
        ("ap", lambda f, r: (f, without(r, "refusal")), r"need retain\['refusal'\], .* has none: answer_preservation"),
        ("idk", lambda f, r: (without(f, "refusal"), r), r"need forget\['refusal'\], .*: idk"),
        ("yao2023", lambda f, r: (without(f, "mismatch"), r), r"\['mismatch'\], .*other prompts' answers"),
        ("kto", lambda f, r: (without(f, "mismatch"), r), r"need forget\['mismatch'\], .*: kto"),
        ("dpo", lambda f, r: (f | {"refusal": part_of(f["refusal"], slice(4))}, r), "4 rows, the forget batch 5"),
        ("dpo", lambda f, r: (f | {"refusal": unlabelled(f["refusal"], 3)}, r), r"row 3 of forget\['refusal'\] has no"),
        ("flat", lambda f, r: (unlabelled(f, 1), r), "row 1 of the forget batch has no label, and flat compares"),
        (
            "idk",
            lambda f, r: (f | {"refusal": unlabelled(f["refusal"], slice(None))}, r),
            r"\['refusal'\] has no label",
        ),
        ("idk", lambda f, r: (f | {"refusal": without(f["refusal"], "labels")}, r), r"\['refusal'\] needs input_ids"),
        ("idk", lambda f, r: (f | {"refusal": f["refusal"]["labels"]}, r), r"forget\['refusal'\] needs input_ids"),
        ("ap", lambda f, r: (f, r | {"position_ids": r["labels"]}), "and their 'position_ids' do not fit together"),
        ("kto", lambda f, r: (f | {"mismatch": unlabelled(f["mismatch"], slice(None))}, r), "kto takes a mean over it"),
        ("grad_diff", lambda f, r: (f, unlabelled(r, slice(None))), "the retain batch has no label"),
        ("grad_diff", lambda f, r: (f, beyond(r)), "outside the vocabulary"),
        ("dpo", lambda f, r: (f | {"refusal": beyond(f["refusal"])}, r), "outside the vocabulary"),
    ],
)
def test_incomplete_batches_are_refused_before_a_forward(model, sides, preset, change, message, forwards):
    loss = ff.UnlearnLoss(model, preset)
    with pytest.raises(ff.FastforgetError, match=message):
        loss(*change(*sides))
    assert not forwards


def term_on(given, side="forget", baseline=None):
    @dataclass(kw_only=True)
    class Custom(Term):
        name: ClassVar[str] = "custom"
        streams: ClassVar[tuple[str, ...]] = given
        baseline_stream: ClassVar[str | None] = baseline

    return Custom(on=side)


@pytest.mark.parametrize(
    ("term", "message"),
    [
        (term_on(("refused",)), "custom: the forget batch has no stream 'refused': it has answer, refusal, mismatch"),
        (term_on(("mismatch",), "retain"), "the retain batch has no stream 'mismatch': it has answer, refusal"),
        (term_on(("answer",), "retain", "mismatch"), "the retain batch has no stream 'mismatch'"),
        (term_on(("answer", "mismatch")), "custom: 'mismatch' belongs to no row"),
        (term_on(()), "custom: streams is empty"),
    ],
)
def test_terms_on_streams_that_are_not_there_are_refused(model, term, message):
    with pytest.raises(ff.FastforgetError, match=message):
        ff.UnlearnLoss(model, [term])


def test_groups_are_the_connected_components():
    def groups(*terms):
        return stream_groups(terms)

    assert groups(ff.RandomMismatch(), ff.NegatedCE()) == [("answer",), ("mismatch",)]
    assert groups(ff.RefusalCE(), ff.NegatedCE()) == [("answer",), ("refusal",)]
    assert groups(ff.RefusalCE(), ff.NegatedCE(), ff.DPO()) == [("answer", "refusal")]
    assert groups(ff.KTO(), ff.RefusalCE()) == [("answer",), ("refusal",)]


def test_counts_know_every_stream(sides):
    counts = ff.count_labels([sides, (sides[0], None)])
    for side, stream in ROLES:
        whole = sides[0] if side == "forget" else sides[1]
        labels = (whole if stream == "answer" else whole[stream])["labels"][:, 1:]
        times = 2 if side == "forget" else 1
        assert counts.totals(side, stream) == (times * int((labels != -100).sum()), times * len(labels))
