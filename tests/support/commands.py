"""The `gpt2` command, run in the tests' own process."""

from __future__ import annotations

from dataclasses import replace
from importlib.util import find_spec

import pytest
from support.models import TINY

from gpt2_jax.cli import main

CONFIG = replace(TINY, vocab_size=256, n_layer=2)
"""A model for the byte ids of `write_byte_tokenizer`."""

needs_torch = pytest.mark.skipif(find_spec("torch") is None, reason="needs torch, which is not installed")
"""For tests of commands that exit with an error if torch is not installed."""


def run(*arguments: object) -> int:
    """Run `gpt2 ARGUMENTS` and return the exit code."""
    with pytest.raises(SystemExit) as ended:
        main([str(a) for a in arguments])
    assert isinstance(ended.value.code, int)
    return ended.value.code
