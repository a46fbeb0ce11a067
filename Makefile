# Most targets use .venv, which is created on first use from pyproject.toml and constraints.txt.
PYTHON ?= python3
BIN := .venv/bin
PEERS := .venv-peers
LM_EVAL := .venv-lm-eval
OLDEST := .venv-oldest
NEWEST := .venv-newest
NEWEST_PYTHON ?= python3.13
DIST := .venv-dist
TPU := .tpu
INSTALLED := .venv/.installed

# Most programs of the tests take longer to compile than to run. Without optimizations, and with XLA's older code
# generator, the tests take half of the time. `make test QUICK_COMPILATION=` compiles as JAX does by default.
QUICK_COMPILATION := JAX_DISABLE_MOST_OPTIMIZATIONS=1 XLA_FLAGS=--xla_cpu_use_fusion_emitters=false

.PHONY: help demo test test-fast test-slow test-processes test-peers test-mesh test-gpu test-tpu test-browser test-oldest test-newest test-overwriting test-tokenizers test-thorough test-pairs fuzz faults check docs bench dist clean

demo: $(INSTALLED)  ## convert a model to JAX, verify it, fine-tune it in JAX, and load the result in PyTorch
	$(BIN)/gpt2 demo --out demo-output --overwrite

test: $(INSTALLED)  ## all tests without a marker
	$(QUICK_COMPILATION) $(BIN)/python -m pytest -n 2 --dist worksteal

test-fast: $(INSTALLED)  ## a quick selection of tests from every package, for use while you edit
	$(QUICK_COMPILATION) $(BIN)/python -m pytest -n 2 --dist worksteal --fast

test-processes: $(INSTALLED)  ## whole commands in processes of their own, and runs that are killed or cannot write
	$(QUICK_COMPILATION) $(BIN)/python -m pytest -n 2 --dist worksteal -m processes

test-slow: $(INSTALLED)  ## tests at 124M parameters, and of memory
	OMP_NUM_THREADS=$(shell nproc) $(BIN)/python -m pytest -m slow

test-peers: $(INSTALLED) $(PEERS)/.installed $(LM_EVAL)/.installed  ## comparisons with transformers 4's Flax and lm-eval, in separate environments
	PEERS_PYTHON=$(CURDIR)/$(PEERS)/bin/python LM_EVAL_PYTHON=$(CURDIR)/$(LM_EVAL)/bin/python $(BIN)/python -m pytest -m peers

test-mesh: $(INSTALLED)  ## training on every mesh of eight devices, and in several processes
	$(BIN)/python -m pytest -m mesh

test-gpu: $(INSTALLED)  ## cuDNN's attention, on a machine with a GPU and the `cuda` extra
	$(BIN)/python -m pytest -m gpu

test-tpu: $(INSTALLED) $(TPU)/.installed  ## attention and training steps, compiled with the TPU compiler on any Linux machine
	JAX_PLATFORMS=cpu PYTHONPATH=$(CURDIR)/$(TPU) $(BIN)/python -m pytest -m tpu

test-browser: $(INSTALLED)  ## HTML reports in headless Chromium, where it is installed
	$(QUICK_COMPILATION) $(BIN)/python -m pytest -m browser

# Older packages use functions that their own newer dependencies deprecate.
test-oldest: $(OLDEST)/.installed  ## with the lowest versions that pyproject.toml allows; torch as in constraints.txt
	$(OLDEST)/bin/python -m pytest -n 2 --dist worksteal -W ignore::DeprecationWarning

test-newest: $(NEWEST)/.installed  ## with Python 3.13 and the newest versions, without torch
	$(NEWEST)/bin/python -m pytest -n 2 --dist worksteal

fuzz: $(INSTALLED)  ## 100,000 damaged files of each kind; takes hours; after Ctrl-C, the same command continues
	PYTHONPATH=.:tests $(BIN)/python -m fuzz.driver --mutants 100000 --state .fuzz.json && rm .fuzz.json

test-overwriting: $(INSTALLED)  ## 10,000 random writes, none of which may change a foreign file; 10 minutes
	PYTHONPATH=.:tests $(BIN)/python -m overwriting.driver --cases 10000

