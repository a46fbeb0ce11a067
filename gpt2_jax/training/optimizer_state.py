"""AdamW's state as part of an optax state: reading and writing it. `bridge.optimizer_state` converts it to torch."""

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
    """Return the first and second moments and the step count of the AdamW inside an optax state.

    Args:
        opt_state: the state of any optax transformation that contains one AdamW, such as a chain.
        model: the model whose parameters it updates.

    Raises:
        bridge.ConversionError: the state does not contain exactly one AdamW, or it does not update all parameters.
    """
    adam = _adam(opt_state)
    return optimizer_state.from_flax(
        int(adam.count), adam.mu, adam.nu, model.config, vocab_multiple=model.vocab_multiple
    )


def with_adamw_state(opt_state: Any, state: AdamWState, model: GPT2) -> Any:
    """Return `opt_state` with the AdamW state replaced.

    Every step count in the optax state is set too, so that schedules continue. `TrainState.step`, which dropout and the
    position in the data depend on, is not part of it; set it separately. New arrays take the dtypes and shardings of
    those they replace.

    Args:
        opt_state: an optax state, for example from `tx.init(params)`.
        state: for example `bridge.load(...).optimizer`, or from `adamw_state`.
        model: the model whose parameters it updates.

    Raises:
        bridge.ConversionError: as `adamw_state`, or `state` belongs to another model.
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
    # JAX on CPU may use a numpy array without a copy. A read-only one is a view of memory that others may change.
    return jax.tree.map(
        lambda a, b: jax.device_put(b.astype(a.dtype, copy=not b.flags.writeable), a.sharding), old, new
    )


def _adam(opt_state: Any) -> optax.ScaleByAdamState:
    """Return the only AdamW in the state, which must update all parameters."""
    found = [x for x in jax.tree.leaves(opt_state, is_leaf=_is_adam) if _is_adam(x)]
    if len(found) != 1:
        raise ConversionError(f"the optax state holds {len(found)} AdamW states (ScaleByAdamState); one is needed")
    masked = [path for path, leaf in flatten(found[0].mu).items() if isinstance(leaf, optax.MaskedNode)]
    if masked:
        raise ConversionError(
            f"AdamW does not update {len(masked)} of the parameters, among them {masked[0]}; a partial state, as in a "
            "run with Muon, cannot be converted"
        )
    return found[0]


def _is_adam(node: Any) -> bool:
    return isinstance(node, optax.ScaleByAdamState)
