"""GPT-2 in PyTorch: the reference for `gpt2_jax.model`, with the same classes in the same order.

Axis letters, the same in both backends: B batch, T query length, S key length, D n_embd, H heads,
K head size, F feed-forward, V vocabulary, P positions, L layers.

Parameter names and layouts are OpenAI's and Hugging Face's, so a pretrained state_dict goes straight
into `GPT2.load_state_dict`. Source: Radford et al. 2019, "Language Models are Unsupervised Multitask
Learners", section 2.3, and the code released with it (gpt-2/src/model.py).
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import cast

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

import bridge
from bridge import Checkpoint, GPT2Config
from gpt2_torch.arrays import normal_tensor, tensor_from_array
from gpt2_torch.ops import kv_cache
from gpt2_torch.ops.activations import ACTIVATIONS
from gpt2_torch.ops.attention import attention, score_scale
from gpt2_torch.ops.kv_cache import KVCache
from gpt2_torch.state_dict import canonicalize_names


class Embedding(nn.Embedding):
    """One row for each id. Raises `IndexError` for an id outside the table."""

    def __init__(self, rows: int, width: int, std: float) -> None:
        super().__init__(rows, width, _weight=normal_tensor(rows, width, std=std))


class Projection(nn.Module):
    """x W + b with W stored `[in, out]`, as OpenAI stores it ("Conv1D" in Hugging Face)."""

    def __init__(self, n_in: int, n_out: int, *, bias: bool, std: float) -> None:
        super().__init__()
        self.weight: nn.Parameter = nn.Parameter(normal_tensor(n_in, n_out, std=std))
        self.bias: nn.Parameter | None = nn.Parameter(torch.zeros(n_out)) if bias else None

    def forward(self, x: Float[Tensor, "*batch n_in"]) -> Float[Tensor, "*batch n_out"]:
        return F.linear(x, self.weight.T, self.bias)


class LayerNorm(nn.LayerNorm):
    """Layer normalization (Ba et al. 2016)."""

    def __init__(self, config: GPT2Config) -> None:
        super().__init__(config.n_embd, config.layer_norm_epsilon, bias=config.bias)


class QKVProjection(Projection):
    """`c_attn`: the query, key and value projections side by side on the out axis."""

    def __init__(self, config: GPT2Config) -> None:
        super().__init__(config.n_embd, 3 * config.n_embd, bias=config.bias, std=config.initializer_range)
        self.head_shape: tuple[int, int] = (config.n_head, config.head_size)

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

    If query, key and value are the same object, one product projects them. Cross-attention, and equal
    tensors that are different objects, take three products.
    """

    def __init__(self, config: GPT2Config) -> None:
        super().__init__()
        self.config = config
        self.c_attn: QKVProjection = QKVProjection(config)
        self.c_proj: Projection = Projection(config.n_embd, config.n_embd, bias=config.bias, std=config.residual_std)

    def forward(
        self,
        query: Float[Tensor, "B T D"],
        key: Float[Tensor, "B S D"],
        value: Float[Tensor, "B S D"],
        mask: Bool[Tensor, "#B #H #T S"] | None = None,
        *,
        segment_ids: Int[Tensor, "B T"] | None = None,
        is_causal: bool = False,
        layer_index: int = 0,
    ) -> Float[Tensor, "B T D"]:
        """
        Args:
            mask: True where a query may attend to a key; None allows all. A query that may attend to
                no key attends to all of them equally, so that padding stays finite.
            segment_ids: also mask every key whose id is not the query's. Requires T == S.
            is_causal: also mask every key after the query. Requires T == S.
            layer_index: counted from 0; used by `scale_attn_by_inverse_layer_idx`.
        """
        q_BTHK, k_BSHK, v_BSHK = self.c_attn(query, key, value)
        context_BTHK = attention(
            q_BTHK,
            k_BSHK,
            v_BSHK,
            mask,
            segment_ids=segment_ids,
            is_causal=is_causal,
            scale=score_scale(self.config, layer_index),
            dropout_rate=self.config.attn_pdrop if self.training else 0.0,
            upcast=self.config.reorder_and_upcast_attn,
        )
        return self.c_proj(context_BTHK.flatten(-2))

    def decode(
        self,
        x: Float[Tensor, "B T D"],
        keys_BHSK: Float[Tensor, "B H S K"],
        values_BHSK: Float[Tensor, "B H S K"],
        mask: Bool[Tensor, "B 1 T length+T"],
        length: int,
        *,
        layer_index: int = 0,
    ) -> Float[Tensor, "B T D"]:
        """Self-attention of T more tokens. Writes their keys and values to the positions after `length`."""
        q_BTHK, k_BTHK, v_BTHK = self.c_attn(x, x, x)
        end = length + x.shape[1]
        keys_BHSK[:, :, length:end], values_BHSK[:, :, length:end] = k_BTHK.transpose(1, 2), v_BTHK.transpose(1, 2)
        context_BTHK = attention(
            q_BTHK,
            keys_BHSK[:, :, :end].transpose(1, 2),
            values_BHSK[:, :, :end].transpose(1, 2),
            mask,
            is_causal=False,
            scale=score_scale(self.config, layer_index),
            upcast=self.config.reorder_and_upcast_attn,
        )
        return self.c_proj(context_BTHK.flatten(-2))