test-tokenizers: $(INSTALLED)  ## a million strings and 1,500 directories, against transformers' tokenizers; an hour
	PYTHONPATH=.:tests $(BIN)/python -m tokenizing.driver --strings 40000
	PYTHONPATH=.:tests $(BIN)/python -m tokenizing.driver --directories 1500

test-thorough: $(INSTALLED)  ## the cases of parametrized tests that `make test` leaves out
	$(QUICK_COMPILATION) $(BIN)/python -m pytest -n 2 --dist worksteal -m thorough

test-pairs: $(INSTALLED)  ## 1,000 random pairs of correct models and of trainers, none of which may fail; after Ctrl-C, the same command continues
	$(QUICK_COMPILATION) PYTHONPATH=.:tests $(BIN)/python -m parity.pairs.random_pairs --pairs 1000 --state .pairs.json && rm .pairs.json
	$(QUICK_COMPILATION) PYTHONPATH=.:tests $(BIN)/python -m parity.pairs.random_trainers --pairs 1000 --state .trainers.json && rm .trainers.json
	$(QUICK_COMPILATION) PYTHONPATH=.:tests $(BIN)/python -m parity.pairs.random_trainers --mistakes 200

FAULTS := kills every_call corruptions full_disks signals two_processes fresh_runs
faults: $(INSTALLED)  ## kills, damage, full disks and signals on small runs, which must resume; an hour or more
	for fault in $(FAULTS); do PYTHONPATH=.:tests $(BIN)/python -m faults.$$fault || exit 1; done

check: $(INSTALLED)  ## style and types
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

docs: $(INSTALLED)  ## build the manual offline, in docs/_build/html, and run its snippets and commands
	$(BIN)/python -m sphinx --quiet --fail-on-warning --keep-going -b html docs docs/_build/html
	$(BIN)/python -m pytest -n 2 --dist worksteal -m docs

bench: $(INSTALLED)  ## measure the speeds of docs/benchmarks.md, other than checkpoints
	$(BIN)/python -m tests.benchmarks.load
	$(BIN)/python -m tests.benchmarks.convert
	$(BIN)/python -m tests.benchmarks.data
	$(BIN)/python -m tests.benchmarks.tokenization
	$(BIN)/gpt2 bench --preset shakespeare-char
	$(BIN)/python -m tests.benchmarks.lora
	$(BIN)/python -m tests.benchmarks.generate

dist: $(DIST)/.installed  ## the source distribution and the wheel, in dist/
	rm -rf build dist
	$(DIST)/bin/python -m build
	$(DIST)/bin/python -m twine check --strict dist/*

help:  ## this list
	@sed -n 's/^\([a-z-]*\):.*  ## /\1\t/p' Makefile | expand -t 20

clean:
	rm -rf .venv $(PEERS) $(LM_EVAL) $(OLDEST) $(NEWEST) $(DIST) $(TPU) build dist demo-output docs/_build docs/_generated .pytest_cache

$(INSTALLED): pyproject.toml constraints.txt
	test -d .venv || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

# Without the flax extra of transformers 4, which requires an older JAX. Its Flax models run with this one too.
$(PEERS)/.installed:
	test -d $(PEERS) || $(PYTHON) -m venv $(PEERS)
	$(PEERS)/bin/python -m pip install --quiet transformers==4.57.6 jax==0.10.2 flax==0.12.8
	touch $@

$(LM_EVAL)/.installed: pyproject.toml constraints.txt
	test -d $(LM_EVAL) || $(PYTHON) -m venv $(LM_EVAL)
	$(LM_EVAL)/bin/python -m pip install --quiet --constraint constraints.txt --editable '.[torch,transformers,lm-eval]' accelerate peft
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

# Not in .venv, because JAX looks for a TPU in every process that can import libtpu. This version is for jax 0.10.2.
$(TPU)/.installed:
	$(BIN)/python -m pip install --quiet --no-deps --target $(TPU) 'libtpu==0.0.42.*'
	touch $@
