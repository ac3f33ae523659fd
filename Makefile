# Every target sets up .venv on first use. Nothing needs a network after that.
SHELL := /bin/bash
BIN := .venv/bin
.DEFAULT_GOAL := help
.PHONY: demo test test-all check help venv

venv:
	@launch/bootstrap.sh

demo: venv ## the five stages at laptop size, export, verification, report
	@$(BIN)/nemovl schedule recipe=tiny/schedule

test: venv ## what CI runs
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q

test-all: venv ## every test, slow ones included; GPU tests where there is a GPU
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -m "slow or not slow"

check: venv ## lint, types, layers, spelling, shell
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy
	@$(BIN)/lint-imports
	@$(BIN)/codespell
	@$(BIN)/shellcheck launch/*.sh .ci/run

help: ## this text
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | sort | expand -t 12
