"""The branch of a projection that applies its adapter."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float

from gpt2_jax.lora.config import LoRAConfig
from gpt2_jax.ops.linear import project

COLLECTION, A, B = "lora", "a", "b"
"""The Flax collection of an adapter, and the names of its factors in each projection."""


def low_rank_update(
    module: nn.Module, config: LoRAConfig | None, x: Float[Array, "..."], input_axes: int, deterministic: bool
) -> Float[Array, "..."] | None:
    """Return s dropout(x) A B, or None if the collection has no factors for this module.

    x A is computed first, so A B is never formed.

    Args:
        module: a bound module. Its factors are `a` [*inputs, r] and `b` [r, *outputs].
        input_axes: the number of last axes of `x` that are contracted.
        deterministic: False applies dropout with the "dropout" rng.
    """
    if config is None or not module.has_variable(COLLECTION, A):
        return None
    a: Array = module.get_variable(COLLECTION, A).astype(x.dtype)
    b: Array = module.get_variable(COLLECTION, B).astype(x.dtype)
    if not deterministic and config.dropout > 0.0:
        kept = jax.random.bernoulli(module.make_rng("dropout"), 1.0 - config.dropout, x.shape)
        x = jnp.where(kept, x / (1.0 - config.dropout), 0.0)
    return project(project(x, a, input_axes), b, 1) * config.scaling
