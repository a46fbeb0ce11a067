"""What is wrong with training data arrives as one kind of error."""

from __future__ import annotations

from bridge import BridgeError


class DataError(BridgeError):
    """A text or token source is missing, damaged, or too small for what is asked of it."""
