"""The error of all data modules."""

from __future__ import annotations

from bridge import BridgeError


class DataError(BridgeError):
    """A text or token source is missing, damaged, or too small."""
