"""What of a layer is kept for the backward pass, and what is computed again.

Chen et al. 2016, "Training Deep Nets with Sublinear Memory Cost".
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax

from gpt2_jax.choices import Remat

PROJECTED, ATTENDED = "projected", "attended"
"""The names, for `jax.ad_checkpoint.checkpoint_name`, of the results that `dots` keeps."""


def _is_cudnn_attention(primitive: Any, *_: Any, **__: Any) -> bool:
    """JAX gives no name to the row sums that cuDNN's backward pass takes besides its result; so all of it is kept."""
    return primitive.name == "dot_product_attention_fwd_wrapper"


POLICIES: Mapping[Remat, Callable[..., Any]] = {
    "dots": jax.checkpoint_policies.save_from_both_policies(
        jax.checkpoint_policies.save_only_these_names(PROJECTED, ATTENDED), _is_cudnn_attention
    ),
    "full": jax.checkpoint_policies.nothing_saveable,
}
