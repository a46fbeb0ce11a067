"""The user's cache directory."""

from __future__ import annotations

import os
from pathlib import Path


def cache_directory(cache: str | Path | None = None) -> Path:
    """Return `cache`, or by default gpt2-bridge in $XDG_CACHE_HOME, or in ~/.cache if that is not set."""
    if cache is not None:
        return Path(cache).absolute()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "gpt2-bridge"
