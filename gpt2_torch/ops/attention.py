"""Attention between the heads' queries, keys and values."""

from __future__ import annotations

import contextlib
import functools
import math

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from bridge import GPT2Config


def attention(
    q_BTHK: Float[Tensor, "B T H K"],
    k_BSHK: Float[Tensor, "B S H K"],
    v_BSHK: Float[Tensor, "B S H K"],
    mask: Bool[Tensor, "#B #H #T S"] | None,
    *,
    segment_ids: Int[Tensor, "B T"] | None = None,
    is_causal: bool,
    scale: float,
    dropout_rate: float = 0.0,
    upcast: bool = False,
) -> Float[Tensor, "B T H K"]:
    """Compute softmax(scale q k^T) v with torch's fused kernels. Each query attends to the keys that are not masked.

    Args:
        mask: True where a query may attend to a key. None allows all.
        segment_ids: also mask every key whose id is not the query's. Requires T == S.
        is_causal: also mask every key after the query. Requires T == S.
        upcast: compute in at least float32 for every dtype of q, k and v, under autocast too.

    Raises `ValueError` for causal attention or segments with T != S.
    """
    T, S, dtype = q_BTHK.shape[1], k_BSHK.shape[1], v_BSHK.dtype
    if (is_causal or segment_ids is not None) and T != S:
        kind = "causal attention" if is_causal else "attention with segment_ids"
        raise ValueError(f"{kind} needs as many queries as keys, not {T} and {S}; pass a mask instead")
    is_only_causal = is_causal and mask is None and segment_ids is None
    mask = None if is_only_causal else _visible(mask, segment_ids, T if is_causal else None, q_BTHK.device)
    if upcast:
        wide = torch.promote_types(dtype, torch.float32)
        q_BTHK, k_BSHK, v_BSHK = q_BTHK.to(wide), k_BSHK.to(wide), v_BSHK.to(wide)
    bias = None
    if mask is not None:
        # The most negative number and not -inf: a row of -inf would be NaN after softmax.
        bias = torch.zeros(mask.shape, dtype=q_BTHK.dtype, device=mask.device)
        bias = bias.masked_fill(~mask, torch.finfo(q_BTHK.dtype).min)
    # Autocast would cast the upcast tensors down again.
    with torch.autocast(q_BTHK.device.type, enabled=False) if upcast else contextlib.nullcontext():
        context_BHTK = F.scaled_dot_product_attention(
            q_BTHK.transpose(1, 2),
            k_BSHK.transpose(1, 2),
            v_BSHK.transpose(1, 2),
            attn_mask=bias,
            dropout_p=dropout_rate,
            is_causal=is_only_causal,
            scale=scale,
        )
    return context_BHTK.transpose(1, 2).to(dtype)


def attention_weights(
    q_BTHK: Float[Tensor, "B T H K"],
    k_BSHK: Float[Tensor, "B S H K"],
    mask: Bool[Tensor, "#B #H #T S"] | None,
    *,
    segment_ids: Int[Tensor, "B T"] | None = None,
    is_causal: bool,
    scale: float,
) -> Float[Tensor, "B H T S"]:
    """Return the weights of the keys in `attention`, softmax(scale q k^T), in at least float32."""
    wide = torch.promote_types(k_BSHK.dtype, torch.float32)
    scores_BHTS = torch.einsum("BTHK,BSHK->BHTS", q_BTHK.to(wide), k_BSHK.to(wide)) * scale
    visible = _visible(mask, segment_ids, q_BTHK.shape[1] if is_causal else None, k_BSHK.device)
    if visible is not None:
        scores_BHTS = scores_BHTS.masked_fill(~visible, torch.finfo(wide).min)
    return scores_BHTS.softmax(-1)


def _visible(
    mask: Bool[Tensor, "#B #H #T S"] | None,
    segment_ids: Int[Tensor, "B T"] | None,
    causal_length: int | None,
    device: torch.device,
) -> Bool[Tensor, "#B #H #T S"] | None:
    """Return the mask of all conditions together, or None if there are none."""
    conditions = [] if mask is None else [mask]
    if segment_ids is not None:
        conditions.append(segment_ids[:, None, :, None] == segment_ids[:, None, None, :])
    if causal_length is not None:
        conditions.append(torch.ones(causal_length, causal_length, dtype=torch.bool, device=device).tril())
    return functools.reduce(torch.logical_and, conditions) if conditions else None


def score_scale(config: GPT2Config, layer_index: int) -> float:
    """Return the factor of the scores of a layer, counted from 0."""
    scale = 1.0
    if config.scale_attn_weights:
        scale = scale / math.sqrt(config.head_size)
    if config.scale_attn_by_inverse_layer_idx:
        scale = scale / (layer_index + 1)
    return scale
