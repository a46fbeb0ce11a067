"""A GPT with rotary positions, RMSNorm, grouped heads and a tied head, as somebody writes it in PyTorch and in Flax.

`Choices` are what ports of such models get wrong.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
from flax import linen as nn
from torch import Tensor
from torch.nn import functional


@dataclass(frozen=True)
class Config:
    vocab: int = 40
    width: int = 32
    layers: int = 2
    heads: int = 4
    kv_heads: int = 2
    feed_forward: int = 48
    base: float = 10_000.0
    eps: float = 1e-6

    @property
    def head(self) -> int:
        return self.width // self.heads


class TorchNorm(torch.nn.Module):
    """RMSNorm with the weight 1 + w, as in Gemma."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(0.1 * torch.randn(config.width))
        self.eps = config.eps

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.eps) * (1 + self.weight)


class TorchAttention(torch.nn.Module):
    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        self.q_proj = torch.nn.Linear(config.width, config.heads * config.head, bias=False)
        self.k_proj = torch.nn.Linear(config.width, config.kv_heads * config.head, bias=False)
        self.v_proj = torch.nn.Linear(config.width, config.kv_heads * config.head, bias=False)
        self.o_proj = torch.nn.Linear(config.heads * config.head, config.width, bias=False)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        c, (B, T, _) = self.config, x.shape
        q = self.q_proj(x).view(B, T, c.heads, c.head).transpose(1, 2)
        k, v = (p(x).view(B, T, c.kv_heads, c.head).transpose(1, 2) for p in (self.k_proj, self.v_proj))
        positions = (mask.cumsum(-1) - 1).clamp(min=0)
        q, k = (self.rotate(each, positions) for each in (q, k))
        k, v = (each.repeat_interleave(c.heads // c.kv_heads, dim=1) for each in (k, v))
        scores = q @ k.transpose(-1, -2) / math.sqrt(c.head)
        seen = torch.ones(T, T, dtype=torch.bool).tril() & (mask[:, None, None, :] == 1)
        scores = scores.masked_fill(~seen, torch.finfo(scores.dtype).min)
        return self.o_proj((scores.softmax(-1) @ v).transpose(1, 2).reshape(B, T, -1))

    def rotate(self, x: Tensor, positions: Tensor) -> Tensor:
        half = self.config.head // 2
        frequencies = self.config.base ** (-torch.arange(half) / half)
        angles = (positions[:, None, :, None] * frequencies).to(x.dtype)
        a, b = x[..., :half], x[..., half:]
        return torch.cat([a * angles.cos() - b * angles.sin(), b * angles.cos() + a * angles.sin()], -1)


class TorchLayer(torch.nn.Module):
    def __init__(self, config: Config) -> None:
        super().__init__()
        self.input_norm, self.post_norm = TorchNorm(config), TorchNorm(config)
        self.attn = TorchAttention(config)
        self.up_proj = torch.nn.Linear(config.width, config.feed_forward)
        self.down_proj = torch.nn.Linear(config.feed_forward, config.width)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        x = x + self.attn(self.input_norm(x), mask)
        return x + self.down_proj(functional.gelu(self.up_proj(self.post_norm(x))))


class TorchGPT(torch.nn.Module):
    def __init__(self, config: Config = Config()) -> None:
        super().__init__()
        self.embed = torch.nn.Embedding(config.vocab, config.width)
        self.layers = torch.nn.ModuleList(TorchLayer(config) for _ in range(config.layers))
        self.norm = TorchNorm(config)
        self.head = torch.nn.Linear(config.width, config.vocab, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        x = self.embed(ids)
        for layer in self.layers:
            x = layer(x, mask)
        return self.head(self.norm(x))


@dataclass(frozen=True)
class Choices:
    """What a port can choose. The defaults are right."""

    interleaved: bool = False
    """Rotate neighbours, as in GPT-J, instead of halves, as in GPT-NeoX."""
    base: float = 10_000.0
    query_offset: int = 0
    """Added to the positions of queries, but not of keys."""
    eps: float = 1e-6
    plus_one: bool = True
    seen_ahead: int = 0
    """How many later positions attention sees."""
    scale: float | None = None
    tanh_gelu: bool = False
    tied: bool = True
    tile_heads: bool = False
    """Repeat the key heads as 0 1 0 1 instead of 0 0 1 1."""
    sees_padding: bool = False
    float32_norm: bool = False
    constant_rms: bool = False
    """No gradient through the root mean square of a norm."""
    residual_of_norm: bool = False
    dropout: float = 0.0


class Norm(nn.Module):
    choices: Choices

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        scale = self.param("scale", nn.initializers.zeros, x.shape[-1:])
        dtype = x.dtype
        x = x.astype(jnp.float32) if self.choices.float32_norm else x
        inverse = jax.lax.rsqrt(jnp.square(x).mean(-1, keepdims=True) + self.choices.eps)
        y = x * (jax.lax.stop_gradient(inverse) if self.choices.constant_rms else inverse)
        return y.astype(dtype) * (scale + 1 if self.choices.plus_one else scale)


class Attention(nn.Module):
    config: Config
    choices: Choices

    @nn.compact
    def __call__(self, x: jax.Array, mask: jax.Array) -> jax.Array:
        c, choices, (_B, T, _) = self.config, self.choices, x.shape
        q = nn.DenseGeneral((c.heads, c.head), use_bias=False, name="q_proj")(x)
        k = nn.DenseGeneral((c.kv_heads, c.head), use_bias=False, name="k_proj")(x)
        v = nn.DenseGeneral((c.kv_heads, c.head), use_bias=False, name="v_proj")(x)
        positions = jnp.maximum(jnp.cumsum(mask, -1) - 1, 0)
        q, k = self.rotate(q, positions + choices.query_offset), self.rotate(k, positions)
        groups = c.heads // c.kv_heads
        k, v = ((jnp.tile(e, (1, 1, groups, 1)) if choices.tile_heads else jnp.repeat(e, groups, 2)) for e in (k, v))
        scale = 1 / math.sqrt(c.head) if choices.scale is None else choices.scale
        scores = jnp.einsum("bqhk,bshk->bhqs", q, k) * scale
        seen = jnp.tril(jnp.ones((T, T), bool), choices.seen_ahead)
        seen = seen if choices.sees_padding else seen & (mask[:, None, None, :] == 1)
        weights = nn.softmax(jnp.where(seen, scores, jnp.finfo(scores.dtype).min))
        y = jnp.einsum("bhqs,bshk->bqhk", weights, v)
        return nn.DenseGeneral(c.width, axis=(-2, -1), use_bias=False, name="o_proj")(y)

    def rotate(self, x: jax.Array, positions: jax.Array) -> jax.Array:
        half = self.config.head // 2
        frequencies = self.choices.base ** (-jnp.arange(half) / half)
        angles = (positions[:, :, None, None] * frequencies).astype(x.dtype)
        cos, sin = jnp.cos(angles), jnp.sin(angles)
        if self.choices.interleaved:
            a, b = x[..., ::2], x[..., 1::2]
            return jnp.stack([a * cos - b * sin, b * cos + a * sin], -1).reshape(x.shape)
        a, b = x[..., :half], x[..., half:]
        return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], -1)


class Layer(nn.Module):
    config: Config
    choices: Choices

    @nn.compact
    def __call__(self, x: jax.Array, mask: jax.Array) -> jax.Array:
        c, normed = self.config, Norm(self.choices, name="input_norm")(x)
        x = (normed if self.choices.residual_of_norm else x) + Attention(c, self.choices, name="attn")(normed, mask)
        y = nn.Dense(c.feed_forward, name="up_proj")(Norm(self.choices, name="post_norm")(x))
        y = nn.Dropout(self.choices.dropout, deterministic=not self.choices.dropout)(y)
        return x + nn.Dense(c.width, name="down_proj")(nn.gelu(y, approximate=self.choices.tanh_gelu))


class FlaxGPT(nn.Module):
    config: Config = Config()
    choices: Choices = Choices()

    @nn.compact
    def __call__(self, ids: jax.Array, mask: jax.Array) -> jax.Array:
        embed = nn.Embed(self.config.vocab, self.config.width, name="embed")
        x = embed(ids)
        for k in range(self.config.layers):
            x = Layer(self.config, self.choices, name=f"layers_{k}")(x, mask)
        x = Norm(self.choices, name="norm")(x)
        return embed.attend(x) if self.choices.tied else nn.Dense(self.config.vocab, use_bias=False, name="head")(x)


def converted(model: TorchGPT, config: Config = Config()) -> dict[str, Any]:
    """The Flax parameters of a PyTorch model."""
    state = {name: tensor.numpy().copy() for name, tensor in model.state_dict().items()}
    heads, kv_heads = (config.heads, config.head), (config.kv_heads, config.head)

    def dense(name: str) -> dict[str, np.ndarray]:
        return {"kernel": state[f"{name}.weight"].T, "bias": state[f"{name}.bias"]}

    tree: dict[str, Any] = {"embed": {"embedding": state["embed.weight"]}, "norm": {"scale": state["norm.weight"]}}
    for k in range(config.layers):
        at = f"layers.{k}"
        shapes = {"q": heads, "k": kv_heads, "v": kv_heads}
        attn = {
            f"{x}_proj": {"kernel": state[f"{at}.attn.{x}_proj.weight"].T.reshape(config.width, *shape)}
            for x, shape in shapes.items()
        }
        attn["o_proj"] = {"kernel": state[f"{at}.attn.o_proj.weight"].T.reshape(*heads, config.width)}
        tree[f"layers_{k}"] = {
            "attn": attn,
            "input_norm": {"scale": state[f"{at}.input_norm.weight"]},
            "post_norm": {"scale": state[f"{at}.post_norm.weight"]},
            "up_proj": dense(f"{at}.up_proj"),
            "down_proj": dense(f"{at}.down_proj"),
        }
    return tree


def inputs_of(config: Config = Config(), shape: tuple[int, int] = (2, 7), seed: int = 0) -> tuple[np.ndarray, ...]:
    """Token ids and a mask without padding."""
    ids = np.random.default_rng(seed).integers(0, config.vocab, shape)
    return ids, np.ones(shape, np.int64)
