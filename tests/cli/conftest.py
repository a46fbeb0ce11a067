"""What all verbs' tests start from."""

from __future__ import annotations

from pathlib import Path

import pytest
from commands import CONFIG
from models import huggingface_directory
from tokenizers_for_tests import write_byte_tokenizer


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A checkpoint of `CONFIG`, with a tokenizer."""
    path = huggingface_directory(tmp_path / "model", CONFIG)
    write_byte_tokenizer(path)
    return path
