# Each target works from a fresh clone, given make and Python 3.11 or newer: the first one run creates .venv and
# installs everything into it. Choose the interpreter with `make test PYTHON=python3.12`.

VENV := .venv
STAMP := $(VENV)/.installed
BIN := $(VENV)/bin
TOO_OLD := import sys; sys.exit(sys.version_info < (3, 11))

# python3, or the newest numbered one where python3 is too old
PYTHON ?= $(shell for p in python3 python3.14 python3.13 python3.12 python3.11; do \
	if $$p -c '$(TOO_OLD)' 2>/dev/null; then echo $$p; exit; fi; done; echo python3)

WORKERS ?= 2
PYTEST_ARGS ?=
MUTANTS ?=
FUZZ ?= tests/test_fuzz_files.py tests/plan/test_files.py tests/test_fuzz.py tests/test_programs.py tests/test_kills.py
BENCHMARKS ?= $(sort $(filter-out benchmarks/_%,$(wildcard benchmarks/*.py)))

.DELETE_ON_ERROR:
.PHONY: help install test fuzz mutants demo lint format docs bench clean

help:
	@echo "make test     run the tests (PYTEST_ARGS='-k slim', WORKERS=2, HYPOTHESIS_PROFILE=long)"
	@echo "make fuzz     altered files, odd calls and command lines, kills, random networks; an hour (FUZZ='...')"
	@echo "make mutants  make one line wrong at a time and see that tests notice (MUTANTS='search/', WORKERS=2)"
	@echo "make demo     train a small model on digits, compress it, print before and after"
	@echo "make lint     ruff and mypy"
	@echo "make format   let ruff rewrite the files"
	@echo "make docs     build the documentation in build/docs"
	@echo "make bench    run the benchmarks (BENCHMARKS='benchmarks/coverage.py')"
	@echo "make clean    remove caches and builds, keep $(VENV)"

install: $(STAMP)

# The stamp is newer than pyproject.toml exactly when the last installation succeeded.
$(STAMP): pyproject.toml
	@$(PYTHON) -c '$(TOO_OLD)' || { echo "Python 3.11 or newer is needed; choose one with PYTHON=..." >&2; exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[dev]'
	@touch $@

test: $(STAMP)
	$(BIN)/python -m pytest -n $(WORKERS) --dist worksteal $(PYTEST_ARGS)

# Alone, not in workers: what was tried is counted and printed at the end. About an hour; FUZZ chooses a part.
fuzz: $(STAMP)
	HYPOTHESIS_PROFILE=long $(BIN)/python -m pytest $(FUZZ) $(PYTEST_ARGS)

mutants: $(STAMP)
	$(BIN)/python tests/mutants/run.py --workers $(WORKERS) $(MUTANTS)

demo: $(STAMP)
	$(BIN)/python -m sbs_fx.demo

lint: $(STAMP)
	$(BIN)/python -m ruff check .
	$(BIN)/python -m ruff format --check .
	$(BIN)/python -m mypy

format: $(STAMP)
	$(BIN)/python -m ruff check --fix .
	$(BIN)/python -m ruff format .

docs: $(STAMP)
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict --quiet --site-dir build/docs
	@echo "build/docs/index.html"

bench: $(STAMP)
	@mkdir -p benchmarks/results
	@set -e; for script in $(BENCHMARKS); do \
		echo "== $$script"; \
		$(BIN)/python $$script --out benchmarks/results/$$(basename $$script .py).json; \
	done

clean:
	rm -rf build dist .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find sbs_fx/ passes/ tests/ -name __pycache__ -type d -prune -exec rm -rf {} +
