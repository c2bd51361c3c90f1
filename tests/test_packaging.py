"""What an installation consists of: the CPU library, the kernels' folder, the version, and what `doctor` says."""

import importlib.metadata
import os
import re
import shutil
import subprocess
import tomllib
from pathlib import Path

import pytest

from fastforget import doctor
from fastforget.backends import library as native

ROOT = Path(__file__).parents[1]
CXX = os.environ.get("CXX") or shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    """csrc/ built as it is now, whatever the installation holds."""
    if CXX is None:
        pytest.skip("no C++ compiler")
    path = tmp_path_factory.mktemp("csrc") / "_csrc.so"
    sources = sorted(str(source) for source in (ROOT / "csrc").glob("*.cpp"))
    flags = ["-std=c++17", "-O1", "-Wall", "-Wextra", "-Werror", "-fPIC", "-shared"]
    subprocess.run([CXX, *flags, *sources, "-o", str(path)], check=True)
    return path


@pytest.fixture
def no_override(monkeypatch):
    monkeypatch.delenv(native.OVERRIDE, raising=False)


def test_installed_library_is_consistent(no_override):
    status = native.status()
    assert status.reason
    assert status.available == (status.instruction_set in native.INSTRUCTION_SETS)
    if os.environ.get("CI") and CXX:
        assert status.available, status.reason


def test_library_picks_the_best_instruction_set(library, no_override):
    status = native.status(library)
    assert status == native.NativeStatus(True, status.instruction_set, "the best that this machine has")
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file() and "flags" in cpuinfo.read_text():
        flags = set(re.search(r"^flags\s*:(.*)$", cpuinfo.read_text(), re.MULTILINE).group(1).split())
        if not {"avx2", "fma"} <= flags:
            expected = "scalar"
        elif not {"avx512f", "avx512bw", "avx512dq", "avx512vl"} <= flags:
            expected = "avx2"
        else:
            expected = "avx512"
        assert status.instruction_set == expected


@pytest.mark.parametrize("requested", [*native.INSTRUCTION_SETS, "AVX9000"])
def test_override_picks_no_more_than_the_machine_has(library, no_override, monkeypatch, requested):
    order, best = native.INSTRUCTION_SETS.index, native.status(library).instruction_set
    monkeypatch.setenv(native.OVERRIDE, requested)
    status = native.status(library)
    if requested in native.INSTRUCTION_SETS:
        assert order(status.instruction_set) == min(order(requested), order(best))
        assert native.OVERRIDE in status.reason
    else:
        assert (status.available, status.instruction_set) == (True, best)
        assert "ignored" in status.reason and "avx2" in status.reason


def test_another_build_of_the_library_says_so(library, monkeypatch):
    native.load.cache_clear()
    monkeypatch.setenv(native.DEVELOPERS, str(library))
    with pytest.warns(UserWarning, match=r"_csrc\.so is loaded as code; this is for fastforget's developers"):
        native.load(library)


def test_every_dependency_is_named_with_its_use():
    """In docs/internals.md, whoever it is that needs it."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    needed = [*project["dependencies"], *(each for name in USERS for each in project["optional-dependencies"][name])]
    named = {re.split(r"[>;]", each)[0] for each in needed}
    rows = re.findall(r"^\| `([\w-]+)`", (ROOT / "docs" / "internals.md").read_text(), re.MULTILINE)
    assert len(named) > 15 and named == set(rows)


USERS = ("ability", "cluster", "data", "evaluate", "gpu", "plot", "real", "trl")  # extras of those who use it


def test_a_library_that_cannot_be_used_says_why(library, tmp_path, monkeypatch):
    (tmp_path / "broken.so").write_text("not a library")
    native.load.cache_clear()
    monkeypatch.setattr(native, "ABI_VERSION", 999)
    for path, words in (
        (tmp_path / "_csrc.so", ("is not there", "compiler")),
        (tmp_path / "broken.so", ("could not be loaded",)),
        (library, ("needs 999",)),
    ):
        status = native.status(path)
        assert (status.available, status.instruction_set) == (False, None)
        assert all(word in status.reason for word in words), status


def test_doctor_reports_every_subject(no_override):
    rows = doctor.report()
    assert all(isinstance(name, str) and isinstance(finding, str) and name and finding for name, finding in rows)
    findings = dict(rows)
    assert len(findings) == len(rows)
    assert {"python", *doctor.PACKAGES} <= findings.keys()
    assert {"cpu", "memory", "torch threads", "csrc", "backend auto, cpu"} <= findings.keys()
    assert any(name.startswith("cuda") for name in findings)
    assert not [finding for finding in findings.values() if "cannot be read" in finding]
    assert findings["fastforget"] == importlib.metadata.version("fastforget")
    status = native.status()
    assert (status.instruction_set if status.available else status.reason) in findings["csrc"]


def test_doctor_says_what_is_missing_or_broken(monkeypatch):
    def missing(name):
        raise importlib.metadata.PackageNotFoundError(name)

    def broken():
        raise OSError("libfirst.so: cannot open")

    monkeypatch.setattr(importlib.metadata, "version", missing)
    monkeypatch.setattr(doctor, "_native_library", broken)
    findings = dict(doctor.report())
    assert findings["peft"] == "not installed"
    assert findings["triton"].startswith("not installed: ")
    assert findings["csrc"] == "cannot be read: OSError: libfirst.so: cannot open"
    assert "backend auto, cpu" in findings


@pytest.mark.parametrize(("load", "threads", "advice"), [(0.2, 2, None), (1.9, 2, 1), (3.0, 4, 1), (1.2, 4, 3)])
def test_doctor_says_what_to_set_on_a_busy_machine(monkeypatch, load, threads, advice):
    monkeypatch.setattr(doctor, "_usable_cpus", lambda: 2 if threads == 2 else 4)
    monkeypatch.setattr(doctor.os, "getloadavg", lambda: (load, 0.0, 0.0))
    monkeypatch.setattr("torch.get_num_threads", lambda: threads)
    finding = dict(doctor.report())["torch threads"]
    assert finding.startswith(str(threads))
    assert ("OMP_NUM_THREADS" in finding) == (advice is not None)
    assert advice is None or f"OMP_NUM_THREADS={advice}," in finding


def test_kernels_is_a_namespace_package():
    assert (ROOT / "kernels").is_dir()
    assert not list((ROOT / "kernels").rglob("__init__.py")), "it would shadow the PyPI package `kernels`"
    import fastforget_kernels

    assert fastforget_kernels.__file__ is None
    assert any((Path(folder) / "README.md").is_file() for folder in fastforget_kernels.__path__)


def test_version_has_a_single_source():
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    assert importlib.metadata.version("fastforget") == version, "stale installation: make venv"
    sources = [ROOT / "setup.py", *(ROOT / "fastforget").rglob("*.py")]
    assert not [source for source in sources if f'"{version}"' in source.read_text()]
    assert f"\nversion: {version}\n" in (ROOT / "CITATION.cff").read_text()
    assert f"\n## {version}\n" in (ROOT / "CHANGELOG.md").read_text()
