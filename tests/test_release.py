"""What is published and how: files of other tools that no tool here reads, held to what they speak of."""

import re
from pathlib import Path

import yaml

ROOT = Path(__file__).parents[1]
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))


def test_workflows_run_what_there_is():
    targets = set(re.findall(r"^(\w[\w-]*):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    commands = []
    for path in WORKFLOWS:
        for job in yaml.safe_load(path.read_text())["jobs"].values():
            commands += [step["run"] for step in job["steps"] if "run" in step]
    made = {target for command in commands for target in re.findall(r"\bmake ([\w-]+)", command)}
    assert {"venv", "docs"} <= made <= targets
    assert any("twine check --strict" in command for command in commands)


def test_contributing_names_targets_that_there_are():
    targets = set(re.findall(r"^(\w[\w-]*):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    named = set(re.findall(r"\bmake ([\w-]+)", (ROOT / "CONTRIBUTING.md").read_text()))
    assert {"venv", "test", "docs", "release-check"} <= named <= targets


def test_hooks_are_the_linters_of_make_test():
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"][0]["hooks"]
    recipe = (ROOT / "Makefile").read_text()
    tools = [hook["entry"].removeprefix(".venv/bin/") for hook in hooks]
    assert tools == ["ruff check", "ruff format --check", "mypy"]
    assert all(f"$(BIN)/{tool}" in recipe for tool in tools)
