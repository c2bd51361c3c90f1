"""Builds the sdist and the wheel, installs them into clean environments and imports them from elsewhere (minutes)."""

import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]

ROOT = Path(__file__).parents[1]
TORCH = re.search(r"^TORCH \?= (\S+)$", (ROOT / "Makefile").read_text(), re.MULTILINE).group(1)

IMPORT_ALL = """
import fastforget, fastforget_kernels, fastforget.doctor
from fastforget.backends import library
print(fastforget.__file__)
print(fastforget_kernels.__path__[0])
print(library.status())
"""


def run(*command, cwd, **environment):
    """The standard output of a command that has to succeed."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "FASTFORGET"))}
    result = subprocess.run(
        [str(part) for part in command], cwd=cwd, env=kept | environment, capture_output=True, text=True
    )
    assert result.returncode == 0, f"{command} failed\n{result.stdout}\n{result.stderr}"
    return result.stdout


class Environment:
    """A virtual environment of its own; `borrowed` puts the packages of another one behind its own."""

    def __init__(self, folder, borrowed=None):
        run(sys.executable, "-m", "venv", folder, cwd=folder.parent)
        self.python = folder / ("Scripts/python.exe" if sys.platform == "win32" else "bin/python")
        self.scripts = self.python.parent
        self.site_packages = Path(self.run("-c", "import sysconfig; print(sysconfig.get_path('purelib'))").strip())
        if borrowed is not None:
            (self.site_packages / "borrowed.pth").write_text(f"{borrowed.site_packages}\n")

    def run(self, *arguments, cwd=None, **environment):
        return run(self.python, *arguments, cwd=cwd or self.python.parent, **environment)

    def install(self, *arguments, **environment):
        constraints = ROOT / "constraints.txt"
        self.run("-m", "pip", "install", "-qq", "-c", constraints, *arguments, **environment)


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A copy of what git would clone, so that nothing built here gets into what is built there."""
    folder = tmp_path_factory.mktemp("source") / "fastforget"
    names = run("git", "ls-files", "-z", "--cached", "--others", "--exclude-standard", cwd=ROOT).split("\0")
    for name in filter(None, names):
        if (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, folder / name)
    return folder


@pytest.fixture(scope="module")
def distributions(source, tmp_path_factory):
    """The sdist, and the wheel built from it."""
    folder = tmp_path_factory.mktemp("dist")
    run(sys.executable, "-m", "build", "--outdir", folder, source, cwd=folder)
    (sdist,), (wheel,) = folder.glob("*.tar.gz"), folder.glob("*.whl")
    return sdist, wheel


@pytest.fixture(scope="module")
def dependencies(distributions, tmp_path_factory):
    """A clean environment with everything that the wheel asks for, and without the wheel: others borrow from it."""
    environment = Environment(tmp_path_factory.mktemp("environments") / "dependencies")
    environment.install(TORCH)
    environment.install(distributions[1])
    environment.run("-m", "pip", "check")
    environment.run("-m", "pip", "uninstall", "-qq", "-y", "fastforget")
    return environment


def test_wheel_holds_the_library_and_no_more(distributions):
    sdist, wheel = distributions
    assert re.fullmatch(r"fastforget-[\d.]+-py3-none-(?!any).+\.whl", wheel.name)
    names = set(zipfile.ZipFile(wheel).namelist())
    assert {"fastforget/_csrc.so", "fastforget/cli.py", "fastforget_kernels/README.md"} <= names
    folders = {name.split("/")[0] for name in names if ".dist-info" not in name}
    assert folders == {"fastforget", "fastforget_kernels"}
    members = {name.partition("/")[2] for name in tarfile.open(sdist).getnames()}
    assert {"csrc/passes.cpp", "csrc/fastforget.h", "kernels/README.md", "constraints.txt", "LICENSE"} <= members
    assert not [name for name in members if name.endswith((".so", ".pyc"))]


def test_wheel_imports_from_another_folder(dependencies, distributions, tmp_path):
    environment = Environment(tmp_path / "wheel", borrowed=dependencies)
    environment.install("--no-deps", distributions[1])
    package, kernels, status = environment.run("-c", IMPORT_ALL, cwd=tmp_path).splitlines()
    assert Path(package) == environment.site_packages / "fastforget" / "__init__.py"
    assert Path(kernels) == environment.site_packages / "fastforget_kernels"
    assert "available=True" in status
    assert "csrc" in run(environment.scripts / "fastforget", "doctor", cwd=tmp_path)


def test_readme_program_in_a_clean_environment(dependencies, distributions, tmp_path):
    environment = Environment(tmp_path / "readme", borrowed=dependencies)
    environment.install("--no-deps", distributions[1])
    program = re.findall(r"^```python\n(.*?)^```$", (ROOT / "README.md").read_text(), re.MULTILINE | re.DOTALL)[0]
    lines = environment.run("-c", program, cwd=tmp_path).splitlines()
    first, last = (float(re.search(r"forget (-\d+\.\d+)", line)[1]) for line in (lines[0], lines[-1]))
    assert last < first - 1.0


def test_pure_wheel_is_for_any_platform(source, tmp_path):
    run(sys.executable, "-m", "build", "--wheel", "--outdir", tmp_path, source, cwd=tmp_path, FASTFORGET_PURE="1")
    (wheel,) = tmp_path.glob("*.whl")
    assert wheel.name.endswith("-py3-none-any.whl")
    assert not [name for name in zipfile.ZipFile(wheel).namelist() if name.endswith((".so", ".cpp"))]


def test_editable_install_imports_from_another_folder(dependencies, source, tmp_path):
    environment = Environment(tmp_path / "editable", borrowed=dependencies)
    environment.install("--no-deps", "-e", source)
    package, kernels, status = environment.run("-c", IMPORT_ALL, cwd=tmp_path).splitlines()
    assert Path(package) == source / "fastforget" / "__init__.py"
    assert Path(kernels) == source / "kernels"
    assert "available=True" in status


def test_installs_without_a_compiler(dependencies, distributions, tmp_path):
    environment = Environment(tmp_path / "no-compiler", borrowed=dependencies)
    environment.install("--no-deps", distributions[0], CC="/bin/false", CXX="/bin/false")
    package, _, status = environment.run("-c", IMPORT_ALL, cwd=tmp_path).splitlines()
    assert Path(package) == environment.site_packages / "fastforget" / "__init__.py"
    assert "available=False" in status and "compiler" in status


@pytest.mark.parametrize("pypi_kernels", [False, True])
def test_transformers_imports_from_the_root(dependencies, source, tmp_path, pypi_kernels):
    environment = Environment(tmp_path / "kernels", borrowed=dependencies)
    if pypi_kernels:
        environment.install("kernels")
    load = "import transformers; from transformers import AutoModelForCausalLM, OPTForCausalLM; import fastforget"
    environment.run("-c", load, cwd=source)
    if pypi_kernels:
        found = environment.run("-c", "import kernels; print(kernels.__file__)", cwd=source).strip()
        assert Path(found).is_relative_to(environment.site_packages)
