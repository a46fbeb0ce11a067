"""Products with weights: a projection, and the projection to the vocabulary."""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from gpt2_jax.ops.dtypes import wide_dtype
from gpt2_jax.ops.linear_call import linear_call
from gpt2_jax.ops.shapes import known_size
from gpt2_jax.parallel.sharding import axes_of_mesh

SUMMANDS = 16
"""A single row times a matrix is computed as the sum of this many products, each over a part of the inputs. XLA on CPU
then reads 28 GB/s, and 17 to 24 with one product (limit 33; `tests/benchmarks/generate.py`)."""

BLOCKS = 64
"""A few rows times the embedding are computed as this many independent products, each with a part of the vocabulary.
XLA on CPU then reads 20 GB/s for 8 rows, and 11 with one product."""

FEW_ROWS = 16

TERMS, TERMS_HIGHEST = 384, 128
"""XLA on CPU accumulates the terms of a float32 product sequentially, and the rounding error grows with their number.
Sums of several products over fewer terms have smaller errors. 384 terms cost no time in a product with at least
`MANY_ROWS` rows. 128 terms cost time, and are used only with `jax.default_matmul_precision("highest")`. With fewer
rows, slicing the kernel takes longer than the product."""

MANY_ROWS = 256


def project_to_vocabulary(x: Float[Array, "*batch D"], embedding: Float[Array, "V D"]) -> Float[Array, "*batch V"]:
    """Return x embedding^T, in at least float32."""
    dtype = wide_dtype(x)
    (V, D), rows = embedding.shape, known_size(x.shape[:-1])

    def product(x: Array, embedding: Array) -> Array:
        return jax.lax.dot_general(x, embedding, (((x.ndim - 1,), (1,)), ((), ())), preferred_element_type=dtype)

    if rows is None:
        return product(x, embedding)
    if rows > FEW_ROWS and _is_highest() and _sums_in_parts(x):

        def in_parts(x: Array, embedding: Array) -> Array:
            return _sum_of_parts(x.reshape(-1, D), embedding, 1, TERMS).reshape(*x.shape[:-1], V)

        return jax.lax.platform_dependent(x, embedding, cpu=in_parts, default=product)
    if rows > FEW_ROWS or V % BLOCKS:
        return product(x, embedding)

    def in_blocks(x: Array, embedding: Array) -> Array:
        blocks_GWD = embedding.reshape(BLOCKS, V // BLOCKS, D)
        x_GRD = jnp.broadcast_to(x.reshape(rows, D), (BLOCKS, rows, D))
        logits_GWR = jnp.einsum("GWD,GRD->GWR", blocks_GWD, x_GRD, preferred_element_type=dtype)
        return logits_GWR.reshape(V, rows).T.reshape(*x.shape[:-1], V)

    return jax.lax.platform_dependent(x, embedding, cpu=in_blocks, default=product)


@functools.partial(jax.custom_jvp, nondiff_argnums=(2,))
def project(x: Float[Array, "..."], kernel: Float[Array, "..."], axes: int) -> Float[Array, "..."]:
    """Contract the last `axes` axes of `x` with the first `axes` of `kernel`.

    The kernel gradient that JAX derives is transposed, so XLA has to copy it. The gradient here is not transposed.
    """
    inputs, kernel_inputs = tuple(range(x.ndim - axes, x.ndim)), tuple(range(axes))

    def product(x: Array, kernel: Array) -> Array:
        return jax.lax.dot_general(x, kernel, ((inputs, kernel_inputs), ((), ())))

    rows, n_in = x.shape[: x.ndim - axes], math.prod(kernel.shape[:axes])
    num_rows = known_size(rows)
    terms = TERMS_HIGHEST if _is_highest() else TERMS

    def in_parts(x: Array, kernel: Array) -> Array:
        y = _sum_of_parts(x.reshape(-1, n_in), kernel.reshape(n_in, -1), 0, terms)
        return y.reshape(*rows, *kernel.shape[axes:])

    if num_rows is None:
        return product(x, kernel)
    if num_rows >= (2 if _is_highest() else MANY_ROWS) and n_in > terms and _sums_in_parts(x):
        return jax.lax.platform_dependent(x, kernel, cpu=in_parts, default=product)
    if num_rows != 1 or n_in % SUMMANDS:
        return product(x, kernel)

    def in_summands(x: Array, kernel: Array) -> Array:
        dtype = wide_dtype(x)
        x, kernel_parts = x.reshape(SUMMANDS, -1), kernel.reshape(SUMMANDS, n_in // SUMMANDS, -1)
        parts = jnp.einsum("ij,ijk->ik", x, kernel_parts, preferred_element_type=dtype)
        # Summed by a product, because XLA's reduction would take a third as long as computing the parts.
        summed = jnp.ones((1, SUMMANDS), dtype) @ parts
        return summed.astype(kernel.dtype).reshape(*rows, *kernel.shape[axes:])

    return jax.lax.platform_dependent(x, kernel, cpu=in_summands, default=product)


def _is_highest() -> bool:
    return jax.config.jax_default_matmul_precision in ("highest", "float32")  # type: ignore[attr-defined]


def _sums_in_parts(x: Array) -> bool:
    """Whether sums over parts have smaller errors: only in float32. Other dtypes round each part or need no accuracy.

    On a mesh, slices of a sharded axis would have to be moved between devices.
    """
    return x.dtype == jnp.float32 and not axes_of_mesh()


def _sum_of_parts(x: Float[Array, "R N"], kernel: Float[Array, "..."], axis: int, terms: int) -> Float[Array, "R M"]:
    """Contract x with this axis of the kernel, as a sum of products over `terms` terms, added in pairs."""
    n_in, contracted = x.shape[1], (((1,), (axis,)), ((), ()))
    sums = [
        jax.lax.dot_general(
            x[:, start : start + terms],
            jax.lax.slice_in_dim(kernel, start, min(start + terms, n_in), axis=axis),
            contracted,
        )
        for start in range(0, n_in, terms)
    ]
    while len(sums) > 1:
        pairs = [a + b for a, b in zip(sums[::2], sums[1::2], strict=False)]
        sums = pairs + sums[2 * len(pairs) :]
    return sums[0]


@project.defjvp
def _project_jvp(axes: int, primals: tuple[Array, Array], tangents: tuple[Array, Array]) -> tuple[Array, Array]:
    y = project(*primals, axes)
    tangent, backward = (functools.partial(each, axes) for each in (_project_tangent, _project_backward))
    return y, linear_call(tangent, backward, primals, tangents, y)


def _project_tangent(axes: int, residuals: tuple[Array, Array], tangents: tuple[Array, Array]) -> Array:
    (x, kernel), (dx, d_kernel) = residuals, tangents
    return project(dx, kernel, axes) + project(x, d_kernel, axes)


def _project_backward(axes: int, residuals: tuple[Array, Array], dy: Array) -> tuple[Array, Array]:
    x, kernel = residuals
    rows = tuple(range(x.ndim - axes))
    outputs, kernel_outputs = tuple(range(len(rows), dy.ndim)), tuple(range(axes, kernel.ndim))
    dx = jax.lax.dot_general(dy, kernel, ((outputs, kernel_outputs), ((), ())))
    return dx, _kernel_gradient(x, dy, rows, axes)


def _kernel_gradient(x: Array, dy: Array, rows: tuple[int, ...], axes: int) -> Array:
    """Return x^T dy.

    XLA on CPU transposes the left operand of the product. If that operand is much wider, the operands are exchanged and
    the result is transposed: 28 instead of 50 ms for the feed-forward's second projection at 124M and 1024 tokens.
    """
    size = known_size(x.shape[: len(rows)])
    n_in, n_out = math.prod(x.shape[len(rows) :]), math.prod(dy.shape[len(rows) :])

    def product(x: Array, dy: Array) -> Array:
        return jax.lax.dot_general(x, dy, ((rows, rows), ((), ())))

    def exchanged(x: Array, dy: Array) -> Array:
        outputs = dy.ndim - len(rows)
        gradient = jax.lax.dot_general(dy, x, ((rows, rows), ((), ())))
        return gradient.transpose(*range(outputs, outputs + axes), *range(outputs))

    if size is None or size * n_in <= size * n_out + n_in * n_out:  # the number of elements that each form transposes
        return product(x, dy)
    return jax.lax.platform_dependent(x, dy, cpu=exchanged, default=product)
