# `make repro` and `make test` work in a fresh clone: each sets up .venv first.
PYTHON ?= python3
BIN := .venv/bin
export PATH := $(CURDIR)/$(BIN):$(PATH)

WORKERS ?= 2
PYTEST := OMP_NUM_THREADS=1 python -m pytest --dist worksteal

.PHONY: repro test test-all lint

repro: .venv/installed
	python -m tools.repro
	@dvc metrics diff --all
	@python -m tools.advice
	@echo "Report: report/index.html  Pictures: plots/<category>/*.png"
	@echo "The other models, one after the other (commit first):"
	@echo "  dvc exp run --queue -S 'model.name=gaussian,patchcore,ensemble' && dvc queue start"

test: .venv/installed-test
	ruff check .
	ruff format --check .
	mypy
	$(PYTEST) -n $(WORKERS) -m "not exhaustive and not cluster" $(COVERAGE)

# All tests, with coverage. Those of Ray and of many categories need the processor to themselves.
test-all: COVERAGE = --cov --cov-report=
test-all: test
	$(PYTEST) -n $(WORKERS) -m "exhaustive and not cluster" --cov --cov-append --cov-report=term
	$(PYTEST) -m cluster

.venv/bin/python:
	$(PYTHON) -m venv .venv

.venv/installed: .venv/bin/python pyproject.toml
	$(BIN)/python -m pip install --editable '.[pipeline,elpv]'
	@touch $@

.venv/installed-test: .venv/bin/python pyproject.toml
	$(BIN)/python -m pip install --editable '.[test]'
	@touch .venv/installed $@

lint: .venv/installed-test
	ruff check --fix .
	ruff format .
