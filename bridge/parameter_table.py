"""The table of parameters: one row per parameter of a GPT-2. Names, shapes, order and counts derive from it.

Axis letters, here and in both backends: D n_embd, H heads, K head size, F feed-forward,
V vocabulary, P positions, L layers; "3" is query, key, value. An axis in parentheses is one axis
in PyTorch and split in Flax, so conversion is a reshape and never a transpose:

    "D (3 H K)"   torch [768, 2304]   flax [768, 3, 12, 64]
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from bridge.config import GPT2Config


@dataclass(frozen=True)
class Row:
    """A row of the table. In names, `{i}` stands for the layer."""

    torch: str
    flax: str
    axes: str
    only_if: str = "always"
    """When the parameter exists: always, with biases, or with an untied head."""


PARAMETERS = (
    Row("wte.weight", "wte/embedding", "V D"),
    Row("wpe.weight", "wpe/embedding", "P D"),
    Row("h.{i}.ln_1.weight", "h_{i}/ln_1/scale", "D"),
    Row("h.{i}.ln_1.bias", "h_{i}/ln_1/bias", "D", "bias"),
    Row("h.{i}.attn.c_attn.weight", "h_{i}/attn/c_attn/kernel", "D (3 H K)"),
    Row("h.{i}.attn.c_attn.bias", "h_{i}/attn/c_attn/bias", "(3 H K)", "bias"),
    Row("h.{i}.attn.c_proj.weight", "h_{i}/attn/c_proj/kernel", "(H K) D"),
    Row("h.{i}.attn.c_proj.bias", "h_{i}/attn/c_proj/bias", "D", "bias"),
    Row("h.{i}.ln_2.weight", "h_{i}/ln_2/scale", "D"),
    Row("h.{i}.ln_2.bias", "h_{i}/ln_2/bias", "D", "bias"),
    Row("h.{i}.mlp.c_fc.weight", "h_{i}/mlp/c_fc/kernel", "D F"),
    Row("h.{i}.mlp.c_fc.bias", "h_{i}/mlp/c_fc/bias", "F", "bias"),
    Row("h.{i}.mlp.c_proj.weight", "h_{i}/mlp/c_proj/kernel", "F D"),
    Row("h.{i}.mlp.c_proj.bias", "h_{i}/mlp/c_proj/bias", "D", "bias"),
    Row("ln_f.weight", "ln_f/scale", "D"),
    Row("ln_f.bias", "ln_f/bias", "D", "bias"),
    Row("lm_head.weight", "lm_head/embedding", "V D", "untied"),
)

VOCABULARY_ROWS = frozenset({"wte.weight", "lm_head.weight"})
"""The canonical names of the parameters with one row per token."""

DECAYS: Mapping[str, bool] = {"kernel": True, "embedding": True, "bias": False, "scale": False}
"""Whether a parameter has weight decay, by the last part of its Flax path: projections and embeddings have it, biases
and LayerNorm scales do not. The number of axes cannot decide it, because biases of stacked layers have two.
Source: nanoGPT, `configure_optimizers`."""


@dataclass(frozen=True)
class Parameter:
    """A parameter of a particular model: a row of the table with its layer and sizes."""

    torch_name: str
    torch_shape: tuple[int, ...]
    flax_path: tuple[str, ...]
    flax_shape: tuple[int, ...]
    layer: int | None

    @property
    def decays(self) -> bool:
        """Whether it has weight decay."""
        return DECAYS[self.flax_path[-1]]

    @property
    def has_vocabulary_rows(self) -> bool:
        """Whether it has one row per token."""
        return self.torch_name in VOCABULARY_ROWS

    @property
    def is_projection(self) -> bool:
        """Whether it is a matrix `[in, out]` that other layouts store as `[out, in]`."""
        return self.flax_path[-1] == "kernel"


def parameters(config: GPT2Config) -> tuple[Parameter, ...]:
    """Return the parameters of a model, in the order of a forward pass."""
    return tuple(_parameters(config))


def num_parameters(config: GPT2Config) -> int:
    """Return the number of learned values. A tied head is counted once, as the token embedding."""
    per_layer = sum(math.prod(p.torch_shape) for p in _parameters(config, layers=1) if p.layer is not None)
    outside = sum(math.prod(p.torch_shape) for p in _parameters(config, layers=1) if p.layer is None)
    return outside + config.n_layer * per_layer


def padded_vocab_size(vocab_size: int, multiple: int) -> int:
    """Return `vocab_size` rounded up to a multiple of `multiple`. Padded sizes are faster on tiled hardware."""
    if multiple < 1:
        raise ValueError(f"cannot pad the vocabulary to a multiple of {multiple}; use 1 for no padding")
    return -(-vocab_size // multiple) * multiple


def _parameters(config: GPT2Config, layers: int | None = None) -> Iterator[Parameter]:
    sizes = {
        "V": config.vocab_size,
        "P": config.n_positions,
        "D": config.n_embd,
        "H": config.n_head,
        "K": config.head_size,
        "F": config.feed_forward_size,
        "3": 3,
    }
    exists = {"always": True, "bias": config.bias, "untied": not config.tie_word_embeddings}
    rows = [row for row in PARAMETERS if exists[row.only_if]]
    first, last = (f([k for k, row in enumerate(rows) if "{i}" in row.torch]) for f in (min, max))
    for row in rows[:first]:
        yield _filled_in(row, sizes)
    for i in range(config.n_layer if layers is None else layers):
        for row in rows[first : last + 1]:
            yield _filled_in(row, sizes, i)
    for row in rows[last + 1 :]:
        yield _filled_in(row, sizes)


def _filled_in(row: Row, sizes: dict[str, int], layer: int | None = None) -> Parameter:
    return Parameter(
        torch_name=row.torch.format(i=layer),
        torch_shape=tuple(math.prod(sizes[a] for a in axis) for axis in _torch_axes(row.axes)),
        flax_path=tuple(row.flax.format(i=layer).split("/")),
        flax_shape=tuple(sizes[a] for a in row.axes if a in sizes),
        layer=layer,
    )


def _torch_axes(axes: str) -> list[list[str]]:
    """`"D (3 H K)"` -> `[["D"], ["3", "H", "K"]]`."""
    grouped: list[list[str]] = []
    inside = False
    for token in axes.replace("(", "( ").replace(")", " )").split():
        if token in "()":
            inside = token == "("
            if inside:
                grouped.append([])
        elif inside:
            grouped[-1].append(token)
        else:
            grouped.append([token])
    return grouped
