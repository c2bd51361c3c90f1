"""Where something was measured: machine, versions, commit; and files that name no folder of that machine."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import torch

from fastforget import doctor

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
PACKAGES = ("torch", "transformers", "peft", "bitsandbytes", "fastforget")
# up to its last name, also where that is the only one; not the path of a URL
ABSOLUTE_PATH = re.compile(r"(?<![\w./:~-])/(?:(?:[^\s/'\":,;()]+/)+|(?=\w))")


def machine(device: str = "cpu") -> dict[str, Any]:
    """The device that was measured on, the CPU's name, how many cores this process may use, and how many torch uses."""
    cpu = dict(doctor.report()).get("cpu", "unknown CPU").partition(";")[0]
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {"device": device, "cpu": cpu, "cores": cores, "torch_threads": torch.get_num_threads()}


def versions() -> dict[str, str]:
    """Python's version, and those of the packages that decide the figures."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found


def commit(root: Path = ROOT) -> str | None:
    """The commit that was measured, with a note where files differ from it; None outside a git checkout."""
    # results that are being written are no change to what is measured; status must not take git's lock
    status = ["status", "--porcelain", "--", ".", ":!benchmarks/results"]
    try:
        head, changes = (
            subprocess.run(
                ["git", "--no-optional-locks", *arguments], cwd=root, capture_output=True, text=True, check=True
            ).stdout.strip()
            for arguments in (["rev-parse", "--short=12", "HEAD"], status)
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return f"{head} with local changes" if changes else head


def without_paths(value: Any) -> Any:
    """The same report, with every absolute path cut down to its last name: folders are nobody's business."""
    if isinstance(value, dict):
        return {key: without_paths(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [without_paths(item) for item in value]
    if not isinstance(value, str):
        return value
    for folder in (str(ROOT), tempfile.gettempdir(), os.path.expanduser("~")):
        if folder != os.sep:  # these may hold spaces, which the pattern takes for an end, and stand alone
            value = re.sub(re.escape(folder) + r"(?![\w.-])", "/_", value)
    return ABSOLUTE_PATH.sub("", value)


def write_whole(path: Path, text: str) -> None:
    """Write a file whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_name(f".{path.name}.part")
    scratch.write_text(text, encoding="utf-8")
    scratch.replace(path)
