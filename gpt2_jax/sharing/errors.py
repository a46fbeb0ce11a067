"""The error of `gpt2_jax.sharing`."""

from __future__ import annotations

from bridge import BridgeError


class SharingError(BridgeError):
    """A checkpoint cannot be shared, or a report, certificate or argument for its card is invalid."""
