"""Rematerialization: which activations of a layer are saved for the backward pass, and which are recomputed.

Chen et al. 2016, "Training Deep Nets with Sublinear Memory Cost".
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax

from gpt2_jax.choices import Remat

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
