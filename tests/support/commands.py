"""The `gpt2` command, run in the tests' own process."""

from __future__ import annotations

from dataclasses import replace

import pytest
from support.models import TINY

from gpt2_jax.cli import main

CONFIG = replace(TINY, vocab_size=256, n_layer=2)
"""Its ids are the bytes, as those of `write_byte_tokenizer` are."""


def run(*arguments: object) -> int:
    """The exit code of `gpt2 ARGUMENTS`."""
    with pytest.raises(SystemExit) as ended:
        main([str(a) for a in arguments])
    assert isinstance(ended.value.code, int)
    return ended.value.code
