# Everything runs in .venv, which the first target that needs it makes: Python >= 3.10 and a C++ compiler are enough.
PYTHON ?= python3
BIN := .venv/bin
.DEFAULT_GOAL := help

# A strict editable install (mypy cannot follow the other kind) has a link for each package file, so a file added or
# removed asks for a new install: the stamp is named by the list of files.
FILES := $(shell find int8compile passes csrc -name __pycache__ -prune -o -type f -print | LC_ALL=C sort)
INSTALLED := .venv/installed-$(firstword $(shell echo $(FILES) | cksum))

$(INSTALLED): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit("Python >= 3.10 is needed: make PYTHON=python3.12 ..." if sys.version_info < (3, 10) else 0)'
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	rm -rf build .venv/installed-*
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]' --config-settings editable_mode=strict
	touch $@

.PHONY: install demo test test-all fuzz test-cuda lint docs bench clean help
install: $(INSTALLED)	## make .venv, or bring it up to date

demo: $(INSTALLED)	## float and int8 side by side on a language model
	$(BIN)/python -m benchmarks.demo

# A file a process, so that what its tests have in common is made once, and in the order of names, whose last files are
# short. Most tests keep one core busy, and idle threads of two processes must not fight over two cores.
WORKERS ?= 2
PYTEST := OMP_WAIT_POLICY=passive $(BIN)/python -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder

test: $(INSTALLED)	## the fast tests
	$(PYTEST) -m "not slow"

test-all: $(INSTALLED)	## all tests
	$(PYTEST)

SECONDS ?= 600
SEED ?= 0
fuzz: $(INSTALLED)	## random programs in float and in int8, for SECONDS=600 from SEED=0
	cd tests/helpers && ../../$(BIN)/python -m fuzz --seconds $(SECONDS) --seed $(SEED)

test-cuda: $(INSTALLED)	## the CUDA kernels compiled for every architecture (needs nvcc, no GPU)
	$(PYTEST) -m slow tests/kernels/test_cuda_build.py

lint: $(INSTALLED)	## ruff and mypy
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	cd tests && ../$(BIN)/mypy --config-file ../pyproject.toml  # from here it sees the installed package, passes/ included

docs: $(INSTALLED)	## the documents as a site, in site/; every warning is an error
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict --quiet

# The other int8 libraries are installed for this alone; the JSON files stay in .cache/.
PEERS := .venv/installed-peers
$(PEERS): $(INSTALLED)
	rm -rf build
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[bench]' --config-settings editable_mode=strict
	touch $@

bench: $(PEERS)	## int8 against float and other int8 libraries, into benchmarks/results (an hour)
	mkdir -p .cache/bench
	$(BIN)/python -m benchmarks.linear --json .cache/bench/linear.json
	$(BIN)/python -m benchmarks.studies.calls --json .cache/bench/calls.json
	$(BIN)/python -m benchmarks.model --peers --json .cache/bench/model.json
	$(BIN)/python -m benchmarks.model --peers --shape llama-3.2-1b --json .cache/bench/llama.json
	$(BIN)/python -m benchmarks.results .cache/bench/*.json
	$(BIN)/python -m benchmarks.studies.min_features

clean:	## remove .venv, builds and caches (the downloaded model too)
	rm -rf .venv .cache build dist site *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -prune -exec rm -rf {} +

help:	## this list
	@sed -n 's/^\([a-z-]*\):[^#]*## \(.*\)/  make \1\t\2/p' Makefile | expand -t 18
