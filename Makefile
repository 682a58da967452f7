# `make help` lists the targets; `make demo` and `make test` need nothing before them.
.DEFAULT_GOAL := help
PYTHON ?= python3
BIN := .venv/bin
# zero3_nvme needs a library that not every machine has, and a build of minutes.
EVERYWHERE := exclude=[_*,*_nvme]

.PHONY: help setup demo test test-fast matrix lint format verify lock clean

help:  ## List the targets.
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-10s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: .venv/ready  ## Make .venv from requirements.lock (does nothing when it is up to date).

.venv/ready: requirements.lock scripts/setup.sh
	@sh scripts/setup.sh $(PYTHON)

demo: setup  ## Train a small GPT on the bundled text under every strategy, and print the runs side by side.
	@$(BIN)/python train.py -m recipe=demo 'strategy=glob(*,$(EVERYWHERE))'

test: setup  ## Run the whole test-suite.
	@$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder
	@$(BIN)/python -m pytest -m alone tests/strategies/test_bubble.py tests/tracking/test_tracing.py

test-fast: setup  ## Run the tests that take less than 10 s each.
	@$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder -m 'not slow and not matrix and not alone'

matrix: setup  ## Prove the agreement of every preset and schedule at 2, 4 and 8 ranks, each switch both ways (100 cases).
	@$(BIN)/python -m pytest -n 2 -m matrix tests/agreement

lint: setup  ## Check format, style, types and the direction of imports.
	@$(BIN)/ruff format --check .
	@$(BIN)/ruff check .
	@$(BIN)/mypy
	@$(BIN)/lint-imports

format: setup  ## Format the code and apply safe fixes.
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .

verify: setup  ## Prove that every strategy computes what one process computes (for the default model).
	@$(BIN)/python scripts/verify.py -m 'strategy=glob(*,exclude=[_*,*_nvme,single])'

lock: setup  ## Write requirements.lock anew from what is installed in .venv.
	@sh scripts/lock.sh

clean:  ## Remove .venv and the tools' caches; runs/ stays.
	@rm -rf .venv .mypy_cache .pytest_cache .ruff_cache .import_linter_cache
