"""What each preset is, needs and costs, read off its terms' own declarations: `fastforget presets`."""

from __future__ import annotations

import inspect
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from fastforget.backends.fields import BY_NAME
from fastforget.backends.gradients import NEEDS_SWEEP
from fastforget.config import plain
from fastforget.loss import SIDES, reference_needs, reference_wants
from fastforget.objectives import PRESETS, ClusterPull, Term, layers_of, preset, reaches_head
from fastforget.objectives.needs import divergences
from fastforget.reference import EMBEDDING, STATES
from fastforget.streams import stream_groups, used_streams

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
        """The card as plain data."""
        return plain(asdict(self))


def cards() -> list[Card]:
    """A card for each preset there is, in the order in which they are registered."""
    return [card(name) for name in PRESETS]


def card(name: str) -> Card:
    """What a preset with its defaults is."""
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
    """The arXiv numbers in the preset's docstring, or else in those of its terms on the forget set."""
    texts = [PRESETS[name].__doc__, *(type(term).__doc__ for term in terms if term.on == "forget")]
    return next((tuple(dict.fromkeys(found)) for text in texts if (found := ARXIV.findall(text or ""))), ())


def needs(terms: Sequence[Term]) -> tuple[str, ...]:
    """What must be there beside the forget set and a model."""
    streams = {stream for term in terms for stream in used_streams(term)}
    found = {
        "reference": any(reference_needs(term) for term in terms),
        "retain data": any(term.on == "retain" for term in terms),
        **{need: stream in streams for stream, need in STREAM_NEEDS.items()},
        "centres": any(isinstance(term, ClusterPull) and term.centres is None for term in terms),
    }
    return tuple(need for need, there in found.items() if there)


def cost(terms: Sequence[Term]) -> Cost:
    """What one step with these terms computes, as `UnlearnLoss` goes about it."""
    forwards = reference_forwards = gemms = reference_gemms = 0
    deepest: list[int | None] = []
    for side in SIDES:
        for group in stream_groups([(term.name, term) for term in terms if term.on == side]):
            own = [term for _, term in group.terms]
            whole = reaches_head(own)
            deepest += [None] if whole else list(layers_of(own))
            looking = [([term for term in own if stream in used_streams(term)], True) for stream in group.streams]
            looking += [([term], False) for term in own if term.baseline_stream is not None]  # without a gradient
            for seen_by, learning in looking:
                wanted = reference_wants(seen_by, known=True)
                forwards += 1
                reference_forwards += bool(wanted)
                gemms += head_products(seen_by, learning) if whole else 0
                reference_gemms += any(not name.startswith(STATES) for name in wanted)
                reference_gemms += EMBEDDING in wanted
    layers = [layer for layer in deepest if layer is not None]
    to_layer = max(layers, key=lambda layer: (layer < 0, layer)) if layers and len(layers) == len(deepest) else None
    return Cost(forwards, reference_forwards, gemms, reference_gemms, to_layer)


def head_products(terms: Sequence[Term], learning: bool = True) -> int:
    """Products with the head that one stream's terms cost together, with their gradients where `learning`."""
    wanted = frozenset().union(*(term.needs for term in terms))
    learned = learning and any(term.learns_from_logp for term in terms)
    again = 2 if learned and NEEDS_SWEEP & wanted else 0
    kinds = divergences(wanted)
    compared = sum(
        (2 if kind == "forward_kl" else 4) + learning * (1 if kind == "forward_kl" else 2) for kind, _ in kinds.values()
    )
    told = not learned and compared and not BY_NAME.keys() & wanted  # log p_y comes with the divergence
    return (0 if told else 1) + learned + again + compared


def row(each: Card) -> tuple[str, str, str, str, str]:
    """A card as the table's row: name, paper, needs, forwards, GEMMs."""
    spent = each.cost
    end = "" if spent.to_layer is None else f" to layer {spent.to_layer}"
    return (
        each.name,
        ", ".join(each.papers) or "–",
        ", ".join(each.needs) or "–",
        f"{spent.forwards}{end}" + (f" (+{spent.reference_forwards})" if spent.reference_forwards else ""),
        f"{spent.gemms}" + (f" (+{spent.reference_gemms})" if spent.reference_gemms else ""),
    )
