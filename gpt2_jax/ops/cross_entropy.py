"""Cross-entropy of logits against labels, its sum without all logits in memory, and the ranks of the labels."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int

from bridge import IGNORE_INDEX
from gpt2_jax.ops.dtypes import wide_dtype
from gpt2_jax.parallel.sharding import BATCH_AXES, TENSOR, axes_of_mesh, batch_parts, constrain, gathered


def cross_entropy(logits: Float[Array, "B T V"], labels: Int[Array, "B T"]) -> Float[Array, "B T"]:
    """Return -log p(label) of each position, in nats, in at least float32. It is 0 where the label is `IGNORE_INDEX`.

    Any other label outside the vocabulary gives NaN, because values cannot be checked inside `jit`.
    """
    counted = labels != IGNORE_INDEX
    # A negative index would count from the end. One past the end makes optax's look-up give NaN. Gathering is faster
    # than a one-hot comparison on CPU: head and loss, forward and backward, take 175 instead of 246 ms at
    # [1, 512, 50257].
    labels = jnp.where(labels < 0, logits.shape[-1], labels)
    wide = logits.astype(wide_dtype(logits))
    losses = optax.softmax_cross_entropy_with_integer_labels(wide, jnp.where(counted, labels, 0))
    return jnp.where(counted, losses, 0.0)


def label_ranks(logits: Float[Array, "B T V"], labels: Int[Array, "B T"]) -> Int[Array, "B T"]:
    """Return the rank of each label among all tokens, 1 for the most likely one, or 0 where it is `IGNORE_INDEX`.

    Of tokens with equal logits, the one with the lower id comes first.
    """
    counted_BT = labels != IGNORE_INDEX
    label_BT1 = jnp.where(counted_BT, labels, 0)[..., None]
    own_BT1 = jnp.take_along_axis(logits, label_BT1, axis=-1)
    is_lower_id_BTV = jnp.arange(logits.shape[-1]) < label_BT1
    is_above_BTV = (logits > own_BT1) | ((logits == own_BT1) & is_lower_id_BTV)
    return jnp.where(counted_BT, 1 + is_above_BTV.sum(-1), 0)


def next_token_loss(logits: Float[Array, "B T V"], input_ids: Int[Array, "B T"]) -> Float[Array, ""]:
    """Return the mean cross-entropy, in nats, of the B (T - 1) tokens that have a token before them."""
    return optax.softmax_cross_entropy_with_integer_labels(logits[:, :-1], input_ids[:, 1:]).mean()


def summed_cross_entropy(
    hidden: Float[Array, "B T D"],
    embedding: Float[Array, "V D"],
    labels: Int[Array, "B T"],
    *,
    vocab_size: int | None = None,
    chunk_bytes: int | None = None,
) -> Float[Array, ""]:
    """Return the sum of `cross_entropy` over all positions, for the logits `hidden @ embedding.T`.

    The logits are computed in chunks of some positions of every row. Each chunk's gradient is computed together with
    its logits, so nothing of size V is saved per token, and none of the three products is computed twice (as in Hsu et
    al. 2024, "Liger Kernel", section 3.2). Products are in the dtype of `hidden`, sums in at least float32. On a mesh,
    every device sums over its own rows, with its part of the vocabulary, and the embedding's gradient is all-reduced
    once.

    Args:
        vocab_size: the number of tokens. Further rows of the embedding are padding and are ignored.
        chunk_bytes: the size of a chunk's logits on a device, by default `default_chunk_bytes()`. A chunk has at least
            one position of every row.
    """
    axes = axes_of_mesh()
    parts = batch_parts(axes)
    if parts > 1 and hidden.shape[0] % parts == 0:
        hidden, labels = (x.reshape(parts, -1, *x.shape[1:]) for x in (hidden, labels))
        device_sum = functools.partial(_own_sum, vocab_size=vocab_size, chunk_bytes=chunk_bytes)
        batch_axes = tuple(axis for axis in BATCH_AXES if axis in axes)
        return jax.vmap(device_sum, (0, None, 0), spmd_axis_name=batch_axes)(hidden, embedding, labels).sum()
    return _own_sum(hidden, embedding, labels, vocab_size, chunk_bytes)


def _own_sum(
    hidden: Array, embedding: Array, labels: Array, vocab_size: int | None, chunk_bytes: int | None
) -> Float[Array, ""]:
    """`summed_cross_entropy` of the rows of one device."""
    B, T, _ = hidden.shape
    V = embedding.shape[0]
    size = default_chunk_bytes() if chunk_bytes is None else chunk_bytes
    if not B * T:
        return jnp.zeros((), wide_dtype(hidden))
    length = min(T, max(1, size // (4 * B * V)))
    length = -(-T // -(-T // length))  # equal lengths, without more chunks
    return _summed(hidden, embedding, labels, vocab_size or V, length)


def default_chunk_bytes() -> int:
    """Return the default size of a chunk's logits: 1/64 of an accelerator's memory, at least 256 MiB; 256 MiB on CPU.

    Larger chunks add to the embedding's gradient less often; below 64 MiB, the difference is measurable. The size is a
    power of two, because the memory of equal devices differs slightly, and all must run the same program.
    """
    memory = jax.local_devices()[0].memory_stats() or {}
    return max(2 ** ((memory.get("bytes_limit", 0) // 64).bit_length() - 1), 2**28)


@functools.partial(jax.custom_jvp, nondiff_argnums=(3, 4))
def _summed(hidden: Array, embedding: Array, labels: Array, vocab_size: int, length: int) -> Array:
    kernel = gathered(embedding.astype(hidden.dtype))

    def add(total: Array, chunk: tuple[Array, Array]) -> tuple[Array, None]:
        return total + _chunk_losses(*chunk, kernel, vocab_size)[0].sum(), None

    return jax.lax.scan(add, jnp.zeros((), wide_dtype(hidden)), _chunks(hidden, labels, length))[0]


def _summed_forward(
    hidden: Array, embedding: Array, labels: Array, vocab_size: int, length: int
) -> tuple[Array, tuple[Array, Array]]:
    kernel, wide = gathered(embedding.astype(hidden.dtype)), wide_dtype(hidden)

    def add(sums: tuple[Array, Array], chunk: tuple[Array, Array]) -> tuple[tuple[Array, Array], Array]:
        (total, d_embedding), (x, y) = sums, chunk
        losses, probabilities = _chunk_losses(x, y, kernel, vocab_size)
        is_label = jax.lax.broadcasted_iota(jnp.int32, probabilities.shape, 2) == y[..., None]
        d_logits = jnp.where((y != IGNORE_INDEX)[..., None], probabilities - is_label, 0.0).astype(x.dtype)
        d_x = jnp.einsum("BTV,VD->BTD", d_logits, kernel)
        d_embedding += jnp.einsum("BTV,BTD->VD", d_logits, x, preferred_element_type=wide)
        return (total + losses.sum(), d_embedding), d_x

    zeros = jnp.zeros((), wide), constrain(jnp.zeros(embedding.shape, wide), TENSOR, None)
    (total, d_embedding), d_chunks = jax.lax.scan(add, zeros, _chunks(hidden, labels, length))
    B, T, D = hidden.shape
    d_hidden = d_chunks.swapaxes(0, 1).reshape(B, -1, D)[:, :T]
    return total, (d_hidden, d_embedding.astype(embedding.dtype))


@_summed.defjvp
def _summed_jvp(
    vocab_size: int, length: int, primals: tuple[Array, Array, Array], tangents: tuple[Array, Array, Any]
) -> tuple[Array, Array]:
    total, gradients = _summed_forward(*primals, vocab_size, length)
    # The products have the dtype of `total`, at least float32. In reverse mode, rounding the cotangent of `total` to
    # bfloat16 would scale all gradients by a wrong factor.
    products = (g.astype(total.dtype) * d.astype(total.dtype) for g, d in zip(gradients, tangents[:2], strict=True))
    return total, sum((product.sum() for product in products), jnp.zeros_like(total))


def _chunk_losses(x: Array, labels: Array, kernel: Array, vocab_size: int) -> tuple[Array, Array]:
    """Return the losses of one chunk as in `cross_entropy`, and the probabilities [B, T, V]."""
    logits = jnp.einsum("BTD,VD->BTV", x, kernel, preferred_element_type=wide_dtype(x))
    if vocab_size < kernel.shape[0]:
        is_padding = jnp.arange(kernel.shape[0]) >= vocab_size
        logits = jnp.where(is_padding, -jnp.inf, logits)
    log_total = jax.nn.logsumexp(logits, -1, keepdims=True)
    valid = (labels >= 0) & (labels < vocab_size)
    chosen = jnp.take_along_axis(logits, jnp.where(valid, labels, 0)[..., None], -1)
    losses = jnp.where(valid, (log_total - chosen)[..., 0], jnp.nan)
    return jnp.where(labels == IGNORE_INDEX, 0.0, losses), jnp.exp(logits - log_total)


def _chunks(hidden: Array, labels: Array, length: int) -> tuple[Array, Array]:
    """Split `hidden` and `labels` into chunks along a new first axis. Ignored positions pad the last chunk."""
    B, T, D = hidden.shape
    fill = -T % length
    hidden = jnp.pad(hidden, ((0, 0), (0, fill), (0, 0)))
    labels = jnp.pad(labels, ((0, 0), (0, fill)), constant_values=IGNORE_INDEX)
    return hidden.reshape(B, -1, length, D).swapaxes(0, 1), labels.reshape(B, -1, length).swapaxes(0, 1)
