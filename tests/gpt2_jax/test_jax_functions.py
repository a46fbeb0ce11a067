"""The derivatives that are written out, against those that JAX derives from the definitions, in float64."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from gpt2_jax.functions import gelu_tanh, project, scaled_norm

ROUNDING = 1e-12  # float64, sums of at most a hundred terms of order 1
EPSILON = 1e-5


def plain_norm(x: Any, scale: Any) -> Any:
    return (x - x.mean(-1, keepdims=True)) / jnp.sqrt(x.var(-1, keepdims=True) + EPSILON) * scale


FUNCTIONS: dict[str, tuple[Callable[..., Any], Callable[..., Any], list[tuple[int, ...]]]] = {
    "one axis to one": (partial(project, axes=1), lambda x, w: x @ w, [(2, 5, 7), (7, 11)]),
    "one axis to three": (
        partial(project, axes=1),
        lambda x, w: jnp.einsum("BTD,DCHK->BTCHK", x, w),
        [(2, 5, 12), (12, 3, 4, 6)],
    ),
    "two axes to one": (
        partial(project, axes=2),
        lambda x, w: jnp.einsum("BTHK,HKD->BTD", x, w),
        [(2, 5, 4, 3), (4, 3, 7)],
    ),
    "norm": (partial(scaled_norm, epsilon=EPSILON), plain_norm, [(2, 5, 7), (7,)]),
    "norm of a row": (partial(scaled_norm, epsilon=EPSILON), plain_norm, [(7,), (7,)]),
    "gelu": (gelu_tanh, partial(nn.gelu, approximate=True), [(2, 5, 7)]),
}
each_function = pytest.mark.parametrize("name", FUNCTIONS)


def arguments(shapes: list[tuple[int, ...]], seed: int = 0) -> list[jax.Array]:
    rng = np.random.default_rng(seed)
    return [jnp.asarray(rng.normal(size=shape)) for shape in shapes]


def value_and_pullback(function: Callable[..., Any], given: list[jax.Array]) -> tuple[Any, Any]:
    value, pullback = jax.vjp(function, *given)
    return value, pullback(jnp.sin(jnp.arange(value.size, dtype=value.dtype)).reshape(value.shape))


@each_function
def test_values_and_gradients_are_those_of_the_definition(name: str, x64: None) -> None:
    written, definition, shapes = FUNCTIONS[name]
    given = arguments(shapes)
    found, expected = (jax.jit(partial(value_and_pullback, f))(given) for f in (written, definition))
    jax.tree.map(partial(np.testing.assert_allclose, rtol=0, atol=ROUNDING), found, expected)


@each_function
def test_gradients_can_be_mapped_rematerialised_and_derived_again(name: str, x64: None) -> None:
    written, definition, shapes = FUNCTIONS[name]
    rows = arguments([(3, *shape) for shape in shapes])

    def second(function: Callable[..., Any]) -> Any:
        def slope(first: Any, *rest: Any) -> Any:
            gradient = jax.grad(lambda x: (jax.checkpoint(function)(x, *rest) ** 2).sum())(first)
            return (gradient**2).sum()

        return jax.jit(jax.vmap(jax.grad(slope)))(*rows)

    found, expected = second(written), second(definition)
    np.testing.assert_allclose(found, expected, rtol=0, atol=ROUNDING * np.abs(expected).max())


@each_function
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
def test_values_and_gradients_have_the_dtype_of_what_goes_in(name: str, dtype: Any) -> None:
    written, _, shapes = FUNCTIONS[name]
    given = [jax.ShapeDtypeStruct(shape, dtype) for shape in shapes]
    assert {leaf.dtype for leaf in jax.tree.leaves(jax.eval_shape(partial(value_and_pullback, written), given))} == {
        jnp.dtype(dtype)
    }


def test_gelu_and_its_slope_are_finite_far_from_zero() -> None:
    far = jnp.asarray([-1e4, -30.0, 0.0, 30.0, 1e4])
    values, slopes = gelu_tanh(far), jax.vmap(jax.grad(gelu_tanh))(far)
    np.testing.assert_array_equal(values, [0, 0, 0, 30, 1e4])
    np.testing.assert_array_equal(slopes, [0, 0, 0.5, 1, 1])
