"""The plan of a loss: which forwards its terms need, and what is computed of each. `loss.py` executes it.

A side's batch is its "answer" stream, and may carry companions (`batch.py`). A stream that no term looks at costs
nothing; streams that one term compares share one graph, so their rows go through the model together; others go one
after the other, which needs less memory.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from fastforget.backends.fields import BY_NAME, NAMES
from fastforget.backends.shard_ops import check_learned, check_served
from fastforget.batch import COMPANIONS
from fastforget.errors import FastforgetError
from fastforget.objectives import LOGP, Divergence, Field, StateRequest, Term, layers_of, reaches_head
from fastforget.reference import ARGMAX, EMBEDDING, LayerStates, ReferenceRequest

SIDES = ("forget", "retain")
STREAMS = ("answer", *COMPANIONS)


@dataclass(frozen=True)
class StreamPlan:
    """What is computed of one stream's kept tokens, for all terms that look at it.

    fields: the model's statistics, from a label sweep; none: no sweep runs.
    learns: whether the sweep computes a gradient. Where no term learns from log p_y it is only reported, and comes with
        a divergence, if there is one, for nothing.
    divergences, states: requests that are answered; reference: what the frozen reference must say for all of this.
    """

    fields: tuple[str, ...]
    learns: bool
    divergences: tuple[Divergence, ...]
    states: tuple[StateRequest, ...]
    reference: frozenset[ReferenceRequest]

    def reference_requests(self, known: bool) -> frozenset[ReferenceRequest]:
        """Say what is asked of the reference; `known`: its embedding too, which saves a forward KL a product."""
        helps = any(each.embedding_helps for each in self.divergences)
        return self.reference | {EMBEDDING, ARGMAX} if known and helps else self.reference


@dataclass(frozen=True)
class ForwardPlan:
    """One forward of streams that go through the model together, and the terms it is for, by name.

    layers: whose states are taken; None is what enters the head. Without it the forward ends at the deepest layer.
    learns: False where only constants are computed (`Term.baseline_stream`), without a gradient.
    """

    side: str
    streams: Mapping[str, StreamPlan]
    terms: Mapping[str, Term]
    layers: frozenset[int | None]
    learns: bool = True

    @property
    def reads_head(self) -> bool:
        """Whether anything is computed with the head's weight."""
        return None in self.layers or any(each.from_label for plan in self.streams.values() for each in plan.states)

    @property
    def trains_head(self) -> bool:
        """Whether a head that trains gets a gradient."""
        return any(plan.learns for plan in self.streams.values())

    @property
    def names(self) -> str:
        """The terms' names, for messages."""
        return ", ".join(self.terms)


@dataclass(frozen=True)
class LossPlan:
    """The forwards of one loss: first those that constants come from, then those that are learned from."""

    baselines: tuple[ForwardPlan, ...]
    forwards: tuple[ForwardPlan, ...]

    def on(self, side: str) -> list[ForwardPlan]:
        """Return all forwards of one side."""
        return [forward for forward in (*self.baselines, *self.forwards) if forward.side == side]

    def check_sharded_head(self) -> None:
        """Raise for what a head whose vocabulary is sharded over processes cannot compute."""
        for forward in (*self.baselines, *self.forwards):
            for plan in forward.streams.values():
                of_reference = [each.name for each in plan.reference if isinstance(each, Field)]
                check_served([*plan.fields, *of_reference], [each.kind for each in plan.divergences])
                check_learned(plan.fields if forward.learns else ())
                if any(each.from_label for each in plan.states):
                    raise FastforgetError("anchor='label' needs all of the head's rows, and they are sharded")

    @property
    def streams(self) -> list[StreamPlan]:
        """The plans of all streams of all forwards."""
        return [stream for forward in (*self.baselines, *self.forwards) for stream in forward.streams.values()]

    @property
    def asks_reference(self) -> bool:
        """Whether anything compares with the frozen model."""
        return any(stream.reference for stream in self.streams)

    @property
    def compares_distributions(self) -> bool:
        """Whether anything compares whole distributions with those of the frozen model."""
        return any(stream.divergences for stream in self.streams)


def named_terms(terms: Sequence[Term]) -> dict[str, Term]:
    """Terms by name; a second term of the same kind gets a number."""
    named: dict[str, Term] = {}
    for term in terms:
        if not isinstance(term, Term):
            raise FastforgetError(f"terms must be fastforget terms, not {type(term).__name__}: {term!r}")
        same = sum(other.name == term.name for other in named.values())
        named[f"{term.name}_{same + 1}" if same else term.name] = term
    if not named:
        raise FastforgetError("there are no terms: give a list of them, or a preset's name")
    return named


def plan_loss(terms: Mapping[str, Term]) -> LossPlan:
    """Make the plan for terms by name."""
    baselines, forwards = [], []
    for side in SIDES:
        own = {name: term for name, term in terms.items() if term.on == side}
        for name, term in own.items():
            if term.baseline_stream is not None:
                baselines.append(plan_forward(side, (term.baseline_stream,), {name: term}, learns=False))
        for streams in stream_groups(list(own.values())):
            looking = {name: term for name, term in own.items() if term.streams[0] in streams}
            forwards.append(plan_forward(side, streams, looking))
    return LossPlan(tuple(baselines), tuple(forwards))


def stream_groups(terms: Sequence[Term]) -> list[tuple[str, ...]]:
    """Return the streams that these terms look at, in groups: those that a term compares are in one."""
    groups: list[set[str]] = []
    for term in terms:
        coupled = [group for group in groups if group & set(term.streams)]
        groups = [group for group in groups if group not in coupled] + [set(term.streams).union(*coupled)]
    groups.sort(key=lambda group: min(map(STREAMS.index, group)))
    return [tuple(stream for stream in STREAMS if stream in group) for group in groups]


def plan_forward(side: str, streams: Sequence[str], terms: Mapping[str, Term], learns: bool = True) -> ForwardPlan:
    """Plan the forward of some streams for the terms that look at them, or (not `learns`) take a constant from them."""
    layers = layers_of(terms.values())
    layers |= {None} if reaches_head(terms.values()) else set()
    looking = {stream: [term for term in terms.values() if stream in term.streams or not learns] for stream in streams}
    plans = {stream: plan_stream(looking[stream], None in layers, learns) for stream in streams}
    return ForwardPlan(side, plans, terms, frozenset(layers), learns)


def plan_stream(terms: Sequence[Term], to_head: bool, learns: bool) -> StreamPlan:
    """Plan what is computed of one stream for its terms. `to_head`: its forward goes on to the head."""
    requests = list(dict.fromkeys(request for term in terms for request in term.requests))
    own = {request.name for request in requests if isinstance(request, Field) and request.of == "model"}
    divergences = tuple(request for request in requests if isinstance(request, Divergence))
    states = tuple(request for request in requests if isinstance(request, StateRequest))
    sweeps = to_head and (bool(own) or not divergences)
    reference: set[ReferenceRequest] = {
        request for request in requests if isinstance(request, Field) and request.of == "reference"
    }
    reference |= {LayerStates(request.layer) for request in states if request.from_reference}
    reference |= {LayerStates(None)} if divergences else set()
    return StreamPlan(
        fields=tuple(name for name in NAMES if name in own | {LOGP.name}) if sweeps else (),
        learns=learns and any(BY_NAME[name].differentiable for name in own),
        divergences=divergences,
        states=states,
        reference=frozenset(reference),
    )
