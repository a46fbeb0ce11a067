"""GPT-2 in Flax Linen: the port of `gpt2_torch.model`, with the same classes in the same order.

Axis letters, the same in both backends: B batch, T query length, S key length, D n_embd, H heads,
K head size, F feed-forward, V vocabulary, P positions, L layers.

Calls are pure functions of parameters and inputs, without mutable collections. Parameters have
`param_dtype`, the computation has `dtype`; statistics of norms and attention scores are in at least
float32. Source: Radford et al. 2019, "Language Models are Unsupervised Multitask Learners", section
2.3, and the code released with it (gpt-2/src/model.py).
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax.ad_checkpoint import checkpoint_name
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int

from bridge import GPT2Config, padded_vocab_size
from bridge.conversion import STACK
from gpt2_jax.choices import Implementation, Remat
from gpt2_jax.lora.branch import COLLECTION, low_rank_update
from gpt2_jax.lora.config import LoRAConfig
from gpt2_jax.ops import kv_cache
from gpt2_jax.ops.activations import ACTIVATIONS
from gpt2_jax.ops.attention import attention, cached_attention, score_scale
from gpt2_jax.ops.dtypes import wide_dtype
from gpt2_jax.ops.kv_cache import KVCache
from gpt2_jax.ops.linear import project, project_to_vocabulary
from gpt2_jax.ops.norm import scaled_norm
from gpt2_jax.ops.shapes import exceeds
from gpt2_jax.ops.slot_attention import Slots, append_slots, slot_attention
from gpt2_jax.parallel.remat import POLICIES, PROJECTED
from gpt2_jax.parallel.sharding import BATCH_AXES, TENSOR, constrain, gathered, require_auto_axes

Attend = Callable[[int, Array, Array, Array, float | Array], Array]
"""Attention in decoding, which adds keys and values to a cache: (layer, q, k, v [B T H K], scale) -> [B T H K]."""


class Embedding(nn.Module):
    """One row for each id. An id past the last row gives NaN, because values cannot be checked inside `jit`."""

    rows: int
    width: int
    std: float
    rows_axis: str | None = TENSOR
    """The mesh axis that shards the rows."""
    dtype: DTypeLike = jnp.float32
    param_dtype: DTypeLike = jnp.float32

    def setup(self) -> None:
        init = nn.initializers.normal(self.std)
        self.embedding: Array = self.param("embedding", init, (self.rows, self.width), self.param_dtype)

    def __call__(self, ids: Int[Array, "B T"]) -> Float[Array, "B T D"]:
        return jnp.take(gathered(self.embedding.astype(self.dtype), self.rows_axis), ids, axis=0)


class Projection(nn.Module):
    """x W + b, where W of the given shape contracts the last `input_axes` axes of x."""

    shape: tuple[int, ...]
    std: float
    input_axes: int = 1
    use_bias: bool = True
    dtype: DTypeLike = jnp.float32
    param_dtype: DTypeLike = jnp.float32
    lora: LoRAConfig | None = None

    @nn.compact
    def __call__(self, x: Float[Array, "*batch n_in"], *, deterministic: bool = True) -> Float[Array, "*batch n_out"]:
        kernel = self.param("kernel", nn.initializers.normal(self.std), self.shape, self.param_dtype)
        x = x.astype(self.dtype)
        y = project(x, kernel.astype(self.dtype), self.input_axes)
        if (update := low_rank_update(self, self.lora, x, self.input_axes, deterministic)) is not None:
            y = y + update
        if self.use_bias:
            outputs = self.shape[self.input_axes :]
            y = y + self.param("bias", nn.initializers.zeros, outputs, self.param_dtype).astype(self.dtype)
        return checkpoint_name(y, PROJECTED)


class LayerNorm(nn.Module):
    """Layer normalization (Ba et al. 2016), with statistics in at least float32."""

    config: GPT2Config
    dtype: DTypeLike = jnp.float32
    param_dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "*batch D"]) -> Float[Array, "*batch D"]:
        wide = wide_dtype(x)
        scale = self.param("scale", nn.initializers.ones, x.shape[-1:], self.param_dtype)
        y = scaled_norm(x.astype(wide), scale.astype(wide), self.config.layer_norm_epsilon)
        if self.config.bias:
            y = y + self.param("bias", nn.initializers.zeros, x.shape[-1:], self.param_dtype).astype(wide)
        return y.astype(self.dtype)


class QKVProjection(nn.Module):
    """`c_attn`: the query, key and value projections side by side, split by head: `[D, 3, H, K]`."""

    config: GPT2Config
    dtype: DTypeLike = jnp.float32
    param_dtype: DTypeLike = jnp.float32
    lora: LoRAConfig | None = None

    @nn.compact
    def __call__(
        self,
        query: Float[Array, "B T D"],
        key: Float[Array, "B S D"],
        value: Float[Array, "B S D"],
        *,
        deterministic: bool = True,
    ) -> tuple[Float[Array, "B T H K"], Float[Array, "B S H K"], Float[Array, "B S H K"]]:
        c = self.config
        shape = (3, c.n_head, c.head_size)
        kernel = self.param("kernel", nn.initializers.normal(c.initializer_range), (c.n_embd, *shape), self.param_dtype)
        bias = self.param("bias", nn.initializers.zeros, shape, self.param_dtype) if c.bias else jnp.zeros(shape)
        kernel_D3HK, bias_3HK = kernel.astype(self.dtype), bias.astype(self.dtype)
        if query is key and key is value:  # self-attention: one product
            qkv = project(query.astype(self.dtype), kernel_D3HK, 1)
            if (update := self._update(query, deterministic)) is not None:
                qkv = qkv + update
            qkv = constrain(qkv + bias_3HK if c.bias else qkv, BATCH_AXES, None, None, TENSOR, None)
            qkv = checkpoint_name(qkv, PROJECTED)
            # Split instead of indexed: the derivative of indexing is a sum of three arrays that are mostly zero.
            q_BTHK, k_BSHK, v_BSHK = (part.squeeze(2) for part in jax.lax.split(qkv, (1, 1, 1), axis=2))
            return q_BTHK, k_BSHK, v_BSHK
        parts = []
        for i, x in enumerate((query, key, value)):
            part = jnp.einsum("BTD,DHK->BTHK", x.astype(self.dtype), kernel_D3HK[:, i]) + bias_3HK[i]
            update = self._update(x, deterministic)
            parts.append(part if update is None else part + update[:, :, i])
        return parts[0], parts[1], parts[2]

    def _update(self, x: Array, deterministic: bool) -> Array | None:
        return low_rank_update(self, self.lora, x.astype(self.dtype), 1, deterministic)


class MultiHeadAttention(nn.Module):
    """Scaled dot-product attention over several heads (Vaswani et al. 2017, section 3.2.2).

    If query, key and value are the same object, one product projects them. Cross-attention, and equal
    arrays that are different objects, take three products.
    """

    config: GPT2Config
    dtype: DTypeLike = jnp.float32
    param_dtype: DTypeLike = jnp.float32
    attention: Implementation = "auto"
    lora: LoRAConfig | None = None

    def setup(self) -> None:
        self.c_attn: QKVProjection = QKVProjection(self.config, self.dtype, self.param_dtype, self.lora)
        c = self.config
        shape = (c.n_head, c.head_size, c.n_embd)
        self.c_proj: Projection = Projection(shape, c.residual_std, 2, c.bias, self.dtype, self.param_dtype, self.lora)

    def __call__(
        self,
        query: Float[Array, "B T D"],
        key: Float[Array, "B S D"],
        value: Float[Array, "B S D"],
        mask: Bool[Array, "#B #H #T S"] | None = None,
        *,
        segment_ids: Int[Array, "B T"] | None = None,
        is_causal: bool = False,
        layer_index: int | Int[Array, ""] = 0,
        deterministic: bool = True,
    ) -> Float[Array, "B T D"]:
        """
        Args:
            mask: True where a query may attend to a key; None allows all. A query that may attend to
                no key attends to all of them equally, so that padding stays finite.
            segment_ids: also mask every key whose id is not the query's. Requires T == S.
            is_causal: also mask every key after the query. Requires T == S.
            layer_index: counted from 0; used by `scale_attn_by_inverse_layer_idx`.
            deterministic: False applies dropout to the attention weights, with the "dropout" rng.
        """
        q_BTHK, k_BSHK, v_BSHK = self.c_attn(query, key, value, deterministic=deterministic)
        drops = not deterministic and self.config.attn_pdrop > 0.0
        context_BTHK = attention(
            q_BTHK,
            k_BSHK,
            v_BSHK,
            mask,
            segment_ids=segment_ids,
            is_causal=is_causal,
            scale=score_scale(self.config, layer_index),
            dropout_rate=self.config.attn_pdrop if drops else 0.0,
            dropout_key=self.make_rng("dropout") if drops else None,
            implementation=self.attention,
        )
        return self.c_proj(context_BTHK, deterministic=deterministic)

    def decode(self, x: Float[Array, "B T D"], attend: Attend, layer_index: int) -> Float[Array, "B T D"]:
        """Self-attention of T more tokens, with the keys and values of a cache."""
        return self.c_proj(attend(layer_index, *self.c_attn(x, x, x), score_scale(self.config, layer_index)))


class FeedForward(nn.Module):
    """Two projections with the configured activation between them (Vaswani et al. 2017, section 3.3)."""

    config: GPT2Config
    dtype: DTypeLike = jnp.float32
    param_dtype: DTypeLike = jnp.float32
    lora: LoRAConfig | None = None

    def setup(self) -> None:
        c = self.config
        inward, outward = (c.n_embd, c.feed_forward_size), (c.feed_forward_size, c.n_embd)
        self.c_fc: Projection = Projection(
            inward, c.initializer_range, 1, c.bias, self.dtype, self.param_dtype, self.lora
        )
        self.c_proj: Projection = Projection(
            outward, c.residual_std, 1, c.bias, self.dtype, self.param_dtype, self.lora
        )

    def __call__(self, x: Float[Array, "B T D"], *, deterministic: bool = True) -> Float[Array, "B T D"]:
        inner = constrain(self.c_fc(x, deterministic=deterministic), BATCH_AXES, None, TENSOR)
        return self.c_proj(ACTIVATIONS[self.config.activation_function](inner), deterministic=deterministic)


class GPT2Layer(nn.Module):
    """x + attention(norm(x)), then x + feed_forward(norm(x)): pre-norm residuals (section 2.3).

    Causal by default. `mask` and `segment_ids` are as in `MultiHeadAttention`.
    """

    config: GPT2Config
    dtype: DTypeLike = jnp.float32
    param_dtype: DTypeLike = jnp.float32
    attention: Implementation = "auto"
    lora: LoRAConfig | None = None

    def setup(self) -> None:
        self.ln_1: LayerNorm = LayerNorm(self.config, self.dtype, self.param_dtype)
        self.attn: MultiHeadAttention = MultiHeadAttention(
            self.config, self.dtype, self.param_dtype, self.attention, self.lora
        )
        self.ln_2: LayerNorm = LayerNorm(self.config, self.dtype, self.param_dtype)
        self.mlp: FeedForward = FeedForward(self.config, self.dtype, self.param_dtype, self.lora)
        self.drop: nn.Dropout = nn.Dropout(self.config.resid_pdrop)

    def __call__(
        self,
        x: Float[Array, "B T D"],
        mask: Bool[Array, "#B #H #T S"] | None = None,
        *,
        segment_ids: Int[Array, "B T"] | None = None,
        is_causal: bool = True,
        layer_index: int | Int[Array, ""] = 0,
        deterministic: bool = True,
    ) -> Float[Array, "B T D"]:
        normed = self.ln_1(x)
        attended = self.attn(
            normed,
            normed,
            normed,
            mask,
            segment_ids=segment_ids,
            is_causal=is_causal,
            layer_index=layer_index,
            deterministic=deterministic,
        )
        x = x + self.drop(attended, deterministic=deterministic)
        return x + self.drop(self.mlp(self.ln_2(x), deterministic=deterministic), deterministic=deterministic)

    def decode(self, x: Float[Array, "B T D"], attend: Attend, layer_index: int) -> Float[Array, "B T D"]:
        """Run the layer for T more tokens; see `MultiHeadAttention.decode`."""
        x = x + self.attn.decode(self.ln_1(x), attend, layer_index)
        return x + self.mlp(self.ln_2(x))


class GPT2(nn.Module):
    """Token and position embeddings, L layers, a final norm, and the output head.

    The parameter tree is that of `bridge.to_flax` with `stacked=scan` and the same `vocab_multiple`.

    Attributes:
        dtype: the dtype of the computation and the logits.
        param_dtype: the dtype of the parameters that `init` creates.
        scan: run the layers as one `nn.scan` over stacked parameters, which compiles L times less
            code, instead of as a loop over `h_0 ... h_{L-1}`.
        vocab_multiple: pad the vocabulary's rows to a multiple of this in the parameters. Logits
            always have `vocab_size` columns.
        remat: which activations of a layer are saved for the backward pass; see `gpt2_jax.parallel.remat`.
        attention: the implementation; see `gpt2_jax.ops.attention.attention`.
        lora: apply an adapter (`gpt2_jax.lora_init`) with these settings. Its factors are not in the parameters, but in
            the collection "lora": `model.apply({"params": params, "lora": lora}, ids)`.
    """

    config: GPT2Config
    dtype: DTypeLike = jnp.float32
    param_dtype: DTypeLike = jnp.float32
    scan: bool = False
    vocab_multiple: int = 1
    remat: Remat = "none"
    attention: Implementation = "auto"
    lora: LoRAConfig | None = None

    def setup(self) -> None:
        c = self.config
        rows = padded_vocab_size(c.vocab_size, self.vocab_multiple)
        self.wte: Embedding = self._embedding(rows)
        self.wpe: Embedding = self._embedding(c.n_positions, None)
        self.drop: nn.Dropout = nn.Dropout(c.embd_pdrop)
        layer = functools.partial(GPT2Layer, c, self.dtype, self.param_dtype, self.attention, self.lora)
        self.h: Any = layer() if self.scan else [layer() for _ in range(c.n_layer)]
        self.ln_f: LayerNorm = LayerNorm(c, self.dtype, self.param_dtype)
        self.lm_head: Embedding | None = None if c.tie_word_embeddings else self._embedding(rows)

    def __call__(
        self,
        input_ids: Int[Array, "B T"] | None = None,
        attention_mask: Int[Array, "B T"] | None = None,
        *,
        segment_ids: Int[Array, "B T"] | None = None,
        position_ids: Int[Array, "B T"] | None = None,
        inputs_embeds: Float[Array, "B T D"] | None = None,
        deterministic: bool = True,
    ) -> Float[Array, "B T V"]:
        """Return the logits of the next token after each position.

        Args:
            input_ids: token ids, each below `vocab_size`.
            attention_mask: 1 for tokens, 0 for padding, left or right. Positions count tokens
                only. The logits at padding are finite and have no meaning.
            segment_ids: the document of each token, for several documents in a row; 0 is padding. A
                token attends only to tokens with its own id, so the outputs of each document equal those of the
                document alone. Replaces `attention_mask`.
            position_ids: the row of `wpe` for each token. By default, the number of tokens before it in its
                row, without padding, or in its segment.
            inputs_embeds: the rows of `wte`, or other vectors, instead of `input_ids`.
            deterministic: False applies dropout at the configured rates, and requires
                `rngs={"dropout": key}` in `apply`.

        Raises:
            ValueError: for a sequence longer than `n_positions`, for a mask, segments or positions of
                another shape, for a mask together with segments, or for both or neither of ids and embeddings.
            IndexError: for an id outside the vocabulary or a position outside `n_positions`. Values
                cannot be checked inside `jit`: there, such an id makes all logits of its row NaN. A
                negative id counts from the end, and an id of a padding row of `vocab_multiple` is not
                detected.
        """
        x = self.last_hidden_state(
            input_ids,
            attention_mask,
            segment_ids=segment_ids,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            deterministic=deterministic,
        )
        return self.head(x).astype(self.dtype)

    def last_hidden_state(
        self,
        input_ids: Int[Array, "B T"] | None = None,
        attention_mask: Int[Array, "B T"] | None = None,
        *,
        segment_ids: Int[Array, "B T"] | None = None,
        position_ids: Int[Array, "B T"] | None = None,
        inputs_embeds: Float[Array, "B T D"] | None = None,
        deterministic: bool = True,
    ) -> Float[Array, "B T D"]:
        """Return the output of the final norm, which `head` maps to the logits. Arguments as in `__call__`."""
        self._check_adapter()
        check_inputs(self.config, input_ids, attention_mask, segment_ids, position_ids, inputs_embeds)
        require_auto_axes((self.variables, input_ids, inputs_embeds))
        x: Any = inputs_embeds if input_ids is None else self.wte(input_ids)
        mask = None if attention_mask is None else attention_mask.astype(bool)[:, None, None, :]
        if position_ids is None:
            position_ids = positions(x[..., 0], attention_mask, segment_ids)
        x = constrain(x.astype(self.dtype) + self.wpe(position_ids), BATCH_AXES, None, None)
        x = self.drop(x, deterministic=deterministic)
        apply_layer = self._layer_function(mask, segment_ids, deterministic)
        x = self._scan_layers(apply_layer, x) if self.scan else self._loop_layers(apply_layer, x)
        return self.ln_f(x)

    def decode(
        self, input_ids: Int[Array, "B T"], cache: KVCache, attention_mask: Int[Array, "B T"] | None = None
    ) -> tuple[Float[Array, "B T D"], KVCache]:
        """Run T more tokens of each row, and add their keys and values to the cache.

        Use it for prefill, with the tokens of the prompt, and for decoding, with one token at a time.
        Dropout is not applied. Requires `scan=False`.

        Returns the last hidden states, which `head` maps to the logits, and the updated cache. The states are
        finite at padding and have no meaning there.

        Args:
            cache: needs T free positions. No row may have more than `n_positions` tokens. Neither is checked.
                A row of the cache is one sequence, so there are no segments.
            attention_mask: 1 for tokens, 0 for padding anywhere in the T columns. Later calls skip that padding too.
        """
        positions_BT, mask_BTS, is_token_BS = kv_cache.new_positions(cache, input_ids.shape[1], attention_mask)
        keys, values = [*cache.keys], [*cache.values]

        def attend(i: int, q: Array, k: Array, v: Array, scale: float | Array) -> Array:
            keys[i], values[i] = kv_cache.append(keys[i], values[i], k, v, cache.length)
            return cached_attention(q, keys[i], values[i], mask_BTS[:, None], scale=scale)

        x = self._decode_layers(input_ids, positions_BT, attend)
        length = cache.length + input_ids.shape[1]
        return x, KVCache(tuple(keys), tuple(values), cache.num_padding, length, is_token_BS)

    def decode_slots(
        self, ids_M: Int[Array, " M"], slots: Slots, cache: KVCache
    ) -> tuple[Float[Array, "M D"], KVCache]:
        """Run one token in each slot; see `gpt2_jax.ops.slot_attention`. Several may be of one row, in order.

        Returns the last hidden states, and the cache with the keys and values of the tokens. Rows of this cache are not
        padded. Requires `scan=False`.
        """
        keys, values = [*cache.keys], [*cache.values]

        def attend(i: int, q: Array, k: Array, v: Array, scale: float | Array) -> Array:
            keys[i], values[i] = append_slots(keys[i], values[i], k[0], v[0], slots)
            return slot_attention(q[0], keys[i], values[i], slots, scale=scale)[None]

        x = self._decode_layers(ids_M[None], jnp.asarray(slots.position_M)[None], attend)
        return x[0], cache._replace(keys=tuple(keys), values=tuple(values))

    def _decode_layers(
        self, input_ids: Int[Array, "B T"], positions: Int[Array, "B T"], attend: Attend
    ) -> Float[Array, "B T D"]:
        if self.scan:
            raise ValueError("decoding needs one set of parameters per layer; use `bridge.unstack_layers` or a Decoder")
        self._check_adapter()
        require_auto_axes((self.variables, input_ids))
        x = self.wte(input_ids) + self.wpe(positions)
        for i, layer in enumerate(self.h):
            x = layer.decode(x, attend, i)
        return self.ln_f(x)

    def head(self, x: Float[Array, "*batch D"]) -> Float[Array, "*batch V"]:
        """Return the logits of the next token, in at least float32. bfloat16 would give many of them the same value."""
        head = self.wte if self.lm_head is None else self.lm_head
        logits = project_to_vocabulary(x.astype(self.dtype), head.embedding.astype(self.dtype))
        return logits[..., : self.config.vocab_size]

    @nn.nowrap
    def _check_adapter(self) -> None:
        """Raise `ValueError` if only the model has `lora` set, or only the variables have an adapter."""
        if self.is_initializing() or self.has_variable(COLLECTION, STACK if self.scan else f"{STACK}_0") == bool(
            self.lora
        ):
            return
        raise ValueError(
            "the model has lora set, and the variables have no matching adapter; "
            'apply it to {"params": params, "lora": lora}, or merge the adapter and use model.clone(lora=None)'
            if self.lora
            else "the variables have an adapter, and the model has no lora; use GPT2(..., lora=LoRAConfig(...))"
        )

    @nn.nowrap
    def _loop_layers(self, apply_layer: Callable[..., tuple[Array, None]], x: Array) -> Array:
        for i, layer in enumerate(self.h):
            x = apply_layer(layer, x, i)[0]
        return x

    @nn.nowrap
    def _scan_layers(self, apply_layer: Callable[..., tuple[Array, None]], x: Array) -> Array:
        scan = nn.scan(
            apply_layer,
            # `sow` and `capture_intermediates` fill the intermediates.
            variable_axes={"params": 0, COLLECTION: 0, "intermediates": 0},
            split_rngs={"params": True, "dropout": True},
        )
        return scan(self.h, x, jnp.arange(self.config.n_layer))[0]

    @nn.nowrap
    def _layer_function(
        self, mask: Array | None, segment_ids: Array | None, deterministic: bool
    ) -> Callable[..., tuple[Array, None]]:
        def apply_layer(layer: GPT2Layer, x: Array, layer_index: int | Array) -> tuple[Array, None]:
            x = layer(x, mask, segment_ids=segment_ids, layer_index=layer_index, deterministic=deterministic)
            return constrain(x, BATCH_AXES, None, None), None

        if self.remat == "none":
            return apply_layer
        # XLA does not merge a loop body with the code around it, so prevent_cse would only cost time with scan.
        return nn.remat(apply_layer, prevent_cse=not self.scan, policy=POLICIES[self.remat])

    @nn.nowrap
    def _embedding(self, rows: int, rows_axis: str | None = TENSOR) -> Embedding:
        c = self.config
        return Embedding(rows, c.n_embd, c.initializer_range, rows_axis, self.dtype, self.param_dtype)


def positions(
    input_ids: Int[Array, "B T"],
    attention_mask: Int[Array, "B T"] | None = None,
    segment_ids: Int[Array, "B T"] | None = None,
) -> Int[Array, "#B T"]:
    """Return the row of `wpe` for each token: the number of tokens before it, without padding and other segments."""
    if segment_ids is not None:
        is_same_BTS = segment_ids[:, :, None] == segment_ids[:, None, :]
        return jnp.tril(is_same_BTS, -1).sum(-1, dtype=jnp.int32)
    if attention_mask is None:
        return jnp.arange(input_ids.shape[1])[None]
    return jnp.clip(jnp.cumsum(attention_mask.astype(bool), axis=1, dtype=jnp.int32) - 1, min=0)


def check_shape(input_ids: Array) -> None:
    """Raise `ValueError` unless `input_ids` are integers of shape [B, T]."""
    if input_ids.ndim != 2 or not jnp.issubdtype(input_ids.dtype, jnp.integer):
        raise ValueError(
            f"input_ids must be integers [batch, length], not {input_ids.dtype} of shape {input_ids.shape}"
        )


def check_inputs(
    config: GPT2Config,
    input_ids: Array | None,
    attention_mask: Array | None = None,
    segment_ids: Array | None = None,
    position_ids: Array | None = None,
    inputs_embeds: Array | None = None,
) -> None:
    """Raise the errors that `GPT2.__call__` documents."""
    tokens = inputs_embeds if input_ids is None else input_ids
    if tokens is None or (input_ids is not None and inputs_embeds is not None):
        raise ValueError("pass either input_ids or inputs_embeds")
    if tokens is input_ids:
        check_shape(tokens)
    elif tokens.ndim != 3 or tokens.shape[2] != config.n_embd:
        raise ValueError(f"inputs_embeds must have the shape [batch, length, {config.n_embd}], not {tokens.shape}")
    shape, given = tokens.shape[:2], "inputs_embeds" if input_ids is None else "input_ids"
    if exceeds(shape[1], config.n_positions):
        raise ValueError(f"{shape[1]} tokens; the model has n_positions={config.n_positions}")
    others = {"attention_mask": attention_mask, "segment_ids": segment_ids, "position_ids": position_ids}
    for name, array in others.items():
        if array is not None and array.shape != shape:
            raise ValueError(f"{name} has shape {array.shape}, but {given} has {tokens.shape}")
    if attention_mask is not None and segment_ids is not None:
        raise ValueError("pass attention_mask or segment_ids, not both; segment_ids are 0 at padding")
    check_values(input_ids, config.vocab_size, "token ids from {} to {}; the vocabulary is 0 to {}")
    check_values(position_ids, config.n_positions, "position_ids from {} to {}; the positions are 0 to {}")


def check_values(ids: Array | None, size: int, message: str) -> None:
    """Raise `IndexError` for ids outside 0 ... size - 1, if their values are known."""
    if ids is None or isinstance(ids, jax.core.Tracer) or not ids.size:
        return
    if getattr(ids, "is_fully_addressable", True):  # ids sharded over hosts cannot be read either
        values = np.asarray(ids)  # with jax.numpy, this would be traced
        low, high = int(values.min()), int(values.max())
        if low < 0 or high >= size:
            raise IndexError(message.format(low, high, size - 1))
