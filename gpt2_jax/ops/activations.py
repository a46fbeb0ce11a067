"""The activation functions of the feed-forward network, by their names in `config.json`."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


@jax.custom_jvp
def gelu_tanh(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """Return x/2 (1 + tanh(u)), u = sqrt(2/pi) (x + 0.044715 x^3), as x sigmoid(2 u) (Hendrycks and Gimpel 2016).

    The gradient takes one exponential; the one that JAX derives takes two tanh. Only the slope is saved for it.
    """
    return x * jax.nn.sigmoid(_twice_u(x))


def _twice_u(x: Array) -> Array:
    return 2.0 * math.sqrt(2.0 / math.pi) * (x + 0.044715 * x * x * x)


@gelu_tanh.defjvp
def _gelu_jvp(primals: tuple[Array], tangents: tuple[Array]) -> tuple[Array, Array]:
    (x,), (dx,) = primals, tangents
    gate = jax.nn.sigmoid(_twice_u(x))
    slope_of_gate = 2.0 * math.sqrt(2.0 / math.pi) * (1.0 + 3.0 * 0.044715 * x * x)
    slope = gate + x * gate * (1.0 - gate) * slope_of_gate
    return x * gate, dx * slope


def relu6(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """Return min(max(x, 0), 6). The gradient at 0 and at 6 is 0, as in PyTorch; that of `jax.nn.relu6` is 1/2."""
    return jnp.where(x >= 6.0, jnp.asarray(6.0, x.dtype), jax.nn.relu(x))


def exact_gelu(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """Return x Phi(x), with the error function (Hendrycks and Gimpel 2016)."""
    return jax.nn.gelu(x, approximate=False)


ACTIVATIONS: Mapping[str, Callable[[Array], Array]] = {
    "gelu_new": gelu_tanh,
    "gelu": exact_gelu,
    "gelu_fast": lambda x: 0.5 * x * (1.0 + jnp.tanh(0.7978845608 * x * (1.0 + 0.044715 * x * x))),
    "gelu_pytorch_tanh": gelu_tanh,
    "quick_gelu": lambda x: x * jax.nn.sigmoid(1.702 * x),
    "relu": jax.nn.relu,
    "silu": jax.nn.silu,
    "swish": jax.nn.silu,
    "tanh": jnp.tanh,
    "gelu_python": exact_gelu,
    "gelu_accurate": gelu_tanh,
    "mish": jax.nn.mish,
    "relu2": lambda x: jnp.square(jax.nn.relu(x)),
    "relu6": relu6,
    "sigmoid": jax.nn.sigmoid,
    "linear": lambda x: x,
}
"""Names and formulas are those of `ACT2FN` in transformers' activations.py."""
