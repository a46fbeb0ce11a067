"""A gigabyte of tokens trains with the memory of a megabyte, in one file or in fifty; text is encoded in pieces."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from tests.benchmarks.data import MIB, growth_while_encoding, growth_while_reading, write_tokens

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform != "linux", reason="the peak is read from /proc"),
]

TOKENS = 2**29
MOST_FOR_READING = 16 * MIB
"""The ten batches read ahead or being made are 5 MiB."""
MOST_FOR_ENCODING = 48 * MIB
"""The blocks in flight, four for each core, as text and as ids; tiktoken's own buffers; malloc's arenas."""


@pytest.mark.parametrize("shards", [1, 50])
def test_a_gigabyte_of_tokens_is_read_with_flat_memory(tmp_path: Path, shards: int) -> None:
    assert growth_while_reading(write_tokens(tmp_path, TOKENS, shards)) < MOST_FOR_READING


def test_a_map_that_stayed_open_would_be_seen(tmp_path: Path) -> None:
    assert growth_while_reading(write_tokens(tmp_path, TOKENS), kept=True) > 900 * MIB


def test_a_large_text_is_encoded_with_flat_memory(tmp_path: Path) -> None:
    line = "def function_of_some_length(argument: int) -> int:\n    return argument + 1\n\n"
    (tmp_path / "text.py").write_text(line * (128 * MIB // len(line)))
    assert growth_while_encoding(tmp_path / "text.py", tmp_path / "cache") < MOST_FOR_ENCODING
