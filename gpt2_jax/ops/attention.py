"""Attention between the heads' queries, keys and values: one function over several implementations.

`xla` supports all arguments. The others support only causal attention without a mask or dropout, and never hold all
scores in memory: `blockwise` for CPU (`gpt2_jax.ops.blockwise_attention`), cuDNN's flash attention for GPU (Dao et al.
2022), and the splash kernel for TPU (jax.experimental.pallas.ops.tpu.splash_attention). `blockwise` and `splash` take
segments.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from bridge import GPT2Config
from gpt2_jax.choices import SPLASH_BLOCKS, Implementation, obstacle
from gpt2_jax.ops.blockwise_attention import causal_attention_by_blocks
from gpt2_jax.ops.dtypes import wide_dtype
from gpt2_jax.ops.shapes import known_size
from gpt2_jax.parallel.remat import ATTENDED
from gpt2_jax.parallel.sharding import BATCH_AXES, TENSOR, axes_of_mesh, batch_parts


def attention(
    q_BTHK: Float[Array, "B T H K"],
    k_BSHK: Float[Array, "B S H K"],
    v_BSHK: Float[Array, "B S H K"],
    mask: Bool[Array, "#B #H #T S"] | None,
    *,
    segment_ids: Int[Array, "B T"] | None = None,
    is_causal: bool,
    scale: float | Float[Array, ""],
    dropout_rate: float = 0.0,
    dropout_key: PRNGKeyArray | None = None,
    implementation: Implementation = "auto",
) -> Float[Array, "B T H K"]:
    """Compute softmax(scale q k^T) v. Each query attends to the keys that are not masked.

    Scores and softmax are at least float32 for every dtype of q, k and v. Products of bfloat16 are exact in float32, so
    the result is always that of `reorder_and_upcast_attn`.

    Args:
        mask: True where a query may attend to a key. None allows all.
        segment_ids: also mask every key whose id is not the query's. Requires T == S.
        is_causal: also mask every key after the query. Requires T == S.
        dropout_key: required if `dropout_rate` is above 0.
        implementation: "auto" selects a fast one for `jax.default_backend()`, dtype and length, and `xla` with a
            mask, with dropout, without queries, or if no faster one supports the arguments. An explicit name also
            allows compilation for another device.

    Raises `ValueError` for arguments that the named implementation does not support.
    """
    T, S = q_BTHK.shape[1], k_BSHK.shape[1]
    if (is_causal or segment_ids is not None) and T != S:
        kind = "causal attention" if is_causal else "attention with segment_ids"
        raise ValueError(f"{kind} needs as many queries as keys, not {T} and {S}; pass a mask instead")
    length = known_size((T,))
    # The other implementations reduce over scores, which must not be empty, and do not support a symbolic length.
    if length == 0 or (length is None and implementation == "auto"):
        implementation = "xla"
    only_causal = is_causal and mask is None and dropout_rate == 0.0
    arrays, has_segments = (q_BTHK.dtype, T, q_BTHK.shape[3]), segment_ids is not None
    if implementation == "auto":
        implementation = fastest(_platform(), *arrays, has_segments=has_segments) if only_causal else "xla"
    if implementation == "xla":
        visible = _visible(mask, segment_ids, T if is_causal else None)
        return _xla(q_BTHK, k_BSHK, v_BSHK, visible, scale, dropout_rate, dropout_key)
    if length is None:
        raise ValueError(f"attention={implementation!r} needs a fixed length; export with 'auto' or 'xla'")
    if problem := obstacle(implementation, *arrays, has_segments=has_segments):
        raise ValueError(f"attention={implementation!r} {problem}; use 'auto' or 'xla'")
    if not only_causal:
        raise ValueError(f"attention={implementation!r} is for causal attention without a mask or dropout; use 'xla'")
    q_BTHK = _scaled(q_BTHK, scale)
    if implementation == "cudnn":
        return _cudnn(q_BTHK, k_BSHK, v_BSHK)
    fast = {"blockwise": _by_blocks, "splash": _splash}[implementation]
    return fast(q_BTHK, k_BSHK, v_BSHK, segment_ids)


def fastest(
    platform: str, dtype: jnp.dtype, length: int, head_size: int, *, has_segments: bool = False
) -> Implementation:
    """Return the fastest implementation for causal attention without a mask or dropout.

    Args:
        platform: as `jax.default_backend()` names it.
        has_segments: whether there are `segment_ids`.
    """
    fast: Implementation
    fast = {"cpu": "blockwise", "gpu": "cudnn", "tpu": "splash"}.get(platform, "xla")  # type: ignore[assignment]
    return "xla" if obstacle(fast, dtype, length, head_size, has_segments=has_segments) else fast


def _platform() -> str:
    """Return `jax.default_backend()`, or "other gpu" without cuDNN's attention: not NVIDIA, or before Ampere."""
    platform, device = jax.default_backend(), jax.local_devices()[0]
    if platform != "gpu":
        return platform
    has_cudnn = "cuda" in device.client.platform_version and float(device.compute_capability) >= 8.0
    return "gpu" if has_cudnn else "other gpu"


