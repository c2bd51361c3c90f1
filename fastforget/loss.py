"""UnlearnLoss: an unlearning objective as one number, over any loop's batches."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import astuple
from itertools import zip_longest
from typing import Any, Literal

import torch
from torch import Tensor, nn

from fastforget.adalora import ORTHOGONALITY, adalora_of
from fastforget.backbone import Backbone
from fastforget.backends import backend_of
from fastforget.backends.protocol import KnownReference
from fastforget.batch import (
    Batch,
    LabelCounts,
    PreparedSide,
    check_counts,
    count_labels,
    count_name,
    sides_of,
    total_counts,
)
from fastforget.collectives import agreed, check_alike, process_count, sum_by_name
from fastforget.complete_reference import Batches, cache_reference, make_reference
from fastforget.distances import Distances
from fastforget.errors import FastforgetError
from fastforget.loss_plan import SIDES, ForwardPlan, StreamPlan, named_terms, plan_loss
from fastforget.objectives import (
    LOGP,
    Divergence,
    Field,
    SideStats,
    StateDistances,
    StateRequest,
    Term,
    layers_of,
    preset,
    weight_at,
)
from fastforget.output import UnlearnOutput, add_outputs, add_to
from fastforget.processes import counts_together
from fastforget.reference import ARGMAX, DEFAULT_CACHE_BYTES, EMBEDDING, Entry, LayerStates, Reference, ReferenceRequest
from fastforget.reference_folder import DEFAULT_FOLDER_BYTES
from fastforget.shards import fill_up, reshard
from fastforget.streams import check_labelled, check_sides, check_streams, join, pack, prepared_parts, seen_by
from fastforget.term_state import TermStates

PASSES = ("sequential", "joint")
Part = dict[str, PreparedSide]  # (micro-)batches of a forward's streams
Share = tuple[ForwardPlan, Part]  # in a forward of the model


class UnlearnLoss:
    """The loss alone, for any loop: `UnlearnLoss(model, terms)(forget, retain).loss`.

    Args:
        model: a Hugging Face causal LM; terms that compare with the frozen model need it to carry a PEFT adapter.
        terms: a list of terms, or a preset's name.
        backend: "auto", "triton", "native", "torch" or "eager".
        reference_cache_bytes: limit of the reference's cache on the CPU; 0 switches it off (streamed data).
        reference_cache_folder, reference_cache_folder_bytes: a folder in which entries of the cache lie too, up to a
            limit, for other runs on these frozen weights (`fastforget/reference_folder.py`).
        reference: a frozen model to compare with, for full fine-tuning; without it, `model` with its adapter off; or
            "cache": what `model` says before its first step, of all examples (`cache_reference`), with no limit of the
            folder. Terms that compare whole distributions (KL, JensUn, UNDIAL) need it to have the same frozen head.
        passes: "sequential": the forget and the retain pass one after the other, each padded; "joint": both in one
            forward, with more in memory, as documents of one packed row where the model keeps these apart
            (`Backbone.packs`) and as one padded batch where it does not. The loss is the same.

    A term's own scalars (the dual weight of `DualCE`) stay as they are: only `UnlearnStep` knows when a step is over.
    With an AdaLoRA adapter PEFT's orthogonality penalty is part of the loss (`adalora_orthogonality` among its terms);
    a loop with `UnlearnLoss` calls `update_and_allocate` itself, `UnlearnStep` does.

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
        reference_cache_folder: str | os.PathLike[str] | None = None,
        reference_cache_folder_bytes: int = DEFAULT_FOLDER_BYTES,
        reference: nn.Module | Literal["cache"] | None = None,
        passes: str = "sequential",
    ) -> None:
        if passes not in PASSES:
            raise FastforgetError(f"passes must be one of {', '.join(PASSES)}, not {passes!r}")
        self.joint = passes == "joint"
        self.terms = named_terms(preset(terms) if isinstance(terms, str) else terms)
        self.backend = backend
        self.backbone = Backbone(model)
        for term in self.terms.values():
            check_streams(term)
            term.check_ready()
        self.backbone.check_layers(layers_of(self.terms.values()))
        if self.joint and self.backbone.sharded:
            raise FastforgetError("passes='joint' does not work under FSDP2: leave it at 'sequential'")
        self.plan = plan_loss(self.terms)
        self.reference: Reference | None = None
        if self.plan.asks_reference:
            self.reference = make_reference(
                self.backbone,
                reference,
                compared=self.plan.compares_distributions,
                backend=backend,
                cache_bytes=reference_cache_bytes,
                folder=reference_cache_folder,
                folder_bytes=reference_cache_folder_bytes,
            )
        self.adalora = adalora_of(self.backbone.model)
        if self.adalora is not None and self.backbone.sharded:
            raise FastforgetError("AdaLoRA shares out its ranks over whole matrices: it does not work under FSDP2")
        if self.backbone.head.shard is not None:
            self.plan.check_sharded_head()
        self.term_states = TermStates(self.terms)  # a step puts its own here
        self.distances = Distances(self.backbone, backend)

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
                that gives no weight; several processes train, whose counts this call does not know.
        """
        if process_count() > 1 and torch.is_grad_enabled() and not self.backbone.shares_batches:
            raise FastforgetError(
                "several processes run, and UnlearnLoss knows only this one's labels: UnlearnStep and UnlearnTrainer "
                "count over all of them, so use one of these, or run one process"
            )
        return add_outputs(list(self.passes(forget, retain, counts, step=step)))

    def cache_reference(self, batches: Batches, *, micro_batch: int | None = None) -> int:
        """Before the first step: keep what the model says of these batches, for a loss with `reference="cache"`.

        Args:
            batches: all that training will see: pairs (forget, retain), of which one may be None, or flat batches, with
                their companions. An example is known by its ids, mask and labels, in whatever batch it comes again.
            micro_batch: at most so many sequences at once.

        Returns:
            How many examples are in the cache, of all calls.

        Raises:
            FastforgetError: no `reference="cache"`, weights that changed since the first call, or more than
                `reference_cache_bytes` without a `reference_cache_folder`.
        """
        return cache_reference(self, batches, micro_batch)

    def wanted(self, plan: StreamPlan, learns: bool) -> frozenset[ReferenceRequest]:
        """What is asked of the reference for one stream; `learns`: with what makes a gradient cheaper."""
        head = self.backbone.head
        known = self.reference is not None and self.reference.keeps_embeddings and learns and self.backend != "eager"
        return plan.reference_requests(known and head.softcap is None and not head.is_identity and head.shard is None)

    def passes(
        self,
        forget: Batch,
        retain: Batch | None = None,
        counts: LabelCounts | None = None,
        micro_batch: int | None = None,
        step: int = 0,
        shared: bool = False,
    ) -> Iterator[UnlearnOutput]:
        """The loss in parts that add up to it, one forward each (`prepared_parts`).

        Args:
            shared: several processes have parts of one batch, and all of them call this: constants are those of all.
        """
        weights = {name: weight_at(name, term.weight, step) for name, term in self.terms.items()}
        check_counts(counts)
        backbone, constants = self.backbone, len(self.plan.baselines)
        shared = shared and process_count() > 1 and not backbone.shares_batches
        call_counts: LabelCounts | None = None  # of this call in all processes
        if shared and constants:
            call_counts = counts_together(lambda: count_labels([sides_of(forget, retain)]), backbone.device)

        def prepare() -> tuple[LabelCounts, list[list[Part]]]:
            return self.prepared(forget, retain, counts, call_counts, micro_batch)

        if backbone.sharded or backbone.shares_batches:
            for each in dict.fromkeys((backbone, backbone if self.reference is None else self.reference.backbone)):
                each.check_again()
        if backbone.sharded:
            reshard(backbone.model)
            backbone.takes_positions()  # two forwards, the first time
            own_counts, parts_of = agreed(prepare, backbone.device)
            parts_of = fill_up(parts_of, {}, backbone.device)
        elif backbone.shares_batches:
            own_counts, parts_of = agreed(prepare, backbone.device)
            own = [*astuple(own_counts), *map(len, parts_of)]
            check_alike(own, backbone.device, "all processes share a vocabulary, and this one's batch is another one")
        else:
            own_counts, parts_of = prepare() if call_counts is None else agreed(prepare, backbone.device)
        whole_counts = counts or own_counts
        baselines = self.constants(parts_of[:constants], call_counts or own_counts, shared)
        for shares in self.forwards_of(parts_of[constants:]):
            used = [share for share in shares if share[1]]
            with backbone.whole_head(any(forward.reads_head for forward, _ in shares)):
                filler = None if used else self.fill_in(shares[0][0])
                stats = self.stats_of(used, whole_counts) if used else []
            if filler is not None:
                yield filler
                continue
            seen = zip(used, stats, strict=True)
            output = add_outputs([self.output(share[0], each, baselines, weights) for share, each in seen])
            del stats, seen  # with its loss, the caller drops the graph before the next forward begins
            yield output
        if self.adalora is not None:
            # the parts of a batch that is accumulated, or of several processes, have one penalty together
            penalty = self.adalora.penalty().to(self.backbone.device) * (own_counts.tokens / whole_counts.tokens)
            yield UnlearnOutput(penalty, {ORTHOGONALITY: penalty.detach()}, {}, side="retain")

    def prepared(
        self,
        forget: Batch,
        retain: Batch | None,
        counts: LabelCounts | None,
        call_counts: LabelCounts | None,
        micro_batch: int | None,
    ) -> tuple[LabelCounts, list[list[Part]]]:
        """Check all of a batch, and prepare it for the plan's forwards: its counts, and the parts of each forward."""
        sides = dict(zip(SIDES, sides_of(forget, retain), strict=True))
        checked = check_sides(self.plan, sides, counts, call_counts, self.backbone.vocabulary)
        own_counts = total_counts(checked)
        for side in SIDES:
            check_labelled(self.plan, side, counts or own_counts)
        if self.joint and micro_batch is not None:  # rows of so many forwards are in memory at once
            micro_batch = max(1, micro_batch // len(self.plan.forwards))

        def parts_of(forward: ForwardPlan) -> list[Part]:
            batches = {each: checked[forward.side, each] for each in forward.streams if (forward.side, each) in checked}
            return list(prepared_parts(batches, micro_batch, self.backbone.prepare, self.joint)) if batches else []

        return own_counts, [parts_of(forward) for forward in (*self.plan.baselines, *self.plan.forwards)]

    @torch.no_grad()
    def constants(self, parts_of: Sequence[Sequence[Part]], counts: LabelCounts, shared: bool) -> dict[str, Tensor]:
        """The constants that terms take from a batch (`Term.baseline_stream`), over all rows that it has in one call.

        Args:
            parts_of: of the plan's forwards for them; counts: of the call, in all processes where it is `shared`.
        """

        def compute() -> dict[str, Tensor]:
            found: dict[str, Tensor] = {}
            for forward, parts in zip(self.plan.baselines, parts_of, strict=True):
                for part in parts:
                    with self.backbone.whole_head(forward.reads_head):
                        if not part:
                            self.fill_in(forward)
                            continue
                        (stats,) = self.stats_of([(forward, part)], counts)
                    add_to(found, {name: term.constant(*stats.values()) for name, term in forward.terms.items()})
            return found

        if not shared or not self.plan.baselines:
            return compute()
        found = compute() if self.backbone.sharded else agreed(compute, self.backbone.device)
        return sum_by_name(found, [name for each in self.plan.baselines for name in each.terms], self.backbone.device)

    def fill_in(self, forward: ForwardPlan) -> UnlearnOutput:
        """Take part in a forward for which this process has no label, and another one has (`shards.py`)."""
        loss = self.backbone.fill_in(forward.layers, forward.trains_head)
        if self.reference is not None:
            for plan in forward.streams.values():
                if plan.reference:
                    self.reference.fill_in(plan.reference)
        return UnlearnOutput(loss=loss, terms={}, stats={}, side=forward.side)

    def output(
        self,
        forward: ForwardPlan,
        streams: Mapping[str, SideStats],
        baselines: Mapping[str, Tensor],
        weights: Mapping[str, float],
    ) -> UnlearnOutput:
        """The terms of one forward of (micro-)batches of one side's streams."""
        values = {name: term.value(seen_by(term, streams, baselines.get(name))) for name, term in forward.terms.items()}
        own = self.term_states.current()
        factors = {name: weights[name] * term.factor(own.get(name, {})) for name, term in forward.terms.items()}
        return UnlearnOutput(
            loss=torch.stack([factors[name] * value for name, value in values.items()]).sum(),
            terms={name: value.detach() for name, value in values.items()},
            stats={
                f"{count_name(forward.side, stream)}_nll": -stats.token_mean(stats.logp.detach())
                for stream, stats in streams.items()
                if LOGP in stats.tensors
            },
            side=forward.side,
        )

    def forwards_of(self, parts_of: Sequence[Sequence[Part]]) -> Iterator[list[Share]]:
        """Yield what goes through the model together: a part of one forward, or (`joint`) of each."""
        if self.joint:
            for together in zip_longest(*parts_of, fillvalue={}):
                yield list(zip(self.plan.forwards, together, strict=True))
            return
        for forward, parts in zip(self.plan.forwards, parts_of, strict=True):
            yield from ([(forward, part)] for part in parts)

    def stats_of(self, shares: Sequence[Share], counts: LabelCounts) -> list[dict[str, SideStats]]:
        """One forward of the model: what terms see of each share's streams, of a batch with these counts."""
        parts = [part for _, streams in shares for part in streams.values()]
        layers = frozenset().union(*(forward.layers for forward, _ in shares))
        states = self.backbone.states(*(self.as_packed(parts) or join(parts)), layers)
        lengths = [len(part.labels) for part in parts]
        of_parts = {layer: iter(state.split(lengths)) for layer, state in states.items()}
        return [
            {
                stream: self.side_stats(
                    forward.streams[stream],
                    part,
                    {layer: next(split) for layer, split in of_parts.items()},
                    counts.totals(forward.side, stream),
                )
                for stream, part in streams.items()
            }
            for forward, streams in shares
        ]

    def as_packed(self, parts: Sequence[PreparedSide]) -> tuple[dict[str, Any], tuple[Tensor, Tensor]] | None:
        """One packed row for a joint forward, where the model can take it and it costs less than padded rows."""
        if not self.joint:
            return None
        packed, shapes = pack(parts), [part.inputs["input_ids"].shape for part in parts]
        padded = torch.Size([sum(rows for rows, _ in shapes), max(width for _, width in shapes)])
        if packed is None or not self.backbone.packing_pays(packed[0]["input_ids"].shape, padded):
            return None
        return packed if self.backbone.packs(packed[0]["input_ids"].shape[1]) else None

    def side_stats(
        self, plan: StreamPlan, prepared: PreparedSide, states: Mapping[int | None, Tensor], totals: tuple[int, int]
    ) -> SideStats:
        """What terms see of one stream, of which there are `totals` (tokens, sequences) in the whole batch."""
        head, labels = self.backbone.head, prepared.labels
        reference: Entry = {}
        if self.reference is not None:
            wanted = self.wanted(plan, torch.is_grad_enabled())
            reference = self.reference.answers(prepared, wanted, self.backend) if wanted else {}
        backend = backend_of(self.backend, labels.device)
        tensors: dict[Field | Divergence, Tensor] = {
            request: value for request, value in reference.items() if isinstance(request, Field)
        }
        if plan.fields:
            with torch.set_grad_enabled(plan.learns and torch.is_grad_enabled()):
                fields = backend.token_stats(states[None], labels, head, plan.fields)
            tensors |= {Field(name): value for name, value in fields.items()}
        embedding = KnownReference(reference[EMBEDDING], reference[ARGMAX]) if EMBEDDING in reference else None
        for request in plan.divergences:
            frozen = reference[LayerStates(None)]
            tensors[request], logp = backend.divergence(
                states[None],
                frozen if request.sharpness == 1.0 else frozen * request.sharpness,
                head,
                request.kind,
                labels=labels,
                label_shift=request.label_shift,
                known=embedding if request.embedding_helps else None,
            )
            tensors.setdefault(LOGP, logp)
        tokens, sequences = totals
        distances: dict[StateRequest, StateDistances] = {}
        stats = SideStats(
            sequence=prepared.sequence,
            sequence_count=prepared.sequence_count,
            token_total=tokens,
            sequence_total=sequences,
            tensors=tensors,
            states=distances,
            labels=labels,
            vocabulary=self.backbone.vocabulary,
        )
        for asked in plan.states:
            distances[asked] = self.distances.of(asked, states[asked.layer], reference, labels, stats)
        return stats
