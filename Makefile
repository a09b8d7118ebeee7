# The commands of this project; `make help` lists them. VENV and PYTHON may be set on the command line.

VENV ?= .venv
PYTHON ?= python3
ARGS ?=
JOBS ?= 3

.DEFAULT_GOAL := help
.PHONY: help env demo docs test engines matrix mutants lint format clean
.DELETE_ON_ERROR:

BIN := $(VENV)/bin
# An environment is good for one state of the pins and of pyproject.toml above its [tool.*] tables, which no package depends on.
PINS := $(shell { sed '/^\[tool\./,$$d' pyproject.toml; cat constraints.txt; } | cksum | tr ' ' '-')
MADE := $(VENV)/made-from-$(PINS)

help: ## show this list
	@sed -n 's/^\([a-z]*\):.*## \(.*\)/  make \1	\2/p' Makefile

env: $(MADE) ## make the environment in VENV (default .venv) with PYTHON (default python3)
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation --editable .

# An environment that was begun here and not finished is thrown away; one that was there before is only brought up to date.
$(MADE):
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { \
	    echo "Python 3.10 or newer is needed, and $(PYTHON) is: $$($(PYTHON) --version 2>&1 || echo not there)." >&2; \
	    echo "Name another one: make $(or $(MAKECMDGOALS),env) PYTHON=python3.12" >&2; exit 1; }
	@if [ -e "$(VENV)/unfinished" ]; then rm -rf "$(VENV)"; fi
	@if [ ! -e "$(VENV)" ]; then mkdir -p "$(VENV)" && touch "$(VENV)/unfinished" && $(PYTHON) -m venv "$(VENV)"; fi
	$(BIN)/python -m pip install --disable-pip-version-check --constraint constraints.txt setuptools
	$(BIN)/python -m pip install --disable-pip-version-check --constraint constraints.txt --no-build-isolation \
	    --editable '.[experiments,test,dev]'
	@rm -f "$(VENV)/unfinished" "$(VENV)"/made-from-*
	@touch "$@"

demo: env ## the main job: ResIST on the digits with two worker processes on the CPU
	$(BIN)/python experiments/train.py experiment=demo $(ARGS)

# Sphinx is not in the environment that trains and tests. A broken link and a docstring that cannot be read are errors.
docs: env ## the documentation site, in build/site
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --no-build-isolation --editable '.[docs]'
	$(BIN)/python -m sphinx --fail-on-warning --keep-going --quiet --conf-dir docs . build/site
	@echo "build/site/index.html"

# Workers wait a good part of the time, so more jobs than two cores. Each worker imports its test anew: compiled once.
test: env ## the tests that need no server, download or ten minutes; ARGS="-k partition" for some, JOBS=0 for one after the other
	PYTHONDONTWRITEBYTECODE= $(BIN)/python -m pytest -n $(JOBS) --no-loadscope-reorder $(ARGS)

engines: env ## tests that need an engine (SLURM, Ray, Hydra's plugins), which say how to install it; ARGS="-k slurm" for some
	$(BIN)/python -m pytest tests/engines $(ARGS)

matrix: env ## a part of the tests with other versions of Python, torch, Lightning; ARGS="2.10 2.15" for some of torch (ten minutes and 6 GB each)
	$(BIN)/python tests/matrix.py $(ARGS)

mutants: env ## break the code on purpose, in one place at a time, and see the tests go red; ARGS="scale" for some (half an hour)
	$(BIN)/python tests/mutants.py $(ARGS)

lint: env ## style, types, layers
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy --strict resist_lightning
	$(BIN)/lint-imports

format: env ## bring the code into shape
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean: ## remove what the tools left, not the environment and not the runs
	rm -rf .mypy_cache .pytest_cache .ruff_cache .hypothesis .import_linter_cache build *.egg-info
	find . -name __pycache__ -not -path './.venv/*' -prune -exec rm -rf {} +
