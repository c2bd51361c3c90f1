"""What each preset is, needs and costs, read off its terms' own declarations: `fastforget presets`."""

from __future__ import annotations

import inspect
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from fastforget.backends.gradients import NEEDS_SWEEP
from fastforget.config import plain
from fastforget.loss_plan import StreamPlan, named_terms, plan_loss
from fastforget.objectives import PRESETS, Divergence, Field, Term, preset
from fastforget.reference import EMBEDDING
from fastforget.streams import used_streams

ARXIV = re.compile(r"(?<![\d.])\d{4}\.\d{5}(?!\d)")  # its numbers since 2015
STREAM_NEEDS = {"refusal": "refusals", "mismatch": "mismatch"}
COST_NOTE = (
    "Cost of a step: forwards with their backward passes, each over as many rows as a side has (and to which layer, if "
    "not to the head); and products with the head, each of 2 N V D flops on N label tokens (frozen head, no softcap). "
    "In brackets what the frozen reference adds in the first epoch; from the second on it comes from the cache."
)


@dataclass(frozen=True)
class Cost:
    """Of one step: forwards over a stream's rows, and products with the head; the reference's own apart.

    `to_layer`: the deepest layer at which a forward ends, where none goes on to the head.
    """

    forwards: int
    reference_forwards: int
    gemms: int
    reference_gemms: int
    to_layer: int | None


@dataclass(frozen=True)
class Card:
    """One preset: its papers (arXiv numbers), what it needs beside the forget set, its cost, its options' defaults."""

    name: str
    papers: tuple[str, ...]
    needs: tuple[str, ...]
    cost: Cost
    options: dict[str, Any]

    def as_json(self) -> dict[str, Any]:
        """Return the card as plain data."""
        return plain(asdict(self))


def cards() -> list[Card]:
    """Make a card for each preset there is, in the order in which they are registered."""
    return [card(name) for name in PRESETS]


def card(name: str) -> Card:
    """Say what a preset with its defaults is."""
    terms = preset(name)
    parameters = inspect.signature(PRESETS[name]).parameters.values()
    return Card(
        name=name,
        papers=papers(name, terms),
        needs=needs(terms),
        cost=cost(terms),
        options={parameter.name: plain(parameter.default) for parameter in parameters},
    )


def papers(name: str, terms: Sequence[Term]) -> tuple[str, ...]:
    """Return the arXiv numbers in the preset's docstring, or else in those of its terms on the forget set."""
    texts = [PRESETS[name].__doc__, *(type(term).__doc__ for term in terms if term.on == "forget")]
    return next((tuple(dict.fromkeys(numbers)) for text in texts if (numbers := ARXIV.findall(text or ""))), ())


def needs(terms: Sequence[Term]) -> tuple[str, ...]:
    """List what must be there beside the forget set and a model."""
    streams = {stream for term in terms for stream in used_streams(term)}
    wanted = {
        "reference": plan_loss(named_terms(terms)).asks_reference,
        "retain data": any(term.on == "retain" for term in terms),
        **{need: stream in streams for stream, need in STREAM_NEEDS.items()},
        "centres": any(term.centre_request is not None for term in terms),
    }
    return tuple(need for need, there in wanted.items() if there)


def cost(terms: Sequence[Term]) -> Cost:
    """Count what one step with these terms computes, read off the plan that `UnlearnLoss` executes."""
    plan = plan_loss(named_terms(terms))
    forwards = [*plan.baselines, *plan.forwards]
    streams = [stream for forward in forwards for stream in forward.streams.values()]
    asked = [stream.reference_requests(known=True) for stream in streams]
    ends = [None if None in forward.layers else layer for forward in forwards for layer in forward.layers]
    layers = [layer for layer in ends if layer is not None]
    return Cost(
        forwards=len(streams),
        reference_forwards=sum(map(bool, asked)),
        gemms=sum(head_products(stream, forward.learns) for forward in forwards for stream in forward.streams.values()),
        reference_gemms=sum(
            any(isinstance(request, Field) for request in requests) + (EMBEDDING in requests) for requests in asked
        ),
        to_layer=max(layers, key=lambda layer: (layer < 0, layer)) if layers and len(layers) == len(ends) else None,
    )


def head_products(stream: StreamPlan, learns: bool) -> int:
    """Products with the head that one stream costs, with their gradients where `learns`.

    A label sweep is one, its gradient another, and two more where the gradient sweep runs; a forward KL is two and two
    for the gradient, one where the reference is known; another divergence four and two.
    """
    sweep = 0
    if stream.fields:
        sweep = 1 + stream.learns * (3 if NEEDS_SWEEP & set(stream.fields) else 1)
    return sweep + sum(divergence_products(each, learns) for each in stream.divergences)


def divergence_products(divergence: Divergence, learns: bool) -> int:
    """Products of one divergence; see `head_products`."""
    if divergence.kind != "forward_kl":
        return 4 + 2 * learns
    return 2 + (1 if divergence.embedding_helps else 2) * learns


def row(each: Card) -> tuple[str, str, str, str, str]:
    """Return a card as the table's row: name, paper, needs, forwards, GEMMs."""
    spent = each.cost
    end = "" if spent.to_layer is None else f" to layer {spent.to_layer}"
    return (
        each.name,
        ", ".join(each.papers) or "–",
        ", ".join(each.needs) or "–",
        f"{spent.forwards}{end}" + (f" (+{spent.reference_forwards})" if spent.reference_forwards else ""),
        f"{spent.gemms}" + (f" (+{spent.reference_gemms})" if spent.reference_gemms else ""),
    )
