PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.ready
# Small models on few cores: one thread per test process is faster than all of them fighting.
TEST_ENV := OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE=1

.DEFAULT_GOAL := help
.PHONY: help setup demo test test-all fix check bench docs notebooks

help:  ## this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F':.*## ' '{printf "  make %-9s %s\n", $$1, $$2}'

setup: $(READY)  ## make the virtual environment in .venv

$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "tokenkit needs Python 3.11 or newer; write make PYTHON=python3.12 ..."; exit 2; }
	@echo "Setting up .venv: torch first, then the rest (once, a few minutes)"
	@$(PYTHON) -m venv .venv
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt torch
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $(READY)

demo: $(READY)  ## move the embedded model to two other tokenizers: a table, a page, models in demo/
	@$(BIN)/tokenkit demo

test: $(READY)  ## the tests that take seconds
	$(TEST_ENV) $(BIN)/python -m pytest -n 2 -m "not slow"

test-all: $(READY)  ## every test, the page in a browser included
	$(TEST_ENV) $(BIN)/python -m pytest -n 2

fix: $(READY)  ## format, and mend what can be mended
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

check: $(READY)  ## lint, format and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyrefly check

bench: $(READY)  ## every claim beside its peer, docs/results.md written anew; under half an hour
	@$(BIN)/python -m benchmarks.run $(if $(RESULTS),--results $(RESULTS))

docs: $(READY)  ## write the generated pages and pictures of docs/, and the site into site/
	$(BIN)/python scripts/write_reference.py
	$(BIN)/python scripts/draw_pipeline.py
	$(BIN)/python scripts/draw_how_it_works.py
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

notebooks: $(READY)  ## run the notebooks and write them with what came out
	$(BIN)/python scripts/run_notebooks.py
