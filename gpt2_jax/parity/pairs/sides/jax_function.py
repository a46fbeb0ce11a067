"""One side of a comparison that is a JAX function, and what all JAX sides share."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gpt2_jax.parity.pairs.matching.layouts import Layout
from gpt2_jax.parity.pairs.sides.projection import projection_weights
from gpt2_jax.parity.pairs.sides.recording import Recorder, named_leaves, named_outputs
from gpt2_jax.parity.pairs.sides.side import DTYPES, Arrays, Description, Forward, Inputs, SideError
from gpt2_jax.parity.precision import full_precision

Leaves = dict[str, jax.Array]
Run = Callable[[Leaves, tuple[jax.Array, ...], jax.Array, Recorder], tuple[Any, Leaves]]
"""Takes parameters by name, inputs, the number of the call and the recorder. Returns the output and updated buffers."""

NHWC = "NHWC"


def function_side(
    function: Callable[..., Any],
    params: Any,
    *,
    name: str = "jax",
    loss: Callable[..., jax.Array] | None = None,
    aux: bool = False,
    layouts: Mapping[str, str] | None = None,
    images: str = "",
    jit: bool = True,
) -> JaxSide:
    """A JAX function with a tree of parameters as one side of `compare`.

    Args:
        function: `function(params, *inputs)` returns the output.
        params: a tree of arrays. The name of a parameter is its path, joined by dots.
        name: the name of the side in the report.
        loss: `loss(output, *inputs)` returns the loss whose gradients are compared. The default is the sum of all
            outputs, each multiplied by a fixed random number.
        aux: whether `function` returns a pair of the output and a dictionary of intermediates, in their order.
        layouts: name of a parameter -> `io` or `oi` for matrices, `hwio` or `oihw` for convolutions, where neither its
            name (`kernel`) nor its shape tells.
        images: `NHWC` if the arrays with four axes are images in this order. They are then transposed from and to
            PyTorch's order, NCHW.
        jit: whether to compile the function. Set it to False for a function that cannot be traced.
    """

    def run(leaves: Leaves, inputs: tuple[jax.Array, ...], call: jax.Array, recorder: Recorder) -> tuple[Any, Leaves]:
        tree = unflatten(leaves)
        output = function(tree, *inputs)
        after = jax.tree.leaves(tree)
        if len(after) != len(leaves) or any(a is not b for a, b in zip(after, leaves.values(), strict=True)):
            raise SideError(name, "", "the function changes the tree of its parameters in place")
        if aux:
            output, values = output
            recorder.values.update(leaf for key in values for leaf in named_leaves(key, values[key], is_array))
        return output, {}

    names, structure = _named(params)

    def unflatten(leaves: Leaves) -> Any:
        return jax.tree.unflatten(structure, [leaves[each] for each in names])

    known = {each: Layout(axes, each) for each, axes in (layouts or {}).items()}
    return JaxSide(run, names, name=name, loss=loss, layouts=known, images=images, jit=jit)


class JaxSide:
    """A side whose computation is a function of named arrays. See `function_side`, `linen_side` and `nnx_side`."""

    def __init__(
        self,
        run: Run,
        leaves: Mapping[str, Any],
        *,
        name: str,
        trained: frozenset[str] | None = None,
        loss: Callable[..., jax.Array] | None = None,
        layouts: Mapping[str, Layout] | None = None,
        images: str = "",
        jit: bool = True,
    ) -> None:
        self.name = name
        self.dtypes = DTYPES
        self.has_loss: bool = loss is not None
        arrays = {each: np.asarray(leaf) for each, leaf in leaves.items()}
        self._floats = {each: array for each, array in arrays.items() if _is_float(array)}
        self._others = {each: array for each, array in arrays.items() if not _is_float(array)}
        self._trained = frozenset(self._floats) if trained is None else trained
        self._run, self._loss, self._layouts, self._images = run, loss, dict(layouts or {}), images
        self._calls = itertools.count()
        self._recorder = Recorder(is_array)
        self._names: dict[str, tuple[list[str], ...]] = {}
        compiled = jax.jit if jit else (lambda function, **_: function)
        self._forward = compiled(self._traced_forward, static_argnames="dtype")
        self._gradients = compiled(jax.value_and_grad(self._traced_loss))

    def parameters(self) -> Arrays:
        return self._floats

    def describe(self, inputs: Inputs) -> Description:
        """Trace a pass without computing it. A pass that fails is reported by `forward`."""
        recorder = self._recorder
        try:
            with full_precision("float32", x64=False):
                jax.eval_shape(lambda: self._forward(*self._arguments(inputs, "float32"), dtype="float32"))
            recorder = self._recorder
        except Exception:
            recorder = self._recorder
        training = tuple(f"{path} ({kind})" for path, kind in recorder.training.items())
        return Description({**recorder.layouts, **self._layouts}, training=training)

    def forward(self, inputs: Inputs, dtype: str) -> Forward:
        values = self._checked(lambda: self._forward(*self._arguments(inputs, dtype), dtype=dtype), dtype)
        outputs, intermediates, state = (
            {each: np.asarray(x) for each, x in zip(names, arrays, strict=True)}
            for names, arrays in zip(self._names[dtype], values, strict=True)
        )
        before = {each: array.astype(state[each].dtype) for each, array in self._floats.items() if each in state}
        state = {each: x for each, x in state.items() if each in before and not np.array_equal(x, before[each])}
        return Forward(outputs, intermediates, state)

    def gradients(self, inputs: Inputs, dtype: str) -> tuple[float, Arrays] | None:
        def run() -> Any:
            leaves, arrays, call = self._arguments(inputs, dtype)
            trained = {each: leaf for each, leaf in leaves.items() if each in self._trained}
            return self._gradients(trained, leaves, arrays, call)

        loss, gradients = self._checked(run, dtype)
        return float(loss), {each: np.asarray(gradients[each]) for each in self._floats if each in gradients}

    def _arguments(self, inputs: Inputs, dtype: str) -> tuple[Leaves, tuple[jax.Array, ...], jax.Array]:
        def cast(array: np.ndarray) -> jax.Array:
            # numpy casts, because JAX would compile a program for each shape.
            return jnp.asarray(array.astype(jnp.dtype(dtype)) if _is_float(array) else array)

        leaves = {each: cast(array) for each, array in {**self._floats, **self._others}.items()}
        return leaves, tuple(map(cast, inputs)), jnp.asarray(np.uint32(next(self._calls)))

    def _traced(self, leaves: Leaves, inputs: tuple[jax.Array, ...], call: jax.Array) -> tuple[Any, Leaves]:
        self._recorder = Recorder(is_array)
        if self._images == NHWC:
            inputs = tuple(x.transpose(0, 2, 3, 1) if x.ndim == 4 else x for x in inputs)
        return self._run(leaves, inputs, call, self._recorder)

    def _traced_forward(self, leaves: Leaves, inputs: Any, call: jax.Array, dtype: str) -> tuple[list[jax.Array], ...]:
        output, state = self._traced(leaves, inputs, call)
        shown = [self._shown(named_outputs(output, is_array)), self._shown(self._recorder.values), state]
        self._names[dtype] = tuple([*values] for values in shown)  # jit would sort the names of a dictionary
        return tuple([*values.values()] for values in shown)

    def _traced_loss(self, trained: Leaves, leaves: Leaves, inputs: Any, call: jax.Array) -> jax.Array:
        output, _ = self._traced({**leaves, **trained}, inputs, call)
        if self._loss is not None:
            return self._loss(output, *inputs)
        outputs = [
            x for x in self._shown(named_outputs(output, is_array)).values() if jnp.issubdtype(x.dtype, np.floating)
        ]
        weights = projection_weights([x.shape for x in outputs])
        return sum(((x * jnp.asarray(w, x.dtype)).sum() for x, w in zip(outputs, weights, strict=True)), jnp.zeros(()))

    def _shown(self, values: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
        """Transpose images to NCHW."""
        if self._images != NHWC:
            return dict(values)
        return {each: x.transpose(0, 3, 1, 2) if x.ndim == 4 else x for each, x in values.items()}

    def _checked(self, run: Callable[[], Any], dtype: str) -> Any:
        try:
            with full_precision(dtype, x64=dtype == "float64"):
                return run()
        except SideError:
            raise
        except jax.errors.UnexpectedTracerError as error:
            message = "values inside nn.scan or nn.remat cannot be recorded; give intermediates=False"
            raise SideError(self.name, self._recorder.place, message) from error
        except Exception as error:
            first = str(error).strip().partition("\n")[0]
            raise SideError(self.name, self._recorder.place, f"{type(error).__name__}: {first}") from error


def is_array(value: Any) -> bool:
    """Whether a value is an array of JAX or numpy, or stands for one in a traced function."""
    return isinstance(value, jax.Array | np.ndarray)


def _named(tree: Any) -> tuple[dict[str, Any], Any]:
    """The leaves of a tree by path, and its structure."""
    paths, structure = jax.tree_util.tree_flatten_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="."): leaf for path, leaf in paths}, structure


def _is_float(array: Any) -> bool:
    return jnp.issubdtype(array.dtype, jnp.floating)
