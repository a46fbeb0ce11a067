"""Layer normalization with a hand-written gradient, which XLA on CPU runs faster than the one that JAX derives."""

from __future__ import annotations

import functools

import jax
from jaxtyping import Array, Float

from gpt2_jax.ops.linear_call import linear_call


@functools.partial(jax.custom_jvp, nondiff_argnums=(2,))
def scaled_norm(x: Float[Array, "*batch D"], scale: Float[Array, " D"], epsilon: float) -> Float[Array, "*batch D"]:
    """Return (x - mean) / sqrt(variance + epsilon) * scale over the last axis (Ba et al. 2016).

    The gradient is computed from the normalized x, which is saved. It takes three passes over a row; the gradient
    that JAX derives takes nine.
    """
    return _norm_forward(x, scale, epsilon)[0]


def _norm_forward(x: Array, scale: Array, epsilon: float) -> tuple[Array, tuple[Array, Array, Array]]:
    centred = x - x.mean(-1, keepdims=True)
    inverse = jax.lax.rsqrt((centred * centred).mean(-1, keepdims=True) + epsilon)
    normed = centred * inverse
    return normed * scale, (normed, inverse, scale)


@scaled_norm.defjvp
def _norm_jvp(epsilon: float, primals: tuple[Array, Array], tangents: tuple[Array, Array]) -> tuple[Array, Array]:
    y, residuals = _norm_forward(*primals, epsilon)
    return y, linear_call(_norm_tangent, _norm_backward, residuals, tangents, y)


def _norm_tangent(residuals: tuple[Array, Array, Array], tangents: tuple[Array, Array]) -> Array:
    (normed, inverse, scale), (dx, d_scale) = residuals, tangents
    return _times_slope(dx, normed, inverse) * scale + normed * d_scale


def _norm_backward(residuals: tuple[Array, Array, Array], dy: Array) -> tuple[Array, Array]:
    normed, inverse, scale = residuals
    return _times_slope(dy * scale, normed, inverse), (dy * normed).sum(tuple(range(dy.ndim - 1)))


def _times_slope(d: Array, normed: Array, inverse: Array) -> Array:
    """Multiply by the Jacobian of the normalization, which is symmetric for each row."""
    projection = (d * normed).mean(-1, keepdims=True)
    return (d - d.mean(-1, keepdims=True) - normed * projection) * inverse
