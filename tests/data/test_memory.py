"""Memory does not grow with the data: a gigabyte of tokens in one file or fifty, and the encoding of a large text."""

from __future__ import annotations

import gzip
import json
import sys
from pathlib import Path

import pytest

from tests.benchmarks.data import MIB, growth_while_encoding, growth_while_reading, write_tokens

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform != "linux", reason="the peak is read from /proc"),
]

TOKENS = 2**29
MAX_FOR_READING = 16 * MIB
"""The ten batches that are read ahead take 5 MiB."""
MAX_FOR_ENCODING = 48 * MIB
"""Four blocks per core, as text and as ids; tiktoken's buffers; malloc's arenas."""


@pytest.mark.parametrize("shards", [1, 50])
def test_a_gigabyte_of_tokens_is_read_with_flat_memory(tmp_path: Path, shards: int) -> None:
    assert growth_while_reading(write_tokens(tmp_path, TOKENS, shards)) < MAX_FOR_READING


def test_the_check_detects_a_permanent_memory_map(tmp_path: Path) -> None:
    assert growth_while_reading(write_tokens(tmp_path, TOKENS), kept=True) > 900 * MIB


def test_a_large_text_is_encoded_with_flat_memory(tmp_path: Path) -> None:
    line = "def function_of_some_length(argument: int) -> int:\n    return argument + 1\n\n"
    (tmp_path / "text.py").write_text(line * (128 * MIB // len(line)))
    assert growth_while_encoding(tmp_path / "text.py", tmp_path / "cache") < MAX_FOR_ENCODING


def test_a_large_file_of_records_is_encoded_with_flat_memory(tmp_path: Path) -> None:
    with gzip.open(tmp_path / "data.jsonl.gz", "wt", compresslevel=1) as file:
        for k in range(64 * 1024):
            row = {"prompt": f"The prompt {k} of many records.", "completion": f"It is {k * k}; " * 64}
            file.write(json.dumps(row) + "\n")
    assert growth_while_encoding(tmp_path / "data.jsonl.gz", tmp_path / "cache") < MAX_FOR_ENCODING
