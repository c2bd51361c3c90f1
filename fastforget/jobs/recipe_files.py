"""The recipes that come with the package, as YAML, and what a user changes in them."""

from __future__ import annotations

import copy
import difflib
from collections.abc import Mapping
from dataclasses import fields
from importlib.resources import files
from typing import Any

import yaml

from fastforget.errors import FastforgetError
from fastforget.jobs.evaluation_options import SUITE_SETS, EvaluateOptions, SelectOptions
from fastforget.jobs.options import JobSettings, UnlearnOptions

RECIPES = ("harmful", "copyright", "hallucination", "privacy", "tofu", "muse")
SIDES = ("forget", "retain", "unseen")
FINE_TUNE = ("known", "bits", "max_length", "lora_r", *(each.name for each in fields(JobSettings)))
Recipe = dict[str, Any]


def read_recipe(name: str) -> Recipe:
    """Read a recipe of the package.

    Raises:
        FastforgetError: there is none of that name.
    """
    if name not in RECIPES:
        near = difflib.get_close_matches(name, RECIPES, n=1)
        hint = f" (did you mean {near[0]!r}?)" if near else ""
        raise FastforgetError(f"unknown recipe {name!r}{hint}: choose one of {', '.join(RECIPES)}")
    text = files("fastforget").joinpath("recipes", f"{name}.yaml").read_text(encoding="utf-8")
    return dict(yaml.safe_load(text))


def overridden(recipe: Recipe, overrides: Mapping[str, Any]) -> Recipe:
    """Return the recipe with fields replaced, each named by its way: `unlearn.max_steps`, `data.forget.format`.

    Raises:
        FastforgetError: a field that there is not, or that is set of fields.
    """
    changed = copy.deepcopy(recipe)
    for way, value in overrides.items():
        known = fields_of(changed)
        if way not in known:
            near = difflib.get_close_matches(way, known, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"such as {', '.join(sorted(known)[:8])}"
            raise FastforgetError(f"the recipe has no field {way!r}: {hint}")
        *parents, last = way.split(".")
        part = changed
        for parent in parents:
            part = part.setdefault(parent, {})
        part[last] = value
    return changed


def fields_of(recipe: Recipe) -> set[str]:
    """List the fields of a recipe that may be replaced, by their ways."""
    known = {f"data.{side}.{field}" for side in SIDES for field in ("place", "format")}
    known |= {f"data.asked.{name}" for suite in recipe["evaluate"] for name in (*SIDES, *SUITE_SETS.get(suite, ()))}
    # what the recipe's command itself says
    not_theirs = {"model", "out", "adapter", "suite", "data", "console", "overwrite", "resume"}
    parts = {"unlearn": UnlearnOptions, **{f"evaluate.{suite}": EvaluateOptions for suite in recipe["evaluate"]}}
    if "select" in recipe:
        parts["select"] = SelectOptions
    for part, options in parts.items():
        known |= {f"{part}.{each.name}" for each in fields(options) if each.name not in not_theirs}
    if "fine_tune" in recipe:
        known |= {f"fine_tune.{name}" for name in FINE_TUNE}
    return known
