"""The update rule as an optax transformation, and its schedule."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float
from optax.contrib import MuonDimensionNumbers, scale_by_muon

from bridge.parameter_table import DECAYS
from gpt2_jax.training.config import OptimizerConfig

# For Muon, the axes that a projection reads from and writes to, by the end of its path; all others (a leading
# layer axis, and the "3" of query, key and value) number matrices that are orthogonalised one by one.
MATRICES: Mapping[tuple[str, ...], MuonDimensionNumbers] = {
    ("attn", "c_attn", "kernel"): MuonDimensionNumbers(reduction_axis=(-4,), output_axis=(-2, -1)),
    ("attn", "c_proj", "kernel"): MuonDimensionNumbers(reduction_axis=(-3, -2), output_axis=(-1,)),
    ("mlp", "c_fc", "kernel"): MuonDimensionNumbers(reduction_axis=(-2,), output_axis=(-1,)),
    ("mlp", "c_proj", "kernel"): MuonDimensionNumbers(reduction_axis=(-2,), output_axis=(-1,)),
}

Params = Mapping[str, Any]


def make_optimizer(config: OptimizerConfig, max_steps: int) -> optax.GradientTransformation:
    """The transformation that turns clipped gradients into updates, over a run of `max_steps` steps.

    AdamW: Loshchilov and Hutter 2019. Muon: Jordan et al. 2024 (github.com/KellerJordan/Muon), on the layers'
    projections, whose updates are orthogonal and times sqrt(max(1, outputs / inputs)).
    """
    schedule = learning_rate_schedule(config, max_steps)
    adamw = optax.adamw(
        schedule, config.beta1, config.beta2, config.epsilon, weight_decay=config.weight_decay, mask=decay_mask
    )
    if config.optimizer == "adamw":
        return adamw
    ratio = config.muon_learning_rate / config.learning_rate
    muon = optax.chain(
        scale_by_muon(beta=config.muon_momentum, weight_dimension_numbers=_matrices),
        optax.stateless(_scale_by_shape),
        optax.add_decayed_weights(config.muon_weight_decay),
        optax.scale_by_learning_rate(lambda step: ratio * schedule(step)),
    )
    return optax.partition({"muon": muon, "adamw": adamw}, _labels)


def learning_rate_schedule(config: OptimizerConfig, max_steps: int) -> Callable[[Any], Any]:
    """Step, from 0, -> learning rate. The warm-up and the cosine are nanoGPT's `get_lr`."""
    peak, floor, warmup = config.learning_rate, config.min_learning_rate, config.warmup_steps
    rise = optax.linear_schedule(peak / (warmup + 1), peak, warmup) if warmup else optax.constant_schedule(peak)
    if config.schedule == "constant":
        fall, begins = optax.constant_schedule(peak), warmup
    elif config.schedule == "cosine":
        length = max(1, (config.decay_steps or max_steps) - warmup)
        fall, begins = optax.cosine_decay_schedule(peak, length, alpha=floor / peak), warmup
    else:
        begins = max(warmup, max_steps - round(config.decay_fraction * max_steps))
        fall = optax.linear_schedule(peak, floor, max(1, max_steps - begins))
    schedule = optax.join_schedules([rise, fall], [begins])
    # From an integer step optax would compute in float32 even where the run is in float64.
    return lambda step: schedule(jnp.asarray(step, float))


def clip_factor(norm: Float[Array, ""], max_norm: float | None) -> Float[Array, ""]:
    """What gradients of this global norm are multiplied with, so that it comes to `max_norm` where it is above.

    As `torch.nn.utils.clip_grad_norm_`, which divides by norm + 1e-6; optax's clipping has no 1e-6.
    """
    return jnp.ones_like(norm) if max_norm is None else jnp.minimum(1.0, max_norm / (norm + 1e-6))


def decay_mask(params: Params) -> Any:
    """True where weight decay acts; raises KeyError for a parameter whose name says nothing of it."""
    return jax.tree_util.tree_map_with_path(lambda path, _: DECAYS[path[-1].key], params)


def _matrix_axes(path: tuple[Any, ...]) -> MuonDimensionNumbers | None:
    return MATRICES.get(tuple(part.key for part in path[-3:]))


def _labels(params: Params) -> Any:
    return jax.tree_util.tree_map_with_path(lambda path, _: "muon" if _matrix_axes(path) else "adamw", params)


def _matrices(params: Params) -> Any:
    """The axes of every matrix, in the shape that `optax.partition` leaves of the tree."""
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: leaf if isinstance(leaf, optax.MaskedNode) else _matrix_axes(path),
        params,
        is_leaf=lambda x: isinstance(x, optax.MaskedNode),
    )


def _scale_by_shape(updates: Params, params: Params | None) -> Params:
    def scaled(path: tuple[Any, ...], update: Array) -> Array:
        axes = _matrix_axes(path)
        assert axes is not None
        inputs, outputs = (_size(update, group) for group in axes)
        return update * max(1.0, outputs / inputs) ** 0.5

    return jax.tree_util.tree_map_with_path(scaled, updates)


def _size(array: Array, axes: Any) -> int:
    size = 1
    for axis in axes:
        size *= array.shape[axis]
    return size
