"""Errors of `gpt2 plan`."""

from __future__ import annotations

from bridge import BridgeError


class PlanError(BridgeError):
    """A step cannot be planned. The message says what to change."""
