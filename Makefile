# Everything installs into .venv, made on first use from pyproject.toml and constraints.txt.
PYTHON ?= python3
BIN := .venv/bin
PEERS := .venv-peers
OLDEST := .venv-oldest
NEWEST := .venv-newest
NEWEST_PYTHON ?= python3.13
DIST := .venv-dist
TPU := .tpu
INSTALLED := .venv/.installed

.PHONY: help demo test test-fast test-slow test-peers test-mesh test-gpu test-tpu test-oldest test-newest test-overwriting fuzz faults check docs bench dist clean

demo: $(INSTALLED)  ## PyTorch to JAX, the proof, fine-tuning in JAX, and back
	$(BIN)/gpt2 demo --out demo-output --overwrite

test: $(INSTALLED)  ## everything but the marked tests
	$(BIN)/python -m pytest -n 2 --dist worksteal

test-fast: $(INSTALLED)  ## a selection for the inner loop, from every package
	$(BIN)/python -m pytest -n 2 --dist worksteal --fast

test-slow: $(INSTALLED)  ## at 124M parameters, of memory, and of kills, signals and full disks
	OMP_NUM_THREADS=$(shell nproc) $(BIN)/python -m pytest -m slow

test-peers: $(INSTALLED) $(PEERS)/.installed  ## against transformers 4's Flax, in an environment of its own
	PEERS_PYTHON=$(CURDIR)/$(PEERS)/bin/python $(BIN)/python -m pytest -m peers

test-mesh: $(INSTALLED)  ## training on every mesh of eight devices, and in several processes
	$(BIN)/python -m pytest -m mesh

test-gpu: $(INSTALLED)  ## cuDNN's attention, on a machine with a GPU and the `cuda` extra
	$(BIN)/python -m pytest -m gpu

test-tpu: $(INSTALLED) $(TPU)/.installed  ## what the TPU's compiler makes of it, on any Linux machine
	JAX_PLATFORMS=cpu PYTHONPATH=$(CURDIR)/$(TPU) $(BIN)/python -m pytest -m tpu

# Older packages warn of what their own newer dependencies deprecate.
test-oldest: $(OLDEST)/.installed  ## with the lowest versions that pyproject.toml allows; torch as in constraints.txt
	$(OLDEST)/bin/python -m pytest -n 2 --dist worksteal -W ignore::DeprecationWarning

test-newest: $(NEWEST)/.installed  ## with Python 3.13 and the newest versions, without torch
	$(NEWEST)/bin/python -m pytest -n 2 --dist worksteal

fuzz: $(INSTALLED)  ## 100,000 damaged files of every format and companion; hours, Ctrl-C stops it and it continues
	PYTHONPATH=.:tests $(BIN)/python -m fuzz.driver --mutants 100000 --state .fuzz.json && rm .fuzz.json

test-overwriting: $(INSTALLED)  ## 10,000 random writes: none changes a file that is not this project's; 10 minutes
	PYTHONPATH=.:tests $(BIN)/python -m overwriting.driver --cases 10000

FAULTS := kills every_call corruptions full_disks signals two_processes fresh_runs
faults: $(INSTALLED)  ## kills, damage, full disks and signals, on small runs that are resumed each time; an hour or more
	for fault in $(FAULTS); do PYTHONPATH=.:tests $(BIN)/python -m faults.$$fault || exit 1; done

check: $(INSTALLED)  ## style and types
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

docs: $(INSTALLED)  ## the manual, in docs/_build/html, offline with warnings as errors; and every line that it shows
	$(BIN)/python -m sphinx --quiet --fail-on-warning --keep-going -b html docs docs/_build/html
	$(BIN)/python -m pytest -n 2 --dist worksteal -m docs

bench: $(INSTALLED)  ## the figures of the README's tables
	$(BIN)/python -m tests.benchmarks.load
	$(BIN)/python -m tests.benchmarks.convert
	$(BIN)/python -m tests.benchmarks.data
	$(BIN)/gpt2 bench --preset shakespeare-char
	$(BIN)/python -m tests.benchmarks.generate

dist: $(DIST)/.installed  ## the source distribution and the wheel, in dist/
	rm -rf build dist
	$(DIST)/bin/python -m build
	$(DIST)/bin/python -m twine check --strict dist/*

help:  ## this list
	@sed -n 's/^\([a-z-]*\):.*  ## /\1\t/p' Makefile | expand -t 20

clean:
	rm -rf .venv $(PEERS) $(OLDEST) $(NEWEST) $(DIST) $(TPU) build dist demo-output docs/_build docs/_generated

$(INSTALLED): pyproject.toml constraints.txt
	test -d .venv || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

# transformers 4 without its flax extra, which asks for an older JAX than it runs with.
$(PEERS)/.installed:
	test -d $(PEERS) || $(PYTHON) -m venv $(PEERS)
	$(PEERS)/bin/python -m pip install --quiet transformers==4.57.6 jax==0.10.2 flax==0.12.8
	touch $@

$(OLDEST)/.installed: pyproject.toml constraints.txt .ci/oldest.py
	test -d $(OLDEST) || $(PYTHON) -m venv $(OLDEST)
	(grep '^torch==' constraints.txt; $(PYTHON) .ci/oldest.py) > $(OLDEST)/constraints.txt
	$(OLDEST)/bin/python -m pip install --quiet --constraint $(OLDEST)/constraints.txt --editable '.[dev]'
	touch $@

$(NEWEST)/.installed: pyproject.toml
	test -d $(NEWEST) || $(NEWEST_PYTHON) -m venv $(NEWEST)
	$(NEWEST)/bin/python -m pip install --quiet --upgrade --upgrade-strategy eager --editable '.[test]'
	touch $@

$(DIST)/.installed:
	test -d $(DIST) || $(PYTHON) -m venv $(DIST)
	$(DIST)/bin/python -m pip install --quiet build twine
	touch $@

# Beside the environment and not in it: JAX would look for a TPU in every process that finds this. For jax 0.10.2.
$(TPU)/.installed:
	$(BIN)/python -m pip install --quiet --no-deps --target $(TPU) 'libtpu==0.0.42.*'
	touch $@
