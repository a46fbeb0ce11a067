"""How much the two backends may differ, and why not more."""

from __future__ import annotations

import math

LOGITS_FP64 = 1e-10
"""Largest difference over the largest logit. Two correct programs differ by some 1e-14 here; a wrong
constant in the seventh digit would show as 1e-7. In between there is nothing to confuse."""

HIDDEN_FP64 = 1e-10
"""The same for every hidden state, over the largest number in it."""

GRADIENT_FP64 = 1e-10
"""Relative L2 distance per parameter; the reasoning of LOGITS_FP64, with a backward pass behind it."""

GRADIENT_FP32 = 1e-5
"""Relative L2 distance per parameter. 100 units of float32 rounding (2^-23): sums over thousands of
terms, in two different orders, through a backward pass."""

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

TRAIN_UPDATE_FP64 = 1e-7
"""Relative L2 distance of what ten steps changed, over all parameters. Adam divides a gradient by its
own size, so where the true gradient is 0 (the bias of the keys) rounding noise moves the weight by
noise / epsilon = 1e-17 / 1e-8 of a step."""

TRAIN_UPDATE_FP32 = 2e-2
"""The same in float32, where noise of 1e-9 is a tenth of Adam's epsilon: weights whose gradient is
that small go their own way. The losses are the sharper test here."""

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
