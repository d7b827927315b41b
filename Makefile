# Targets: demo, test, test-slow, bench, lint, types, clean, venv.
#
#   PYTHON=python3.12       the interpreter; by default the first one of 3.11, 3.12, 3.10 and python3 that works
#   TORCH_INDEX=<url>       a package index with CPU builds of torch; PyTorch's page "Get Started" names one
#   ANY_DISK=1              install although the disk seems to have no room
#   WORKERS=2               processes that run tests; by default one a core

SHELL := /bin/sh
.DELETE_ON_ERROR:
.PHONY: demo test test-slow bench lint types clean venv

PYTHON ?= $(shell for p in python3.11 python3.12 python3.10 python3; do \
	$$p -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 10))' >/dev/null 2>&1 && { echo $$p; break; }; done)
VENV := .venv
BIN := $(VENV)/bin
PLUGINS := $(wildcard plugins/*/pyproject.toml)
SOURCES := pyproject.toml constraints.txt $(PLUGINS)
# Named after the contents of SOURCES: a checkout that only touches their times installs nothing.
STAMP := $(VENV)/.installed-$(shell cat $(SOURCES) | cksum | cut -d' ' -f1)

REQUIREMENTS := -c constraints.txt -e '.[llm,vision,diffusion,train,optimizers,trackers,dev]' $(patsubst %/pyproject.toml,-e ./%,$(PLUGINS)) \
	$(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX))
PIP := $(BIN)/python -m pip --disable-pip-version-check --quiet
WORKERS ?= logical
# Tensors of tests are tiny, so a process has one thread. Neighbouring tests share fixtures, so they stay in one process.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest
SPREAD := --numprocesses $(WORKERS) --maxprocesses 8 --dist worksteal

demo: $(STAMP)
	$(BIN)/python -m examples.digits.demo

# Types and layers are checked beside the tests, and shown after them.
test: lint
	@$(MAKE) --no-print-directory types >$(VENV)/types.log 2>&1 & types=$$!; \
	$(PYTEST) $(SPREAD); tests=$$?; \
	wait $$types; types=$$?; cat $(VENV)/types.log; exit $$((tests | types))

# All of the tests, the fast ones too; those that measure have the machine to themselves.
test-slow: $(STAMP)
	$(PYTEST) $(SPREAD) -m 'slow or not slow' --timeout 1800 --ignore tests/benchmarks
	$(PYTEST) tests/benchmarks -m 'slow or not slow'

bench: $(STAMP)
	$(BIN)/python -m pytest tests/benchmarks -m 'slow or not slow' -s

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(STAMP)
	$(BIN)/pyright
	$(BIN)/lint-imports

venv: $(STAMP)

$(STAMP):
	@test -n "$(PYTHON)" || { echo "error: no Python 3.10 or later with venv and ensurepip. Pass PYTHON=..." >&2; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) install --dry-run --report $(VENV)/plan.json $(REQUIREMENTS)
	@test -n "$(ANY_DISK)" || $(BIN)/python .ci/room.py $(VENV)/plan.json $(VENV) "$(or $(MAKECMDGOALS),demo)"
	$(PIP) install $(REQUIREMENTS)
	rm -f $(VENV)/.installed-*
	touch $@

clean:
	rm -rf $(VENV) build dist .pytest_cache .ruff_cache .import_linter_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
