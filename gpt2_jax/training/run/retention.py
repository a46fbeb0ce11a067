"""Which checkpoints of a run are kept."""

from __future__ import annotations

from pathlib import Path

from bridge.formats.run import steps_by_loss


def best_step(run: Path) -> int | None:
    """Return the step with the lowest validation loss, or the newest if none was evaluated; None if there is none."""
    return next(iter(steps_by_loss(run)), None)
