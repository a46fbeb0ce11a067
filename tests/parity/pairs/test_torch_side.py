"""A PyTorch module as a side: it does not change, and what goes wrong in it is named."""

from __future__ import annotations

import copy
from typing import Any

import jax
import numpy as np
import pytest
import torch
from parity.pairs import mlp
from parity.pairs.test_compare import check_of, failures
from torch import nn

from gpt2_jax.parity.pairs.compare import compare
from gpt2_jax.parity.pairs.sides.jax_function import function_side
from gpt2_jax.parity.pairs.sides.side import SideError
from gpt2_jax.parity.pairs.sides.torch_module import module_layouts, torch_side


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc, self.act, self.drop, self.bn = (
            nn.Linear(5, 4),
            nn.ReLU(inplace=True),
            nn.Dropout(0.5),
            nn.BatchNorm1d(4),
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.bn(self.drop(self.act(self.fc(x))))


def test_the_module_does_not_change() -> None:
    module = Net().train()
    module.register_forward_hook(lambda *_: None)
    before, hooks = copy.deepcopy(module.state_dict()), len(module._forward_hooks)
    side = torch_side(module)
    for dtype in side.dtypes:
        side.forward(mlp.inputs(), dtype)
        side.gradients(mlp.inputs(), dtype)
    assert all(torch.equal(tensor, before[name]) for name, tensor in module.state_dict().items())
    assert module.training and all(child.training for child in module.modules())
    assert len(module._forward_hooks) == hooks
    assert all(not child._forward_hooks and not child._forward_pre_hooks for child in module.children())
    assert all(p.grad is None for p in module.parameters())
    assert torch.get_default_dtype() == torch.float32


def test_what_modules_receive_and_return_is_recorded_in_order() -> None:
    values = torch_side(Net().eval()).forward(mlp.inputs(), "float64").intermediates
    assert [*values] == [f"{m}{part}" for m in ("fc", "act", "drop", "bn") for part in (":input", "")]
    assert (values["fc"] < 0).any()  # not overwritten by the ReLU in place
    assert all(value.dtype == np.float64 for value in values.values())


def test_modules_in_training_mode_are_named() -> None:
    module = Net()
    found = torch_side(module).describe(mlp.inputs()).training
    assert found == ("drop (Dropout)", "bn (BatchNorm1d)")
    report = compare(torch_side(module), torch_side(Net().eval(), name="other"), mlp.inputs(), checks=["determinism"])
    assert report.diagnostics == ("torch is in training mode: drop (Dropout), bn (BatchNorm1d)",)
    assert check_of(report, "determinism").first_divergence == "drop of torch"
    module.drop.p = 0.0
    module.bn.eval()
    assert torch_side(module).describe(mlp.inputs()).training == ()


def test_updated_statistics_are_the_state() -> None:
    state = torch_side(Net()).forward(mlp.inputs(), "float64").state
    assert [*state] == ["bn.running_mean", "bn.running_var"]
    assert torch_side(Net().eval()).forward(mlp.inputs(), "float64").state == {}


def test_gradients_are_those_of_the_loss() -> None:
    module = nn.Linear(5, 4)
    (x,) = mlp.inputs()
    loss, gradients = torch_side(module, loss=lambda y, x: y.sum()).gradients((x,), "float64") or (0, {})
    assert np.allclose(gradients["weight"], np.broadcast_to(x.astype(np.float64).sum(0), (4, 5)), rtol=1e-12)
    assert np.isclose(loss, module.double()(torch.tensor(x).double()).sum().item())


def test_frozen_parameters_have_no_gradient() -> None:
    module = nn.Linear(5, 4)
    module.bias.requires_grad_(False)
    _, gradients = torch_side(module).gradients(mlp.inputs(), "float32") or (0, {})
    assert [*gradients] == ["weight"]


class Changes(nn.Module):
    def __init__(self, what: str) -> None:
        super().__init__()
        self.fc, self.what = nn.Linear(5, 4), what

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.what == "input":
            x.mul_(2)
        elif self.what == "parameter":
            self.fc.weight.data.mul_(2)
        elif self.what == "raise":
            return self.fc(x[:, :3])
        return self.fc(x)


@pytest.mark.parametrize(
    ("what", "place", "message"),
    [
        ("input", "", "the forward pass changes input 0 in place"),
        ("parameter", "fc.weight", "the forward pass changes this parameter in place"),
        ("raise", "fc", "RuntimeError: "),
    ],
)
def test_a_module_that_fails_is_reported_with_the_place(what: str, place: str, message: str) -> None:
    side = torch_side(Changes(what))
    with pytest.raises(SideError) as error:
        side.forward(mlp.inputs(), "float64")
    assert error.value.place == place
    assert error.value.message.startswith(message)
    report = compare(side, torch_side(nn.Linear(5, 4), name="other"), mlp.inputs(), checks=["outputs"])
    assert check_of(report, "outputs").measurements[0].location == place


def test_layouts_are_those_of_the_kinds_of_modules() -> None:
    module = nn.ModuleDict(
        {"conv": nn.Conv2d(2, 3, 3), "rnn": nn.LSTM(4, 5), "table": nn.Embedding(6, 7), "head": nn.Linear(3, 2)}
    )
    module.register_buffer("steps", torch.zeros(3))
    layouts = module_layouts(module)
    axes = {name: layout.axes for name, layout in layouts.items() if layout.axes}
    assert axes == {
        "conv.weight": "oihw",
        "rnn.weight_ih_l0": "gi",
        "rnn.weight_hh_l0": "gi",
        "rnn.bias_ih_l0": "g",
        "rnn.bias_hh_l0": "g",
        "table.weight": "vc",
        "head.weight": "oi",
    }
    assert layouts["rnn.weight_hh_l0"].blocks == ("i", "f", "g", "o")
    assert not layouts["steps"].required


def test_a_buffer_may_be_missing_on_the_other_side() -> None:
    class WithTable(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(5, 4)
            self.register_buffer("table", torch.ones(4))

        def forward(self, x: torch.Tensor) -> Any:
            return {"y": self.fc(x) * self.table}

    module = WithTable()
    params = {"fc": {name: p.detach().numpy() for name, p in module.fc.named_parameters()}}
    right = function_side(lambda p, x: x @ p["fc"]["weight"].T + p["fc"]["bias"], params)
    assert failures(compare(torch_side(module), right, mlp.inputs())) == {}


def test_a_gradient_that_is_zero_but_for_rounding_is_no_alarm() -> None:
    """Softmax does not depend on the bias of the keys."""

    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q, self.k, self.v = (nn.Linear(5, 8) for _ in range(3))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return (self.q(x) @ self.k(x).transpose(-1, -2)).softmax(-1) @ self.v(x)

    def call(params: Any, x: jax.Array) -> jax.Array:
        q, k, v = (x @ params[n]["weight"].T + params[n]["bias"] for n in "qkv")
        return jax.nn.softmax(q @ k.swapaxes(-1, -2)) @ v

    for seed in range(3):
        torch.manual_seed(seed)
        module = Attention()
        params = {n: {leaf: p.detach().numpy() for leaf, p in getattr(module, n).named_parameters()} for n in "qkv"}
        x = np.random.default_rng(seed).normal(size=(2, 7, 5))
        _, exact = torch_side(module).gradients((x,), "float64") or (0, {})
        assert np.abs(exact["k.bias"]).max() < 1e-14 * np.abs(exact["v.bias"]).max()
        report = compare(torch_side(module), function_side(call, params), [x], checks=["gradients"])
        assert failures(report) == {}
        biased = {**params, "k": {**params["k"], "bias": params["k"]["bias"] + 1}}
        report = compare(torch_side(module), function_side(call, biased), [x], checks=["parameters", "gradients"])
        assert {*failures(report)} >= {"parameters"}
