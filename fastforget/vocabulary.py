"""A part of the vocabulary: which of the head's rows a process holds, where several hold one part each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from fastforget.collectives import has_group
from fastforget.errors import FastforgetError

COMPARED = 4  # elements of a state
DIFFERENT = (
    "processes that share a vocabulary differ in their hidden states or labels: each of them needs the same batches, "
    "the same weights (seed them alike before the adapter is made) and the same random numbers for dropout"
)


@dataclass(frozen=True)
class VocabularyShard:
    """Where a process's rows of the head lie in the vocabulary; all of its processes have the same hidden states.

    Args:
        first: the token of its first row.
        vocabulary: how many tokens there are in all.
        group: the processes; None: all.

    Raises:
        FastforgetError: there are no processes.
    """

    first: int
    vocabulary: int
    group: dist.ProcessGroup | None = None

    def __post_init__(self) -> None:
        if not has_group():
            raise FastforgetError("a shard of the vocabulary needs processes: call init_process_group first")

    @property
    def place(self) -> int:
        """This process's number in the group."""
        return dist.get_rank(self.group)

    def own_labels(self, labels: Tensor, rows: int) -> Tensor:
        """Labels (n,) as numbers of this process's rows; `rows` for those of other processes, -1 for none."""
        own = labels - self.first
        own = torch.where((own >= 0) & (own < rows), own, rows)
        return torch.where(labels < 0, -1, own)

    def gather(self, tensor: Tensor) -> Tensor:
        """All processes' tensors (...), in their order: (R, ...)."""
        parts = [torch.empty_like(tensor) for _ in range(dist.get_world_size(self.group))]
        dist.all_gather(parts, tensor, group=self.group)
        return torch.stack(parts)

    def add_up(self, tensor: Tensor) -> None:
        """Sum all processes' tensors, in place."""
        dist.all_reduce(tensor, group=self.group)

    def check_alike(self, states: Sequence[Tensor], labels: Tensor) -> None:
        """Raise, in every process, where not all have the same states, each (n, D), and labels (n,).

        Of each state a few elements are compared, as loosely as devices may round. On a device nothing is looked at
        from the host: there a difference ends the next launches with the message.
        """
        compared = torch.cat([each.detach()[:, :COMPARED].float() for each in states], dim=1)
        parts = self.gather(torch.cat([compared, labels[:, None].float()], dim=1))
        apart = parts.amax(dim=0) - parts.amin(dim=0)
        bound = (1e-3 if states[0].element_size() > 2 else 3e-2) * parts[..., :-1].abs().amax()
        # numbers that are not finite are not compared
        differ = (apart[:, :-1] > bound).any() | (apart[:, -1] > 0).any()
        if not differ.is_cpu:
            torch._assert_async(~differ, DIFFERENT)
        elif bool(differ):
            raise FastforgetError(DIFFERENT)

    def check(self, rows: int, device: torch.device) -> None:
        """Raise, in every process, where the parts are not the vocabulary: each token in one of them, in any order."""
        parts = self.gather(torch.tensor([self.first, rows, self.vocabulary], device=device)).tolist()
        end = 0
        for first, size, vocabulary in sorted(parts):
            if first != end or vocabulary != self.vocabulary:
                break
            end += size
        if end != self.vocabulary:
            said = "; ".join(f"{size} rows from {first} on, of {vocabulary}" for first, size, vocabulary in parts)
            raise FastforgetError(f"the shards of the head are not one vocabulary, each token in one of them: {said}")
