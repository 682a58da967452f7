# `make help` lists the targets; `make demo` and `make test` need nothing before them.
.DEFAULT_GOAL := help
PYTHON ?= python3
BIN := .venv/bin
# zero3_nvme needs a library that not every machine has, and a build of minutes.
EVERYWHERE := exclude=[_*,*_nvme]
# Two workers, a file each, since its tests share trainings; in the order of folders, in which long files come early.
SIDE_BY_SIDE := -n 2 --dist loadfile --no-loadscope-reorder

.PHONY: help setup demo test prove mutants lint format verify lock clean

help:  ## List the targets.
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-10s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: .venv/ready  ## Make .venv from requirements.lock (does nothing when it is up to date).

.venv/ready: requirements.lock scripts/setup.sh
	@sh scripts/setup.sh $(PYTHON)

demo: setup  ## Train a small GPT on the bundled text under every strategy, and print the runs side by side.
	@$(BIN)/python train.py -m recipe=demo 'strategy=glob(*,$(EVERYWHERE))'

test: setup  ## Run the everyday tests: what a change may break, each strategy and each planted fault once.
	@$(BIN)/python -m pytest $(SIDE_BY_SIDE) -m 'not full and not matrix and not alone'

prove: setup  ## Run all tests: also every further case, every spread at 2, 4 and 8 ranks, and what measures time.
	@$(BIN)/python -m pytest $(SIDE_BY_SIDE) -m 'not alone'
	@$(BIN)/python -m pytest $(SIDE_BY_SIDE) -m alone

mutants: setup  ## Plant faults in a copy of the code, one by one: the tests have to catch each (not in CI).
	@$(BIN)/python -m tests.mutants

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
