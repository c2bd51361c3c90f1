"""TOFU's two figures (arXiv 2401.06121): forget quality and model utility, and the log that one run leaves to another.

Forget quality is the p-value of a two-sample Kolmogorov-Smirnov test between the forget questions' truth ratios under
the unlearned model and under a *retain model*, one trained without the forget set: a small p says that they can be
told apart. Model utility is the harmonic mean of nine: probability, ROUGE and truth ratio on questions of the retain
set, about real authors, and of world facts.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastforget.errors import FastforgetError
from fastforget.evaluate.libraries import library
from fastforget.evaluate.questions import Answered
from fastforget.files import open_text

UTILITY_SETS = ("retain", "real_authors", "world_facts")
LOG = "log.json"  # of a run: what another is compared with


@dataclass(frozen=True)
class TofuReport:
    """One model: figures from 0 to 1 by name, None with a reason where one cannot be had."""

    forget_quality: float | None
    forget_quality_reason: str | None
    utility: float | None
    utility_reason: str | None
    figures: dict[str, float | None]  # "forget_probability", "retain_rouge", "world_facts_truth_ratio", ...


def tofu_report(answers: Mapping[str, Sequence[Answered]], retain_ratios: Sequence[float] | None) -> TofuReport:
    """Summarise a model's answers.

    Args:
        answers: by set: "forget", and of UTILITY_SETS those that there are.
        retain_ratios: the forget questions' truth ratios under the retain model, None without one.
    """
    figures: dict[str, float | None] = {}
    for name, part in answers.items():
        for figure, value in set_figures(name, part).items():
            figures[f"{name}_{figure}"] = value
    quality, quality_reason = forget_quality(ratios(answers.get("forget", ())), retain_ratios)
    utility, utility_reason = model_utility(figures)
    return TofuReport(quality, quality_reason, utility, utility_reason, figures)


def set_figures(name: str, answers: Sequence[Answered]) -> dict[str, float | None]:
    """Return the means over one set's questions.

    Probability: normalised for real authors and world facts. Truth ratio: how near it is to 1 on the forget set,
    min(r, 1/r); elsewhere how far the right answer is ahead, max(0, 1 - r).
    """
    probabilities = [
        each.normalised if name in ("real_authors", "world_facts") and each.normalised is not None else each.probability
        for each in answers
    ]
    found = ratios(answers)
    near_one = [0.0 if ratio == 0.0 else min(ratio, 1.0 / ratio) for ratio in found]
    ahead = [max(1.0 - ratio, 0.0) for ratio in found]  # in this order: NaN stays
    return {
        "probability": mean(probabilities),
        "paraphrased_probability": mean([each.paraphrased_probability for each in answers]),
        "rouge": mean([each.rouge for each in answers]),
        "truth_ratio": mean(near_one if name == "forget" else ahead),
    }


def ratios(answers: Sequence[Answered]) -> list[float]:
    """List the truth ratios of the questions that have wrong answers."""
    return [each.truth_ratio for each in answers if each.truth_ratio is not None]


def mean(values: Sequence[float]) -> float | None:
    """Average; None of nothing."""
    return sum(values) / len(values) if values else None


def model_utility(figures: Mapping[str, float | None]) -> tuple[float | None, str | None]:
    """Return the harmonic mean of the nine figures, 0 where one is 0, and a reason where there is none."""
    names = [f"{name}_{figure}" for name in UTILITY_SETS for figure in ("probability", "rouge", "truth_ratio")]
    values = {name: figures.get(name) for name in names}
    missing = [name for name, value in values.items() if value is None or math.isnan(value)]
    if missing:
        return None, f"not measured: {', '.join(missing)}"
    stats = library("scipy.stats", "model utility")
    return float(stats.hmean([max(value, 0.0) for value in values.values() if value is not None])), None


def forget_quality(unlearned: Sequence[float], retained: Sequence[float] | None) -> tuple[float | None, str | None]:
    """Return the p-value of the Kolmogorov-Smirnov test between two models' truth ratios, or None and a reason.

    The two may have other numbers of questions.
    """
    if retained is None:
        return None, "no log of a retain model (trained without the forget set) to compare with"
    if not unlearned or not retained:
        return None, "no truth ratios: the forget questions need perturbed answers"
    if any(math.isnan(ratio) for ratio in (*unlearned, *retained)):
        return None, "a truth ratio is NaN: the model is broken"
    stats = library("scipy.stats", "forget quality")
    return float(stats.ks_2samp(list(unlearned), list(retained)).pvalue), None


def read_retain_ratios(path: str | os.PathLike[str]) -> list[float]:
    """Read the forget questions' truth ratios from a retain model's log.

    Our own log.json, open-unlearning's TOFU_EVAL.json, and TOFU's own eval_log_forget.json are read.

    Raises:
        FastforgetError: a file of another form.
    """
    log = read_log(path)
    try:
        if "forget_truth_ratio" in log and isinstance(log["forget_truth_ratio"], list):
            return [float(value) for value in log["forget_truth_ratio"]]
        if "forget_truth_ratio" in log:
            return [float(each["score"]) for each in log["forget_truth_ratio"]["value_by_index"].values()]
        if "average_perturb_loss" in log:
            wrong, right = log["average_perturb_loss"], log["avg_paraphrased_loss"]
            return [math.exp(right[index] - sum(wrong[index]) / len(wrong[index])) for index in wrong]
    except (KeyError, TypeError, ValueError, ArithmeticError, AttributeError) as error:
        raise FastforgetError(f"{path} is a log whose truth ratios cannot be read: {error!r}") from None
    raise FastforgetError(
        f"{path} holds no truth ratios of forget questions: give {LOG} of `fastforget evaluate --suite tofu`, "
        f"open-unlearning's TOFU_EVAL.json, or TOFU's eval_log_forget.json; its keys are {', '.join(list(log)[:20])}"
    )


def read_log(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Read a log: a JSON file that holds an object; raise FastforgetError for another."""
    with open_text(Path(path)) as file:
        try:
            log = json.load(file)
        except (ValueError, RecursionError) as error:
            raise FastforgetError(f"{path} is not valid JSON: {error}") from None
    if not isinstance(log, dict):
        raise FastforgetError(f"{path} holds no log: it needs a JSON object")
    return log
