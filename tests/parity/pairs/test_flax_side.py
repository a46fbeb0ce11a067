"""Flax modules as sides: collections, modes, layouts and images."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx
from parity.pairs import mlp
from parity.pairs.test_compare import check_of, failures

from gpt2_jax.parity.pairs.compare import compare
from gpt2_jax.parity.pairs.sides.flax_module import linen_side, nnx_side
from gpt2_jax.parity.pairs.sides.jax_function import function_side
from gpt2_jax.parity.pairs.sides.side import SideError


class Net(nn.Module):
    train: bool

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = nn.DenseGeneral((2, 3), name="split")(x)
        x = nn.BatchNorm(use_running_average=not self.train, name="bn")(x)
        return nn.Dropout(0.5, deterministic=not self.train, name="drop")(x)


def variables() -> Any:
    return Net(False).init(jax.random.key(0), jnp.ones((1, 5)))


def test_linen_collections_modes_and_layouts() -> None:
    side = linen_side(Net(True), variables(), rngs={"dropout": jax.random.key(1)})
    assert {*side.parameters()} == {"split.kernel", "split.bias", "bn.scale", "bn.bias", "bn.mean", "bn.var"}
    description = side.describe(mlp.inputs())
    assert description.training == ("bn (BatchNorm)", "drop (Dropout)")
    assert {n: layout.axes for n, layout in description.layouts.items()} == {"split.kernel": "ioo", "split.bias": "oo"}
    assert {*side.forward(mlp.inputs(), "float32").state} == {"bn.mean", "bn.var"}
    _, gradients = side.gradients(mlp.inputs(), "float32") or (0, {})
    assert {*gradients} == {"split.kernel", "split.bias", "bn.scale", "bn.bias"}
    still = linen_side(Net(False), variables())
    assert still.describe(mlp.inputs()).training == ()
    assert still.forward(mlp.inputs(), "float32").state == {}


def test_each_pass_has_its_own_random_numbers() -> None:
    side = linen_side(Net(True), variables(), rngs={"dropout": jax.random.key(1)})
    first, second = (side.forward(mlp.inputs(), "float32") for _ in range(2))
    assert np.array_equal(first.intermediates["bn"], second.intermediates["bn"])
    assert not np.array_equal(first.outputs["output"], second.outputs["output"])


def test_values_inside_a_loop_cannot_be_recorded() -> None:
    class Looped(nn.Module):
        @nn.compact
        def __call__(self, x: jax.Array) -> jax.Array:
            layer = nn.remat(mlp.LinenMLP)(name="net")
            return layer(x)

    params = {"params": {"net": mlp.weights()}}
    with pytest.raises(SideError, match="intermediates=False"):
        linen_side(Looped(), params).forward(mlp.inputs(), "float32")
    right = linen_side(Looped(), params, intermediates=False)
    report = compare(linen_side(mlp.LinenMLP(), {"params": mlp.weights()}, name="plain"), right, mlp.inputs())
    assert failures(report) == {}
    assert check_of(report, "intermediates").skipped


def test_the_place_of_an_error_is_the_innermost_module() -> None:
    class Wrong(nn.Module):
        @nn.compact
        def __call__(self, x: jax.Array) -> jax.Array:
            return nn.Dense(3, name="fc")(x[:, :2])

    good = {"params": {"fc": {"kernel": np.ones((5, 3)), "bias": np.zeros(3)}}}
    with pytest.raises(SideError) as error:
        linen_side(Wrong(), good).forward(mlp.inputs(), "float32")
    assert error.value.place == "fc"
    assert error.value.message.startswith("ScopeParamShapeError")


def test_nnx_statistics_are_the_state() -> None:
    class Norm(nnx.Module):
        def __init__(self) -> None:
            self.bn = nnx.BatchNorm(5, rngs=nnx.Rngs(0))

        def __call__(self, x: jax.Array) -> jax.Array:
            return self.bn(x)

    module = Norm()
    side = nnx_side(module)
    assert {*side.forward(mlp.inputs(), "float32").state} == {"bn.mean", "bn.var"}
    assert side.describe(mlp.inputs()).training == ("bn (BatchNorm)",)
    assert np.array_equal(module.bn.mean.get_value(), np.zeros(5))
    module.eval()
    assert nnx_side(module).describe(mlp.inputs()).training == ()
    assert nnx_side(module).forward(mlp.inputs(), "float32").state == {}


def test_images_are_transposed_to_the_order_of_pytorch() -> None:
    images = np.arange(2 * 3 * 4 * 5.0).reshape(2, 3, 4, 5)
    side = function_side(lambda params, x: (x * params["s"], {"x": x}), {"s": np.arange(3.0)}, images="NHWC", aux=True)
    forward = side.forward((images,), "float64")
    assert np.array_equal(forward.outputs["output"], images * np.arange(3.0)[:, None, None])
    assert np.array_equal(forward.intermediates["x"], images)


def test_a_function_that_changes_its_parameters_is_reported() -> None:
    def call(params: dict[str, jax.Array], x: jax.Array) -> jax.Array:
        params["w"] = params["w"] * 2
        return x @ params["w"]

    with pytest.raises(SideError, match="changes the tree of its parameters in place"):
        function_side(call, {"w": np.ones((5, 3))}).forward(mlp.inputs(), "float32")


def test_intermediates_of_a_function_keep_their_order() -> None:
    side = function_side(lambda params, x: (x, {"z": x + 1, "a": (x + 2, x + 3)}), {"w": np.ones(1)}, aux=True)
    assert [*side.forward(mlp.inputs(), "float32").intermediates] == ["z", "a[0]", "a[1]"]
