"""What formats that are a directory with a `config.json` have in common."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bridge.checkpoint import Checkpoint
from bridge.errors import CheckpointError, quoted
from bridge.json_text import parse_object
from bridge.tokenizer import TOKENIZER_FILES

CONFIG = "config.json"
_MOST_JSON_BYTES = 2**20  # a GPT-2 XL's index is 50 kB; parsed, hostile JSON takes 33 times its size
_CARRIED_FILES = (*TOKENIZER_FILES, "generation_config.json")


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file; `CheckpointError` if it is anything else."""
    try:
        if path.stat().st_size > _MOST_JSON_BYTES:
            raise CheckpointError(f"{quoted(path)} is larger than {_MOST_JSON_BYTES} bytes; that is not a {path.name}")
        text = path.read_bytes()
    except OSError as error:
        raise CheckpointError(f"cannot read {quoted(path)}: {error.strerror}") from error
    return parse_object(text, quoted(path), CheckpointError)


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def carry_files(checkpoint: Checkpoint, directory: Path) -> None:
    """Copy the tokenizer and generation settings that stood beside the weights."""
    if checkpoint.path is None:
        return
    for name in _CARRIED_FILES:
        if (checkpoint.path / name).is_file():
            shutil.copyfile(checkpoint.path / name, directory / name)
