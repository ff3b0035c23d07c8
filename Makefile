# Every target is one tool; `make` alone lists them. Nothing is installed outside .venv.
PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.ready
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadgroup

.PHONY: help install demo fmt lint types test unit golden e2e dist gpu generate check clean
.DEFAULT_GOAL := help

help:           ## this list
	@sed -n 's/^\([a-z0-9]*\):.*## \(.*\)/\1\t\2/p' $(MAKEFILE_LIST) | expand -t 12

$(READY): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "error: Python 3.11 or newer is needed; try make PYTHON=python3.12")'
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[dev]'
	@touch $@

install: $(READY)   ## editable install with development tools, in .venv

demo: $(READY)      ## from images to a backbone and a kNN number, offline, about five minutes on two cores
	$(BIN)/ssl demo

fmt: $(READY)       ## format and fix
	$(BIN)/ruff format . && $(BIN)/ruff check --fix .

lint: $(READY)      ## ruff, import-linter, codespell; changes nothing
	$(BIN)/ruff format --check . && $(BIN)/ruff check . && $(BIN)/lint-imports && $(BIN)/codespell

types: $(READY)     ## mypy --strict on the package
	$(BIN)/mypy

test: $(READY)      ## all tests
	$(PYTEST)

unit: $(READY)      ## the fast tests only
	$(PYTEST) -m "not golden and not e2e and not dist and not data and not gpu"

golden: $(READY)    ## equality with recordings of the reference implementations
	$(PYTEST) -m golden

e2e: $(READY)       ## whole commands on small data
	$(PYTEST) -m e2e

dist: $(READY)      ## two local processes
	$(PYTEST) -m dist

gpu: $(READY)       ## what needs a CUDA device
	$(PYTEST) -m gpu

generate: $(READY)  ## rewrite generated reference pages
	$(BIN)/python docs/generate.py

check: lint types test  ## what CI runs
	$(BIN)/python docs/generate.py --check

clean:          ## remove the environment and caches
	rm -rf .venv .mypy_cache .ruff_cache .pytest_cache .import_linter_cache
