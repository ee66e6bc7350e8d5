# SPDX-License-Identifier: Apache-2.0
# Everything runs in a virtual environment of its own (.venv), which the first command sets up.
# Paths are relative throughout, so a checkout whose path holds spaces works.

PYTHON ?= python3
VENV ?= .venv
PYTEST_ARGS ?=
BENCH_ARGS ?=
DEMO_ARGS ?=
OUT ?= build/bench-gpu

PY := $(VENV)/bin/python
BASE := $(VENV)/.stamp-base
PACKAGE := $(VENV)/.stamp-package
DEMO := $(VENV)/.stamp-demo
TESTS := $(VENV)/.stamp-tests
SOURCES := setup.py $(shell find csrc -type f 2>/dev/null)

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.NOTPARALLEL:
.PHONY: help setup demo test lint format aot bench bench-gpu build clean

help: ## This text.
	@echo "kvcompact-kernels: make <target>"
	@echo
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  \1|\2/p' Makefile | while IFS='|' read -r target text; do printf '%-11s %s\n' "$$target" "$$text"; done
	@echo
	@echo "PYTHON=python3.12 picks the interpreter, VENV=folder the environment;"
	@echo "DEMO_ARGS, PYTEST_ARGS and BENCH_ARGS are passed on."

$(BASE): requirements/constraints.txt requirements/build.txt scripts/venv.sh
	@PYTHON="$(PYTHON)" bash scripts/venv.sh "$(VENV)"
	@touch $@

$(PACKAGE): $(BASE) pyproject.toml $(SOURCES)
	@bash scripts/compiler.sh
	@echo "setup: building and installing kvcompact-kernels (editable)"
	@$(PY) -m pip install --quiet --no-build-isolation -c requirements/constraints.txt -e .
	@touch $@

$(DEMO): $(PACKAGE) pyproject.toml
	@echo "setup: installing what the demo needs"
	@$(PY) -m pip install --quiet --no-build-isolation -c requirements/constraints.txt -e ".[demo]"
	@touch $@

$(TESTS): $(DEMO)
	@echo "setup: installing what the tests need"
	@$(PY) -m pip install --quiet -c requirements/constraints.txt -r requirements/test.txt
	@touch $@

setup: $(TESTS) ## Sets up .venv for everything below.

demo: $(DEMO) ## Compacts a real document on a real model and answers questions from it (minutes).
	@$(PY) -m kvcompact_kernels.cli demo $(DEMO_ARGS)

test: $(TESTS) ## Runs the tests.
	@OMP_NUM_THREADS=$${OMP_NUM_THREADS:-2} $(PY) -m pytest $(PYTEST_ARGS)

lint: $(TESTS) ## Checks style and format (ruff).
	@$(PY) -m ruff check .
	@$(PY) -m ruff format --check .

format: $(TESTS) ## Formats the Python files (ruff).
	@$(PY) -m ruff check --fix .
	@$(PY) -m ruff format .

aot: $(TESTS) ## Compiles every GPU kernel for sm_80 to sm_120 and checks registers, spills, shared memory (minutes).
	@PYTHONPATH=. $(PY) benchmarks/aot.py --quiet

bench: $(TESTS) ## Runs the CPU benchmarks; rows go to benchmarks/results.
	@$(PY) benchmarks/run.py $(BENCH_ARGS)

bench-gpu: ## One visit to a GPU, with the Python that is active and OUT=folder: build, tests, sanitizer, benchmarks.
	@$(PYTHON) benchmarks/gpu/visit.py --out "$(OUT)" $(BENCH_ARGS)

build: $(PACKAGE) ## Builds the wheel into dist/.
	@$(PY) -m pip wheel --quiet --no-build-isolation --no-deps --wheel-dir dist .
	@ls -l dist/*.whl

clean: ## Removes the environment, build outputs and caches of this checkout.
	rm -rf $(VENV) build dist demo_out *.egg-info .pytest_cache .ruff_cache kvcompact_kernels/*.so
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
