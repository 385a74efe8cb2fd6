# Two commands are the whole set-up: `make demo` draws pictures, `make test` runs every check.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test bench clean

# The constraints pin the tested set.
.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable .
	touch $@

.venv/installed-dev: .venv/installed
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

demo: .venv/installed
	$(BIN)/unicfg generate --prompts examples/prompts.txt --scales 0 1 2 4 8 -n 1 --seed 0 --out out/demo.png

test: .venv/installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python -m pytest

bench: .venv/installed-dev
	$(BIN)/python benchmarks/autoregressive.py --rounds 7 --out benchmarks/results

clean:
	rm -rf .venv .mypy_cache .ruff_cache .pytest_cache .import_linter_cache
