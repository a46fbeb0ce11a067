"""`linear_call` by itself: each transformation gives the result of the plain function."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gpt2_jax.ops.linear_call import linear_call

MATRIX = jnp.asarray(np.random.default_rng(0).normal(size=(3, 4)), jnp.float32)
X = jnp.asarray(np.random.default_rng(1).normal(size=4), jnp.float32)
ROUNDING = 1e-5  # float32, sums of a few products of order 1


def product(matrix: Any, x: Any) -> Any:
    """Return sin(matrix) x. The transpose multiplies by 2, so that a result shows which function was used."""
    like = jnp.zeros(matrix.shape[0], x.dtype)
    return linear_call(lambda m, x: jnp.sin(m) @ x, lambda m, y: 2.0 * jnp.sin(m).T @ y, matrix, x, like)


def assert_same(found: Any, expected: Any) -> None:
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=ROUNDING), found, expected)


def test_the_value_is_that_of_the_function() -> None:
    assert_same(product(MATRIX, X), jnp.sin(MATRIX) @ X)
    assert_same(jax.jit(product)(MATRIX, X), jnp.sin(MATRIX) @ X)


def test_reverse_mode_uses_the_transpose_and_its_transpose_the_function() -> None:
    (found,) = jax.linear_transpose(lambda x: product(MATRIX, x), X)(jnp.ones(3))
    assert_same(found, 2.0 * jnp.sin(MATRIX).T @ jnp.ones(3))

    def transposed(y: Any) -> Any:
        return jax.linear_transpose(lambda x: product(MATRIX, x), X)(y)[0]

    (found,) = jax.linear_transpose(transposed, jnp.ones(3))(X)
    assert_same(found, jnp.sin(MATRIX) @ X)


def test_derivatives_by_the_residuals_are_derived() -> None:
    direction = jnp.cos(MATRIX)
    expected = jax.jvp(lambda m, x: jnp.sin(m) @ x, (MATRIX, X), (direction, X))
    assert_same(jax.jvp(product, (MATRIX, X), (direction, X)), expected)
    assert_same(jax.grad(lambda m: product(m, X).sum())(MATRIX), jax.grad(lambda m: (jnp.sin(m) @ X).sum())(MATRIX))


def test_constants_have_no_tangent() -> None:
    gradient = jax.grad(lambda x: linear_call(_sum, _both, 3.0, (x, X), like=X).sum())(X)
    assert_same(gradient, jnp.full(4, 3.0))


def _sum(factor: Any, pair: Any) -> Any:
    return factor * (pair[0] + pair[1])


def _both(factor: Any, y: Any) -> Any:
    return factor * y, factor * y


def test_vmap_of_either_argument() -> None:
    matrices, rows = jnp.stack([MATRIX, 2 * MATRIX]), jnp.stack([X, -X])
    for axes in ((0, 0), (0, None), (None, 0)):
        given = [batch if axis == 0 else batch[0] for batch, axis in zip((matrices, rows), axes, strict=True)]

        def loss(x: Any, axes: Any = axes, matrix: Any = given[0]) -> Any:
            return jax.vmap(product, axes)(matrix, x).sum()

        def definition(x: Any, axes: Any = axes, matrix: Any = given[0]) -> Any:
            return jax.vmap(lambda m, x: jnp.sin(m) @ x, axes)(matrix, x).sum()

        assert_same(loss(given[1]), definition(given[1]))
        assert_same(jax.grad(loss)(given[1]), 2.0 * jax.grad(definition)(given[1]))