class FeedForward(nn.Module):
    """Two projections with the configured activation between them (Vaswani et al. 2017, section 3.3)."""

    def __init__(self, config: GPT2Config) -> None:
        super().__init__()
        D, F_ = config.n_embd, config.feed_forward_size
        self.config = config
        self.c_fc: Projection = Projection(D, F_, bias=config.bias, std=config.initializer_range)
        self.c_proj: Projection = Projection(F_, D, bias=config.bias, std=config.residual_std)

    def forward(self, x: Float[Tensor, "B T D"]) -> Float[Tensor, "B T D"]:
        return self.c_proj(ACTIVATIONS[self.config.activation_function](self.c_fc(x)))


class GPT2Layer(nn.Module):
    """x + attention(norm(x)), then x + feed_forward(norm(x)): pre-norm residuals (section 2.3).

    Causal by default. `mask` and `segment_ids` are as in `MultiHeadAttention`.
    """

    def __init__(self, config: GPT2Config) -> None:
        super().__init__()
        self.ln_1: LayerNorm = LayerNorm(config)
        self.attn: MultiHeadAttention = MultiHeadAttention(config)
        self.ln_2: LayerNorm = LayerNorm(config)
        self.mlp: FeedForward = FeedForward(config)
        self.drop: nn.Dropout = nn.Dropout(config.resid_pdrop)

    def forward(
        self,
        x: Float[Tensor, "B T D"],
        mask: Bool[Tensor, "#B #H #T S"] | None = None,
        *,
        segment_ids: Int[Tensor, "B T"] | None = None,
        is_causal: bool = True,
        layer_index: int = 0,
    ) -> Float[Tensor, "B T D"]:
        normed = self.ln_1(x)
        attended = self.attn(
            normed, normed, normed, mask, segment_ids=segment_ids, is_causal=is_causal, layer_index=layer_index
        )
        x = x + self.drop(attended)
        return x + self.drop(self.mlp(self.ln_2(x)))

    def decode(
        self,
        x: Float[Tensor, "B T D"],
        keys_BHSK: Float[Tensor, "B H S K"],
        values_BHSK: Float[Tensor, "B H S K"],
        mask: Bool[Tensor, "B 1 T length+T"],
        length: int,
        *,
        layer_index: int = 0,
    ) -> Float[Tensor, "B T D"]:
        """Run the layer for T more tokens; see `MultiHeadAttention.decode`."""
        x = x + self.attn.decode(self.ln_1(x), keys_BHSK, values_BHSK, mask, length, layer_index=layer_index)
        return x + self.mlp(self.ln_2(x))


