# Everything runs in .venv, which is set up anew only when pyproject.toml or constraints.txt has changed.
# Three settings, from the command line or the environment, decide how; they tell only when .venv is made, so to change
# one later, `make clean` first:
#   PYTHON    the interpreter, 3.11 or newer     make test PYTHON=python3.12
#   TORCH     what pip is asked for as torch     make test TORCH=torch==2.14.1
#   PIP_ARGS  options for every pip install      make test PIP_ARGS="--extra-index-url URL"

PYTHON ?= python3
TORCH ?= $(shell grep '^torch==' constraints.txt)
PIP_ARGS ?=

# Waiting threads sleep rather than spin (faster where all cores are busy); nothing here needs a model hub.
export OMP_WAIT_POLICY ?= PASSIVE
export HF_HUB_OFFLINE ?= 1
export PIP_DISABLE_PIP_VERSION_CHECK ?= 1

BIN := .venv/bin
INSTALL = $(BIN)/python -m pip install --quiet $(PIP_ARGS) -c .venv/constraints.txt

.PHONY: help demo test lint bench bench-merge docs clean
.DEFAULT_GOAL := help

help: ## Say what can be made
	@awk -F ':.*## ' '/^[a-z.-]+:.*## / {printf "make %-11s %s\n", $$1, $$2}' Makefile

demo: .venv ## Run the whole experiment on the embedded model; writes runs/demo/report.html
	@$(BIN)/backmerge demo

# three at a time on two cores, since some tests wait for programs and servers
test: .venv ## Run the tests, but for those marked slow, gpu, network, ray or vllm
	@PYTHONHASHSEED=0 OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 3 --dist loadfile --no-loadscope-reorder

lint: .venv ## Check style, format and types
	@$(BIN)/ruff check
	@$(BIN)/ruff format --check
	@$(BIN)/mypy

bench: .venv ## Time the demo
	@$(BIN)/python -m benchmarks.demo

bench-merge: .venv ## Time merges against mergekit (in an environment of its own) and the disk; takes 26 GB of it
	@$(BIN)/python -m benchmarks.merge

docs: .venv ## Build the documentation into site/
	@[ -x $(BIN)/zensical ] || $(INSTALL) --no-build-isolation -e '.[docs]'
	@$(BIN)/python docs/build.py

clean: ## Remove .venv, .venv-mergekit, builds and caches; runs/ stays
	rm -rf .venv .venv-mergekit dist build site .pytest_cache .mypy_cache .ruff_cache .hypothesis .cache

.venv: .venv/.stamp

# torch goes first and by itself, so that TORCH decides its version and build: the pin is left out of the constraints
# for the rest, which keep the torch that they find. What builds this package goes with it: a build environment made
# by pip would be pinned nowhere.
.venv/.stamp: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || \
	  { echo "backmerge needs Python 3.11 or newer, and '$(PYTHON)' is not: make ... PYTHON=python3.11"; exit 1; }
	@echo "Setting up .venv (minutes the first time) ..."
	@$(PYTHON) -m venv .venv
	@grep -v '^torch==' constraints.txt > .venv/constraints.txt
	@$(INSTALL) '$(TORCH)' hatchling editables
	@$(INSTALL) --no-build-isolation -e '.[dev]'
	@touch $@
