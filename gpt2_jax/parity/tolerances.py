"""How much the two backends may differ, and why not more."""

from __future__ import annotations

import math

LOGITS_FP64 = 1e-10
"""Largest difference, as a share of the largest logit. Two correct programs differ by some 1e-14 here; a wrong
constant in the seventh digit would show as 1e-7. In between there is nothing to confuse."""

HIDDEN_FP64 = 1e-10
"""The same for every hidden state, over the largest number in it."""

GRADIENT_FP64 = 1e-10
"""Relative L2 distance per parameter; the reasoning of LOGITS_FP64, with a backward pass behind it."""

GRADIENT_FP32 = 1e-5
"""Relative L2 distance per parameter. 100 units of float32 rounding (2^-23): sums over thousands of
terms, in two different orders, through a backward pass."""

KL_FP64 = 1e-12
"""Nats per token; what rounding leaves of an exact 0, 2^-52 times a logit of 100 times some tens."""

KL_FP32 = 1e-9
"""Nats per token. Logits that differ by d change a distribution by about d^2 / 2; 1e-5 gives 5e-11."""

ERROR_RATIO_FP32 = 1.5
"""Root-mean-square error against float64, port over reference. Not 1: XLA's matrix product on CPU sums
768 terms in one chain where MKL uses two, which by itself is a factor sqrt(2)."""

ERROR_RATIO_BF16 = 1.25
"""The same in bfloat16, where the rounding of stored activations dominates and is equal in both."""

ERROR_FLOOR_FP32 = 2.0**-24
ERROR_FLOOR_BF16 = 2.0**-9
"""Half a unit in the last place of the largest logit: errors below it are rounding of the result
itself, and their ratio says nothing."""

TRAIN_LOSS = 1e-5
"""Nats; largest difference of the losses of ten steps in float32, about 10 units of its rounding."""

TRAIN_LOSS_FP64 = 1e-11
"""The same in float64."""

TRAIN_UPDATE_FP64 = 1e-9
"""Relative L2 distance of what ten steps changed, per parameter; the bias of the keys is left out, as its
true gradient is 0. Gradients agree to 1e-14; where one is small beside Adam's epsilon it counts for more."""

TRAIN_UPDATE_FP32 = 2e-3
"""The same in float32. A step of 1e-4 added to a norm's scale, near 1, is rounded at 6e-8: up to 6e-4 of
the step. Forgetting the decay of biases alone makes 3e-3, of everything 2e-1."""

PADDING_FP64 = 1e-10
"""Largest difference over the largest logit between a padded row and the row alone."""

PREDICTS = 1.0
"""Loss over ln(V). A model that learned anything on any text is below the uniform guess."""


def logits_fp32(largest_logit: float, n_layer: int) -> float:
    """Largest absolute difference of float32 logits that rounding explains.

    1e-5 for logits up to 10 at 12 layers: ten times float32's rounding there. It grows with the
    logits, whose spacing grows, and with the square root of depth, as independent errors add.
    """
    return 1e-6 * max(10.0, largest_logit) * math.sqrt(max(1.0, n_layer / 12))
