"""A residual block with batch norm, as somebody writes it in PyTorch (NCHW) and in Flax (NHWC)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
import torch
from flax import linen as nn
from torch import Tensor


@dataclass(frozen=True)
class Config:
    channels: int = 3
    width: int = 4
    stride: int = 2
    eps: float = 1e-5
    momentum: float = 0.1
    """The weight of the new statistics, as in PyTorch."""


class TorchBlock(torch.nn.Module):
    def __init__(self, config: Config = Config()) -> None:
        super().__init__()
        c, w = config.channels, config.width
        self.conv1 = torch.nn.Conv2d(c, w, 3, config.stride, 1, bias=False)
        self.conv2 = torch.nn.Conv2d(w, w, 3, 1, 1, bias=False)
        self.shortcut = torch.nn.Conv2d(c, w, 1, config.stride, bias=False)
        self.bn1, self.bn2, self.bn3 = (torch.nn.BatchNorm2d(w, config.eps, config.momentum) for _ in range(3))
        self.relu = torch.nn.ReLU(inplace=True)
        self.fc = torch.nn.Linear(w, 5)

    def forward(self, x: Tensor) -> Tensor:
        y = self.relu(self.bn1(self.conv1(x)))
        y = self.relu(self.bn2(self.conv2(y)) + self.bn3(self.shortcut(x)))
        return self.fc(y.mean((2, 3)))


def torch_block(config: Config = Config(), seed: int = 0) -> TorchBlock:
    """A block in evaluation mode, whose statistics are those of training."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        block = TorchBlock(config)
        for norm in (block.bn1, block.bn2, block.bn3):
            for tensor in (norm.weight.data, norm.running_var):
                tensor.uniform_(0.5, 1.5)
            for tensor in (norm.bias.data, norm.running_mean):
                tensor.normal_(std=0.3)
    return block.eval()


@dataclass(frozen=True)
class Choices:
    """What a port can choose. The defaults are right, except that Flax averages the biased variance."""

    eps: float = 1e-5
    momentum: float = 0.9
    """The weight of the old statistics, as in Flax."""
    train: bool = False
    same_padding: bool = False
    relu_before_sum: bool = False
    stride_in_second: bool = False
    leaky: float = 0.0
    sum_for_mean: bool = False


class FlaxBlock(nn.Module):
    config: Config = Config()
    choices: Choices = Choices()

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        c, choices = self.config, self.choices
        padding = "SAME" if choices.same_padding else ((1, 1), (1, 1))
        first, second = (1, c.stride) if choices.stride_in_second else (c.stride, 1)

        def conv(width: int, size: int, stride: int, name: str) -> nn.Conv:
            around = padding if size == 3 else "VALID"
            return nn.Conv(width, (size, size), (stride, stride), around, use_bias=False, name=name)

        def norm(name: str) -> nn.BatchNorm:
            return nn.BatchNorm(not choices.train, momentum=choices.momentum, epsilon=choices.eps, name=name)

        def relu(x: jax.Array) -> jax.Array:
            return nn.leaky_relu(x, choices.leaky) if choices.leaky else nn.relu(x)

        y = relu(norm("bn1")(conv(c.width, 3, first, "conv1")(x)))
        y = norm("bn2")(conv(c.width, 3, second, "conv2")(y))
        short = norm("bn3")(conv(c.width, 1, c.stride, "shortcut")(x))
        y = relu(y) + short if choices.relu_before_sum else relu(y + short)
        return nn.Dense(5, name="fc")(y.sum((1, 2)) if choices.sum_for_mean else y.mean((1, 2)))


def converted(block: TorchBlock) -> dict[str, Any]:
    """The Flax variables of a PyTorch block."""
    state = {name: tensor.numpy().copy() for name, tensor in block.state_dict().items()}
    params: dict[str, Any] = {"fc": {"kernel": state["fc.weight"].T, "bias": state["fc.bias"]}}
    statistics = {}
    for name in ("conv1", "conv2", "shortcut"):
        params[name] = {"kernel": state[f"{name}.weight"].transpose(2, 3, 1, 0)}
    for name in ("bn1", "bn2", "bn3"):
        params[name] = {"scale": state[f"{name}.weight"], "bias": state[f"{name}.bias"]}
        statistics[name] = {"mean": state[f"{name}.running_mean"], "var": state[f"{name}.running_var"]}
    return {"params": params, "batch_stats": statistics}


def inputs_of(config: Config = Config(), batch: int = 3, size: int = 6, seed: int = 0) -> tuple[np.ndarray, ...]:
    """Images [N, C, H, W]."""
    rng = np.random.default_rng(seed)
    return (rng.normal(size=(batch, config.channels, size, size)).astype(np.float32),)
