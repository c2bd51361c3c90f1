# Needs Python 3.11 or newer (with venv), make, and a C++ compiler if there is one.
#   make demo                  installs into .venv, then shows a small model forget a real text
#   make demo ARGS="--seed 1"  the same, with options of `fastforget demo`
#   make test PYTHON=python3.12 TORCH=torch    another Python, another torch

PYTHON ?= python3
# Installed before everything else, so that no dependency picks another build of it; not in constraints.txt for this reason.
TORCH ?= torch==2.13.0
EXTRAS ?= dev,data,plot,cluster,evaluate,gpu,trl
# Other versions than those of constraints.txt, in words of pip: OTHERS="transformers==5.0.*"
OTHERS ?=
TEST_WORKERS ?= 2
ARGS ?=

VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
# -qq: only errors. pip would otherwise list every package, and warn of package indexes that it has not been asked to trust.
PIP_INSTALL := $(BIN)/python -m pip install -qq --disable-pip-version-check -c constraints.txt

.DEFAULT_GOAL := help
.PHONY: help venv demo test test-versions test-short test-install docs release-check sanitize bench proof format clean

help:
	@sed -n 's/^## //p' Makefile

## make venv          install everything into .venv
venv: $(STAMP)

$(STAMP): Makefile pyproject.toml setup.py constraints.txt $(wildcard csrc/*)
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "Installing $(TORCH) into $(VENV) ..."
	@$(PIP_INSTALL) "$(TORCH)"
	@echo "Installing fastforget and what it needs ..."
	@$(PIP_INSTALL) -e ".[$(EXTRAS)]"
	@test -z "$(OTHERS)" || $(BIN)/python -m pip install -qq --disable-pip-version-check $(foreach each,$(OTHERS),"$(each)")
	@touch $(STAMP)

## make demo          show a small model forget a real text (ARGS="..." for options)
demo: $(STAMP)
	$(BIN)/fastforget demo $(ARGS)

## make test          lint, format, types and the tests that take seconds
test: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "not gpu and not slow" -n $(TEST_WORKERS) --dist worksteal

## make test-versions the same tests with the oldest versions that we take, and with those of the GPU machine that we have
##                    measured on (environments of several GB, in build/)
OLDEST := TORCH="torch==2.9.*" OTHERS="transformers==5.0.* peft==0.18.* accelerate==1.10.* numpy<2.4"
GPU_MACHINE := TORCH="torch==2.11.0" OTHERS="transformers==5.17.* numpy<2.4"  # Triton 3.6's interpreter: numpy < 2.4
test-versions:
	$(MAKE) test-short VENV=build/oldest $(OLDEST)
	$(MAKE) test-short VENV=build/gpu-machine $(GPU_MACHINE)
test-short: $(STAMP)
	OMP_NUM_THREADS=1 TORCHINDUCTOR_CACHE_DIR=$(VENV)/inductor TRITON_CACHE_DIR=$(VENV)/triton \
	    $(BIN)/python -m pytest -m "not gpu and not slow" -n $(TEST_WORKERS) --dist worksteal

## make test-install  build the sdist and the wheel, install them into clean environments, and import
test-install: $(STAMP)
	$(BIN)/python -m pytest -m slow tests/test_install.py

## make docs          the site of the documentation, into build/site; a warning is an error
docs: $(STAMP)
	@$(PIP_INSTALL) -e ".[docs]"
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

## make release-check what would be published: an sdist, a wheel and a pure wheel, checked, and installed into clean
##                    environments, where the README's program runs
release-check: $(STAMP)
	@$(PIP_INSTALL) -e ".[release]"
	rm -rf dist
	$(BIN)/python -m build --outdir dist .
	FASTFORGET_PURE=1 $(BIN)/python -m build --wheel --outdir dist .
	$(BIN)/python -m twine check --strict dist/*
	$(BIN)/python -m pytest -m slow tests/test_install.py

## make sanitize      build csrc/ with AddressSanitizer and UndefinedBehaviorSanitizer, and run its tests on that build
SANITIZE := -fsanitize=address,undefined -fno-sanitize-recover=undefined
sanitize: $(STAMP)
	@mkdir -p build/sanitize
	@if ! echo 'int main() {}' | $(CXX) $(SANITIZE) -x c++ - -o build/sanitize/probe 2>/dev/null; then \
	    echo "skipped: $(CXX) has no AddressSanitizer or UndefinedBehaviorSanitizer"; exit 0; \
	fi; set -e; \
	echo "Building csrc/ with $(SANITIZE) ..."; \
	$(CXX) -std=c++17 -O1 -ffp-contract=off -g -fno-omit-frame-pointer $(SANITIZE) -fopenmp -fPIC -shared csrc/*.cpp -o build/sanitize/_csrc.so; \
	LD_PRELOAD="$$($(CXX) -print-file-name=libasan.so) $$($(CXX) -print-file-name=libstdc++.so)" \
	ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1 OMP_NUM_THREADS=2 \
	FASTFORGET_CSRC=build/sanitize/_csrc.so $(BIN)/python -m pytest -q -p no:cacheprovider \
	    $(addprefix tests/backends/test_,native_passes.py native_library.py oracle.py odd_values.py) \
	    -k "native or scalar or avx"

## make bench         a short form of every benchmark on the CPU: a dated table and a plot under benchmarks/results/
##                    (ARGS="--full" takes the sizes that docs/benchmarks.md quotes, and half an hour)
bench: $(STAMP)
	$(BIN)/python -m benchmarks.bench $(ARGS)

## make proof         the tests that take minutes, other versions, every causal LM class of transformers, then the demo
##                    with every preset and three seeds, and every preset's job and memory on a small set (ARGS="..." for
##                    options); writes results under benchmarks/results/
proof: $(STAMP) test-versions
	$(BIN)/python -m pytest -m slow
	FASTFORGET_DRAWS=20 $(BIN)/python -m pytest -q --timeout 3600 -n $(TEST_WORKERS) \
	    tests/backends/test_oracle.py tests/test_linear.py
	$(BIN)/python -m benchmarks.models
	$(BIN)/python -m benchmarks.presets $(ARGS)

## make format        format, and fix what the linter can
format: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

## make clean         remove .venv and everything that was built
clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .ruff_cache .hypothesis fastforget/_csrc.*
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
