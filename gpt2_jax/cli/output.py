"""What the verbs share: consoles, JSON files, and the one message for a missing extra."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

from rich.console import Console

from bridge import BridgeError

REPORT_WIDTH = 120
"""Columns where the output is no terminal; tables need more than the customary 80."""


def console() -> Console:
    """Standard output, for what was asked for."""
    return Console(width=None if sys.stdout.isatty() else REPORT_WIDTH)


def progress_console() -> Console:
    """Standard error, for what only a person watching wants."""
    return Console(stderr=True)


def write_json(file: Path | None, value: dict[str, Any]) -> None:
    """`--json FILE`; nothing where it was not given."""
    if file is None:
        return
    try:
        file.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
    except OSError as error:
        raise BridgeError(f"cannot write {file}: {error.strerror}") from error


def require_torch(what: str) -> None:
    """Raise the message that a newcomer needs, before an import error does."""
    if importlib.util.find_spec("torch") is None:
        raise BridgeError(f"{what} needs PyTorch: pip install 'gpt2-bridge[torch]'")
