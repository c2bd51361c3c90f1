"""RMU and HiddenMSE: values and LoRA gradients against their formulas on full float64 hidden states."""

from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import pytest
import torch
from helpers import assert_follows, gradients, load_perturbed, reference_of, stack_of
from kernel_device import KINDS_AND_BACKENDS

import fastforget as ff
from fastforget.objectives import LOGP
from fastforget.objectives.states import StateTerm

WIDTH = 64


def layer_states(model, batch, layer):
    """[(t, D)] float64 for each row: what a layer puts out where the next token is labelled; None: enters the head."""
    kept = {}
    if layer is not None:
        handle = stack_of(model)[layer].register_forward_hook(
            lambda _module, _inputs, out: kept.update(states=out[0] if isinstance(out, tuple) else out)
        )
    out = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], output_hidden_states=True)
    if layer is None:
        kept["states"] = out.hidden_states[-1]
    else:
        handle.remove()
    states = kept["states"][:, :-1].double()
    return [row[label != -100] for row, label in zip(states, batch["labels"][:, 1:], strict=True)]


def expected_loss(model, reference, forget, retain, *, layer, c, alpha, reduction):
    u = torch.rand(WIDTH, generator=torch.Generator().manual_seed(5)).double()
    u = u / (u * u).sum().sqrt()
    away = [((h - c * u) ** 2).sum(1) for h in layer_states(model, forget, layer)]
    with torch.no_grad():
        frozen = layer_states(reference, retain, layer)
    moved = [((h - h_ref) ** 2).sum(1) for h, h_ref in zip(layer_states(model, retain, layer), frozen, strict=True)]

    def mean(rows):
        return torch.cat(rows).mean() if reduction == "token" else torch.stack([row.mean() for row in rows]).mean()

    return 2.0 * mean(away) + alpha * mean(moved)


@pytest.mark.parametrize(("kind", "backend"), KINDS_AND_BACKENDS)
def test_every_lora_gradient_is_that_of_the_formula(tiny, batch, kind, backend):
    sides, where = (batch(4, 1), batch(3, 2, width=17)), {"c": 6.5, "alpha": 30.0}
    thorough = backend != "triton"
    for bits in (32, 8) if thorough else (32,):
        model = load_perturbed(tiny[kind], bits)
        # in the interpreter a step takes a second: the last layer, as states and before the head
        for layer, reduction in (*[(0, "token"), (1, "sequence")] * thorough, (-1, "token"), (None, "token")):
            where |= {"layer": layer, "reduction": reduction}
            formula = partial(expected_loss, model, reference_of(model), *sides, **where)
            terms = ff.preset("rmu", seed=5, forget_weight=2.0, **where)
            options = {"bound": 1e-5, "micro_batches": (None, 2) if thorough else (2,), "backend": backend}
            found = assert_follows(formula, model, terms, *sides, **options)
            assert len(found) == {0: 1}.get(layer, 2) * 2 * {"opt": 6, "llama": 7}[kind]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_states_of_16_bits_are_measured_in_float32(dtype):
    """The gradient over the states is 2 (h - a) / n, also near the anchor and at it."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(300, WIDTH, generator=generator).to(dtype)
    anchor = hidden.clone()
    anchor[100:] += (0.1 * torch.randn(200, WIDTH, generator=generator)).to(dtype)
    for backend in ("eager", "torch", "native"):
        states = hidden.clone().requires_grad_()
        distance, _ = ff.hidden_stats(states, anchor, backend=backend)
        value = distance.square().mean()
        value.backward()
        difference = hidden.double() - anchor.double()
        assert distance.dtype == torch.float32
        assert float(value) == pytest.approx(float(difference.square().sum(1).mean()), rel=1e-5), backend
        error = (states.grad.double() - 2 * difference / 300).abs()
        assert (error <= torch.finfo(dtype).eps * (2 * difference / 300).abs() + 1e-7).all(), backend
        assert states.grad[:100].eq(0).all()


def test_u_is_one_vector_of_length_one_by_seed_and_width():
    term = ff.RMU(c=2.0)
    for width in (8, 64):
        assert term.target(width) is term.target(width) and term.target(width).shape == (width,)
        assert float(term.target(width).norm()) == pytest.approx(2.0, rel=1e-6) and (term.target(width) >= 0).all()
    assert torch.equal(ff.RMU(c=2.0).target(64), term.target(64))
    assert not torch.equal(ff.RMU(c=2.0, seed=1).target(64), term.target(64))


def test_at_the_start_hidden_mse_is_zero_without_a_gradient(tiny, batch):
    model = ff.load(tiny["llama"], bits=32, lora={"r": 4}).train()
    terms = [ff.NegatedCE(), ff.HiddenMSE(layer=1)]
    out = ff.UnlearnStep(model, torch.optim.SGD, terms=terms, lr=0.1).backward(batch(2, 1), batch(2, 2))
    assert float(out.terms["hidden_mse"]) == 0.0
    assert all(gradient.isfinite().all() for gradient in gradients(model).values())


@dataclass(kw_only=True, eq=False)
class ReadsLogp(StateTerm):
    """A term of the user's on a layer's states that also looks at logp."""

    name: ClassVar[str] = "reads_logp"
    asks: bool = False

    def __post_init__(self):
        super().__post_init__()
        self._request = ff.EmbeddingDistance(layer=self.layer)._request

    @property
    def requests(self):
        return (*super().requests, LOGP) if self.asks else super().requests

    def value(self, stats):
        return stats.token_mean(self.distances(stats).distance * stats.logp.detach().exp())


def test_a_term_must_ask_for_the_logp_it_reads(model, batch):
    with pytest.raises(ff.FastforgetError, match="a term uses logp without asking for it: name it in its `requests`"):
        ff.UnlearnLoss(model, [ReadsLogp(layer=0)])(batch(2, 1))
    out = ff.UnlearnLoss(model, [ReadsLogp(layer=0, asks=True)])(batch(2, 1))
    assert out.loss.isfinite() and out.stats["forget_nll"] > 0
