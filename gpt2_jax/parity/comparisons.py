"""Comparisons of the implementations on the same inputs. They return measurements with their tolerances, and plots.

The other implementation is an argument, so that this module does not import PyTorch.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from types import ModuleType

import numpy as np

import gpt2_jax.parity.backends.jax_gpt2 as jax_gpt2
import gpt2_jax.parity.reporting.plots as plots
import gpt2_jax.parity.tolerances as tolerances
from bridge import Checkpoint
from gpt2_jax.parity.activations import activation_differences
from gpt2_jax.parity.inputs import AdamW, CheckInputs
from gpt2_jax.parity.metrics import kl_divergence, relative, relative_l2_difference, rms
from gpt2_jax.parity.reporting.report import Compared, Measurement
from gpt2_jax.parity.tolerances import SHORT_NAMES

Gradients = Callable[[Checkpoint, np.ndarray, str], dict[str, np.ndarray]]
"""The function `gradients` of `torch_gpt2` or `transformers_gpt2`."""


def compare_logits(dtype: str, expected: np.ndarray, actual: np.ndarray, n_layer: int) -> Compared:
    """Differences of logits [B, T, V]. In bfloat16 they have no tolerance; `compare_errors` tests bfloat16 instead."""
    # Tolerances of the KL divergence and of the fraction of tokens with a different top-1.
    limits: dict[str, tuple[float | None, float | None]] = {
        "float64": (tolerances.KL_FP64, 0.0),
        "float32": (tolerances.KL_FP32, None),
        "bfloat16": (None, None),
    }
    return measure_logits(
        SHORT_NAMES[dtype], expected, actual, _logits_tolerance(dtype, expected, n_layer), *limits[dtype]
    )


def measure_logits(
    short: str,
    expected: np.ndarray,
    actual: np.ndarray,
    limit: float | None,
    kl_limit: float | None,
    top1_limit: float | None = None,
    positions: Sequence[int] | None = None,
) -> Compared:
    """Differences of logits [B, T, V] with their tolerances.

    Args:
        short: the name of the dtype.
        limit, kl_limit, top1_limit: tolerances of the difference, the KL divergence and the fraction of tokens.
        positions: the positions of the tokens in their rows. The default is 0, 1, 2, ...
    """
    difference = np.abs(expected - actual)
    kl_BT = np.stack([kl_divergence(a, b) for a, b in zip(expected, actual, strict=True)])
    different_top1 = float((expected.argmax(-1) != actual.argmax(-1)).mean())
    measurements = (
        Measurement(f"{short} logits, max difference", float(difference.max()), limit),
        Measurement(f"{short} logits, mean difference", float(difference.mean())),
        Measurement(f"{short} max KL divergence, nats per token", float(kl_BT.max()), kl_limit),
        Measurement(f"{short} tokens with a different top-1, fraction", different_top1, top1_limit),
    )
    return Compared(measurements, (plots.kl_by_position(short, kl_BT, positions, kl_limit),))


def compare_class_logits(title: str, dtype: str, expected: np.ndarray, actual: np.ndarray, n_layer: int) -> Measurement:
    """The maximum difference of logits of classes [B, C], in float64 or float32."""
    difference = np.abs(actual - expected)
    row, label = np.unravel_index(difference.argmax(), difference.shape)
    limit = _logits_tolerance(dtype, expected, n_layer)
    name = f"{SHORT_NAMES[dtype]} {title}, max difference"
    return Measurement(name, float(difference.max()), limit, f"row {row}, class {label}")


def _logits_tolerance(dtype: str, expected: np.ndarray, n_layer: int) -> float | None:
    """The tolerance of the maximum difference. bfloat16 has none; see `compare_errors`."""
    largest = float(np.abs(expected).max())
    if dtype == "float64":
        return tolerances.LOGITS_FP64 * largest
    return tolerances.logits_fp32(largest, n_layer) if dtype == "float32" else None


def compare_errors(dtype: str, exact: np.ndarray, expected: np.ndarray, actual: np.ndarray) -> Compared:
    """RMS error of JAX's logits relative to the RMS error of PyTorch's, both against float64 logits [B, T, V]."""
    ratio, floor = {
        "float32": (tolerances.ERROR_RATIO_FP32, tolerances.ERROR_FLOOR_FP32),
        "bfloat16": (tolerances.ERROR_RATIO_BF16, tolerances.ERROR_FLOOR_BF16),
    }[dtype]
    least, short = floor * float(np.abs(exact).max()), SHORT_NAMES[dtype]
    sides = {"torch": expected, "JAX": actual}
    errors_BT = {name: np.sqrt(np.square(logits - exact).mean(-1)) for name, logits in sides.items()}
    torch_error, jax_error = (max(rms(error_BT), least) for error_BT in errors_BT.values())
    title = "RMS error of the logits against fp64 by position, maximum over the rows"
    curves = [plots.by_position(title, "error", f"{short}, {name}", error) for name, error in errors_BT.items()]
    measurement = Measurement(f"{short} error vs fp64, JAX / torch", relative(jax_error, torch_error), ratio)
    return Compared((measurement,), tuple(curves))


def compare_gradients(expected: Gradients, inputs: CheckInputs) -> Compared:
    """Differences of JAX's gradients from `expected`, in float64 and float32."""
    measurements, curves = [], []
    for dtype, limit in (("float64", tolerances.GRADIENT_FP64), ("float32", tolerances.GRADIENT_FP32)):
        reference = expected(inputs.checkpoint, inputs.gradient_ids, dtype)
        actual = jax_gpt2.gradients(inputs.checkpoint, inputs.gradient_ids, dtype)
        differences = {
            name: relative_l2_difference(actual[name], reference[name]) if name in reference else math.inf
            for name in actual
        }
        worst, short = max(differences, key=differences.__getitem__), SHORT_NAMES[dtype]
        name = f"{short} gradients, max relative L2 difference of {len(differences)} parameters"
        measurements.append(Measurement(name, differences[worst], limit, worst))
        curves.append(plots.by_parameter("Distance of the gradients, by parameter", short, differences, limit))
    return Compared(tuple(measurements), tuple(curves))


