"""The error for what cannot be shared."""

from __future__ import annotations

from bridge import BridgeError


class SharingError(BridgeError):
    """A checkpoint, or what is said about it, cannot be shared."""
