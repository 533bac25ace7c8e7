# Needs Python >= 3.10 with pip and venv, nothing else: `make demo` and `make test` build .venv on first use.
# PYTHON=python3.12 chooses the interpreter; PIP_ARGS="--index-url ..." is handed to every pip install.

PYTHON ?= $(firstword $(foreach p,python3 python3.13 python3.12 python3.11 python3.10 python,\
	$(if $(shell $(p) -c 'import sys; print(sys.version_info >= (3, 10) or "")' 2>/dev/null),$(p))))
PIP_ARGS ?=
BIN := .venv/bin
STAMP := .venv/.installed
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt $(PIP_ARGS)

.PHONY: help demo test test-eval lint docs bench
.DEFAULT_GOAL := help

help:
	@echo "make demo       train a small model, prune it, retrain it with the zeros kept, and write a report"
	@echo "make test       the CPU test suite"
	@echo "make test-eval  the tests of zero-shot tasks, with lm-evaluation-harness (a minute more to install)"
	@echo "make lint       ruff, format check and mypy"
	@echo "make docs       tables and plots from docs/results, then the site in site/"
	@echo "make bench      every benchmark and quality script in tests/benchmarks (hours)"

demo: $(STAMP)
	$(BIN)/sparse-ft demo

test: $(STAMP)
	$(BIN)/python -m pytest -n auto --dist worksteal -m "not slow and not distributed and not gpu"

# Apart, because lm-eval brings some forty packages; without it `make test` skips these tests and says so.
test-eval: $(STAMP)-eval
	$(BIN)/python -m pytest -n auto --dist worksteal tests/evaluation/test_tasks.py tests/cli/test_eval_tasks.py

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

docs: $(STAMP)
	$(BIN)/python docs/build_tables.py
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

bench: $(STAMP)
	@for script in tests/benchmarks/bench_*.py tests/benchmarks/quality_*.py; do \
		echo "== $$script"; $(BIN)/python $$script || exit 1; \
	done

# A venv whose interpreter is gone (a moved or copied checkout) is made anew; one that is up to date is left alone.
# Without ensurepip (Debian without python3-venv) pip is put in by the interpreter's own pip.
$(STAMP): pyproject.toml constraints.txt
	@if [ -z "$(PYTHON)" ] || ! $(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null; then \
		echo "sparse_ft needs Python >= 3.10, but '$(or $(PYTHON),python3)' is $$($(or $(PYTHON),python3) --version 2>&1 || true);" \
			"install one, or name it: make PYTHON=/path/to/python3.12" >&2; exit 1; \
	fi
	@$(BIN)/python -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null || { \
		echo "Making .venv with $$($(PYTHON) --version)"; rm -rf .venv; \
		$(PYTHON) -m venv .venv >/dev/null 2>&1 || { rm -rf .venv; \
			$(PYTHON) -m venv --without-pip .venv && \
			$(PYTHON) -m pip --python $(BIN)/python install --quiet $(PIP_ARGS) pip; }; }
	@echo "Installing sparse_ft and the pinned versions of constraints.txt into .venv (a few minutes the first time)"
	@$(PIP) pip
	@$(PIP) hatchling editables
	@$(PIP) --no-build-isolation --editable '.[report,dev,docs,quant]'
	@touch $@

$(STAMP)-eval: $(STAMP)
	@$(PIP) lm-eval
	@touch $@
