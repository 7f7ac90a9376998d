# `make quickstart` and `make test` work from a fresh clone: Linux, Python 3.11 or newer, no GPU.
PYTHON ?= python3
VENV ?= .venv
# Tests run in this many processes, one thread each.
WORKERS ?= 2

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check --quiet
INSTALL_PACKAGE := $(PIP) install --no-deps --no-build-isolation --editable .
BASE := $(VENV)/.installed-base
DEV := $(VENV)/.installed-dev

.DEFAULT_GOAL := help
.PHONY: help install quickstart test test-isa test-release check format clean

help:  ## say what there is
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "make %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

install: $(BASE)  ## make .venv with the pinned packages and `dydit` in it

quickstart: $(BASE)  ## real data to a picture and a report, on the CPU, in minutes
	$(BIN)/dydit quickstart --overwrite

test: $(DEV)  ## run the tests
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS)

test-isa: $(DEV)  ## run the tests that depend on rounding as on a CPU without AVX-512, VNNI and AMX
	tests/isa/run.sh $(BIN)/python -m pytest -n $(WORKERS) -m numerics -p no:faulthandler

test-release: $(DEV)  ## run what a release needs besides: minutes long, or figures of this machine, which should be idle
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m release

check: $(DEV)  ## formatting, lints, types and tests: what CI runs
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS)

format: $(DEV)  ## format the code and mend what the linter can mend
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean:  ## remove .venv, caches and build folders
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis

$(VENV)/.made:
	@command -v $(PYTHON) >/dev/null || { echo "$(PYTHON) is not there; dydit needs Python 3.11 or newer: make PYTHON=/path/to/python3 ..." >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "$(PYTHON) is $$($(PYTHON) -V 2>&1); dydit needs Python 3.11 or newer: make PYTHON=/path/to/python3 ..." >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	@touch $@

$(BASE): requirements/base.txt pyproject.toml | $(VENV)/.made
	$(PIP) install --requirement requirements/base.txt
	$(INSTALL_PACKAGE)
	@touch $@

$(DEV): requirements/dev.txt requirements/evaluate.txt requirements/base.txt pyproject.toml | $(VENV)/.made
	$(PIP) install --requirement requirements/dev.txt
	$(PIP) install --no-deps --requirement requirements/evaluate.txt
	$(INSTALL_PACKAGE)
	@touch $(BASE) $@
