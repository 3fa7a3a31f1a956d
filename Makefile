# make demo    a real model, published as blocks, answers from four daemons of this machine
# make test    everything that CI runs: lint, types, import contracts, all tests
# make quick   the same without the tests that are marked slow
# make fuzz    every property with new random cases, many more than the tests try
# make lint    ruff, mypy and the import contracts alone
# make bench   the project's measurements, each beside its peer or its limit (NAMES="publish ...")
# make foreign installs js-libp2p (node 20 or newer, npm) and runs its tests against our daemons
# make clean   removes what the others made
#
# Each makes its own .venv. PYTHON=... names the Python (3.11 or newer) to make it with.

BIN := .venv/bin
NAMES ?=
# Two files at a time: a test file often waits for daemons. One file's tests stay together,
# and files go in the order of tests/conftest.py.
WORKERS := -n 2 --dist loadfile --no-loadscope-reorder
export PYTHON

.DEFAULT_GOAL := help
.PHONY: help demo test quick fuzz lint bench foreign clean

help:
	@sed -n 's/^# //p' Makefile

.venv/installed-%: pyproject.toml constraints.txt tools/environment.sh
	@tools/environment.sh $*

demo: .venv/installed-demo
	@$(BIN)/python demo/demo.py

lint: .venv/installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

test: lint
	$(BIN)/pytest $(WORKERS)

quick: lint
	$(BIN)/pytest $(WORKERS) -m "not slow"

fuzz: .venv/installed-dev
	$(BIN)/pytest $(WORKERS) -m hypothesis --hypothesis-profile fuzz

bench: .venv/installed-dev
	@$(BIN)/blyan-node bench $(NAMES)

tests/foreign/node_modules: tests/foreign/package.json tests/foreign/package-lock.json
	npm ci --prefix tests/foreign --no-audit --no-fund
	@touch $@

foreign: .venv/installed-dev tests/foreign/node_modules
	$(BIN)/pytest -rP tests/foreign

clean:
	rm -rf .venv tests/foreign/node_modules .demo .testnet build dist *.egg-info
	rm -rf .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
