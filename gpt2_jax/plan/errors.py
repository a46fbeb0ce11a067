"""What goes wrong in planning."""

from __future__ import annotations

from bridge import BridgeError


class PlanError(BridgeError):
    """A step cannot be planned as asked; the message says what to change."""
