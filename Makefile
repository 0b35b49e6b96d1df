# `make demo` trains a small language model on real text; `make test` runs the tests.
# Both set up everything they need in .venv; only Python 3.10 or newer has to be there.
PYTHON ?= python3
VENV   ?= .venv
# Idle threads sleep rather than spin, which is what makes a shared machine slow.
export OMP_WAIT_POLICY ?= PASSIVE
BIN    := $(VENV)/bin
TESTS  := $(BIN)/python -m pytest --numprocesses auto --maxprocesses 8 --dist worksteal
PIP    := $(BIN)/python -m pip --disable-pip-version-check --quiet

.PHONY: help demo test test-all check docs dist clean

help:            ## list the commands
	@grep -E '^[a-z-]+:.*##' Makefile | sed -E 's/:[^#]*## */\t/'

demo: $(VENV)/.train  ## train a language model on CPython's own documentation, and write a page about it
	$(BIN)/lossmith demo $(ARGS)

test: $(VENV)/.dev    ## run the tests, but for the slowest
	$(TESTS) -m "not slow" $(ARGS)

test-all: $(VENV)/.dev    ## run all the tests
	$(TESTS) $(ARGS)

check: $(VENV)/.dev   ## format, lint, types and tests
	PATH="$(abspath $(BIN)):$$PATH" scripts/check

docs: $(VENV)/.docs   ## build the site into site/; with ARGS=serve, show it while you write
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs $(or $(ARGS),build)

dist: $(VENV)/.dev    ## build sdist and wheel into dist/, and try the wheel in a fresh environment with torch alone
	PATH="$(abspath $(BIN)):$$PATH" scripts/dist

$(VENV)/.torch: constraints.txt
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(0 if v >= (3, 10) else f"lossmith needs Python 3.10 or newer; {sys.executable} is {v.major}.{v.minor}. Try: make PYTHON=python3.12 ...")'
	@echo "setting up $(VENV) (once; a minute or two)"
	$(PYTHON) -m venv $(VENV)
	$(PIP) install -c constraints.txt torch
	@touch $@

$(VENV)/.train: $(VENV)/.torch pyproject.toml
	$(PIP) install -c constraints.txt -e '.[train,report]' tensorboard
	@touch $@

$(VENV)/.dev: $(VENV)/.torch pyproject.toml
	$(PIP) install -c constraints.txt -e '.[train,report,track,docs,dev]'
	@touch $@ $(VENV)/.train $(VENV)/.docs

$(VENV)/.docs: $(VENV)/.torch pyproject.toml
	$(PIP) install -c constraints.txt -e '.[docs]'
	@touch $@

clean:           ## remove the environment and the caches
	rm -rf $(VENV) .pytest_cache .ruff_cache .hypothesis site dist
