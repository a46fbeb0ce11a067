"""GPT-2 in PyTorch: the reference that `gpt2_jax.model` is measured against.

Axis letters, the same in both backends: B batch, T query length, S key length, D n_embd, H heads,
K head size, F feed-forward, V vocabulary, P positions, L layers.

Parameter names and layouts are OpenAI's and Hugging Face's, so a pretrained state_dict goes straight
into `GPT2.load_state_dict`. Source: Radford et al. 2019, "Language Models are Unsupervised Multitask
Learners", section 2.3, and the code released with it (gpt-2/src/model.py).
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

import bridge
from bridge import GPT2Config

ACTIVATIONS: Mapping[str, Callable[[Tensor], Tensor]] = {
    "gelu_new": lambda x: F.gelu(x, approximate="tanh"),
    "gelu": F.gelu,  # the exact form, with erf
    "gelu_fast": lambda x: 0.5 * x * (1.0 + torch.tanh(0.7978845608 * x * (1.0 + 0.044715 * x * x))),
    "gelu_pytorch_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),
    "relu": F.relu,
    "silu": F.silu,
    "swish": F.silu,
    "tanh": torch.tanh,
}


@dataclass
class KVCache:
    """What attention needs of the tokens so far, so that none is run twice: `GPT2.extend` writes into it.

    Each row's tokens stand in slots that follow each other; rows with fewer begin later.
    """

    keys: list[Float[Tensor, "B H S K"]]
    """One tensor per layer."""
    values: list[Float[Tensor, "B H S K"]]
    padding: Int[Tensor, " B"]
    """How many slots of a row, at its beginning, hold no token."""
    length: int = 0
    """How many slots are filled; `GPT2.extend` writes to those that follow."""

    def of_rows(self, rows: Int[Tensor, " R"]) -> KVCache:
        """A copy whose rows are these rows."""
        keys, values = ([tensor[rows] for tensor in tensors] for tensors in (self.keys, self.values))
        return KVCache(keys, values, self.padding[rows], self.length)


def empty_cache(config: GPT2Config, padding: Int[Tensor, " B"], slots: int, dtype: torch.dtype) -> KVCache:
    """Room for `slots` tokens in each row, padding counted."""
    B, H, K, L = padding.shape[0], config.n_head, config.head_size, config.n_layer
    keys, values = (
        [torch.zeros(B, H, slots, K, dtype=dtype, device=padding.device) for _ in range(L)] for _ in range(2)
    )
    return KVCache(keys, values, padding)


class Projection(nn.Module):
    """x W + b with W stored `[in, out]`, as OpenAI stores it ("Conv1D" in Hugging Face)."""

    def __init__(self, n_in: int, n_out: int, *, bias: bool, std: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(n_in, n_out).normal_(std=std))
        self.bias = nn.Parameter(torch.zeros(n_out)) if bias else None

    def forward(self, x: Float[Tensor, "*batch n_in"]) -> Float[Tensor, "*batch n_out"]:
        return F.linear(x, self.weight.T, self.bias)


class QKVProjection(Projection):
    """`c_attn`: the query, key and value projections side by side on the out axis."""

    def __init__(self, config: GPT2Config) -> None:
        super().__init__(config.n_embd, 3 * config.n_embd, bias=config.bias, std=config.initializer_range)
        self.head_shape = (config.n_head, config.head_size)

    def forward(  # type: ignore[override]
        self, query: Float[Tensor, "B T D"], key: Float[Tensor, "B S D"], value: Float[Tensor, "B S D"]
    ) -> tuple[Float[Tensor, "B T H K"], Float[Tensor, "B S H K"], Float[Tensor, "B S H K"]]:
        if query is key and key is value:  # self-attention: one product
            q, k, v = super().forward(query).chunk(3, dim=-1)
        else:
            weights = self.weight.chunk(3, dim=-1)
            biases = (None, None, None) if self.bias is None else self.bias.chunk(3)
            q, k, v = (F.linear(x, w.T, b) for x, w, b in zip((query, key, value), weights, biases, strict=True))
        q_BTHK, k_BSHK, v_BSHK = (x.unflatten(-1, self.head_shape) for x in (q, k, v))
        return q_BTHK, k_BSHK, v_BSHK


class MultiHeadAttention(nn.Module):
    """Scaled dot-product attention over several heads (Vaswani et al. 2017, section 3.2.2).

    Where query, key and value are one and the same object they are projected in one product;
    cross-attention, and equal tensors that are different objects, take three.
    """

    def __init__(self, config: GPT2Config) -> None:
        super().__init__()
        self.config = config
        self.c_attn = QKVProjection(config)
        self.c_proj = Projection(config.n_embd, config.n_embd, bias=config.bias, std=config.residual_std)

    def forward(
        self,
        query: Float[Tensor, "B T D"],
        key: Float[Tensor, "B S D"],
        value: Float[Tensor, "B S D"],
        mask: Bool[Tensor, "#B #H #T S"] | None = None,
        *,
        is_causal: bool = False,
        layer_index: int = 0,
    ) -> Float[Tensor, "B T D"]:
        """
        Args:
            mask: True where a query may see a key; None lets it see all. A query that may see no
                key attends to all of them evenly, so padding stays finite.
            is_causal: besides, hide every key that comes after the query; needs T == S.
            layer_index: counted from 0; used by `scale_attn_by_inverse_layer_idx`.
        """
        q_BTHK, k_BSHK, v_BSHK = self.c_attn(query, key, value)
        context_BTHK = attention(
            q_BTHK,
            k_BSHK,
            v_BSHK,
            mask,
            is_causal=is_causal,
            scale=self._scale(layer_index),
            dropout_rate=self.config.attn_pdrop if self.training else 0.0,
            upcast=self.config.reorder_and_upcast_attn,
        )
        return self.c_proj(context_BTHK.flatten(-2))

    def extend(
        self,
        x: Float[Tensor, "B T D"],
        keys_BHSK: Float[Tensor, "B H S K"],
        values_BHSK: Float[Tensor, "B H S K"],
        mask: Bool[Tensor, "B 1 T seen"],
        length: int,
        *,
        layer_index: int = 0,
    ) -> Float[Tensor, "B T D"]:
        """Self-attention of T more tokens, whose keys and values go to the slots from `length` on."""
        q_BTHK, k_BTHK, v_BTHK = self.c_attn(x, x, x)
        end = length + x.shape[1]
        keys_BHSK[:, :, length:end], values_BHSK[:, :, length:end] = k_BTHK.transpose(1, 2), v_BTHK.transpose(1, 2)
        context_BTHK = attention(
            q_BTHK,
            keys_BHSK[:, :, :end].transpose(1, 2),
            values_BHSK[:, :, :end].transpose(1, 2),
            mask,
            is_causal=False,
            scale=self._scale(layer_index),
            upcast=self.config.reorder_and_upcast_attn,
        )
        return self.c_proj(context_BTHK.flatten(-2))

    def _scale(self, layer_index: int) -> float:
        scale = 1.0
        if self.config.scale_attn_weights:
            scale = scale / math.sqrt(self.config.head_size)
        if self.config.scale_attn_by_inverse_layer_idx:
            scale = scale / (layer_index + 1)
        return scale


def attention(
    q_BTHK: Float[Tensor, "B T H K"],
    k_BSHK: Float[Tensor, "B S H K"],
    v_BSHK: Float[Tensor, "B S H K"],
    mask: Bool[Tensor, "#B #H #T S"] | None,
    *,
    is_causal: bool,
    scale: float,
    dropout_rate: float = 0.0,
    upcast: bool = False,
) -> Float[Tensor, "B T H K"]:
    """softmax(scale q k^T) v, each query over the keys it may see, through torch's fused kernels.

    `upcast` computes it in float32 at least, whatever the dtype of q, k and v, under autocast too.
    """
    T, S, dtype = q_BTHK.shape[1], k_BSHK.shape[1], v_BSHK.dtype
    if is_causal and T != S:
        raise ValueError(f"causal attention needs as many queries as keys, not {T} and {S}; pass a mask instead")
    if upcast:
        wide = torch.promote_types(dtype, torch.float32)
        q_BTHK, k_BSHK, v_BSHK = q_BTHK.to(wide), k_BSHK.to(wide), v_BSHK.to(wide)
    added = None
    if mask is not None:
        if is_causal:
            mask = mask & torch.ones(T, S, dtype=torch.bool, device=mask.device).tril()
        # The most negative number and not -inf: a row of -inf would be NaN after softmax.
        added = torch.zeros(mask.shape, dtype=q_BTHK.dtype, device=mask.device)
        added = added.masked_fill(~mask, torch.finfo(q_BTHK.dtype).min)
    # Autocast would narrow again what was just widened.
    with torch.autocast(q_BTHK.device.type, enabled=False) if upcast else contextlib.nullcontext():
        context_BHTK = F.scaled_dot_product_attention(
            q_BTHK.transpose(1, 2),
            k_BSHK.transpose(1, 2),
            v_BSHK.transpose(1, 2),
            attn_mask=added,
            dropout_p=dropout_rate,
            is_causal=is_causal and mask is None,
            scale=scale,
        )
    return context_BHTK.transpose(1, 2).to(dtype)


class FeedForward(nn.Module):
    """Two projections with the configured activation between (Vaswani et al. 2017, section 3.3)."""

    def __init__(self, config: GPT2Config) -> None:
        super().__init__()
        D, F_ = config.n_embd, config.feed_forward_size
        self.config = config
        self.c_fc = Projection(D, F_, bias=config.bias, std=config.initializer_range)
        self.c_proj = Projection(F_, D, bias=config.bias, std=config.residual_std)

    def forward(self, x: Float[Tensor, "B T D"]) -> Float[Tensor, "B T D"]:
        return self.c_proj(ACTIVATIONS[self.config.activation_function](self.c_fc(x)))


class GPT2Layer(nn.Module):
    """x + attention(norm(x)), then x + feed_forward(norm(x)): pre-norm residuals (section 2.3).

    Causal unless asked otherwise; `mask` is as in `MultiHeadAttention`.
    """

    def __init__(self, config: GPT2Config) -> None:
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd, config.layer_norm_epsilon, bias=config.bias)
        self.attn = MultiHeadAttention(config)
        self.ln_2 = nn.LayerNorm(config.n_embd, config.layer_norm_epsilon, bias=config.bias)
        self.mlp = FeedForward(config)
        self.drop = nn.Dropout(config.resid_pdrop)

    def forward(
        self,
        x: Float[Tensor, "B T D"],
        mask: Bool[Tensor, "#B #H #T S"] | None = None,
        *,
        is_causal: bool = True,
        layer_index: int = 0,
    ) -> Float[Tensor, "B T D"]:
        normed = self.ln_1(x)
        x = x + self.drop(self.attn(normed, normed, normed, mask, is_causal=is_causal, layer_index=layer_index))
        return x + self.drop(self.mlp(self.ln_2(x)))

    def extend(
        self,
        x: Float[Tensor, "B T D"],
        keys_BHSK: Float[Tensor, "B H S K"],
        values_BHSK: Float[Tensor, "B H S K"],
        mask: Bool[Tensor, "B 1 T seen"],
        length: int,
        *,
        layer_index: int = 0,
    ) -> Float[Tensor, "B T D"]:
        """The layer for T more tokens; see `MultiHeadAttention.extend`."""
        x = x + self.attn.extend(self.ln_1(x), keys_BHSK, values_BHSK, mask, length, layer_index=layer_index)
        return x + self.mlp(self.ln_2(x))


class GPT2(nn.Module):
    """Token and position embeddings, L layers, a final norm, and the output head.

    `state_dict()` has exactly the canonical names of `bridge.parameters`; a tied head has none.
    `load_state_dict` also takes names with the prefixes `transformer.`, `module.` and `_orig_mod.`,
    causal-mask buffers, and a tied `lm_head.weight` that equals `wte.weight`.
    """

    def __init__(self, config: GPT2Config) -> None:
        super().__init__()
        self.config = config
        V, P, D = config.vocab_size, config.n_positions, config.n_embd
        self.wte = _embedding(V, D, config.initializer_range)
        self.wpe = _embedding(P, D, config.initializer_range)
        self.drop = nn.Dropout(config.embd_pdrop)
        self.h = nn.ModuleList(GPT2Layer(config) for _ in range(config.n_layer))
        self.ln_f = nn.LayerNorm(D, config.layer_norm_epsilon, bias=config.bias)
        self.lm_head = None if config.tie_word_embeddings else _embedding(V, D, config.initializer_range)
        self.register_load_state_dict_pre_hook(_canonicalize_names)

    def forward(
        self, input_ids: Int[Tensor, "B T"], attention_mask: Int[Tensor, "B T"] | None = None
    ) -> Float[Tensor, "B T V"]:
        """Logits of the next token after each position.

        Args:
            input_ids: token ids, each below `vocab_size`.
            attention_mask: 1 for tokens, 0 for padding, left or right. Positions count tokens
                only. What comes out at padding is finite and means nothing.

        Raises:
            ValueError: for a sequence longer than `n_positions`, or a mask of another shape.
            IndexError: for an id outside the vocabulary (on CPU; a GPU asserts by itself).
        """
        return self.head(self.hidden(input_ids, attention_mask))

    def hidden(
        self, input_ids: Int[Tensor, "B T"], attention_mask: Int[Tensor, "B T"] | None = None
    ) -> Float[Tensor, "B T D"]:
        """What `head` turns into the logits. Arguments as in `forward`."""
        check_inputs(self.config, input_ids, attention_mask)
        mask = None if attention_mask is None else attention_mask.bool()[:, None, None, :]
        x = self.drop(self.wte(input_ids) + self.wpe(positions(input_ids, attention_mask)))
        for i, layer in enumerate(self.h):
            x = layer(x, mask, layer_index=i)
        return self.ln_f(x)

    def extend(self, input_ids: Int[Tensor, "B T"], cache: KVCache) -> Float[Tensor, "B T D"]:
        """What `head` turns into the logits after each of T more tokens, which go into the cache.

        Slots of padding come out finite and mean nothing. The cache must have room for T more slots, and no
        row may get more than `n_positions` tokens. Dropout is not applied.
        """
        end = cache.length + input_ids.shape[1]
        slots_T = torch.arange(cache.length, end, device=input_ids.device)
        slots_S = torch.arange(end, device=input_ids.device)
        padding_B1 = cache.padding[:, None]
        mask_BTS = (slots_S <= slots_T[:, None]) & (slots_S >= padding_B1[..., None])
        x = self.wte(input_ids) + self.wpe((slots_T - padding_B1).clamp(min=0))
        for i, layer in enumerate(cast("Iterable[GPT2Layer]", self.h)):
            x = layer.extend(x, cache.keys[i], cache.values[i], mask_BTS[:, None], cache.length, layer_index=i)
        cache.length = end
        return self.ln_f(x)

    def head(self, x: Float[Tensor, "*batch D"]) -> Float[Tensor, "*batch V"]:
        """Logits of the next token, in the model's dtype."""
        head = self.wte if self.lm_head is None else self.lm_head
        return F.linear(x, head.weight)

    @classmethod
    def from_pretrained(cls, source: str | Path, *, activation: str | None = None) -> GPT2:
        """Load a model from a checkpoint in any format or from a Hugging Face id, in its dtype and in eval mode.

        Args:
            activation: the activation of a nanoGPT file that does not state it; see `bridge.load`.

        Raises `bridge.BridgeError` for anything that is not a GPT-2 checkpoint.
        """
        from gpt2_torch.loading import model_from_checkpoint

        return model_from_checkpoint(bridge.load(source, activation=activation))


