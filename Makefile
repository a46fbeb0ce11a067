# Everything installs into .venv, made on first use from pyproject.toml and constraints.txt.
PYTHON ?= python3
BIN := .venv/bin
INSTALLED := .venv/.installed

.PHONY: demo test test-slow check bench clean

demo: $(INSTALLED)  ## PyTorch to JAX, the proof, fine-tuning in JAX, and back
	$(BIN)/gpt2 demo --out demo-output --overwrite

test: $(INSTALLED)  ## everything but the marked tests
	$(BIN)/python -m pytest

test-slow: $(INSTALLED)  ## the tests at 124M parameters
	$(BIN)/python -m pytest -m slow

check: $(INSTALLED)  ## style and types
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

bench: $(INSTALLED)  ## the figures of the README's tables
	$(BIN)/python -m tests.benchmarks.load
	$(BIN)/python -m tests.benchmarks.data
	$(BIN)/python -m tests.benchmarks.train
	$(BIN)/python -m tests.benchmarks.generate

clean:
	rm -rf .venv demo-output

$(INSTALLED): pyproject.toml constraints.txt
	test -d .venv || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@
