"""Hand-written derivatives, compared with those that JAX derives from the definitions, in float64."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from gpt2_jax.ops.activations import gelu_tanh
from gpt2_jax.ops.linear import (
    BLOCKS,
    FEW_ROWS,
    MANY_ROWS,
    SUMMANDS,
    TERMS,
    _kernel_gradient,
    project,
    project_to_vocabulary,
)
from gpt2_jax.ops.norm import scaled_norm

ROUNDING = 1e-12  # float64, sums of at most a hundred terms of order 1
FLOAT32_ROUNDING = 1e-5  # sums of 11 products of order 1, exact in float32 for bfloat16 factors
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
    "two axes to two, of more inputs": (
        partial(project, axes=2),
        lambda x, w: jnp.einsum("BTHK,HKDE->BTDE", x, w),
        [(2, 30, 4, 6), (4, 6, 3, 2)],
    ),
    "one row, one axis to three": (
        partial(project, axes=1),
        lambda x, w: jnp.einsum("BTD,DCHK->BTCHK", x, w),
        [(1, 1, 2 * SUMMANDS), (2 * SUMMANDS, 3, 4, 6)],
    ),
    "one row, two axes to one": (
        partial(project, axes=2),
        lambda x, w: jnp.einsum("BTHK,HKD->BTD", x, w),
        [(1, 1, 4, SUMMANDS // 2), (4, SUMMANDS // 2, 7)],
    ),
    "one row, inputs that have no even parts": (
        partial(project, axes=1),
        lambda x, w: x @ w,
        [(1, 1, SUMMANDS + 1), (SUMMANDS + 1, 11)],
    ),
    "norm": (partial(scaled_norm, epsilon=EPSILON), plain_norm, [(2, 5, 7), (7,)]),
    "norm of a row": (partial(scaled_norm, epsilon=EPSILON), plain_norm, [(7,), (7,)]),
    "gelu": (gelu_tanh, partial(nn.gelu, approximate=True), [(2, 5, 7)]),
}
each_function = pytest.mark.parametrize("name", FUNCTIONS)

TO_VOCABULARY: dict[str, tuple[tuple[int, ...], int]] = {
    "one row": ((1,), 2 * BLOCKS),
    "a few rows": ((8,), 3 * BLOCKS),
    "a few rows of several axes": ((2, 3), 2 * BLOCKS),
    "as many rows as are few": ((FEW_ROWS,), 2 * BLOCKS),
    "many rows": ((20,), 2 * BLOCKS),
    "one row, no even blocks": ((1,), 2 * BLOCKS + 1),
    "a few rows, no even blocks": ((8,), BLOCKS - 1),
}
D = 11
each_vocabulary = pytest.mark.parametrize(("rows", "vocabulary"), TO_VOCABULARY.values(), ids=TO_VOCABULARY)


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
def test_gradients_support_vmap_remat_and_second_derivatives(name: str, x64: None) -> None:
    written, definition, shapes = FUNCTIONS[name]
    rows = arguments([(3, *shape) for shape in shapes])

    def second(function: Callable[..., Any]) -> Any:
        def slope(first: Any, *rest: Any) -> Any:
            gradient = jax.grad(lambda x: (jax.checkpoint(function)(x, *rest) ** 2).sum())(first)
            return (gradient**2).sum()

        return jax.jit(jax.vmap(jax.grad(slope)))(*rows)

    found, expected = second(written), second(definition)
    np.testing.assert_allclose(found, expected, rtol=0, atol=ROUNDING * np.abs(expected).max())


FORWARD = ("two axes to two, of more inputs", "one row, one axis to three", "norm", "gelu")


@pytest.mark.parametrize("name", FORWARD)
def test_forward_mode_and_hessian_vector_products_are_those_of_the_definition(name: str, x64: None) -> None:
    written, definition, shapes = FUNCTIONS[name]
    given, directions = tuple(arguments(shapes)), tuple(arguments(shapes, seed=1))
    every = tuple(range(len(shapes)))

    def derivatives(function: Callable[..., Any]) -> Any:
        def loss(*x: Any) -> Any:
            return jnp.sin(function(*x)).sum()

        tangent = jax.jvp(function, given, directions)[1]
        forward_over_reverse = jax.jvp(jax.grad(loss, every), given, directions)[1]
        reverse_over_forward = jax.grad(lambda *x: jax.jvp(loss, x, directions)[1], every)(*given)
        return tangent, forward_over_reverse, reverse_over_forward

    found, expected = (jax.jit(partial(derivatives, f))() for f in (written, definition))
    jax.tree.map(partial(np.testing.assert_allclose, rtol=ROUNDING, atol=100 * ROUNDING), found, expected)


@each_function
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
def test_values_and_gradients_have_the_dtype_of_the_inputs(name: str, dtype: Any) -> None:
    written, _, shapes = FUNCTIONS[name]
    given = [jax.ShapeDtypeStruct(shape, dtype) for shape in shapes]
    assert {leaf.dtype for leaf in jax.tree.leaves(jax.eval_shape(partial(value_and_pullback, written), given))} == {
        jnp.dtype(dtype)
    }


KERNELS: dict[str, tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...], bool]] = {
    "one axis to one": ((2, 5), (7,), (11,), False),
    "one axis to three": ((2, 5), (12,), (3, 4, 6), False),
    "two axes to two": ((5,), (4, 3), (2, 7), False),
    "a row to three axes": ((1,), (4,), (2, 3, 5), False),
    "more inputs, one axis to one": ((2, 25), (13,), (3,), True),
    "more inputs, two axes to one": ((2, 25), (4, 6), (5,), True),
    "more inputs, two axes to two": ((50,), (4, 6), (3, 2), True),
    "more inputs, three axes to three": ((7, 10), (2, 3, 5), (3, 2, 1), True),
}
"""(rows, inputs, outputs, whether the operands are exchanged on CPU)."""


@pytest.mark.parametrize(("rows", "inputs", "outputs", "transposed"), KERNELS.values(), ids=KERNELS)
def test_the_kernel_gradient_is_correct_in_both_forms(
    rows: tuple[int, ...], inputs: tuple[int, ...], outputs: tuple[int, ...], transposed: bool, x64: None
) -> None:
    x, dy = arguments([(*rows, *inputs), (*rows, *outputs)])

    def product(kernel: jax.Array) -> jax.Array:
        return (jnp.tensordot(x, kernel, len(inputs)) * dy).sum()

    gradient = partial(_kernel_gradient, rows=tuple(range(len(rows))), axes=len(inputs))
    expected = jax.grad(product)(jnp.zeros((*inputs, *outputs)))
    np.testing.assert_allclose(jax.jit(gradient)(x, dy), expected, rtol=0, atol=ROUNDING)
    assert ("platform_index" in str(jax.make_jaxpr(gradient)(x, dy))) == transposed


@each_vocabulary
def test_logits_and_their_gradients_are_those_of_the_definition(
    rows: tuple[int, ...], vocabulary: int, x64: None
) -> None:
    given = arguments([(*rows, D), (vocabulary, D)])
    found, expected = (
        jax.jit(partial(value_and_pullback, f))(given)
        for f in (project_to_vocabulary, lambda x, embedding: jnp.einsum("...D,VD->...V", x, embedding))
    )
    jax.tree.map(partial(np.testing.assert_allclose, rtol=0, atol=ROUNDING), found, expected)


@each_vocabulary
def test_logits_of_bfloat16_are_float32_and_their_gradients_bfloat16(rows: tuple[int, ...], vocabulary: int) -> None:
    x, embedding = (array.astype(jnp.bfloat16) for array in arguments([(*rows, D), (vocabulary, D)]))
    logits, gradients = jax.jit(partial(value_and_pullback, project_to_vocabulary))([x, embedding])
    assert logits.dtype == jnp.float32
    assert {gradient.dtype for gradient in gradients} == {jnp.dtype(jnp.bfloat16)}
    exact = np.einsum("...D,VD->...V", np.asarray(x, np.float64), np.asarray(embedding, np.float64))
    np.testing.assert_allclose(logits, exact, rtol=0, atol=FLOAT32_ROUNDING)


def test_gelu_and_its_slope_are_finite_far_from_zero() -> None:
    far = jnp.asarray([-1e4, -30.0, 0.0, 30.0, 1e4])
    values, slopes = gelu_tanh(far), jax.vmap(jax.grad(gelu_tanh))(far)
    np.testing.assert_array_equal(values, [0, 0, 0, 30, 1e4])
    np.testing.assert_array_equal(slopes, [0, 0, 0.5, 1, 1])


IN_PARTS: dict[str, tuple[tuple[int, ...], tuple[int, ...], int]] = {
    "one axis to one": ((2, MANY_ROWS // 2, 1000), (1000, 11), 1),
    "one axis to three": ((1, MANY_ROWS, TERMS + 1), (TERMS + 1, 3, 2, 5), 1),
    "two axes to one": ((1, MANY_ROWS, 5, 96), (5, 96, 7), 2),
}
PRECISIONS = ("default", "highest")


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("name", IN_PARTS)
def test_sums_of_parts_are_the_product_and_have_its_gradients(name: str, precision: str) -> None:
    x_shape, kernel_shape, axes = IN_PARTS[name]
    x, kernel = (array.astype(np.float32) for array in map(np.asarray, arguments([x_shape, kernel_shape])))
    with jax.default_matmul_precision(precision):
        value, pullback = jax.vjp(jax.jit(partial(project, axes=axes)), jnp.asarray(x), jnp.asarray(kernel))
        gradients = pullback(jnp.ones_like(value))
    wide = [array.astype(np.float64) for array in (x, kernel)]
    expected = np.tensordot(*wide, axes)
    np.testing.assert_allclose(value, expected, rtol=0, atol=2e-4)  # sums of 1000 products of order 1
    ones = np.ones_like(expected)
    outputs, rows = tuple(range(2, ones.ndim)), (0, 1)
    np.testing.assert_allclose(
        gradients[0], np.tensordot(ones, wide[1], (outputs, tuple(range(axes, kernel.ndim)))), rtol=0, atol=2e-4
    )
    np.testing.assert_allclose(gradients[1], np.tensordot(wide[0], ones, (rows, rows)), rtol=0, atol=2e-4)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_many_rows_to_the_vocabulary_in_parts(precision: str) -> None:
    x, embedding = (np.asarray(array, np.float32) for array in arguments([(2, 20, 500), (70, 500)]))
    with jax.default_matmul_precision(precision):
        logits = jax.jit(project_to_vocabulary)(x, embedding)
    assert logits.shape == (2, 20, 70)
    np.testing.assert_allclose(logits, x.astype(np.float64) @ embedding.T.astype(np.float64), rtol=0, atol=1e-4)


@pytest.mark.usefixtures("optimized_compilation")
def test_sums_of_parts_round_less_than_one_product() -> None:
    """A chain of n terms has an error of about sqrt(n) units: 128 terms instead of 3072 leave a fifth."""
    if jax.default_backend() != "cpu":
        pytest.skip("the parts are for CPU")
    x, kernel = (np.asarray(array, np.float32) for array in arguments([(MANY_ROWS, 3072), (3072, 64)]))
    exact = x.astype(np.float64) @ kernel.astype(np.float64)
    values = {"one product": jax.jit(jnp.matmul)(x, kernel)}
    for precision in PRECISIONS:
        with jax.default_matmul_precision(precision):
            values[precision] = jax.jit(partial(project, axes=1))(x, kernel)
    errors = {name: np.sqrt(np.square(np.asarray(value) - exact).mean()) for name, value in values.items()}
    assert errors["default"] <= 1.02 * errors["one product"]  # equal where XLA's product has chains as short
    assert errors["highest"] <= 0.75 * errors["default"]
    assert errors["highest"] <= 2.0**-24 * np.sqrt(128) * np.abs(exact).std()