class GPT2(nn.Module):
    """Token and position embeddings, L layers, a final norm, and the output head.

    `state_dict()` has exactly the canonical names of `bridge.parameters`; a tied head has no entry.
    `load_state_dict` also takes names with the prefixes that `bridge.canonical_names` removes, causal-mask buffers,
    and a tied `lm_head.weight` that equals `wte.weight`.
    """

    def __init__(self, config: GPT2Config) -> None:
        super().__init__()
        self.config = config
        V, P, D = config.vocab_size, config.n_positions, config.n_embd
        self.wte: Embedding = Embedding(V, D, config.initializer_range)
        self.wpe: Embedding = Embedding(P, D, config.initializer_range)
        self.drop: nn.Dropout = nn.Dropout(config.embd_pdrop)
        self.h: nn.ModuleList = nn.ModuleList(GPT2Layer(config) for _ in range(config.n_layer))
        self.ln_f: LayerNorm = LayerNorm(config)
        self.lm_head: Embedding | None = (
            None if config.tie_word_embeddings else Embedding(V, D, config.initializer_range)
        )
        self.register_load_state_dict_pre_hook(canonicalize_names)

    def forward(
        self,
        input_ids: Int[Tensor, "B T"] | None = None,
        attention_mask: Int[Tensor, "B T"] | None = None,
        *,
        segment_ids: Int[Tensor, "B T"] | None = None,
        position_ids: Int[Tensor, "B T"] | None = None,
        inputs_embeds: Float[Tensor, "B T D"] | None = None,
    ) -> Float[Tensor, "B T V"]:
        """Return the logits of the next token after each position.

        Args:
            input_ids: token ids, each below `vocab_size`.
            attention_mask: 1 for tokens, 0 for padding, which may be on the left or right. Positions
                count tokens only. The logits at padding are finite and have no meaning.
            segment_ids: the document of each token, for several documents in a row; 0 is padding. A
                token attends only to tokens with its own id, so the outputs of each document equal those of the
                document alone. Replaces `attention_mask`.
            position_ids: the row of `wpe` for each token. By default, the number of tokens before it in its
                row, without padding, or in its segment.
            inputs_embeds: the rows of `wte`, or other vectors, instead of `input_ids`.

        Raises:
            ValueError: for a sequence longer than `n_positions`, for a mask, segments or positions of
                another shape, for a mask together with segments, or for both or neither of ids and embeddings.
            IndexError: for an id outside the vocabulary or a position outside `n_positions` (on CPU; a GPU
                raises a device-side assertion).
        """
        x = self.last_hidden_state(
            input_ids,
            attention_mask,
            segment_ids=segment_ids,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
        )
        return self.head(x)

    def last_hidden_state(
        self,
        input_ids: Int[Tensor, "B T"] | None = None,
        attention_mask: Int[Tensor, "B T"] | None = None,
        *,
        segment_ids: Int[Tensor, "B T"] | None = None,
        position_ids: Int[Tensor, "B T"] | None = None,
        inputs_embeds: Float[Tensor, "B T D"] | None = None,
    ) -> Float[Tensor, "B T D"]:
        """Return the output of the final norm, which `head` maps to the logits. Arguments as in `forward`."""
        check_inputs(self.config, input_ids, attention_mask, segment_ids, position_ids, inputs_embeds)
        x = self.wte(input_ids) if inputs_embeds is None else inputs_embeds
        mask = None if attention_mask is None else attention_mask.bool()[:, None, None, :]
        if position_ids is None:
            position_ids = positions(x[..., 0], attention_mask, segment_ids)
        x = self.drop(x + self.wpe(position_ids))
        for i, layer in enumerate(self.h):
            x = layer(x, mask, segment_ids=segment_ids, layer_index=i)
        return self.ln_f(x)

    def decode(
        self, input_ids: Int[Tensor, "B T"], cache: KVCache, attention_mask: Int[Tensor, "B T"] | None = None
    ) -> Float[Tensor, "B T D"]:
        """Run T more tokens of each row, and add their keys and values to the cache.

        Use it for prefill, with all tokens of the prompt, and for decoding, with one token at a time. Dropout is not
        applied.

        Returns the last hidden states, which `head` maps to the logits. They are finite at padding and have no
        meaning there.

        Args:
            cache: needs T free positions. No row may have more than `n_positions` tokens. A row of the cache is one
                sequence, so there are no segments.
            attention_mask: 1 for tokens, 0 for padding anywhere in the T columns. Later calls skip that padding too.
        """
        positions_BT, mask_BTS, is_token_BS = kv_cache.new_positions(cache, input_ids.shape[1], attention_mask)
        x = self.wte(input_ids) + self.wpe(positions_BT)
        for i, layer in enumerate(cast("Iterable[GPT2Layer]", self.h)):
            x = layer.decode(x, cache.keys[i], cache.values[i], mask_BTS[:, None], cache.length, layer_index=i)
        cache.length, cache.is_token = cache.length + input_ids.shape[1], is_token_BS
        return self.ln_f(x)

    def head(self, x: Float[Tensor, "*batch D"]) -> Float[Tensor, "*batch V"]:
        """Return the logits of the next token, in the model's dtype."""
        head = self.wte if self.lm_head is None else self.lm_head
        return F.linear(x, head.weight)

    @classmethod
    def from_pretrained(
        cls,
        source: str | Path,
        *,
        activation: str | None = None,
        drop_extra_heads: bool = False,
        base: str | Path | None = None,
    ) -> GPT2:
        """Load a model from a checkpoint in any format or from a Hugging Face id; see `gpt2_torch.from_pretrained`."""
        return cls.from_checkpoint(
            bridge.load(source, activation=activation, drop_extra_heads=drop_extra_heads, base=base)
        )

    @classmethod
    def from_checkpoint(cls, checkpoint: Checkpoint) -> GPT2:
        """Return a model with the checkpoint's tensors, in their dtypes and in eval mode."""
        with torch.device("meta"):  # allocates and initializes nothing, because the tensors are assigned next
            model = cls(checkpoint.config)
        state = {name: tensor_from_array(array) for name, array in checkpoint.tensors.items()}
        model.load_state_dict(state, assign=True)
        return model.eval()


