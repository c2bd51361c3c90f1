"""UnlearnLoss: an unlearning objective as one number, over any loop's batches."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fastforget.backbone import Backbone
from fastforget.backends import backend_of
from fastforget.backends.fields import NAMES
from fastforget.backends.protocol import KnownReference
from fastforget.batch import Batch, LabelCounts, PreparedSide, count_labels, count_name, split_roles
from fastforget.errors import FastforgetError
from fastforget.objectives import (
    SideStats,
    StateDistances,
    StateRequest,
    Term,
    layers_of,
    preset,
    reaches_head,
    weight_at,
)
from fastforget.objectives.needs import OF_REFERENCE, reference_fields
from fastforget.objectives.needs import divergences as divergences_among
from fastforget.reference import DEFAULT_CACHE_BYTES, EMBEDDING, STATES, Reference, states_of
from fastforget.stats import hidden_stats, label_anchor
from fastforget.streams import check_labelled, check_streams, join, prepared_parts, seen_by, stream_work, used_streams
from fastforget.term_state import States, initial_states

SIDES = ("forget", "retain")


@dataclass
class UnlearnOutput:
    """What one call returns; all scalars, float32, on the model's device.

    `terms` holds the unweighted value of each term by name, `stats` the positive mean NLL per label token of each side
    that a term looked at (`forget_nll`, `retain_nll`), and of each companion (`forget_refusal_nll`, ...). Of a side
    whose terms all look at layers its forward ends at the deepest of them, and there is no NLL of it.
    """

    loss: Tensor
    terms: dict[str, Tensor]
    stats: dict[str, Tensor]
    side: str | None = None  # of a part (`UnlearnLoss.passes`): which side it is of


class UnlearnLoss:
    """The loss alone, for any loop: `UnlearnLoss(model, terms)(forget, retain).loss`.

    Args:
        model: a Hugging Face causal LM; terms that compare with the frozen model need it to carry a PEFT adapter.
        terms: a list of terms, or a preset's name.
        backend: "auto", "triton", "native", "torch" or "eager".
        reference_cache_bytes: limit of the reference's cache on the CPU; 0 switches it off (streamed data).

    A term's own scalars (the dual weight of `DualCE`) stay as they are: only `UnlearnStep` knows when a step is over.

    Raises:
        FastforgetError: no terms, a layer that the model does not have, an adapter on the head, or a set-up in which
            the reference would be wrong.
    """

    def __init__(
        self,
        model: nn.Module,
        terms: Sequence[Term] | str,
        *,
        backend: str = "auto",
        reference_cache_bytes: int = DEFAULT_CACHE_BYTES,
    ) -> None:
        self.terms = named_terms(preset(terms) if isinstance(terms, str) else terms)
        self.backend = backend
        self.backbone = Backbone(model)
        for term in self.terms.values():
            check_streams(term)
            term.check_ready()
        self.backbone.check_layers(layers_of(self.terms.values()))
        needed = frozenset().union(*(reference_needs(term) for term in self.terms.values()))
        self.reference = Reference(self.backbone, reference_cache_bytes) if needed else None
        states = initial_states(self.terms)
        self.term_states: Callable[[], States] = lambda: states  # scalars of terms' own; a step puts its own here
        self._constants: dict[int, Tensor] = {}  # anchors and centres on the model's device, by the id of the user's

    def __call__(
        self, forget: Batch, retain: Batch | None = None, counts: LabelCounts | None = None, step: int = 0
    ) -> UnlearnOutput:
        """The loss of one batch, with its graph.

        Args:
            forget, retain: dicts of `input_ids`, `attention_mask`, `labels` (B, T), labels unshifted as transformers
                has them and -100 outside the answer; other keys go to the model. A flat batch with `role` (0 forget, 1
                retain) may stand for both. `retain` may be None where no term is on it. Terms that need more answers
                find them in companions, nested dicts of the same three: `forget["refusal"]`, `retain["refusal"]` (row
                i: the same prompt with a refusal) and `forget["mismatch"]` (other prompts' answers, any number of
                rows); in a flat batch `role` 2, 3 and 4.
            counts: the denominators of a batch accumulated over several calls, by `count_labels`; without them means
                are over this call.
            step: optimizer steps taken so far, of which scheduled weights are functions.

        Raises:
            FastforgetError: a batch that lacks a key, a side or a companion that a term needs, or any label; a schedule
                that gives no weight.
        """
        parts = list(self.passes(forget, retain, counts, step=step))
        return add_outputs(parts)

    def passes(
        self,
        forget: Batch,
        retain: Batch | None = None,
        counts: LabelCounts | None = None,
        micro_batch: int | None = None,
        step: int = 0,
    ) -> Iterator[UnlearnOutput]:
        """The loss in parts that add up to it, one forward each (`prepared_parts`)."""
        weights = {name: weight_at(name, term.weight, step) for name, term in self.terms.items()}
        if "role" in forget and retain is None:
            forget, retain = split_roles(forget)
        sides = [side for side in SIDES if self.terms_on(side)]
        given = {"forget": forget, "retain": retain}
        batches: dict[str, Batch] = {}
        for side in sides:
            batch = given[side]
            streams = [stream for _, term in self.terms_on(side) for stream in used_streams(term)]
            if batch is None and counts is not None and all(counts.of(side, stream)[0] for stream in streams):
                continue  # this part of a larger batch has none of that side
            if batch is None:
                names = ", ".join(name for name, _ in self.terms_on(side))
                raise FastforgetError(f"these terms need a {side} batch, and there is none: {names}")
            if "labels" not in batch or "input_ids" not in batch:
                raise FastforgetError(f"the {side} batch needs input_ids, attention_mask and labels")
            batches[side] = batch
        work = {side: stream_work(side, batch, self.terms_on(side), counts) for side, batch in batches.items()}
        counts = counts or count_labels([(batches.get("forget"), batches.get("retain"))])
        for side in sides:
            check_labelled(side, self.terms_on(side), counts)
        model = self.backbone.batch_arguments
        ready = [  # all of it, and so checked, before anything is computed
            (side, group, list(prepared_parts(side, batches[side], group.streams, micro_batch, *model)))
            for side, groups in work.items()
            for group in groups
        ]
        constants = [self.baselines(side, batches[side], group.terms, micro_batch) for side, group, _ in ready]
        for (side, group, parts), baselines in zip(ready, constants, strict=True):
            for part in parts:
                states = self.stream_states(part, group.terms)
                stats = {
                    stream: self.side_stats(
                        part[stream], states[stream], looking_at(group.terms, stream), counts.of(side, stream)
                    )
                    for stream in part
                }
                yield self.output(side, stats, group.terms, baselines, weights)

    def terms_on(self, side: str) -> list[tuple[str, Term]]:
        """The terms on one side, with their names."""
        return [(name, term) for name, term in self.terms.items() if term.on == side]

    def output(
        self,
        side: str,
        streams: dict[str, SideStats],
        terms: list[tuple[str, Term]],
        baselines: dict[str, Tensor],
        weights: dict[str, float],
    ) -> UnlearnOutput:
        """The terms of one forward of (micro-)batches of one side's streams."""
        values = {name: term.value(seen_by(term, streams, baselines.get(name))) for name, term in terms}
        own = self.term_states()
        factors = {name: weights[name] * term.factor(own.get(name, {})) for name, term in terms}
        loss = torch.stack([factors[name] * values[name] for name, _ in terms]).sum()
        return UnlearnOutput(
            loss=loss,
            terms={name: value.detach() for name, value in values.items()},
            stats={
                f"{count_name(side, stream)}_nll": -stats.token_mean(stats.logp.detach())
                for stream, stats in streams.items()
                if stats.label_logp is not None
            },
            side=side,
        )

    def baselines(
        self, side: str, batch: Batch, terms: list[tuple[str, Term]], micro_batch: int | None
    ) -> dict[str, Tensor]:
        """Each term's constant of its `baseline_stream`, by name: over all of this call's rows, without a gradient."""
        found: dict[str, Tensor] = {}
        own = count_labels([(batch, None) if side == "forget" else (None, batch)])
        model = self.backbone.batch_arguments
        for name, term in terms:
            if term.baseline_stream is None:
                continue
            stream = term.baseline_stream
            with torch.no_grad():
                for part in prepared_parts(side, batch, (stream,), micro_batch, *model):
                    states = self.stream_states(part, [(name, term)])[stream]
                    share = term.constant(self.side_stats(part[stream], states, [term], own.of(side, stream)))
                    found[name] = found[name] + share if name in found else share
        return found

    def stream_states(
        self, prepared: dict[str, PreparedSide], terms: list[tuple[str, Term]]
    ) -> dict[str, dict[int | None, Tensor]]:
        """One forward of streams: each one's states (n, D) by layer, as far as the terms looking at them need."""
        layers = layers_of(term for _, term in terms)
        layers |= {None} if reaches_head(term for _, term in terms) else set()
        states = self.backbone.states(*join(list(prepared.values())), layers)
        lengths = [len(part.labels) for part in prepared.values()]
        parts = {layer: state.split(lengths) for layer, state in states.items()}
        return {stream: {layer: parts[layer][place] for layer in states} for place, stream in enumerate(prepared)}

    def side_stats(
        self, prepared: PreparedSide, states: dict[int | None, Tensor], terms: list[Term], totals: tuple[int, int]
    ) -> SideStats:
        """What terms see of one stream, of which there are `totals` (tokens, sequences) in the whole batch.

        Where no term learns from log p_y it is only reported, and comes with a divergence, if there is one, for free.
        """
        needs = frozenset().union(*(term.needs for term in terms))
        head, labels = self.backbone.head, prepared.labels
        kinds = divergences_among(needs)
        known = self.reference is not None and self.reference.keeps_embeddings and torch.is_grad_enabled()
        known = known and self.backend != "eager" and head.softcap is None and not head.is_identity
        wanted = reference_wants(terms, known)
        reference = self.reference.of(prepared, wanted, self.backend) if self.reference and wanted else {}
        fields: dict[str, Tensor] = {}
        divergences: dict[str, Tensor] = {}
        if None in states:
            hidden, backend = states[None], backend_of(self.backend, labels.device)
            names = ("logp", *(name for name in NAMES if name in needs - {"logp"}))
            learned = any(term.learns_from_logp for term in terms)
            if learned or not kinds or len(names) > 1:
                with torch.set_grad_enabled(learned and torch.is_grad_enabled()):
                    fields = backend.token_stats(hidden, labels, head, names)
            of_reference = None
            if EMBEDDING in reference:
                of_reference = KnownReference(reference[EMBEDDING], reference["others_argmax"])
            for name, (kind, shift) in kinds.items():
                divergences[name], logp = backend.divergence(
                    hidden, reference[states_of(None)], head, kind, labels=labels, label_shift=shift, known=of_reference
                )
                fields.setdefault("logp", logp)
        tokens, sequences = totals
        stats = SideStats(
            label_logp=fields.get("logp"),
            sequence=prepared.sequence,
            sequence_count=prepared.sequence_count,
            token_total=tokens,
            sequence_total=sequences,
            ref_logp=reference.get("logp"),
            divergences=divergences,
            fields=fields
            | {OF_REFERENCE + name: value for name, value in reference.items() if not name.startswith(STATES)},
            vocabulary=self.backbone.vocabulary,
        )
        for term in terms:
            request = term.state_request
            if request is not None:
                stats.states[request] = self.state_distances(request, states[request.layer], reference, prepared, stats)
        return stats

    def state_distances(
        self,
        request: StateRequest,
        hidden: Tensor,
        reference: dict[str, Tensor],
        prepared: PreparedSide,
        stats: SideStats,
    ) -> StateDistances:
        """What a term asked of a layer's hidden states (n, D)."""
        if self.backbone.head.is_identity and (request.layer is None or request.anchor == "label"):
            raise FastforgetError(
                "this model's head cannot be read, so the states that enter it are not known, nor its rows: give the "
                "term a layer (layer=-1 is the last), and another anchor than 'label'"
            )
        anchor: Tensor | None
        if isinstance(request.anchor, str):
            if request.anchor == "label":
                anchor = label_anchor(request.anchor, self.backbone.head, prepared.labels)
            else:
                anchor = reference[states_of(request.layer)]
        else:
            given = request.anchor
            anchor = self.constant(given(hidden.shape[1]) if callable(given) else given)
        if request.level == "sequence":
            hidden = stats.sequence_average(hidden)
            anchor = stats.sequence_average(anchor) if anchor is not None and anchor.dim() == 2 else anchor
        centres = self.constant(request.centres)
        return StateDistances(
            *hidden_stats(hidden, anchor, centres, request.metric, request.margin, backend=self.backend)
        )

    def constant(self, tensor: Tensor | None) -> Tensor | None:
        """A term's own tensor on the model's device, copied there once."""
        if tensor is None:
            return None
        if id(tensor) not in self._constants:
            self._constants[id(tensor)] = tensor.to(self.backbone.device)
        return self._constants[id(tensor)]


