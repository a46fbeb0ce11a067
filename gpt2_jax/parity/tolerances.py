"""Tolerances of the checks, with their reasons."""

from __future__ import annotations

import math
from collections.abc import Mapping

SHORT_NAMES: Mapping[str, str] = {"float64": "fp64", "float32": "fp32", "bfloat16": "bf16"}
"""The names of dtypes in reports."""

LOGITS_FP64 = 1e-10
"""Maximum difference, relative to the largest logit. Two correct implementations differ by about 1e-14. An error in the
seventh digit of a constant gives about 1e-7. This tolerance separates the two clearly."""

ACTIVATION_FP64 = 1e-10
"""Maximum difference of an activation, relative to its largest element. See LOGITS_FP64."""

GRADIENT_FP64 = 1e-10
"""Relative L2 difference per parameter. The reasoning is that of LOGITS_FP64, applied to a backward pass."""

GRADIENT_FP32 = 1e-5
"""Relative L2 difference per parameter: 100 times float32 rounding (2^-23). Gradients are sums of thousands of terms,
added in different orders, through a backward pass."""

KL_FP64 = 1e-12
"""Nats per token. The exact value is 0. Rounding gives about 2^-52 x 100, for a logit of 100, times a few tens."""

KL_FP32 = 1e-9
"""Nats per token. Logits that differ by d change a distribution by about d^2 / 2, and 1e-5 gives 5e-11."""

ERROR_RATIO_FP32 = 1.25
"""RMS error against float64, JAX / PyTorch, at the highest precision of matrix products. On CPU, JAX then accumulates
at most 128 terms sequentially (`gpt2_jax.ops.linear.TERMS_HIGHEST`), and MKL some hundreds. The measured ratio is 0.91
with 124M parameters and 0.89 to 0.91 with the bundled model, on one kind of CPU. The rest is for other CPUs and
models."""

ERROR_RATIO_BF16 = 1.25
"""The same in bfloat16. The rounding of stored activations dominates, and is equal in both."""

ERROR_FLOOR_FP32 = 2.0**-24
ERROR_FLOOR_BF16 = 2.0**-9
"""Half a unit in the last place of the largest logit. Smaller errors are rounding of the result itself, so their ratio
is meaningless."""

TRAIN_LOSS = 1e-5
"""Nats. Maximum difference of the losses of ten steps in float32: about 10 times float32 rounding."""

TRAIN_LOSS_FP64 = 1e-11
"""The same in float64."""

TRAIN_UPDATE_FP64 = 1e-9
"""Relative L2 difference of the change after ten steps, per parameter, without the key bias, whose true gradient is 0.
Gradients agree to 1e-14. Adam amplifies the difference where a gradient is small compared to epsilon."""

TRAIN_UPDATE_FP32 = 2e-3
"""The same in float32. Adding an update of 1e-4 to a norm's scale near 1 rounds at 6e-8, up to 6e-4 of the update.
Missing weight decay gives 3e-3 if only the biases lack it, and 2e-1 if all parameters do."""

PADDING_FP64 = 1e-10
"""Maximum difference between a padded row and the row alone, relative to the largest logit."""

PREDICTION = 1.0
"""Loss / ln(V). Any trained model on any text is better than a uniform guess."""


LOSS_FP64 = 2 * LOGITS_FP64
"""Maximum difference of a token's loss, relative to the largest logit. A loss is the log-sum-exp of the logits minus
one logit. Each of the two changes at most by the largest change of a logit."""

PROJECTION_FP64 = 10 * GRADIENT_FP64
"""Difference of a gradient's dot product with random signs, relative to the gradient's L2 norm. A difference d of the
gradients changes the dot product by more than 10 ||d|| with a probability below 2 exp(-10^2 / 2) = 4e-22 (Hoeffding).
The norm itself changes at most by ||d||, so its tolerance is GRADIENT_FP64."""

LOGITS_FP32 = 1e-6
"""Relative difference of float32 logits: about ten times 2^-23, the spacing of float32. See `logits_fp32`."""

ROUNDOFF_FP32, ROUNDOFF_BF16X3, ROUNDOFF_TF32, ROUNDOFF_BF16 = 2.0**-24, 2.0**-16, 2.0**-11, 2.0**-8
"""Unit round-off of the operands of a matrix product: half the spacing at 1. float32 has 24 significant bits, three
passes of bfloat16 have 16, TF32 has 11, and bfloat16 has 8."""

_ROUNDOFF: Mapping[str, Mapping[str, float]] = {
    "cpu": {"default": ROUNDOFF_FP32, "high": ROUNDOFF_FP32, "highest": ROUNDOFF_FP32},
    "gpu": {"default": ROUNDOFF_TF32, "high": ROUNDOFF_TF32, "highest": ROUNDOFF_FP32},
    "tpu": {"default": ROUNDOFF_BF16, "high": ROUNDOFF_BF16X3, "highest": ROUNDOFF_FP32},
}


def matmul_roundoff(platform: str, precision: str) -> float:
    """The unit round-off of float32 matrix products on a JAX platform with `jax.default_matmul_precision`.

    An unknown platform has that of a TPU, which is the largest.
    """
    return _ROUNDOFF.get(platform, _ROUNDOFF["tpu"])[precision]


def logits_fp32(largest_logit: float, n_layer: int, roundoff: float = ROUNDOFF_FP32) -> float:
    """The largest absolute difference of float32 logits that rounding alone can explain.

    1e-5 for logits up to 10 and 12 layers, which is ten times float32 rounding. It grows with the logits, because their
    spacing grows, and with the square root of the depth, because independent errors add. It is proportional to the unit
    round-off of the matrix products, because the rounding of their operands then dominates.
    """
    scale = LOGITS_FP32 * roundoff / ROUNDOFF_FP32
    return scale * max(10.0, largest_logit) * math.sqrt(max(1.0, n_layer / 12))


def kl_fp32(roundoff: float) -> float:
    """KL_FP32 for matrix products with another unit round-off. KL grows with the square of the logits' difference."""
    return KL_FP32 * (roundoff / ROUNDOFF_FP32) ** 2