def positions(
    input_ids: Int[Tensor, "B T"],
    attention_mask: Int[Tensor, "B T"] | None = None,
    segment_ids: Int[Tensor, "B T"] | None = None,
) -> Int[Tensor, "#B T"]:
    """Return the row of `wpe` for each token: the number of tokens before it, without padding and other segments."""
    if segment_ids is not None:
        is_same_BTS = segment_ids[:, :, None] == segment_ids[:, None, :]
        return is_same_BTS.tril(-1).sum(-1)
    if attention_mask is None:
        return torch.arange(input_ids.shape[1], device=input_ids.device)[None]
    return (attention_mask.bool().cumsum(dim=1) - 1).clamp(min=0)


def check_shape(input_ids: Tensor) -> None:
    """Raise `ValueError` unless `input_ids` are integers of shape [B, T]."""
    if input_ids.ndim != 2 or input_ids.dtype.is_floating_point:
        raise ValueError(
            f"input_ids must be integers [batch, length], not {input_ids.dtype} of shape {tuple(input_ids.shape)}"
        )


def check_inputs(
    config: GPT2Config,
    input_ids: Tensor | None,
    attention_mask: Tensor | None = None,
    segment_ids: Tensor | None = None,
    position_ids: Tensor | None = None,
    inputs_embeds: Tensor | None = None,
) -> None:
    """Raise the errors that `GPT2.forward` documents."""
    tokens = inputs_embeds if input_ids is None else input_ids
    if tokens is None or (input_ids is not None and inputs_embeds is not None):
        raise ValueError("pass either input_ids or inputs_embeds")
    if tokens is input_ids:
        check_shape(tokens)
    elif tokens.ndim != 3 or tokens.shape[2] != config.n_embd:
        raise ValueError(
            f"inputs_embeds must have the shape [batch, length, {config.n_embd}], not {tuple(tokens.shape)}"
        )
    shape, given = tokens.shape[:2], "inputs_embeds" if input_ids is None else "input_ids"
    if shape[1] > config.n_positions:
        raise ValueError(f"{shape[1]} tokens; the model has n_positions={config.n_positions}")
    others = {"attention_mask": attention_mask, "segment_ids": segment_ids, "position_ids": position_ids}
    for name, tensor in others.items():
        if tensor is not None and tensor.shape != shape:
            raise ValueError(f"{name} has shape {tuple(tensor.shape)}, but {given} has {tuple(tokens.shape)}")
    if attention_mask is not None and segment_ids is not None:
        raise ValueError("pass attention_mask or segment_ids, not both; segment_ids are 0 at padding")
    check_values(input_ids, config.vocab_size, "token ids from {} to {}; the vocabulary is 0 to {}")
    check_values(position_ids, config.n_positions, "position_ids from {} to {}; the positions are 0 to {}")


def check_values(ids: Tensor | None, size: int, message: str) -> None:
    """Raise `IndexError` for ids outside 0 ... size - 1, if they are on the CPU."""
    # Reading values would wait for a GPU, and would break the graph of torch.compile.
    if ids is None or ids.device.type != "cpu" or torch.compiler.is_compiling() or not ids.numel():
        return
    try:
        low, high = int(ids.min()), int(ids.max())
    except RuntimeError:  # torch.func.vmap and fake tensors hide values; under vmap, the embedding lookup checks
        return
    if low < 0 or high >= size:
        raise IndexError(message.format(low, high, size - 1))
