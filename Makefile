# Two commands are the whole set-up: `make demo` draws pictures, `make test` runs every check.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test test-browser test-slow test-lowest test-newest test-others bench clean

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

# What takes minutes: kills, full disks, broken files, 100,000 images, threads, visitors. Writes the table of its results.
test-slow: .venv/installed-dev
	$(BIN)/python -m pytest -m slow --table docs/reliability-results.md

# The tests with the lowest versions that the library allows, and with the newest, but for those in
# VERSIONS="transformers==5.21.0 diffusers==0.40.0". Each brings a torch of its own: gigabytes, where the package index
# has it for CUDA alone. TESTS=tests/test_guide.py runs that; the default is all.
INNER := $(patsubst %,tests/test_%.py,guide guidance mitigations spaces spelling conformance dropout sampling masked \
	diffusion oracles branches passes guided_call)
HOSTS := $(patsubst %,tests/test_%.py,guided_generate janus musicgen vibevoice diffusers_guider k_diffusion parity)
OTHER_EXTRAS := data,train,eval,captions,demo,diffusers,transformers
OTHER_TOOLS := kornia pytest pytest-timeout hypothesis

test-lowest:
	$(PYTHON) -m venv --clear .venv-lowest
	.venv-lowest/bin/python -m pip install --quiet --constraint constraints-lowest.txt --editable '.[$(OTHER_EXTRAS)]' $(OTHER_TOOLS)
	.venv-lowest/bin/python -m pip install --quiet --no-deps denoising-diffusion-pytorch==2.3.4
	.venv-lowest/bin/python -m pytest $(TESTS)

test-newest:
	$(PYTHON) -m venv --clear .venv-newest
	.venv-newest/bin/python -m pip install --quiet --editable '.[$(OTHER_EXTRAS),int8]' $(OTHER_TOOLS) $(VERSIONS)
	.venv-newest/bin/python -m pip install --quiet --no-deps denoising-diffusion-pytorch==2.3.4
	.venv-newest/bin/python -m pytest $(TESTS)

# What of them is quick enough for every change: the inner ring with the lowest, the integrations too with the newest.
test-others:
	$(MAKE) test-lowest TESTS="$(INNER)"
	rm -rf .venv-lowest
	$(MAKE) test-newest TESTS="$(INNER) $(HOSTS)"
	rm -rf .venv-newest

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
	rm -rf .venv .venv-lowest .venv-newest .mypy_cache .ruff_cache .pytest_cache .import_linter_cache
