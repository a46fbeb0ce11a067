"""Functions that XLA on CPU runs slowly in their plain form: in forms that it runs fast, or with written derivatives.

Measured at nanoGPT's CPU size in the training step (`gpt2 bench --preset shakespeare-char`), and at 124M when
generating (`tests/benchmarks/generate.py`).
"""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

SUMMANDS = 16
"""A single row times a matrix is computed as the sum of so many products, each over a part of the inputs: XLA on CPU
then reads 28 GB/s, with one product 17 to 24 (limit 33; `tests/benchmarks/generate.py`)."""

BLOCKS = 64
"""A few rows times the embedding are computed as so many products side by side, each with a part of the vocabulary:
XLA on CPU then reads 20 GB/s for 8 rows, with one product 11."""

FEW_ROWS = 16


def wide_dtype(x: Array) -> jnp.dtype:
    """What sums over `x` are made in: its own dtype, float32 at least."""
    return jnp.promote_types(x.dtype, jnp.float32)


def project_to_vocabulary(x: Float[Array, "*batch D"], embedding: Float[Array, "V D"]) -> Float[Array, "*batch V"]:
    """The product of each row with each of the embedding's, in float32 at least."""
    dtype = jnp.promote_types(x.dtype, jnp.float32)
    (V, D), rows = embedding.shape, math.prod(x.shape[:-1])

    def product(x: Array, embedding: Array) -> Array:
        return jax.lax.dot_general(x, embedding, (((x.ndim - 1,), (1,)), ((), ())), preferred_element_type=dtype)

    if rows > FEW_ROWS or V % BLOCKS:
        return product(x, embedding)

    def in_blocks(x: Array, embedding: Array) -> Array:
        blocks, x_GRD = (
            embedding.reshape(BLOCKS, V // BLOCKS, D),
            jnp.broadcast_to(x.reshape(rows, D), (BLOCKS, rows, D)),
        )
        logits_GWR = jnp.einsum("GWD,GRD->GWR", blocks, x_GRD, preferred_element_type=dtype)
        return logits_GWR.reshape(V, rows).T.reshape(*x.shape[:-1], V)

    return jax.lax.platform_dependent(x, embedding, cpu=in_blocks, default=product)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def project(x: Float[Array, "..."], kernel: Float[Array, "..."], axes: int) -> Float[Array, "..."]:
    """The product of the last `axes` axes of `x` with the first `axes` of `kernel`.

    JAX derives the kernel's gradient turned on its side, and XLA copies it back; here it is made upright.
    """
    inputs, kernel_inputs = tuple(range(x.ndim - axes, x.ndim)), tuple(range(axes))

    def product(x: Array, kernel: Array) -> Array:
        return jax.lax.dot_general(x, kernel, ((inputs, kernel_inputs), ((), ())))

    rows, n_in = x.shape[: x.ndim - axes], math.prod(kernel.shape[:axes])
    if math.prod(rows) != 1 or n_in % SUMMANDS:
        return product(x, kernel)

    def in_summands(x: Array, kernel: Array) -> Array:
        dtype = jnp.promote_types(x.dtype, jnp.float32)
        x, kernel_parts = x.reshape(SUMMANDS, -1), kernel.reshape(SUMMANDS, n_in // SUMMANDS, -1)
        parts = jnp.einsum("ij,ijk->ik", x, kernel_parts, preferred_element_type=dtype)
        # Summed as a product: XLA's reduction takes a third of the time that the parts took.
        summed = jnp.ones((1, SUMMANDS), dtype) @ parts
        return summed.astype(kernel.dtype).reshape(*rows, *kernel.shape[axes:])

    return jax.lax.platform_dependent(x, kernel, cpu=in_summands, default=product)


def _project_forward(x: Array, kernel: Array, axes: int) -> tuple[Array, tuple[Array, Array]]:
    return project(x, kernel, axes), (x, kernel)


def _project_backward(axes: int, kept: tuple[Array, Array], dy: Array) -> tuple[Array, Array]:
    x, kernel = kept
    rows = tuple(range(x.ndim - axes))
    outputs, kernel_outputs = tuple(range(len(rows), dy.ndim)), tuple(range(axes, kernel.ndim))
    dx = jax.lax.dot_general(dy, kernel, ((outputs, kernel_outputs), ((), ())))
    return dx, _kernel_gradient(x, dy, rows, axes)


def _kernel_gradient(x: Array, dy: Array, rows: tuple[int, ...], axes: int) -> Array:
    """x^T dy. XLA on CPU turns the product's left side; where it is much the wider one, the other is put there and the
    result turned: for the feed-forward's second projection at 124M and 1024 tokens that takes 28 ms, and 50 else."""
    size = max(1, math.prod(x.shape[: len(rows)]))
    n_in, n_out = x.size // size, dy.size // size

    def product(x: Array, dy: Array) -> Array:
        return jax.lax.dot_general(x, dy, ((rows, rows), ((), ())))

    def turned(x: Array, dy: Array) -> Array:
        outputs = dy.ndim - len(rows)
        gradient = jax.lax.dot_general(dy, x, ((rows, rows), ((), ())))
        return gradient.transpose(*range(outputs, outputs + axes), *range(outputs))

    if size * n_in <= size * n_out + n_in * n_out:  # what either way turns
        return product(x, dy)
    return jax.lax.platform_dependent(x, dy, cpu=turned, default=product)


project.defvjp(_project_forward, _project_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def scaled_norm(x: Float[Array, "*batch D"], scale: Float[Array, " D"], epsilon: float) -> Float[Array, "*batch D"]:
    """(x - mean) / sqrt(variance + epsilon) * scale over the last axis (Ba et al. 2016).

    The gradient is in the normalised x, which is kept: three passes over the row where the derived one makes nine.
    """
    return _norm_forward(x, scale, epsilon)[0]


def _norm_forward(x: Array, scale: Array, epsilon: float) -> tuple[Array, tuple[Array, Array, Array]]:
    centred = x - x.mean(-1, keepdims=True)
    inverse = jax.lax.rsqrt((centred * centred).mean(-1, keepdims=True) + epsilon)
    normed = centred * inverse
    return normed * scale, (normed, inverse, scale)


def _norm_backward(epsilon: float, kept: tuple[Array, Array, Array], dy: Array) -> tuple[Array, Array]:
    normed, inverse, scale = kept
    dn = dy * scale
    along = (dn * normed).mean(-1, keepdims=True)
    dx = (dn - dn.mean(-1, keepdims=True) - normed * along) * inverse
    return dx, (dy * normed).sum(tuple(range(dy.ndim - 1)))


scaled_norm.defvjp(_norm_forward, _norm_backward)


@jax.custom_vjp
def gelu_tanh(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """x/2 (1 + tanh(u)), u = sqrt(2/pi) (x + 0.044715 x^3), as x sigmoid(2 u) (Hendrycks and Gimpel 2016).

    One exponential where the derived gradient takes two tanh; what is kept is the slope alone.
    """
    return x * jax.nn.sigmoid(_twice_u(x))


def _twice_u(x: Array) -> Array:
    return 2.0 * math.sqrt(2.0 / math.pi) * (x + 0.044715 * x * x * x)


def _gelu_forward(x: Array) -> tuple[Array, Array]:
    gate = jax.nn.sigmoid(_twice_u(x))
    slope = 2.0 * math.sqrt(2.0 / math.pi) * (1.0 + 3.0 * 0.044715 * x * x)
    return x * gate, gate + x * gate * (1.0 - gate) * slope


def _gelu_backward(slope: Array, dy: Array) -> tuple[Array]:
    return (dy * slope,)


gelu_tanh.defvjp(_gelu_forward, _gelu_backward)
