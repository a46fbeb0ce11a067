"""`compare` agrees for every pair of sides that are the same function, and reports a side that fails."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from parity.pairs import mlp
from rich.console import Console

from bridge import BridgeError
from gpt2_jax.parity import Check, Report
from gpt2_jax.parity.pairs.compare import compare
from gpt2_jax.parity.pairs.matching.match import Match
from gpt2_jax.parity.pairs.matching.names import MatchError
from gpt2_jax.parity.pairs.sides.flax_module import linen_side, nnx_side
from gpt2_jax.parity.pairs.sides.jax_function import function_side
from gpt2_jax.parity.pairs.sides.side import Description, Forward, Inputs, Side


def failures(report: Report) -> dict[str, list[str]]:
    return {
        check.name: [f"{m.name}: {m.value} > {m.tolerance} at {m.location}" for m in check.measurements if not m.passed]
        for check in report.checks
        if not check.passed
    }


def check_of(report: Report, name: str) -> Check:
    return next(check for check in report.checks if check.name == name)


@pytest.mark.parametrize(("left", "right"), [*itertools.combinations(mlp.SIDES, 2)])
def test_sides_of_all_kinds_agree(left: str, right: str) -> None:
    report = compare(mlp.SIDES[left](), mlp.SIDES[right](), mlp.inputs())
    assert failures(report) == {}
    assert [check.name for check in report.checks if check.skipped] == ["state"]
    title = check_of(report, "intermediates").measurements[0].name
    assert title == f"fp64 max difference of {3 if right == 'function' else 6} intermediates / tolerance"
    shown = Console(record=True, width=200)
    report.show(shown)
    assert "6 checks hold: the two sides compute the same function. Skipped: state." in shown.export_text()
    assert json.loads(json.dumps(report.to_json()))["passed"] is True


def test_the_order_of_layers_by_the_forward_pass() -> None:
    """Names that say nothing are matched by the places of their modules in the forward pass."""

    class Unnamed(nn.Module):
        @nn.compact
        def __call__(self, x: jax.Array) -> jax.Array:
            for width in mlp.WIDTHS[1:-1]:
                x = nn.tanh(nn.Dense(width)(x))
            return nn.Dense(mlp.WIDTHS[-1])(x)

    params = {f"Dense_{k}": layer for k, layer in enumerate(mlp.weights().values())}
    left = linen_side(mlp.LinenMLP(), {"params": mlp.weights()}, name="left")
    report = compare(left, linen_side(Unnamed(), {"params": params}), mlp.inputs())
    assert failures(report) == {}
    assert "2 x same place in the forward pass" in check_of(report, "names").note  # the biases of the same width
    assert check_of(report, "intermediates").measurements[0].name.startswith("fp64 max difference of 6 ")


def test_a_wrong_weight_is_named() -> None:
    params = mlp.weights()
    params["fc1"]["kernel"] = params["fc1"]["kernel"].T
    report = compare(mlp.torch_mlp_side(), linen_side(mlp.LinenMLP(), {"params": params}), mlp.inputs())
    assert {*failures(report)} == {"parameters", "outputs", "intermediates", "gradients"}
    assert check_of(report, "parameters").note == "fc1.weight and fc1.kernel: copied without its transpose"
    assert check_of(report, "intermediates").first_divergence.startswith("fc1 at [")


def test_an_unmatched_parameter_fails_and_is_listed() -> None:
    params = mlp.weights()
    left = linen_side(mlp.LinenMLP(), {"params": params}, name="left")
    more = function_side(lambda p, x: mlp.function(p, x)[0], {**params, "unused": np.zeros(7)})
    report = compare(left, more, mlp.inputs(), checks=["names", "outputs"])
    (line,) = failures(report)["names"]
    assert line == "parameters only in jax, of 7: 1 > 0 at unused"
    assert check_of(report, "outputs").passed


def test_names_that_can_be_paired_in_two_ways_are_an_error() -> None:
    params = {name: [layer["kernel"], layer["bias"]] for name, layer in mlp.weights().items()}
    params = {"x": params["fc0"], "y": params["fc1"], "z": params["fc2"]}

    def call(p: Any, x: jax.Array) -> jax.Array:
        x = jnp.tanh(jnp.tanh(x @ p["x"][0] + p["x"][1]) @ p["y"][0] + p["y"][1])
        return x @ p["z"][0] + p["z"][1]

    right = function_side(call, params)
    with pytest.raises(MatchError, match=r"(?s)fc0.bias, fc1.bias.*x.1, y.1.*names=\{"):
        compare(mlp.torch_mlp_side(), right, mlp.inputs())
    names = {f"fc{k}.{leaf}": f"{'xyz'[k]}.{n}" for k in range(3) for n, leaf in enumerate(("weight", "bias"))}
    assert failures(compare(mlp.torch_mlp_side(), right, mlp.inputs(), names=names)) == {}


class Renamed(nn.Module):
    """The network of `mlp` with other names for two layers."""

    wrong: bool = False

    @nn.compact
    def __call__(self, x: jax.Array) -> dict[str, jax.Array]:
        x = nn.tanh(nn.Dense(mlp.WIDTHS[1], name="stem")(x))
        x = nn.tanh(nn.Dense(mlp.WIDTHS[2], name="fc1")(x) + self.wrong)
        return {"y": nn.Dense(mlp.WIDTHS[3], name="top")(x)}


def renamed(wrong: bool = False) -> Side:
    params = mlp.weights()
    params = {"stem": params["fc0"], "fc1": params["fc1"], "top": params["fc2"]}
    return linen_side(Renamed(wrong), {"params": params}, name="renamed")


def test_given_names_hold_for_parameters_intermediates_and_outputs() -> None:
    names = {"fc0": "stem", "fc2": "top", "output": "y"}
    report = compare(mlp.torch_mlp_side(), renamed(), mlp.inputs(), names=names)
    assert failures(report) == {}
    assert check_of(report, "intermediates").measurements[0].name.startswith("fp64 max difference of 6 ")
    report = compare(mlp.torch_mlp_side(), renamed(wrong=True), mlp.inputs(), names=names, checks=["intermediates"])
    assert check_of(report, "intermediates").first_divergence.startswith("fc2:input at [")


def test_an_excluded_module_is_not_compared() -> None:
    params = mlp.weights()
    params["fc1"]["bias"] += 1
    right = linen_side(mlp.LinenMLP(), {"params": params})
    excluded = compare(
        mlp.torch_mlp_side(), right, mlp.inputs(), names={"fc1": None}, checks=["parameters", "intermediates"]
    )
    assert check_of(excluded, "parameters").passed
    assert check_of(excluded, "intermediates").first_divergence.startswith("fc2:input at [")


def test_a_table_of_matches_gives_the_transforms() -> None:
    stored = {name: layer["kernel"].T * 2 for name, layer in mlp.weights().items()}
    biases = {f"b{k}": layer["bias"] for k, layer in enumerate(mlp.weights().values())}

    def call(params: Any, x: jax.Array) -> jax.Array:
        for k in range(3):
            x = x @ (params[f"fc{k}"].T / 2) + params[f"b{k}"]
            x = jnp.tanh(x) if k < 2 else x
        return x

    table = [Match(f"fc{k}.weight", f"fc{k}", lambda w: w / 2, "stored twice as large") for k in range(3)]
    table += [Match(f"fc{k}.bias", f"b{k}", lambda b: b, "another name") for k in range(3)]
    right = function_side(call, {**stored, **biases})
    report = compare(mlp.torch_mlp_side(), right, mlp.inputs(), names=table)
    assert failures(report) == {}
    assert check_of(report, "gradients").note.endswith("more than move elements: fc0.weight, fc1.weight, fc2.weight")
    assert check_of(report, "names").note == "3 x stored twice as large; 3 x another name"


class Scripted:
    """A side that returns what a test says."""

    def __init__(self, forward: Callable[[Inputs, str], Forward], name: str = "scripted") -> None:
        self.name, self.dtypes, self._forward = name, ("float64",), forward

    def parameters(self) -> dict[str, np.ndarray]:
        return {}

    def describe(self, inputs: Inputs) -> Description:
        return Description()

    def forward(self, inputs: Inputs, dtype: str) -> Forward:
        return self._forward(inputs, dtype)

    def gradients(self, inputs: Inputs, dtype: str) -> None:
        return None


def twice(inputs: Inputs, dtype: str) -> Forward:
    return Forward({"output": 2 * inputs[0].astype(np.float64)}, {"double": 2 * inputs[0].astype(np.float64)})


def in_place(inputs: Inputs, dtype: str) -> Forward:
    inputs[0][:] *= 2
    return Forward({"output": inputs[0].astype(np.float64)})


def not_a_number(inputs: Inputs, dtype: str) -> Forward:
    y = 2 * inputs[0].astype(np.float64)
    y[0] = np.nan
    return Forward({"output": y}, {"double": y})


def raises(inputs: Inputs, dtype: str) -> Forward:
    raise RuntimeError("out of luck")


@pytest.mark.parametrize(
    ("wrong", "place", "message"),
    [
        (raises, "", "RuntimeError: out of luck"),
        (in_place, "", "the forward pass changes input 0 in place"),
        (not_a_number, "double", "NaN in float64"),
        (lambda inputs, dtype: Forward({}), "", "the forward pass returns no array"),
        (lambda inputs, dtype: None, "", "AttributeError: 'NoneType' object has no attribute 'outputs'"),
    ],
)
@pytest.mark.parametrize("side", ["left", "right"])
def test_a_side_that_fails_is_reported(wrong: Any, place: str, message: str, side: str) -> None:
    sides = [Scripted(twice, "good"), Scripted(wrong, "bad")]
    report = compare(*(sides if side == "right" else sides[::-1]), [np.arange(3.0)], dtypes=["float64"])
    check = check_of(report, "outputs")
    assert not report.passed
    assert not check.passed
    assert (check.measurements[0].name, check.measurements[0].location) == ("bad fails", place)
    assert check.note == message


def test_other_shapes_and_names_are_reported() -> None:
    good = Scripted(twice, "good")
    flat = Scripted(lambda inputs, dtype: Forward({"output": np.zeros(2)}), "flat")
    report = compare(good, flat, [np.arange(3.0)], dtypes=["float64"])
    assert check_of(report, "outputs").first_divergence == "output: shapes (3,) and (2,)"
    pair = Scripted(lambda inputs, dtype: Forward({"a": np.zeros(3), "output": twice(inputs, dtype).outputs["output"]}))
    report = compare(good, pair, [np.arange(3.0)], dtypes=["float64"], checks=["names", "outputs"])
    assert failures(report) == {
        "names": ["outputs only in scripted, of 2: 1 > 0 at a"],
        "outputs": ["fp64 a, in one side only: inf > 0.0 at a"],
    }
    report = compare(pair, good, [np.arange(3.0)], dtypes=["float64"], names={"a": None}, checks=["outputs"])
    assert failures(report) == {}


def linear(w: np.ndarray, change: Callable[[str], Callable[[Any], Any]], name: str) -> Side:
    def function(params: Any, x: jax.Array) -> jax.Array:
        return change(str(x.dtype))(x @ params["w"].astype(x.dtype))

    return function_side(function, {"w": w}, name=name)


@pytest.mark.parametrize("wrong", [{"float32": 1000.0, "float64": 2e-6}, {"float32": 0.01, "float64": 4e-12}], ids=str)
def test_the_side_under_test_cannot_raise_its_own_tolerance(wrong: dict[str, float]) -> None:
    rng = np.random.default_rng(0)
    w, x = rng.standard_normal((3, 3)), rng.standard_normal((4, 3))
    right = linear(w, lambda dtype: lambda y: y + wrong[dtype], "right")
    left = linear(w, lambda dtype: lambda y: y, "left")
    report = compare(left, right, [x], checks=["outputs"], dtypes=["float64", "float32"])
    assert not report.passed


def test_a_parameter_that_one_side_does_not_train_is_named() -> None:
    torch = pytest.importorskip("torch")
    from gpt2_jax.parity.pairs.sides.torch_module import torch_side

    modules = [torch.nn.Linear(4, 3), torch.nn.Linear(4, 3)]
    modules[1].load_state_dict(modules[0].state_dict())
    modules[1].weight.requires_grad_(False)
    sides = [torch_side(module, name=name) for name, module in zip(("left", "right"), modules, strict=True)]
    report = compare(*sides, [np.ones((2, 4))], checks=["gradients"])
    assert failures(report) == {"gradients": ["parameters with a gradient on one side only: 1 > 0 at weight"]}


def test_losses_that_differ_by_a_constant_are_reported() -> None:
    rng = np.random.default_rng(0)
    params, x = {"w": rng.standard_normal((3, 3))}, rng.standard_normal((4, 3))
    sides = [
        function_side(
            lambda params, x: x @ params["w"], params, loss=lambda y, x, add=add: (y**2).sum() + add, name=f"plus {add}"
        )
        for add in (0.0, 5.0)
    ]
    [check] = compare(*sides, [x], checks=["gradients"]).checks
    [failed] = [m for m in check.measurements if not m.passed]
    assert (failed.name, round(failed.value, 9)) == ("fp64 loss, difference", 5.0)


def test_a_random_side_is_found() -> None:
    rng = np.random.default_rng(0)
    noisy = Scripted(
        lambda inputs, dtype: Forward({"output": inputs[0] + rng.normal()}, {"noise": np.array([rng.normal()])})
    )
    report = compare(Scripted(twice, "good"), noisy, [np.arange(3.0)], dtypes=["float64"], checks=["determinism"])
    assert check_of(report, "determinism").first_divergence == "noise of scripted"


def test_equal_infinities_agree_and_others_do_not() -> None:
    one, other = (
        Scripted(lambda i, d, v=v: Forward({"output": np.array([v, 1.0])}), str(v)) for v in (np.inf, -np.inf)
    )
    same = Scripted(lambda inputs, dtype: Forward({"output": np.array([np.inf, 1.0])}), "same")
    assert compare(one, same, [np.zeros(1)], dtypes=["float64"], checks=["outputs"]).passed
    assert not compare(one, other, [np.zeros(1)], dtypes=["float64"], checks=["outputs"]).passed


def test_unusable_arguments() -> None:
    side = Scripted(twice, "a")
    with pytest.raises(BridgeError, match="both sides are named 'a'"):
        compare(side, side, [np.zeros(1)])
    with pytest.raises(BridgeError, match="'logits' is not one of names, parameters"):
        compare(side, Scripted(twice), [np.zeros(1)], checks=["logits"])
    with pytest.raises(BridgeError, match="'float8' is not one of"):
        compare(side, Scripted(twice), [np.zeros(1)], dtypes=["float8"])
    with pytest.raises(BridgeError, match="cannot compute in float64"):
        compare(side, Scripted(twice), [np.zeros(1)], dtypes=["float32"])


def test_a_loss_on_one_side_only_is_an_error() -> None:
    left = linen_side(mlp.LinenMLP(), {"params": mlp.weights()}, loss=lambda y, x: jnp.square(y).sum())
    with pytest.raises(BridgeError, match="only one side has a loss"):
        compare(left, mlp.function_mlp_side(), mlp.inputs())


def test_losses_are_compared_by_their_gradients() -> None:
    sides: list[Side] = []
    for name, power in (("square", 2), ("cube", 3)):
        side = linen_side(mlp.LinenMLP(), {"params": mlp.weights()}, name=name, loss=lambda y, x, p=power: (y**p).sum())
        sides.append(side)
    report = compare(*sides, mlp.inputs(), checks=["outputs", "gradients"], dtypes=["float64", "float32"])
    assert {*failures(report)} == {"gradients"}
    assert check_of(report, "gradients").first_divergence == "fc2.kernel, the first in the backward pass"


def test_a_function_that_cannot_be_traced() -> None:
    def call(params: Any, x: jax.Array) -> jax.Array:
        return x @ params["fc0"]["kernel"] if float(x[0, 0]) > -100 else x

    params = {"fc0": {"kernel": mlp.weights()["fc0"]["kernel"]}}
    plain = function_side(lambda p, x: x @ p["fc0"]["kernel"], params, name="plain")
    report = compare(plain, function_side(call, params), mlp.inputs(), checks=["outputs"])
    assert check_of(report, "outputs").note.startswith("ConcretizationTypeError")
    report = compare(plain, function_side(call, params, jit=False), mlp.inputs(), checks=["outputs", "parameters"])
    assert failures(report) == {}


def test_nnx_side_leaves_the_module_as_it_was() -> None:
    from flax import nnx

    class Dropped(nnx.Module):
        def __init__(self) -> None:
            self.fc, self.drop = nnx.Linear(5, 3, rngs=nnx.Rngs(0)), nnx.Dropout(0.5, rngs=nnx.Rngs(1))

        def __call__(self, x: jax.Array) -> jax.Array:
            return self.drop(self.fc(x))

    module = Dropped()
    before = nnx.Linear.__call__, module.drop.rngs.count.get_value()  # type: ignore[union-attr]
    report = compare(nnx_side(module), nnx_side(Dropped(), name="other"), mlp.inputs(), checks=["determinism"])
    assert report.diagnostics == (
        "nnx is in training mode: drop (Dropout)",
        "other is in training mode: drop (Dropout)",
    )
    assert check_of(report, "determinism").first_divergence.startswith("drop of nnx")
    assert (nnx.Linear.__call__, module.drop.rngs.count.get_value()) == before  # type: ignore[union-attr]
    module.eval()
    report = compare(nnx_side(module), nnx_side(module, name="other"), mlp.inputs())
    assert failures(report) == {}