def looking_at(terms: list[tuple[str, Term]], stream: str) -> list[Term]:
    """The terms that take something from a stream."""
    return [term for _, term in terms if stream in used_streams(term)]


def reference_needs(term: Term) -> frozenset[str]:
    """What a term needs of the frozen reference, by the names that `Reference.of` knows."""
    needs = reference_fields(term.needs)
    if divergences_among(term.needs):
        needs.add(states_of(None))
    request = term.state_request
    if request is not None and isinstance(request.anchor, str) and request.anchor == "reference":
        needs.add(states_of(request.layer))
    return frozenset(needs)


def reference_wants(terms: Sequence[Term], known: bool) -> frozenset[str]:
    """What terms need of the frozen reference together; `known`: its embedding too, which saves a KL a product."""
    wanted = frozenset().union(*(reference_needs(term) for term in terms))
    kinds = divergences_among(frozenset().union(*(term.needs for term in terms)))
    if known and any(kind == "forward_kl" for kind, _ in kinds.values()):
        wanted |= {EMBEDDING, "others_argmax"}
    return wanted


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


def add_outputs(parts: Sequence[UnlearnOutput]) -> UnlearnOutput:
    """The sum of parts whose denominators are those of the whole."""
    if not parts:  # a part of a larger batch, without a label of its own
        return UnlearnOutput(loss=torch.zeros(()), terms={}, stats={})
    total = UnlearnOutput(loss=parts[0].loss, terms=dict(parts[0].terms), stats=dict(parts[0].stats))
    for part in parts[1:]:
        total.loss = total.loss + part.loss
        for mine, other in ((total.terms, part.terms), (total.stats, part.stats)):
            for name, value in other.items():
                mine[name] = mine[name] + value if name in mine else value
    return total
