# `make help` lists the targets. Everything runs from the virtual environment in .venv, which `make setup` makes.

.DEFAULT_GOAL := help
SHELL := /bin/sh

# The Python that makes the virtual environment: 3.11, 3.12 or 3.13.
PYTHON ?= python3
# Arguments of the main job: make demo ARGS="run_dir=runs/mine rounds=1"
ARGS ?=
# cpu or gpu; empty: gpu where nvidia-smi lists one.
ACCELERATOR ?=
# Arguments of pytest: make unit PYTEST_ARGS="-k models"
PYTEST_ARGS ?=

BIN := .venv/bin
# Tests of pairs of values in make test, of all combinations at night; and of some broken inputs, at night of many.
PRODUCT_TESTS := $(addprefix tests/integration/test_training,.py _gradients.py _ray.py)
FUZZED_TESTS := tests/unit/test_fuzzed_inputs.py tests/integration/test_fuzzed_run_directories.py
UV ?= $(BIN)/uv

.PHONY: help setup setup-test demo test lint types unit integration nightly audit format lock clean

help: ## list the targets
	@sed -n 's/^\([a-z]*\):[^#]*## \(.*\)/  make \1|\2/p' $(MAKEFILE_LIST) | awk -F '|' '{ printf "%-20s %s\n", $$1, $$2 }'

setup: ## make .venv and install the pinned packages of the run; does nothing when that is done
	@PYTHON="$(PYTHON)" ACCELERATOR="$(ACCELERATOR)" sh requirements/install.sh run

setup-test: # the same, with what the tests need beside them
	@PYTHON="$(PYTHON)" ACCELERATOR="$(ACCELERATOR)" sh requirements/install.sh test

demo: setup ## run the main job with the embedded model; ARGS="..." passes overrides on
	@$(BIN)/python -m mipo_ray.models.embedded
	@$(BIN)/python -m mipo_ray.run $(ARGS)

test: lint types unit integration ## lint, types, unit and integration tests

lint: setup-test ## check style and formatting
	$(BIN)/python -m ruff check .
	$(BIN)/python -m ruff format --check .

types: setup-test ## check types
	$(BIN)/python -m mypy mipo_ray

unit: setup-test ## the tests without engine and cluster
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/unit --numprocesses logical --maxprocesses 8 --dist loadfile $(PYTEST_ARGS)

integration: setup-test ## the tests with real vLLM, Ray and DeepSpeed
	$(BIN)/python -m pytest tests/integration $(PYTEST_ARGS)

nightly: setup-test ## the tests that make test leaves out: the real model, clusters and programs of their own
	FULL_PRODUCTS=1 $(BIN)/python -m pytest tests/nightly $(PRODUCT_TESTS) $(FUZZED_TESTS) $(PYTEST_ARGS)

audit: setup-test ## look the pinned packages up among the advisories of the package index, which must be reachable
	mkdir -p build
	sed -n 's/^\([^ ]*==[^+ ]*\).*/\1/p' requirements/*.txt | grep -v '^#' | sort -u >build/audit.txt
	$(UV) tool run pip-audit==2.10.1 --strict --no-deps --disable-pip --requirement build/audit.txt

format: setup-test ## format the code and apply safe fixes
	$(BIN)/python -m ruff check --fix .
	$(BIN)/python -m ruff format .

# A lock holds for CPython 3.11 to 3.13 on Linux x86-64 with glibc 2.31 or newer. It is resolved for the oldest
# Python; the overrides say which dependencies are left out, and why. The run and the tests are resolved together, so
# that they agree: the first file is what the run needs of it, the second, -test.txt, the rest (requirements/divide.py).
# Versions already locked are kept: delete the lines of a package first to take its newest one (of torch for CPUs, add
# the hashes of its wheels for the other Pythons by hand). Of a version, every file that a package index has of it may be
# installed, by its hash.
# The CPU build of torch must be findable: where PIP_FIND_LINKS names a folder with its wheel, uv is told of it.
# Elsewhere: make lock TORCH_FROM="--torch-backend cpu"
TORCH_FROM ?= $(if $(PIP_FIND_LINKS),--find-links "$(PIP_FIND_LINKS)")
LOCK := $(UV) pip compile pyproject.toml --quiet --no-header --no-annotate \
	--python-version 3.11 --python-platform x86_64-manylinux_2_31 --extra embedded

lock: setup-test ## resolve the dependencies again and write requirements/*.txt
	$(call resolve,cpu,$(TORCH_FROM))
	$(call resolve,gpu,)

define resolve
mkdir -p build
cat requirements/linux-x86_64-$(1).txt requirements/linux-x86_64-$(1)-test.txt 2>/dev/null >build/all.txt || true
$(LOCK) $(2) --extra $(1) --extra test --override requirements/$(1)-overrides.txt --generate-hashes -o build/all.txt
rm -f build/run.txt
$(LOCK) $(2) --extra $(1) --override requirements/$(1)-overrides.txt --constraint build/all.txt -o build/run.txt
$(BIN)/python requirements/divide.py $(1)
endef

clean: ## remove the virtual environment and every cache of the tools; runs/ stays
	rm -rf .venv build *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find mipo_ray tests benchmarks -name __pycache__ -type d -prune -exec rm -rf {} +