def require_device(implementation: Implementation) -> None:
    """Raise `ValueError` if this process's devices do not support the implementation."""
    platform, needed = _platform(), {"cudnn": "gpu", "splash": "tpu"}.get(implementation)
    if needed not in (None, platform):
        described = "an NVIDIA GPU of the Ampere generation or later" if needed == "gpu" else "a TPU"
        raise ValueError(f"attention={implementation!r} needs {described}; JAX computes on {platform} here. Use 'auto'")


def _scaled(q: Array, scale: float | Array) -> Array:
    """Return `q * scale`, rounded once, because bfloat16 may not represent the scale."""
    return (q.astype(wide_dtype(q)) * scale).astype(q.dtype)


def _visible(
    mask: Bool[Array, "#B #H #T S"] | None, segment_ids: Int[Array, "B T"] | None, causal_length: int | None
) -> Bool[Array, "#B #H #T S"] | None:
    """Return the mask of all conditions together, or None if there are none."""
    conditions = [] if mask is None else [mask]
    if segment_ids is not None:
        conditions.append(segment_ids[:, None, :, None] == segment_ids[:, None, None, :])
    if causal_length is not None:
        conditions.append(jnp.tril(jnp.ones((causal_length, causal_length), bool)))
    return functools.reduce(jnp.logical_and, conditions) if conditions else None


def _by_blocks(q_BTHK: Array, k_BSHK: Array, v_BSHK: Array, segment_ids: Array | None = None) -> Array:
    q_BHTK, k_BHSK, v_BHSK = (x.swapaxes(1, 2) for x in (q_BTHK, k_BSHK, v_BSHK))
    return causal_attention_by_blocks(q_BHTK, k_BHSK, v_BHSK, segment_ids).swapaxes(1, 2)


def _cudnn(q_BTHK: Array, k_BSHK: Array, v_BSHK: Array) -> Array:
    return jax.nn.dot_product_attention(q_BTHK, k_BSHK, v_BSHK, is_causal=True, scale=1.0, implementation="cudnn")


def _splash(
    q_BTHK: Array, k_BSHK: Array, v_BSHK: Array, segment_ids: Array | None = None, interpret: bool = False
) -> Array:
    """The splash kernel, sharded over the mesh of `jax.set_mesh`, because XLA does not partition kernels by itself.

    An axis of the arrays that the mesh does not divide is replicated.
    """

    def local(q_BTHK: Array, k_BSHK: Array, v_BSHK: Array, segment_ids: Array | None) -> Array:
        from jax.experimental.pallas.ops.tpu import splash_attention  # imported here because it is slow

        kernel = _splash_kernel(q_BTHK.shape[2], q_BTHK.shape[1], interpret)
        heads = (x.swapaxes(1, 2) for x in (q_BTHK, k_BSHK, v_BSHK))
        segments = None if segment_ids is None else splash_attention.SegmentIds(segment_ids, segment_ids)
        return jax.vmap(kernel)(*heads, segments).swapaxes(1, 2)

    axes = axes_of_mesh()
    if not axes:
        return local(q_BTHK, k_BSHK, v_BSHK, segment_ids)
    divides_rows, divides_heads = q_BTHK.shape[0] % batch_parts(axes) == 0, q_BTHK.shape[2] % axes.get(TENSOR, 1) == 0
    batch = tuple(axis for axis in BATCH_AXES if axis in axes) if divides_rows else ()
    heads = TENSOR if TENSOR in axes and divides_heads else None
    spec = PartitionSpec(batch or None, None, heads, None)
    specs = (spec, spec, spec, PartitionSpec(batch or None, None))
    sharded = jax.shard_map(local, in_specs=specs, out_specs=spec, check_vma=False)
    return sharded(q_BTHK, k_BSHK, v_BSHK, segment_ids)


