"""General ability: tasks of EleutherAI's lm-evaluation-harness, run through its own API (the extra `ability`)."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase

from fastforget.backbone import training_flags_restored
from fastforget.errors import FastforgetError
from fastforget.evaluate.libraries import library

WHAT, EXTRA = "--tasks", "ability"


def task_manager(tasks: Sequence[str], folder: str | os.PathLike[str] | None = None) -> Any:
    """Return what knows lm-eval's tasks, and those of a folder of YAML files in its format.

    A task's files may name Python functions of theirs, which run: give folders that you trust.

    Raises:
        FastforgetError: lm-eval is not installed, there is no such folder, or one of the tasks is not known.
    """
    if folder is not None and not os.path.isdir(folder):
        raise FastforgetError(f"{folder} is no folder of tasks")
    found = library("lm_eval.tasks", WHAT, EXTRA).TaskManager(
        include_path=None if folder is None else os.fspath(folder)
    )
    unknown = [name for name in tasks if not found.match_tasks([name])]
    if unknown:
        raise FastforgetError(f"lm-eval knows no task {', '.join(unknown)}: `lm-eval ls tasks` lists them")
    return found


def ability(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    tasks: Sequence[str],
    manager: Any,
    *,
    limit: int | None = None,
    batch_size: int = 8,
    seed: int = 0,
) -> dict[str, float]:
    """Run tasks; return each one's metrics as "task/metric", as lm-eval names them.

    The model is in evaluation mode meanwhile.

    Args:
        limit: questions of each task at most.

    Raises:
        FastforgetError: lm-eval is not installed, or cannot run a task (its data cannot be had, say).
    """
    lm_eval = library("lm_eval", WHAT, EXTRA)
    wrapped = library("lm_eval.models.huggingface", WHAT, EXTRA).HFLM
    seeds = {f"{name}_random_seed": seed for name in ("numpy", "torch", "fewshot")}
    with training_flags_restored(model):
        model.eval()
        try:
            found = lm_eval.simple_evaluate(
                model=wrapped(pretrained=model, tokenizer=tokenizer, batch_size=batch_size),
                tasks=list(tasks),
                task_manager=manager,
                limit=limit,
                random_seed=seed,
                bootstrap_iters=0,
                log_samples=False,
                **seeds,
            )
        except Exception as error:  # of its own, of `datasets`, and of the files of tasks
            raise FastforgetError(
                f"lm-eval could not run {', '.join(tasks)}: {type(error).__name__}: {error}"
            ) from error
    return {
        f"{task}/{name.removesuffix(',none')}": float(value)
        for task, row in found["results"].items()
        for name, value in row.items()
        if isinstance(value, float) and "stderr" not in name
    }
