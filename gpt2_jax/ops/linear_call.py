"""A linear function with a hand-written transpose, for the tangents of `jax.custom_jvp` rules.

A rule that returns `linear_call(tangent, backward, ...)` gives both derivatives: forward mode evaluates `tangent`, and
reverse mode evaluates `backward`, as with `jax.custom_vjp`, which has no forward mode. Unlike
`jax.custom_derivatives.linear_call`, it can be differentiated with respect to its residuals, which Hessian-vector
products need, and batched by `jax.vmap`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir

_Flat = Callable[..., Sequence[Any]]
"""A function of the leaves of the residuals and of the linear argument, which returns leaves."""


def linear_call(
    fun: Callable[[Any, Any], Any], transpose: Callable[[Any, Any], Any], residuals: Any, x: Any, like: Any
) -> Any:
    """Return `fun(residuals, x)`, which must be linear in `x`.

    Args:
        fun: the function.
        transpose: `transpose(residuals, y)` applies the transpose of `x -> fun(residuals, x)` to `y`; a tree like `x`.
        residuals: a tree of arrays.
        x: a tree of floating-point arrays.
        like: a tree of arrays with the shapes and dtypes of the result.

    >>> two, x = jnp.float32(2.0), jnp.float32(3.0)
    >>> float(linear_call(lambda r, x: x / r, lambda r, y: y / r, two, x, like=x))
    1.5
    """
    x = _varying_like((residuals, x, like), x)
    (known, known_tree), (given, x_tree), (outputs, out_tree) = map(jax.tree.flatten, (residuals, x, like))
    n = len(known)

    def flat(function: Callable[[Any, Any], Any], argument_tree: Any) -> _Flat:
        def call(*leaves: Any) -> Sequence[Any]:
            return jax.tree.leaves(
                function(jax.tree.unflatten(known_tree, leaves[:n]), jax.tree.unflatten(argument_tree, leaves[n:]))
            )

        return call

    result = _linear_call.bind(
        *known,
        *given,
        fun=flat(fun, x_tree),
        transpose=flat(transpose, out_tree),
        num_residuals=n,
        out_avals=tuple(map(jax.typeof, outputs)),
    )
    return jax.tree.unflatten(out_tree, result)


def _varying_like(tree: Any, x: Any) -> Any:
    """Mark arrays as varying over the axes of a `jax.shard_map` over which some array of the tree varies.

    The transpose of this mark is a sum over these axes. The gradient of a replicated array needs that sum.
    """

    def axes_of(array: Any) -> frozenset[str]:
        return frozenset(jax.typeof(array).manual_axis_type.varying)

    axes = frozenset().union(*map(axes_of, jax.tree.leaves(tree)))

    def marked(array: Any) -> Any:
        missing = tuple(sorted(axes - axes_of(array)))
        return jax.lax.pcast(array, missing, to="varying") if missing else array

    return jax.tree.map(marked, x)


_linear_call = Primitive("linear_call_with_transpose")
_linear_call.multiple_results = True


@_linear_call.def_impl
def _call(*arguments: Any, fun: _Flat, **_: Any) -> Sequence[Any]:
    return fun(*arguments)


@_linear_call.def_abstract_eval
def _out_avals(*_: Any, out_avals: Sequence[Any], **__: Any) -> Sequence[Any]:
    return out_avals


def _jvp(primals: Sequence[Any], tangents: Sequence[Any], **params: Any) -> tuple[Sequence[Any], Sequence[Any]]:
    n, out_avals = params["num_residuals"], params["out_avals"]
    sums: list[Any] = [ad.Zero(aval.to_tangent_aval()) for aval in out_avals]
    if not all(isinstance(tangent, ad.Zero) for tangent in tangents[n:]):
        by_x = _linear_call.bind(*primals[:n], *map(ad.instantiate_zeros, tangents[n:]), **params)
        sums = [*map(ad.add_tangents, sums, by_x)]
    varying = [i for i, tangent in enumerate(tangents[:n]) if not isinstance(tangent, ad.Zero)]
    if varying:

        def of_residuals(*residuals: Any) -> Sequence[Any]:
            replaced = dict(zip(varying, residuals, strict=True))
            return params["fun"](*(replaced.get(i, primal) for i, primal in enumerate(primals)))

        _, by_residuals = jax.jvp(of_residuals, [primals[i] for i in varying], [tangents[i] for i in varying])
        sums = [*map(ad.add_tangents, sums, by_residuals)]
    return _linear_call.bind(*primals, **params), sums


def _transposed(
    cotangents: Sequence[Any],
    *arguments: Any,
    fun: _Flat,
    transpose: _Flat,
    num_residuals: int,
    out_avals: Sequence[Any],
) -> list[Any]:
    known, x = arguments[:num_residuals], arguments[num_residuals:]
    result = _linear_call.bind(
        *known,
        *map(ad.instantiate_zeros, cotangents),
        fun=transpose,
        transpose=fun,
        num_residuals=num_residuals,
        out_avals=tuple(each.aval if ad.is_undefined_primal(each) else jax.typeof(each) for each in x),
    )
    # Tangents of constants are zeros, not variables. Their cotangents are not needed.
    wanted = (y if ad.is_undefined_primal(each) else None for each, y in zip(x, result, strict=True))
    return [None] * num_residuals + [*wanted]


def _batched(
    axis_data: Any,
    arguments: Sequence[Any],
    axes: Sequence[int | None],
    *,
    fun: _Flat,
    transpose: _Flat,
    num_residuals: int,
    out_avals: Sequence[Any],
) -> tuple[Sequence[Any], Sequence[int]]:
    # The linear arguments must all be batched, because the transpose of a broadcast is a sum.
    x = [
        jnp.broadcast_to(each, (axis_data.size, *each.shape)) if axis is None else jnp.moveaxis(each, axis, 0)
        for each, axis in zip(arguments[num_residuals:], axes[num_residuals:], strict=True)
    ]

    def batched(function: _Flat, num_linear: int) -> _Flat:
        in_axes = (*axes[:num_residuals], *[0] * num_linear)
        return jax.vmap(function, in_axes, axis_size=axis_data.size, spmd_axis_name=axis_data.spmd_name)

    result = _linear_call.bind(
        *arguments[:num_residuals],
        *x,
        fun=batched(fun, len(x)),
        transpose=batched(transpose, len(out_avals)),
        num_residuals=num_residuals,
        out_avals=tuple(aval.update(shape=(axis_data.size, *aval.shape)) for aval in out_avals),
    )
    return result, [0] * len(result)


ad.primitive_jvps[_linear_call] = _jvp
ad.primitive_transposes[_linear_call] = _transposed
batching.fancy_primitive_batchers[_linear_call] = _batched
mlir.register_lowering(_linear_call, mlir.lower_fun(_call, multiple_results=True))