def _splash_kernel(heads: int, length: int, interpret: bool) -> Any:
    from jax.experimental.pallas.ops.tpu import splash_attention  # imported here because it is slow

    block = next(size for size in SPLASH_BLOCKS if length % size == 0)
    sizes = splash_attention.BlockSizes(
        block_q=block,
        block_kv=block,
        block_q_dkv=block,
        block_kv_dkv=block,
        block_q_dq=block,
        block_kv_dq=block,
    )
    mask = splash_attention.MultiHeadMask([splash_attention.CausalMask((length, length))] * heads)
    return splash_attention.make_splash_mha(
        mask,
        block_sizes=sizes,
        head_shards=1,
        q_seq_shards=1,
        residual_checkpoint_name=ATTENDED,
        interpret=interpret,
    )


def _xla(
    q_BTHK: Array,
    k_BSHK: Array,
    v_BSHK: Array,
    mask: Array | None,
    scale: float | Array,
    dropout_rate: float,
    dropout_key: PRNGKeyArray | None,
) -> Array:
    dtype = v_BSHK.dtype
    scores_BHTS = jnp.einsum("BTHK,BSHK->BHTS", q_BTHK, k_BSHK, preferred_element_type=wide_dtype(v_BSHK))
    weights_BHTS = _weights(scores_BHTS, mask, scale)
    if dropout_rate > 0.0:
        if dropout_key is None:
            raise ValueError('attention dropout needs a key: pass rngs={"dropout": key} to apply')
        kept = jax.random.bernoulli(dropout_key, 1.0 - dropout_rate, weights_BHTS.shape)
        weights_BHTS = jnp.where(kept, weights_BHTS / (1.0 - dropout_rate), 0.0)
    return checkpoint_name(jnp.einsum("BHTS,BSHK->BTHK", weights_BHTS.astype(dtype), v_BSHK), ATTENDED)


def cached_attention(
    q_BTHK: Float[Array, "B T H K"],
    k_NKS: Float[Array, "N K S"],
    v_NSK: Float[Array, "N S K"],
    mask: Bool[Array, "#B #H #T S"],
    *,
    scale: float | Float[Array, ""],
) -> Float[Array, "B T H K"]:
    """`attention` with the keys and values of a `KVCache`, where N = B H."""
    (B, T, H, K), dtype = q_BTHK.shape, v_NSK.dtype
    q_NTK = q_BTHK.swapaxes(1, 2).reshape(B * H, T, K)
    scores_NTS = jnp.einsum("NTK,NKS->NTS", q_NTK, k_NKS, preferred_element_type=wide_dtype(v_NSK))
    weights_BHTS = _weights(scores_NTS.reshape(B, H, T, -1), mask, scale)
    context_NTK = jnp.einsum("NTS,NSK->NTK", weights_BHTS.reshape(B * H, T, -1).astype(dtype), v_NSK)
    return context_NTK.reshape(B, H, T, K).swapaxes(1, 2)


def attention_weights(
    q_BTHK: Float[Array, "B T H K"],
    k_BSHK: Float[Array, "B S H K"],
    mask: Bool[Array, "#B #H #T S"] | None,
    *,
    segment_ids: Int[Array, "B T"] | None = None,
    is_causal: bool,
    scale: float | Float[Array, ""],
) -> Float[Array, "B H T S"]:
    """Return the weights of the keys in `attention`, softmax(scale q k^T), in at least float32."""
    scores_BHTS = jnp.einsum("BTHK,BSHK->BHTS", q_BTHK, k_BSHK, preferred_element_type=wide_dtype(k_BSHK))
    return _weights(scores_BHTS, _visible(mask, segment_ids, q_BTHK.shape[1] if is_causal else None), scale)


def _weights(
    scores_BHTS: Float[Array, "B H T S"], mask: Bool[Array, "#B #H #T S"] | None, scale: float | Float[Array, ""]
) -> Float[Array, "B H T S"]:
    dtype = scores_BHTS.dtype
    scores_BHTS = scores_BHTS * jnp.asarray(scale, dtype)
    if mask is not None:
        # The most negative number and not -inf: a row of -inf would be NaN after softmax.
        scores_BHTS = jnp.where(mask, scores_BHTS, jnp.finfo(dtype).min)
    return jax.nn.softmax(scores_BHTS, axis=-1)


def score_scale(config: GPT2Config, layer_index: int | Int[Array, ""]) -> float | Float[Array, ""]:
    """Return the factor of the scores of a layer, counted from 0."""
    scale: float | Array = 1.0
    if config.scale_attn_weights:
        scale = scale / math.sqrt(config.head_size)
    if config.scale_attn_by_inverse_layer_idx:
        scale = scale / (layer_index + 1)
    return scale
