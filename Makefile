# Two commands are the whole set-up: `make demo` draws pictures, `make test` runs every check.
PYTHON ?= python3
BIN := .venv/bin
# modules are compiled when they are first imported; most of what is installed never is
INSTALL := -m pip install --quiet --no-compile
# one thread each, for two that wait for one another are slower than one; `make test-slow` runs with more
PARALLEL := OMP_NUM_THREADS=1
# the tests start many processes: where this is set, each would compile all of torch anew
unexport PYTHONDONTWRITEBYTECODE
WORKERS := -n 2 --dist loadfile

.PHONY: demo docs wheel test test-browser test-slow test-lowest test-newest test-lowest-quick test-newest-quick bench clean

# The constraints pin the tested set.
.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python $(INSTALL) --constraint constraints.txt --editable .
	touch $@

.venv/installed-dev: .venv/installed
	$(BIN)/python $(INSTALL) --constraint constraints.txt --editable '.[dev]'
	# benchmarks/unet.py and its parity tests; without its torchvision, which needs another build of torch
	$(BIN)/python $(INSTALL) --no-deps denoising-diffusion-pytorch==2.3.4
	touch $@

demo: .venv/installed
	$(BIN)/unicfg compare "a large red circle above a large blue square on a white background" --scales 1 2 4 8 15 --weights shapes --out out/demo

test: .venv/installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(PARALLEL) $(BIN)/python -m pytest $(WORKERS)

# The documentation as a site, in out/site; a link or a heading that is not there is an error.
docs: .venv/installed-dev
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet --site-dir out/site

# The report and the page of unicfg demo, in a headless Chromium that is there.
test-browser: .venv/installed-dev
	$(PARALLEL) $(BIN)/python -m pytest -m browser

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
OTHER_TOOLS := kornia pytest pytest-timeout pytest-xdist hypothesis

.venv-lowest/installed: pyproject.toml constraints-lowest.txt
	$(PYTHON) -m venv --clear .venv-lowest
	.venv-lowest/bin/python $(INSTALL) --constraint constraints-lowest.txt --editable '.[$(OTHER_EXTRAS)]' $(OTHER_TOOLS)
	.venv-lowest/bin/python $(INSTALL) --no-deps denoising-diffusion-pytorch==2.3.4
	touch $@

test-lowest: .venv-lowest/installed
	$(PARALLEL) .venv-lowest/bin/python -m pytest $(WORKERS) $(TESTS)

# Made anew each time: what is newest changes.
.PHONY: .venv-newest/installed
.venv-newest/installed:
	$(PYTHON) -m venv --clear .venv-newest
	.venv-newest/bin/python $(INSTALL) --editable '.[$(OTHER_EXTRAS),int8]' $(OTHER_TOOLS) $(VERSIONS)
	.venv-newest/bin/python $(INSTALL) --no-deps denoising-diffusion-pytorch==2.3.4

test-newest: .venv-newest/installed
	$(PARALLEL) .venv-newest/bin/python -m pytest $(WORKERS) $(TESTS)

# What of them is quick enough for every change: the inner ring, and with the newest the integrations, too.
test-lowest-quick:
	$(MAKE) test-lowest TESTS="$(INNER)" WORKERS="$(WORKERS)"

test-newest-quick:
	$(PARALLEL) .venv-newest/bin/python -m pytest $(WORKERS) $(INNER) $(HOSTS)

# What a release would be: built, checked, and installed where nothing else is, to draw from the weights that it brings.
wheel:
	rm -rf dist
	$(PYTHON) -m venv --clear .venv-wheel
	.venv-wheel/bin/python $(INSTALL) build twine
	.venv-wheel/bin/python -m build --outdir dist
	.venv-wheel/bin/python -m twine check --strict dist/*
	$(PYTHON) -m venv --clear .venv-wheel
	.venv-wheel/bin/python $(INSTALL) --constraint constraints.txt dist/*.whl
	cd .venv-wheel && bin/unicfg generate "a red circle" --weights shapes -n 1 --out $(CURDIR)/out/wheel.png
	rm -rf .venv-wheel

bench: .venv/installed-dev
	$(BIN)/python benchmarks/autoregressive.py --rounds 3 --out benchmarks/results
	$(BIN)/python benchmarks/masked.py --rounds 3 --out benchmarks/results
	$(BIN)/python benchmarks/diffusion.py --rounds 3 --out benchmarks/results
	$(BIN)/python benchmarks/families.py --out benchmarks/results
	$(BIN)/python benchmarks/unet.py --rounds 3 --out benchmarks/results
	$(BIN)/python benchmarks/shipped.py --rounds 2 --out benchmarks/results
	$(BIN)/python benchmarks/int8.py --out benchmarks/results
	$(BIN)/python benchmarks/refresh.py --out benchmarks/results --plot docs/pictures/shapes-refresh.png
	$(BIN)/python benchmarks/attributes.py --out benchmarks/results --plot docs/pictures/shapes-attributes.png

clean:
	rm -rf .venv .venv-lowest .venv-newest .venv-wheel dist .mypy_cache .ruff_cache .pytest_cache .import_linter_cache
