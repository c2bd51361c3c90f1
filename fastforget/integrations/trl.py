"""UnlearnSFTTrainer: unlearning in TRL's SFTTrainer, whose preparation of data and metrics are kept."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import trl
from datasets import Dataset
from torch import Tensor, nn
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from fastforget.batch import COMPANIONS, LabelCounts
from fastforget.errors import FastforgetError
from fastforget.integrations.rows import PairedRows, as_row, flat_rows, row_collator
from fastforget.integrations.trainer import EpochOfPairs, UnlearnTrainerMixin
from fastforget.objectives import LOGP, Field, Request, SideStats, Term, preset

ENTROPY, ARGMAX = Field("entropy"), Field("argmax")
JOINS = "joins documents in one row, and forgetting counts them one by one: leave it off"
COLUMNS = ("input_ids", "labels", "example_id", *COMPANIONS)  # what a collator takes of a prepared set


def no_weight(step: int) -> float:
    """Weigh a term that is only reported."""
    return 0.0


@dataclass(kw_only=True)
class LabelTokens(Term):
    """How many label tokens there are: not learned from, and neither are the terms below."""

    name: ClassVar[str] = "label_tokens"

    def value(self, stats: SideStats) -> Tensor:
        return torch.ones_like(stats.logp.detach()).sum()


@dataclass(kw_only=True)
class EntropySum(Term):
    """The entropies of the predictions, summed over the label tokens, in nats."""

    name: ClassVar[str] = "entropy_sum"

    @property
    def requests(self) -> tuple[Request, ...]:
        return LOGP, ENTROPY

    def value(self, stats: SideStats) -> Tensor:
        return stats[ENTROPY].detach().sum()


@dataclass(kw_only=True)
class TopLabels(Term):
    """How many label tokens are the likeliest token."""

    name: ClassVar[str] = "top_labels"

    @property
    def requests(self) -> tuple[Request, ...]:
        return LOGP, ARGMAX

    def value(self, stats: SideStats) -> Tensor:
        assert stats.labels is not None
        return (stats[ARGMAX] == stats.labels).to(torch.float32).sum()


SUMS: dict[str, type[Term]] = {term.name: term for term in (LabelTokens, EntropySum, TopLabels)}


def token_sums(terms: Sequence[Term]) -> list[Term]:
    """What SFTTrainer's metrics are made of, of each side on which terms look at the model's own statistics."""
    looking = {
        term.on
        for term in terms
        if "answer" in term.streams and any(isinstance(each, Field) and each.of == "model" for each in term.requests)
    }
    return [made(on=side, weight=no_weight) for side in sorted(looking) for made in SUMS.values()]


class UnlearnSFTTrainer(UnlearnTrainerMixin, trl.SFTTrainer):
    """TRL's `SFTTrainer` that unlearns; see `UnlearnTrainerMixin` for what it adds.

        trainer = UnlearnSFTTrainer(model, args, terms="npo", forget_dataset=forget, retain_dataset=retain)

    SFTTrainer prepares the sets (chat templates, completions, truncation), and its metrics "entropy",
    "mean_token_accuracy" and "num_tokens" are of the label tokens of both sides, from the statistics of the loss's own
    sweeps. With `padding_free` the loss is the same; rows are padded in memory all the same.

    Args:
        forget_dataset, retain_dataset: `datasets.Dataset`s in any of TRL's formats, both in the same one, or rows or
            examples as in `UnlearnTrainerMixin`. eval_dataset: (forget set, retain set).

    Raises:
        FastforgetError: an option that stands for another loss or another way to compute it (`loss_type`,
            `label_smoothing_factor`, `compute_loss_func`, `activation_offloading`), or joins documents into one
            (`packing`); sets of images.
    """

    train_dataset: Any  # SFTTrainer's own, as are the next two
    eval_dataset: Any
    data_collator: Any

    def __init__(
        self,
        model: nn.Module | str,
        args: Any = None,
        *,
        terms: Sequence[Term] | str,
        forget_dataset: Any,
        retain_dataset: Any = None,
        eval_dataset: tuple[Any, Any] | None = None,
        compute_loss_func: Callable | None = None,
        **options: Any,
    ) -> None:
        check_options(args, compute_loss_func)
        given = {"retain": retain_dataset}
        if eval_dataset is not None:
            given |= dict(zip(("eval_forget", "eval_retain"), eval_dataset, strict=True))
        others = {name: as_dataset(rows) for name, rows in given.items() if rows is not None}
        terms = preset(terms) if isinstance(terms, str) else list(terms)
        super().__init__(
            model,
            args,
            terms=[*terms, *token_sums(terms)],
            train_dataset=as_dataset(forget_dataset),
            eval_dataset=others or None,  # which SFTTrainer prepares as it does the first
            data_collator=None,
            **options,
        )
        if not isinstance(self.data_collator, DataCollatorForLanguageModeling):
            raise FastforgetError("UnlearnSFTTrainer takes sets of text, and these have images")
        self.data_collator = row_collator(self.data_collator.pad_token_id)
        others = {name: prepared_columns(rows) for name, rows in (self.eval_dataset or {}).items()}
        self.train_dataset = PairedRows(prepared_columns(self.train_dataset), others.get("retain"))
        self.add_callback(EpochOfPairs(self.train_dataset))
        self.eval_dataset = None
        if "eval_forget" in others:
            self.eval_dataset = flat_rows(others["eval_forget"], others.get("eval_retain"))
        self._tokens_seen = 0

    def get_batch_samples(
        self, epoch_iterator: Iterator, num_batches: int, device: torch.device
    ) -> tuple[list, LabelCounts | None]:
        """The batches of one optimizer step, whose tokens are counted for "num_tokens"."""
        batches, counts = super().get_batch_samples(epoch_iterator, num_batches, device)
        tokens = torch.tensor(sum(int(batch["attention_mask"].sum()) for batch in batches), device=self.args.device)
        self._tokens_seen += int(self.accelerator.reduce(tokens, "sum"))
        return batches, counts

    def figures(self, totals: Mapping[str, Tensor], steps: int = 1) -> dict[str, float]:
        """Terms and NLLs, and SFTTrainer's metrics in place of the sums that they are made of."""
        sums = dict.fromkeys(SUMS, 0.0)
        rest = {}
        for name, total in totals.items():
            kind = name.removesuffix("_2")  # the second one is that of the other side
            if kind in SUMS:
                sums[kind] += float(total)
            else:
                rest[name] = total
        found = super().figures(rest, steps)
        found["num_tokens"] = self._tokens_seen
        if count := sums["label_tokens"]:
            found["entropy"] = sums["entropy_sum"] / count
            found["mean_token_accuracy"] = sums["top_labels"] / count
        return found


def check_options(args: Any, compute_loss_func: Callable | None) -> None:
    """Raise for options of SFTTrainer that would be ignored, or change what a sequence is."""
    refused = {
        "packing": JOINS,
        "eval_packing": JOINS,
        "label_smoothing_factor": "is of SFTTrainer's own loss: leave it at 0",
        "activation_offloading": "is not served: use gradient_checkpointing or micro_batch=",
    }
    for name, why in refused.items():
        if getattr(args, name, None):
            raise FastforgetError(f"{name}={getattr(args, name)!r} {why}")
    if getattr(args, "loss_type", "nll") != "nll" or compute_loss_func is not None:
        raise FastforgetError("loss_type and compute_loss_func are other losses: `terms` say what is minimised here")


def as_dataset(rows: Any) -> Dataset:
    """A `datasets.Dataset` as it is; rows or examples as one."""
    return rows if isinstance(rows, Dataset) else Dataset.from_list([dict(as_row(row)) for row in rows])


def prepared_columns(rows: Dataset) -> Dataset:
    """A prepared set without the texts that it was made of."""
    return rows.select_columns([name for name in COLUMNS if name in rows.column_names])