def positions(input_ids: Int[Tensor, "B T"], attention_mask: Int[Tensor, "B T"] | None) -> Int[Tensor, "#B T"]:
    """Which row of `wpe` each token takes: the number of tokens before it, padding not counted."""
    if attention_mask is None:
        return torch.arange(input_ids.shape[1], device=input_ids.device)[None]
    return (attention_mask.bool().cumsum(dim=1) - 1).clamp(min=0)


def _embedding(rows: int, width: int, std: float) -> nn.Embedding:
    embedding = nn.Embedding(rows, width, _weight=torch.empty(rows, width))
    nn.init.normal_(embedding.weight, std=std)
    return embedding


def check_form(input_ids: Tensor) -> None:
    """Raise `ValueError` for what are no token ids."""
    if input_ids.ndim != 2 or input_ids.dtype.is_floating_point:
        raise ValueError(
            f"input_ids must be integers [batch, length], not {input_ids.dtype} of shape {tuple(input_ids.shape)}"
        )


def check_inputs(config: GPT2Config, input_ids: Tensor, attention_mask: Tensor | None = None) -> None:
    """Raise what `GPT2.forward` documents."""
    check_form(input_ids)
    if input_ids.shape[1] > config.n_positions:
        raise ValueError(f"{input_ids.shape[1]} tokens; the model has n_positions={config.n_positions}")
    if attention_mask is not None and attention_mask.shape != input_ids.shape:
        raise ValueError(f"attention_mask is {tuple(attention_mask.shape)}, input_ids {tuple(input_ids.shape)}")
    # Looking at values would wait for a GPU, and break the graph of torch.compile.
    if input_ids.device.type == "cpu" and not torch.compiler.is_compiling() and input_ids.numel():
        low, high = int(input_ids.min()), int(input_ids.max())
        if low < 0 or high >= config.vocab_size:
            raise IndexError(f"token ids from {low} to {high}; the vocabulary is 0 to {config.vocab_size - 1}")


def _same_bytes(a: Tensor, b: Tensor) -> bool:
    """Bit for bit, so that NaN equals itself."""
    return a.dtype == b.dtype and torch.equal(*(x.detach().contiguous().view(torch.uint8) for x in (a, b)))


def _canonicalize_names(module: nn.Module, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
    """Before loading: rename in place what is this model's, drop what the model does not hold."""
    own = {name.removeprefix(prefix): name for name in state_dict if name.startswith(prefix)}
    renamed = {name: state_dict[own[given]] for name, given in bridge.canonical_names(own).items()}
    head, embedding = renamed.get("lm_head.weight"), renamed.get("wte.weight")
    if getattr(module, "lm_head", None) is None and head is not None and embedding is not None:
        if _same_bytes(head, embedding):  # a different head stays, to be reported as unexpected
            del renamed["lm_head.weight"]
    for name in own.values():
        del state_dict[name]
    state_dict.update({prefix + name: tensor for name, tensor in renamed.items()})
