"""The optimizer as an optax transformation, its learning rate schedule, gradient clipping, and the decay mask."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float
from optax.contrib import MuonDimensionNumbers, scale_by_muon

from bridge.conversion import STACK
from bridge.parameter_table import DECAYS
from gpt2_jax.lora.branch import A, B
from gpt2_jax.training.config import OptimizerConfig

# For Muon: the input and output axes of each projection, by the end of its path. All other axes (a leading layer axis,
# and the "3" of query, key and value) enumerate matrices, which are orthogonalized separately.
MATRIX_AXES: Mapping[tuple[str, ...], MuonDimensionNumbers] = {
    ("attn", "c_attn", "kernel"): MuonDimensionNumbers(reduction_axis=(-4,), output_axis=(-2, -1)),
    ("attn", "c_proj", "kernel"): MuonDimensionNumbers(reduction_axis=(-3, -2), output_axis=(-1,)),
    ("mlp", "c_fc", "kernel"): MuonDimensionNumbers(reduction_axis=(-2,), output_axis=(-1,)),
    ("mlp", "c_proj", "kernel"): MuonDimensionNumbers(reduction_axis=(-2,), output_axis=(-1,)),
}

_DECAYS = {**DECAYS, A: True, B: True}

Params = Mapping[str, Any]


def make_optimizer(config: OptimizerConfig, max_steps: int, n_layer: int | None = None) -> optax.GradientTransformation:
    """Return the optax transformation from clipped gradients to updates, for a run of `max_steps` steps.

    AdamW: Loshchilov and Hutter 2019. Muon: Jordan et al. 2024 (github.com/KellerJordan/Muon), for the layers'
    projections. Their updates are orthogonal matrices times sqrt(max(1, outputs / inputs)).

    Args:
        n_layer: the number of layers of the model, for `layer_decay` below 1.
    """
    if config.layer_decay != 1.0:
        if n_layer is None:
            raise ValueError(f"layer_decay={config.layer_decay} needs n_layer, the number of layers of the model")
        whole = make_optimizer(replace(config, layer_decay=1.0), max_steps)
        return _then(whole, scale_by_layer(config.layer_decay, n_layer))
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


def scale_by_layer(decay: float, n_layer: int) -> optax.GradientTransformation:
    """Return a transformation for layer-wise learning rate decay, to apply after the optimizer.

    It multiplies the updates of the embeddings by decay^(L + 1), those of layer i by decay^(L - i), counted from 0, and
    leaves those of the final norm and an untied head unchanged. Sources: Clark et al. 2020, "ELECTRA"; Bao et al. 2021,
    "BEiT", whose code has these exponents.

    >>> updates = {"wte": {"embedding": 1.0}, "h_0": {"ln_1": {"scale": 1.0}}, "ln_f": {"scale": 1.0}}
    >>> scale_by_layer(0.5, n_layer=1).update(updates, optax.EmptyState())[0]
    {'h_0': {'ln_1': {'scale': 0.5}}, 'ln_f': {'scale': 1.0}, 'wte': {'embedding': 0.25}}
    """

    def scaled(path: tuple[Any, ...], update: Any) -> Any:
        top = path[0].key
        if top in ("wte", "wpe"):
            return update * decay ** (n_layer + 1)
        if top == STACK:
            factors = decay ** np.arange(n_layer, 0, -1.0)
            return update * jnp.asarray(factors, update.dtype).reshape(-1, *[1] * (update.ndim - 1))
        layer = re.fullmatch(rf"{STACK}_(\d+)", top)
        return update * decay ** (n_layer - int(layer[1])) if layer else update

    return optax.stateless(lambda updates, _: jax.tree_util.tree_map_with_path(scaled, updates))


def _then(first: optax.GradientTransformation, scaling: optax.GradientTransformation) -> optax.GradientTransformation:
    """Return `first` followed by a stateless transformation, as a transformation with the state of `first`.

    `optax.chain` would nest the state of `first`, and AdamW's state would not be found in it.
    """

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        updates, state = first.update(updates, state, params)
        return scaling.update(updates, optax.EmptyState(), params)[0], state

    return optax.GradientTransformation(first.init, update)


def learning_rate_schedule(config: OptimizerConfig, max_steps: int) -> Callable[[Any], Any]:
    """Return a function from the step, counted from 0, to the learning rate.

    The warm-up and the cosine are those of nanoGPT's `get_lr`.
    """
    peak, floor, warmup = config.learning_rate, config.min_learning_rate, config.warmup_steps
    ramp = optax.linear_schedule(peak / (warmup + 1), peak, warmup) if warmup else optax.constant_schedule(peak)
    if config.schedule == "constant":
        decay, decay_start = optax.constant_schedule(peak), warmup
    elif config.schedule == "cosine":
        length = max(1, (config.decay_steps or max_steps) - warmup)
        decay, decay_start = optax.cosine_decay_schedule(peak, length, alpha=floor / peak), warmup
    else:
        decay_start = max(warmup, max_steps - round(config.decay_fraction * max_steps))
        decay = optax.linear_schedule(peak, floor, max(1, max_steps - decay_start))
    schedule = optax.join_schedules([ramp, decay], [decay_start])
    # Given an integer step, optax would compute in float32 even if the run uses float64.
    return lambda step: schedule(jnp.asarray(step, float))


def clip_factor(norm: Float[Array, ""], max_norm: float | None) -> Float[Array, ""]:
    """Return the factor that clips gradients of the global norm `norm` to `max_norm`.

    The same as `torch.nn.utils.clip_grad_norm_`, which divides by norm + 1e-6. Optax's clipping has no 1e-6.
    """
    return jnp.ones_like(norm) if max_norm is None else jnp.minimum(1.0, max_norm / (norm + 1e-6))


def decay_mask(params: Params) -> Any:
    """Return a tree of booleans: True for parameters that weight decay applies to.

    Projections, embeddings and the factors of an adapter decay; biases and LayerNorms do not. This is the mask for
    `optax.adamw`. It depends on the names of the parameters and not on their number of axes, because stacked layers
    give biases a second axis: `mask = x.ndim > 1` would decay them.

    Args:
        params: a Flax tree of this model or an adapter, with layers stacked or not, or a tree of the same structure.

    Raises:
        KeyError: a parameter is not one of GPT-2's.

    Example:
        >>> import jax, jax.numpy as jnp, optax
        >>> from bridge import GPT2Config
        >>> from gpt2_jax import GPT2
        >>> from gpt2_jax.training import decay_mask
        >>> model = GPT2(GPT2Config(vocab_size=32, n_positions=8, n_embd=8, n_layer=2, n_head=2), scan=True)
        >>> params = model.init(jax.random.key(0), jnp.zeros((1, 1), int))["params"]
        >>> decay_mask(params)["h"]["mlp"]["c_fc"]
        {'bias': False, 'kernel': True}
        >>> tx = optax.adamw(1e-3, weight_decay=0.1, mask=decay_mask)
    """
    return jax.tree_util.tree_map_with_path(lambda path, _: _DECAYS[path[-1].key], params)


def _matrix_axes(path: tuple[Any, ...]) -> MuonDimensionNumbers | None:
    return MATRIX_AXES.get(tuple(part.key for part in path[-3:]))


def _labels(params: Params) -> Any:
    return jax.tree_util.tree_map_with_path(lambda path, _: "muon" if _matrix_axes(path) else "adamw", params)


def _matrices(params: Params) -> Any:
    """Return the axes of every matrix, keeping the `MaskedNode`s that `optax.partition` puts in place of the others."""
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
