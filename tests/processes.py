"""Several processes that train together, each forked from the test's."""

import contextlib
import multiprocessing
import traceback

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from integrations.loops import flat, rows
from torch.distributed.fsdp import FSDPModule

import fastforget as ff
from fastforget.batch import ROLES


def start(rank, work, folder, count, arguments):
    """A child's whole life; what `work` returns goes into a file, or its traceback, as the second of two."""
    store = dist.FileStore(str(folder / "store"), count)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=count)
    try:
        outcome = work(rank, *arguments), None
    except BaseException:
        outcome = None, traceback.format_exc()
    torch.save(outcome, folder / f"{rank}.pt")
    dist.destroy_process_group()


def in_processes(folder, count, work, *arguments):
    """[work(0, ...), work(1, ...), ...], each run in a process of its own; `folder` is for their files alone."""
    # forked: nothing is imported again, and the tests run with one thread
    context = multiprocessing.get_context("fork")
    children = [context.Process(target=start, args=(rank, work, folder, count, arguments)) for rank in range(count)]
    for child in children:
        child.start()
    hung = False
    for child in children:
        child.join(60)
        if child.is_alive():
            hung = True
            child.kill()
    assert not hung, "a process hangs"
    outcomes = [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(count)]
    for _, failure in outcomes:
        assert failure is None, failure
    return [result for result, _ in outcomes]


def messages_of(attempts):
    """What each attempt's FastforgetError says, by name."""
    messages = {}
    for name, attempt in attempts.items():
        with pytest.raises(ff.FastforgetError) as error:
            attempt()
        messages[name] = str(error.value)
    return messages


def micro_batches(step, rank):
    """Two of each step and process, of uneven counts; in some a process has no forget rows, or no label at all."""
    first, second = (100 * step + 10 * rank, 100 * step + 10 * rank + 5)
    odd = rank % 2
    forgets = 0 if odd and step in (1, 3) else 2 - odd
    batches = [
        flat(rows(forgets, first), rows(1 + odd, first + 1)),
        flat(rows(forgets, second), rows(2, second + 1)),
    ]
    if rank == 1 and step == 3:
        for batch in batches:
            batch["labels"] = torch.full_like(batch["labels"], -100)
    return batches


def merged(batches):
    """One flat batch of all of their rows."""
    width = max(batch["input_ids"].shape[1] for batch in batches)
    padding = {"labels": -100}

    def wide(key, value):
        return value if value.dim() == 1 else F.pad(value, (0, width - value.shape[1]), value=padding.get(key, 0))

    return {key: torch.cat([wide(key, batch[key]) for batch in batches]) for key in batches[0]}


def calls_with_mismatched(step, rank):
    """Two calls of a step with answers to other prompts, of which the second process has some at even steps alone."""
    calls = []
    for place, batch in enumerate(micro_batches(step, rank)):
        if rank == 0 or step % 2 == 0:
            extra = flat(rows(2 + place, 1000 + 100 * step + 10 * rank + place), [])
            extra["role"] = torch.full_like(extra["role"], ROLES["forget", "mismatch"])
            batch = merged([batch, extra])
        calls.append(batch)
    return calls


def five_steps(step, batches_of):
    losses = []
    for number in range(5):
        batches = batches_of(number)
        counts = ff.count_labels(batches)
        loss = 0.0
        for place, batch in enumerate(batches):
            last = place == len(batches) - 1
            if isinstance(step.model, FSDPModule):
                step.model.set_requires_gradient_sync(last)
            apart = getattr(step.model, "no_sync", contextlib.nullcontext)
            with contextlib.nullcontext() if last else apart():
                loss += float(step.backward(batch, counts=counts).loss)
        step.step()
        step.zero_grad()
        losses.append(loss)
    scalars = {k: float(v) for k, v in step.param_groups[0].items() if k.startswith("unlearn_")}
    return losses, scalars
