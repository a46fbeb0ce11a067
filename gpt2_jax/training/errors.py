"""Errors of training."""

from __future__ import annotations

from bridge import BridgeError


class TrainingError(BridgeError):
    """A training run cannot be started or continued as configured; the message names the field."""


class NonFiniteLoss(TrainingError):
    """A loss, a gradient or a weight is infinite or NaN; the message names the step."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that the memory of the machine or of a device was too small."""
    from jax.errors import JaxRuntimeError  # not at the top, because `gpt2 train --help` must not wait for JAX

    return isinstance(error, MemoryError) or (isinstance(error, JaxRuntimeError) and "RESOURCE_EXHAUSTED" in str(error))
