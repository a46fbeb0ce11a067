"""Rematerialization: which activations of a layer are saved for the backward pass, and which are recomputed.

Chen et al. 2016, "Training Deep Nets with Sublinear Memory Cost".
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal

import jax

Remat = Literal["none", "dots", "full"]
"""none: save everything that the derivatives use. dots: save the results of products and of attention, and recompute
norms and activation functions, which is faster on CPU than writing and reading them. full: save only each layer's
input."""

PROJECTED, ATTENDED = "projected", "attended"
"""Names of the results that `dots` saves, for `jax.ad_checkpoint.checkpoint_name`."""


def _is_cudnn_attention(primitive: Any, *_: Any, **__: Any) -> bool:
    """Save all results of cuDNN's attention: JAX does not name the row sums that its backward pass also uses."""
    return primitive.name == "dot_product_attention_fwd_wrapper"


POLICIES: Mapping[Remat, Callable[..., Any]] = {
    "dots": jax.checkpoint_policies.save_from_both_policies(
        jax.checkpoint_policies.save_only_these_names(PROJECTED, ATTENDED), _is_cudnn_attention
    ),
    "full": jax.checkpoint_policies.nothing_saveable,
}
