"""One side of a comparison that is a Flax module, of Linen or of NNX."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax import nnx
from flax.traverse_util import flatten_dict, unflatten_dict

from gpt2_jax.parity.pairs.matching.layouts import Layout
from gpt2_jax.parity.pairs.sides.jax_function import JaxSide, Leaves
from gpt2_jax.parity.pairs.sides.recording import Recorder

_SPATIAL = {1: "w", 2: "hw", 3: "dhw"}


def linen_side(
    module: nn.Module,
    variables: Mapping[str, Any],
    *,
    name: str = "flax",
    loss: Callable[..., jax.Array] | None = None,
    kwargs: Mapping[str, Any] | None = None,
    rngs: Mapping[str, jax.Array] | None = None,
    images: str = "",
    intermediates: bool = True,
) -> JaxSide:
    """A Flax Linen module as one side of `compare`.

    Args:
        module: the module.
        variables: its collections, such as `{"params": ..., "batch_stats": ...}`. A pass may update all but `params`.
        name: the name of the side in the report.
        loss: `loss(output, *inputs)` returns the loss whose gradients are compared. The default is the sum of all
            outputs, each multiplied by a fixed random number.
        kwargs: keyword arguments of every call, such as `{"deterministic": True}`.
        rngs: keys by stream. Each pass folds its number into them, so that randomness shows as a difference.
        images: `NHWC` if the arrays with four axes are images in this order. They are then transposed from and to
            PyTorch's order, NCHW.
        intermediates: whether to record what passes into and out of modules.
    """
    flat = {path: leaf for path, leaf in flatten_dict(nn.meta.unbox(dict(variables))).items() if leaf is not None}
    paths = {_name(path, flat): path for path in flat}
    mutable = [collection for collection in variables if collection != "params"]

    def run(leaves: Leaves, inputs: tuple[jax.Array, ...], call: jax.Array, recorder: Recorder) -> tuple[Any, Leaves]:
        tree = unflatten_dict({paths[each]: leaf for each, leaf in leaves.items()})
        keys = {stream: jax.random.fold_in(key, call) for stream, key in (rngs or {}).items()}
        with nn.intercept_methods(_interceptor(recorder, intermediates)):
            result: Any = module.apply(tree, *inputs, rngs=keys, mutable=mutable or False, **dict(kwargs or {}))
        if not mutable:
            return result, {}
        output, updated = result
        changed = {_name(path, flat): leaf for path, leaf in flatten_dict(nn.meta.unbox(dict(updated))).items()}
        return output, {each: leaf for each, leaf in changed.items() if each in paths}

    trained = frozenset(each for each, path in paths.items() if path[0] == "params")
    leaves = {each: flat[path] for each, path in paths.items()}
    return JaxSide(run, leaves, name=name, trained=trained, loss=loss, images=images)


def _name(path: tuple[str, ...], all_paths: Mapping[tuple[str, ...], Any]) -> str:
    """The path without its collection, unless another collection has the same path."""
    same = sum(other[1:] == path[1:] for other in all_paths)
    return ".".join(path[1:] if same <= 1 else path)


def _interceptor(recorder: Recorder, intermediates: bool) -> Callable[..., Any]:
    def record(next_call: Callable[..., Any], args: Any, kwargs: Any, context: Any) -> Any:
        module = context.module
        if context.method_name != "__call__":
            return next_call(*args, **kwargs)
        path = ".".join(module.path)
        _describe(recorder, path, module, args, kwargs)
        if not path or not intermediates:
            return next_call(*args, **kwargs)
        recorder.enter(path, args)
        output = next_call(*args, **kwargs)
        recorder.leave(output)
        return output

    return record


def _describe(recorder: Recorder, path: str, module: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
    """Record the layouts of a module, and whether it is in training mode."""
    prefix, kind = f"{path}." if path else "", type(module).__name__
    for leaf, axes in _layouts(module).items():
        recorder.layouts[prefix + leaf] = Layout(axes, f"{_package(module)}.{kind}.{leaf}")
    flag = {"Dropout": "deterministic", "BatchNorm": "use_running_average"}.get(kind)
    if flag is None or (kind == "Dropout" and not module.rate):
        return
    value = kwargs.get(flag, getattr(module, flag, None))
    if len(args) > 1 and isinstance(args[1], bool):
        value = args[1]
    if not value:
        recorder.training[path or kind] = kind


def _package(module: Any) -> str:
    return "nnx" if isinstance(module, nnx.Module) else "nn"


def _layouts(module: Any) -> dict[str, str]:
    """The layouts of the parameters of one module, for the modules of Flax. All have the kernel [..., in, out]."""
    if isinstance(module, nn.Dense | nnx.Linear):
        return {"kernel": "io"}
    if isinstance(module, nn.Embed | nnx.Embed):
        return {"embedding": "vc"}
    if isinstance(module, nn.Conv | nnx.Conv):
        size = module.kernel_size
        return {"kernel": _SPATIAL.get(len(size) if isinstance(size, tuple | list) else 1, "") + "io"}
    if isinstance(module, nn.DenseGeneral):
        outputs, inputs = _length(module.features), _length(module.axis)
    elif isinstance(module, nnx.LinearGeneral):
        outputs, inputs = len(module.out_features), len(module.in_features)
    else:
        return {}
    return {"kernel": "i" * inputs + "o" * outputs, "bias": "o" * outputs}


def _length(value: Any) -> int:
    return 1 if isinstance(value, int) else len(value)


def nnx_side(
    module: nnx.Module,
    *,
    name: str = "nnx",
    loss: Callable[..., jax.Array] | None = None,
    kwargs: Mapping[str, Any] | None = None,
    images: str = "",
    intermediates: bool = True,
) -> JaxSide:
    """A Flax NNX module as one side of `compare`.

    Every pass runs on a copy of the module, in the mode that it has: call `module.eval()` first to compare inference.

    Args:
        module: the module.
        name: the name of the side in the report.
        loss: `loss(output, *inputs)` returns the loss whose gradients are compared. The default is the sum of all
            outputs, each multiplied by a fixed random number.
        kwargs: keyword arguments of every call.
        images: `NHWC` if the arrays with four axes are images in this order. They are then transposed from and to
            PyTorch's order, NCHW.
        intermediates: whether to record what passes into and out of modules.
    """
    graph, random, state = nnx.split(module, nnx.RngState, ...)  # type: ignore[misc]
    flat = [*nnx.to_flat_state(state)]
    variables = {".".join(map(str, path)): leaf for path, leaf in flat}

    def run(leaves: Leaves, inputs: tuple[jax.Array, ...], call: jax.Array, recorder: Recorder) -> tuple[Any, Leaves]:
        pure = nnx.from_flat_state([(path, leaf.replace(leaves[".".join(map(str, path))])) for path, leaf in flat])
        counted = jax.tree.map(
            lambda x: x.replace(x.get_value() + call.astype(x.get_value().dtype)) if isinstance(x, nnx.RngCount) else x,
            random,
            is_leaf=lambda x: isinstance(x, nnx.Variable),
        )
        copy = nnx.merge(graph, counted, pure)
        with _recorded(copy, recorder, intermediates):
            output = copy(*inputs, **dict(kwargs or {}))
        after = nnx.to_flat_state(nnx.state(copy, nnx.Not(nnx.RngState)))
        return output, {".".join(map(str, path)): jnp.asarray(leaf.get_value()) for path, leaf in after}

    leaves = {each: leaf.get_value() for each, leaf in variables.items()}
    trained = frozenset(each for each, leaf in variables.items() if isinstance(leaf, nnx.Param))
    return JaxSide(run, leaves, name=name, trained=trained, loss=loss, images=images)


@contextmanager
def _recorded(module: Any, recorder: Recorder, intermediates: bool) -> Iterator[None]:
    """Record the calls of all modules below `module`. Their classes are patched, and restored afterwards."""
    paths = {id(child): ".".join(map(str, path)) for path, child in nnx.iter_modules(module)}
    classes = {type(child) for _, child in nnx.iter_modules(module) if "__call__" in vars(type(child))}
    originals = {each: vars(each)["__call__"] for each in classes}

    def recording(original: Callable[..., Any]) -> Callable[..., Any]:
        def call(self: Any, *args: Any, **kwargs: Any) -> Any:
            path = paths.get(id(self))
            if path is None:
                return original(self, *args, **kwargs)
            _describe(recorder, path, self, args, kwargs)
            if not path or not intermediates:
                return original(self, *args, **kwargs)
            recorder.enter(path, args)
            output = original(self, *args, **kwargs)
            recorder.leave(output)
            return output

        return call

    try:
        for each, original in originals.items():
            each.__call__ = recording(original)  # type: ignore[method-assign]
        yield
    finally:
        for each, original in originals.items():
            each.__call__ = original  # type: ignore[method-assign]
