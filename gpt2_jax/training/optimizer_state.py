"""AdamW's moments put into an optax state and taken out of it; `bridge.optimizer_state` carries them on to torch."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array

from bridge import ConversionError, optimizer_state
from bridge.conversion import FlaxTree, differences
from bridge.errors import bullet_list
from bridge.optimizer_state import AdamWState
from bridge.storage.trees import flatten
from gpt2_jax.model import GPT2


def adamw_state(opt_state: Any, model: GPT2) -> AdamWState:
    """The moments and step count in an optax state, wherever inside it they are.

    Raises `bridge.ConversionError` unless it has one AdamW, over all of the model's parameters.
    """
    adam = _adam(opt_state)
    return optimizer_state.from_flax(
        int(adam.count), adam.mu, adam.nu, model.config, vocab_multiple=model.vocab_multiple
    )


def with_adamw_state(opt_state: Any, state: AdamWState, model: GPT2) -> Any:
    """An optax state, as `init` gives it, with these moments and step count in their places.

    Every count in it is set: a schedule goes on from where the moments come from. `TrainState.step`, on which
    data and dropout depend, is the caller's. Arrays take the dtypes and the devices of those they replace.
    Raises `bridge.ConversionError` as `adamw_state` does, and where the moments are another model's.
    """
    adam = _adam(opt_state)
    trees = optimizer_state.to_flax(state, model.config, stacked=model.scan, vocab_multiple=model.vocab_multiple)
    mu, nu = (_placed(old, new) for old, new in zip((adam.mu, adam.nu), trees, strict=True))

    def counted(path: tuple[Any, ...], leaf: Array) -> Array:
        return jnp.full_like(leaf, state.step) if getattr(path[-1], "name", "") == "count" else leaf

    opt_state = jax.tree.map(lambda x: x._replace(mu=mu, nu=nu) if _is_adam(x) else x, opt_state, is_leaf=_is_adam)
    return jax.tree_util.tree_map_with_path(counted, opt_state)


def _placed(old: Any, new: FlaxTree) -> Any:
    shapes = {path: array.shape for path, array in flatten(new).items()}
    if problems := differences(shapes, flatten(old)):
        raise ConversionError("this optax state was not made for this model's parameters:\n" + bullet_list(problems))
    # JAX on CPU adopts an array as it is; what somebody else holds (it is read-only) may change under it.
    return jax.tree.map(
        lambda a, b: jax.device_put(b.astype(a.dtype, copy=not b.flags.writeable), a.sharding), old, new
    )


def _adam(opt_state: Any) -> optax.ScaleByAdamState:
    """The one AdamW in the state, if it moves all parameters."""
    found = [x for x in jax.tree.leaves(opt_state, is_leaf=_is_adam) if _is_adam(x)]
    if len(found) != 1:
        raise ConversionError(f"the optax state holds {len(found)} AdamW states (ScaleByAdamState); one is needed")
    masked = [path for path, leaf in flatten(found[0].mu).items() if isinstance(leaf, optax.MaskedNode)]
    if masked:
        raise ConversionError(
            f"AdamW does not move {len(masked)} of the parameters, {masked[0]} among them; a state in part, as Muon's "
            "run has it, does not cross the bridge"
        )
    return found[0]


def _is_adam(node: Any) -> bool:
    return isinstance(node, optax.ScaleByAdamState)
