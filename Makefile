# Each of quickstart, test, lint and format sets up .venv by itself, on a machine that has python3
# (3.11 to 3.13), make and sh. Another interpreter: make PYTHON=python3.12 test

PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin/python -m
PIP := $(RUN) pip --disable-pip-version-check
# An installed lock, and an installed package: nothing is installed again before its file changes.
LOCKED := $(VENV)/.locked
INSTALLED := $(VENV)/.installed

.PHONY: quickstart test test-t5x lint format clean

quickstart: $(INSTALLED)  ## trains a small retriever, evaluates it, and searches
	$(VENV)/bin/genret quickstart

test: lint  ## style, types, then all tests
	$(RUN) pytest -q -n auto --maxprocesses 4 --dist loadfile

test-t5x: $(INSTALLED)  ## what needs T5X; says so where it is not installed
	$(RUN) pytest -q -m t5x -rs

lint: $(INSTALLED)  ## style, shell scripts and types; changes nothing
	$(RUN) ruff check .
	@set -- .ci/run; for script in launch/*.sh; do \
	  if [ -f "$$script" ]; then set -- "$$@" "$$script"; fi; done; \
	echo "shellcheck $$*"; $(VENV)/bin/shellcheck "$$@"
	$(RUN) mypy

format: $(INSTALLED)  ## rewrites the Python files in the house style
	$(RUN) ruff check --fix-only .
	$(RUN) ruff format .

clean:  ## removes .venv, caches and builds; what was trained (runs/) stays
	rm -rf $(VENV) build dist .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# From an empty .venv each time, so that what left the lock is gone from the machine too.
$(LOCKED): requirements.txt
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' 2>/dev/null || { \
	  found=$$(command -v $(PYTHON) >/dev/null && $(PYTHON) --version 2>&1) || \
	    found="not a working Python"; \
	  echo "$(PYTHON) is $$found: Python 3.11 to 3.13 is needed; give one," \
	    "as in: make $(MAKECMDGOALS) PYTHON=python3.11" >&2; exit 1; }
	$(PYTHON) -m venv --clear $(VENV)
	$(PIP) install -q -r requirements.txt
	@: > $@

# The lock holds the build backend, so nothing else is downloaded here.
$(INSTALLED): $(LOCKED) pyproject.toml
	$(PIP) install -q --no-deps --no-build-isolation -e .
	@: > $@
