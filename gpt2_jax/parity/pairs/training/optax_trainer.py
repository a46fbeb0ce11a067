"""A trainer in JAX and optax that `compare_training` can observe."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from gpt2_jax.parity.pairs.training.trainers import Arrays, Step, Trainer, TrainerError, numpy_seed, scalar

MOMENTS = {"mu": "exp_avg", "nu": "exp_avg_sq", "nu_max": "max_exp_avg_sq", "trace": "momentum_buffer"}
"""A field of an optax state -> PyTorch's name for it."""


GRADIENTS = "gradients"
"""The field of `RecordedGradients`."""


class OptaxTrainer(Trainer):
    """See `optax_trainer`."""

    def __init__(
        self,
        params: Any,
        state: Any,
        step: Callable[..., Any],
        ema: Callable[[Any], Any] | None,
        loss: Callable[[Any, Any], Any] | None,
        name: str,
    ) -> None:
        self.name = name
        self._params, self._state = _copy(params), _copy(state)
        self._step, self._ema, self._loss = step, ema, loss

    def parameters(self) -> Arrays:
        return named_arrays(self._params)

    def state(self) -> Arrays:
        return self._observed(self._params, self._state)[0]

    def step(self, batch: Any) -> Step:
        self._params, self._state, loss = self._run(self._params, self._state, batch)
        return self._result(self._params, self._state, loss)

    def snapshot(self) -> Any:
        return _copy(self._params), _copy(self._state)

    def replay(self, snapshot: Any, batch: Any, seed: int = 0) -> Step:
        params, state = snapshot
        with numpy_seed(seed):
            return self._result(*self._run(params, _reseeded(state, seed), _reseeded(batch, seed, counts=False)))

    def loss(self, snapshot: Any, batch: Any) -> np.ndarray | None:
        return None if self._loss is None else np.asarray(self._loss(_copy(snapshot[0]), batch))

    def _run(self, params: Any, state: Any, batch: Any) -> tuple[Any, Any, Any]:
        # A step may donate its arguments, so it receives copies.
        result = self._step(_copy(params), _copy(state), batch)
        if not isinstance(result, tuple) or len(result) not in (3, 4):
            raise TrainerError(f"{self.name}: the step must return (params, state, loss) or (params, state, loss, aux)")
        return result[0], result[1], result[2]

    def _result(self, params: Any, state: Any, loss: Any) -> Step:
        arrays, gradients, settings = self._observed(params, state)
        return Step(scalar(loss, self.name), named_arrays(params), arrays, gradients, settings)

    def _observed(self, params: Any, state: Any) -> tuple[Arrays, Arrays | None, Mapping[str, Any]]:
        arrays, gradients, settings = optax_arrays(state, named_arrays(params))
        if self._ema is not None:
            arrays = {**arrays, **{f"ema/{name}": array for name, array in named_arrays(self._ema(state)).items()}}
        return arrays, gradients or None, settings


def optax_trainer(
    params: Any,
    state: Any,
    step: Callable[..., Any],
    *,
    ema: Callable[[Any], Any] | None = None,
    loss: Callable[[Any, Any], Any] | None = None,
    name: str = "jax",
) -> Trainer:
    """Return the trainer of a pure JAX function.

    Args:
        params: the tree of parameters.
        state: the optax state, or a tree that contains one, for example a Flax `TrainState`. Moments and counts are
            found in it wherever they are.
        step: `step(params, state, batch) -> (params, state, loss)`, or with a fourth result, which is ignored. It must
            not keep anything between two calls. It may be compiled and may donate its arguments.
        ema: `ema(state)` returns the tree of averaged parameters.
        loss: `loss(params, batch)` returns the loss without training, one value or one per example or token. It
            sharpens the diagnosis of a difference.
        name: the name in the report.

    Parameters have dotted names, such as `layers.0.kernel`.

    >>> optimizer = optax.sgd(0.5)
    >>> def step(params, state, batch):
    ...     loss, gradients = jax.value_and_grad(lambda params: (params["w"] * batch).sum())(params)
    ...     updates, state = optimizer.update(gradients, state)
    ...     return optax.apply_updates(params, updates), state, loss
    >>> params = {"w": jnp.ones(2)}
    >>> trainer = optax_trainer(params, optimizer.init(params), step)
    >>> trainer.step(np.array([1.0, 2.0])).parameters["w"].tolist()
    [0.5, 0.0]
    """
    return OptaxTrainer(params, state, step, ema, loss, name)


