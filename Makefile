# What a person types; `make` alone says it. Everything happens in .venv, the tools' own commands
# work there as their communities know them.
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
MAKEFLAGS += --no-print-directory
.ONESHELL:
.DEFAULT_GOAL := help

PYTHON ?= python3
BIN := .venv/bin
# CPU wheels of torch are smaller: TORCH_INDEX=https://download.pytorch.org/whl/cpu make setup
TORCH_INDEX ?=
MINUTES ?= 8
SEEDS ?= 3
OVERLOAD_S ?= 300
CALLERS_S ?= 20
PARTS ?=
export PATH := $(CURDIR)/$(BIN):$(PATH)

.PHONY: help setup demo up down status test lint bench bench-data bench-model bench-serve pretrained clean

help: ## this list
	@sed -nE 's/^([a-z-]+):.*## (.*)/  make \1\t\2/p' Makefile | expand -t 16

setup: $(BIN)/.installed ## make .venv and install; does nothing if it is up to date

# Only what decides the installation: afterwards no network is needed.
$(BIN)/.installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || {
	  echo "error: Python 3.11 or newer is needed; got $$($(PYTHON) --version 2>&1 || echo none). Name one: make $(or $(MAKECMDGOALS),setup) PYTHON=/path/to/python3.11" >&2; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv .venv || {
	  echo "error: no venv could be made; on Debian: apt-get install python3-venv" >&2; exit 1; }
	echo "installing into .venv (2 to 4 minutes the first time)"
	export PIP_DISABLE_PIP_VERSION_CHECK=1
	if [ -n "$(TORCH_INDEX)" ]; then
	  $(BIN)/python -m pip install --quiet --index-url "$(TORCH_INDEX)" "$$(grep '^torch==' constraints.txt)"
	fi
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[all]'
	touch $@

demo: setup ## the whole loop on the synthetic Earth, then pictures and links
	@$(BIN)/python -m mm_model.cli demo

up: setup ## start MLflow, Prefect, Ray and the endpoint
	@$(BIN)/python -m mm_model.cli up

down: ## stop all of them, leaving nothing behind but var/
	@test ! -x $(BIN)/python || $(BIN)/python -m mm_model.cli down

status: setup ## what runs, where, with how much memory
	@$(BIN)/python -m mm_model.cli status

test: setup ## every test
	@$(BIN)/python -m pytest

lint: setup ## format, style, types, import contracts
	@$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

bench: setup ## measure; writes benchmarks/results and docs/benchmarks.md
	@$(BIN)/python -m benchmarks

bench-data: setup ## the data engine; PARTS=workers measures that part alone
	@$(BIN)/python -m benchmarks.data $(PARTS)

bench-model: setup ## ours beside what people would use instead; MINUTES=8 of CPU time a model, SEEDS=3
	@$(BIN)/python -m benchmarks.model --minutes $(MINUTES) --seeds $(SEEDS)

bench-serve: setup ## the endpoint under load, for OVERLOAD_S=300 at ten times what it can answer
	@$(BIN)/python -m benchmarks.serve --overload-s $(OVERLOAD_S) --callers-s $(CALLERS_S)

pretrained: setup ## go on training the bundle in the box (an hour and a half on two cores)
	@cd examples/pretrained
	dvc repro
	python -m mm_model.cli.box

clean: down ## stop the services; remove what they and the tools wrote, but not .venv, data or models
	@rm -rf var demo build .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache
	find . -name __pycache__ -not -path './.venv/*' -prune -exec rm -rf {} +
