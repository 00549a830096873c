# Set-up happens by itself: each target makes the virtual environment it needs, from pinned versions.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALL := PIP_DISABLE_PIP_VERSION_CHECK=1 $(BIN)/python -m pip install --quiet -c constraints.txt
EDITABLE := --config-settings editable_mode=compat  # a path that mypy can follow, instead of an import hook

.PHONY: demo test test-full check lint format bench bench-peers eval clean

demo: $(VENV)/.run-ready  ## one request through a graph of five processes, with its trace
	$(BIN)/nixlbus demo

test: $(VENV)/.dev-ready $(VENV)-dynamo/.ready  ## the tests
	$(BIN)/python -m pytest -m "not full and not gpu"

test-full: $(VENV)/.dev-ready $(VENV)-dynamo/.ready  ## and the longer soaks and sweeps
	$(BIN)/python -m pytest

check: lint test  ## format, lint, types, layers, tests

lint: $(VENV)/.dev-ready
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(VENV)/.dev-ready
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

bench: $(VENV)/.dev-ready  ## paired operations and requests against raw NIXL and raw NATS, each in one run
	$(BIN)/python -m benchmarks.operations --quick --json results/operations.json
	$(BIN)/python -m benchmarks.bus --quick --json results/bus.json

bench-peers: $(VENV)/.dev-ready $(VENV)-dynamo/.ready $(VENV)-faststream/.ready  ## and nixl_connect, FastStream; longer
	$(BIN)/python -m benchmarks.operations --peers --json results/operations.json
	$(BIN)/python -m benchmarks.bus --peers --json results/bus.json

eval: $(VENV)/.dev-ready  ## the 360 held-out digits, through the graph
	$(BIN)/python -m benchmarks.accuracy

clean:
	rm -rf $(VENV) $(VENV)-dynamo $(VENV)-faststream build dist results *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache

$(VENV)/.run-ready: pyproject.toml constraints.txt | $(VENV)/bin/python
	$(INSTALL) $(EDITABLE) -e '.[embedded,http]'
	touch $@

$(VENV)/.dev-ready: pyproject.toml constraints.txt | $(VENV)/bin/python
	$(INSTALL) $(EDITABLE) -e '.[dev]'
	touch $@ $(VENV)/.run-ready

$(VENV)-dynamo/.ready: tests/bus/interop/requirements.txt  # NVIDIA's library, apart: its pins don't bind ours
	$(PYTHON) -m venv $(VENV)-dynamo
	PIP_DISABLE_PIP_VERSION_CHECK=1 $(VENV)-dynamo/bin/python -m pip install --quiet -r $<
	touch $@

$(VENV)-faststream/.ready: benchmarks/requirements-faststream.txt  # what benchmarks.bus is held against
	$(PYTHON) -m venv $(VENV)-faststream
	PIP_DISABLE_PIP_VERSION_CHECK=1 $(VENV)-faststream/bin/python -m pip install --quiet -r $<
	touch $@

$(VENV)/bin/python:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "nixlbus needs Python 3.11 or later")'
	$(PYTHON) -m venv $(VENV)