def compare_training(side: ModuleType, dtype: str, inputs: CheckInputs) -> Compared:
    """Differences from `side`, of the losses and of the final weights after training with AdamW."""
    loss_limit, update_limit = {
        "float64": (tolerances.TRAIN_LOSS_FP64, tolerances.TRAIN_UPDATE_FP64),
        "float32": (tolerances.TRAIN_LOSS, tolerances.TRAIN_UPDATE_FP32),
    }[dtype]
    batches = inputs.train_batches()
    expected_losses, expected = side.train(inputs.checkpoint, batches, dtype, AdamW())
    jax_losses, actual = jax_gpt2.train(inputs.checkpoint, batches, dtype, AdamW())
    loss_differences = np.abs(np.subtract(expected_losses, jax_losses))
    differences = {
        name: relative_l2_difference(
            _without_key_bias(name, actual[name] - start), _without_key_bias(name, expected[name] - start)
        )
        for name, start in inputs.checkpoint.tensors.items()
    }
    worst = max(differences, key=differences.__getitem__)
    short, loss = SHORT_NAMES[dtype], float(loss_differences.max())
    measurements = (
        Measurement(f"{short} losses of {len(batches)} steps, max difference", loss, loss_limit),
        Measurement(f"{short} weight updates, max relative L2 difference", differences[worst], update_limit, worst),
    )
    losses = {"torch": expected_losses, "JAX": jax_losses}
    return Compared(
        measurements,
        (
            plots.over_steps(f"Losses in {dtype}", "nats per token", losses),
            plots.over_steps(
                "Difference of the losses", "nats per token", {short: loss_differences.tolist()}, loss_limit
            ),
            plots.by_parameter("Distance of the weight updates, by parameter", short, differences, update_limit),
        ),
    )


def _without_key_bias(name: str, update: np.ndarray) -> np.ndarray:
    """Remove the key bias from the update of `c_attn.bias`.

    Softmax cancels the key bias, so its true gradient is 0. Adam normalises the gradient by its own magnitude and thus
    amplifies the rounding error to a full step.
    """
    if not name.endswith("c_attn.bias"):
        return update
    query, _, value = np.split(update, 3)
    return np.concatenate([query, value])


def compare_activations(
    side: ModuleType, inputs: CheckInputs, ids: np.ndarray | None = None, mask: np.ndarray | None = None
) -> dict[str, float]:
    """Maximum relative difference of every activation, in float64, in the order of the forward pass.

    Args:
        side: `torch_gpt2`.
        ids: token ids instead of those of `inputs`.
        mask: 1 at tokens and 0 at padding. Padding is not compared.
    """
    ids = inputs.ids if ids is None else ids
    expected = side.activations(inputs.checkpoint, ids, mask)
    actual = jax_gpt2.activations(inputs.checkpoint, ids, mask)
    return activation_differences(expected, actual, np.ones(ids.shape, bool) if mask is None else mask == 1)