class RecordedGradients(NamedTuple):
    """The state of `record_gradients`."""

    gradients: Any


def record_gradients() -> optax.GradientTransformation:
    """Return a transformation that changes nothing and stores the gradients for `compare_training`.

    Place it in a chain where the gradients should be compared: after clipping, before the optimizer, to compare what
    PyTorch's optimizer receives. Without it, a difference of gradients is found in the first moments.

    >>> optimizer = optax.chain(optax.clip_by_global_norm(1.0), record_gradients(), optax.adamw(1e-3))
    """
    return optax.GradientTransformation(
        lambda params: RecordedGradients(jax.tree.map(jnp.zeros_like, params)),
        lambda updates, state, params=None: (updates, RecordedGradients(updates)),
    )


def named_arrays(tree: Any) -> dict[str, np.ndarray]:
    """The leaves of a tree by their dotted path."""
    return {_joined(path): np.asarray(leaf) for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]}


def optax_arrays(state: Any, parameters: Arrays) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray], dict[str, Any]]:
    """Find moments, recorded gradients and hyperparameters in a tree that contains optax states.

    A leaf belongs to a parameter if its path ends in a field of `MOMENTS` and the parameter's path, and its shape is
    the parameter's. This holds in chains, masks, partitions and `inject_hyperparams`, and in the states of NNX.

    Returns:
        the arrays with the names of `Step.state`; the gradients of `record_gradients`; the hyperparameters.
    """
    arrays: dict[str, np.ndarray] = {}
    gradients: dict[str, np.ndarray] = {}
    settings: dict[str, Any] = {}
    owners: dict[tuple[str, ...], list[str]] = {}  # the path of an optax state -> its parameters
    counts: dict[tuple[str, ...], np.ndarray] = {}
    for path, leaf in jax.tree_util.tree_flatten_with_path(state)[0]:
        keys = _keys(path)
        if keys[-1:] == ("count",) and np.ndim(leaf) == 0:
            counts[keys[:-1]] = np.asarray(leaf)
        if keys[-2:-1] == ("hyperparams",):
            settings[keys[-1]] = np.asarray(leaf).item()
        for k, key in enumerate(keys):
            name = ".".join(keys[k + 1 :])
            if (key in MOMENTS or key == GRADIENTS) and name in parameters:
                if np.shape(leaf) == parameters[name].shape:
                    if key == GRADIENTS:
                        gradients[name] = np.asarray(leaf)
                    else:
                        arrays[f"{MOMENTS[key]}/{name}"] = np.asarray(leaf)
                        owners.setdefault(keys[:k], []).append(name)
                break
    for prefix, names in owners.items():
        if prefix in counts:
            arrays.update({f"count/{name}": counts[prefix] for name in names})
    return arrays, gradients, settings


def _keys(path: tuple[Any, ...]) -> tuple[str, ...]:
    keys = tuple(re.sub(r"^\.|^\[['\"]?|['\"]?\]$", "", str(key)) for key in path)
    return keys[:-1] if len(keys) > 1 and str(path[-1]) == ".value" else keys  # an NNX variable


def _joined(path: tuple[Any, ...]) -> str:
    return ".".join(_keys(path))


def _copy(tree: Any) -> Any:
    return jax.tree.map(lambda x: x.copy() if isinstance(x, jax.Array | np.ndarray) else x, tree)


def _reseeded(tree: Any, seed: int, counts: bool = True) -> Any:
    """Change random keys, and the integers from which keys may be derived. Seed 0 changes nothing."""

    def change(leaf: Any) -> Any:
        if not seed or not isinstance(leaf, jax.Array | np.ndarray):
            return leaf
        if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            return jax.random.wrap_key_data(
                jax.random.key_data(leaf) + jnp.uint32(seed), impl=jax.random.key_impl(leaf)
            )
        is_count = leaf.ndim == 0 or (leaf.dtype == np.uint32 and leaf.shape[-1:] == (2,))  # or a key without a type
        return leaf + leaf.dtype.type(seed) if counts and is_count and jnp.issubdtype(leaf.dtype, jnp.integer) else leaf

    return jax.tree.map(change, tree)
