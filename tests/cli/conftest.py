"""Fixtures for the tests of all verbs."""

from __future__ import annotations

from pathlib import Path

import pytest
from support.commands import CONFIG
from support.models import huggingface_directory
from support.tokenizers_for_tests import write_byte_tokenizer


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A checkpoint of `CONFIG`, with a tokenizer."""
    path = huggingface_directory(tmp_path / "model", CONFIG)
    write_byte_tokenizer(path)
    return path
