# Two commands are the whole set-up: `make demo` draws pictures, `make test` runs every check.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test test-browser test-hosts bench clean

# The constraints pin the tested set.
.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable .
	touch $@

.venv/installed-dev: .venv/installed
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	# benchmarks/unet.py and its parity tests; without its torchvision, which needs another build of torch
	$(BIN)/python -m pip install --quiet --no-deps denoising-diffusion-pytorch==2.3.4
	touch $@

demo: .venv/installed
	$(BIN)/unicfg compare "a large red circle above a large blue square on a white background" --scales 1 2 4 8 15 --weights shapes --out out/demo

test: .venv/installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python -m pytest

# The report and the page of unicfg demo, in a headless Chromium that is there.
test-browser: .venv/installed-dev
	$(BIN)/python -m pytest -m browser

# The integrations with other releases of their hosts: the newest, or those in HOSTS="transformers==5.20.0 diffusers==0.36.0".
HOSTS ?= transformers diffusers
HOST_TESTS := guided_generate janus musicgen vibevoice diffusers_guider k_diffusion parity

test-hosts:
	$(PYTHON) -m venv --clear .venv-hosts
	grep '^torch==' constraints.txt > .venv-hosts/torch.txt
	.venv-hosts/bin/python -m pip install --quiet --constraint .venv-hosts/torch.txt --editable '.[eval]' $(HOSTS) pytest pytest-timeout hypothesis
	.venv-hosts/bin/python -m pytest $(HOST_TESTS:%=tests/test_%.py)

bench: .venv/installed-dev
	$(BIN)/python benchmarks/autoregressive.py --rounds 3 --out benchmarks/results
	$(BIN)/python benchmarks/masked.py --rounds 3 --out benchmarks/results
	$(BIN)/python benchmarks/diffusion.py --rounds 3 --out benchmarks/results
	$(BIN)/python benchmarks/families.py --out benchmarks/results
	$(BIN)/python benchmarks/unet.py --rounds 3 --out benchmarks/results
	$(BIN)/python benchmarks/int8.py --out benchmarks/results
	$(BIN)/python benchmarks/refresh.py --out benchmarks/results --plot docs/pictures/shapes-refresh.png
	$(BIN)/python benchmarks/attributes.py --out benchmarks/results --plot docs/pictures/shapes-attributes.png

clean:
	rm -rf .venv .venv-hosts .mypy_cache .ruff_cache .pytest_cache .import_linter_cache
