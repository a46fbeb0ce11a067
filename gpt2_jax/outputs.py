"""The hidden states and attention weights of every layer, which transformers calls `output_hidden_states` and
`output_attentions`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import jax
from jaxtyping import Array, Float, Int

from gpt2_jax.model import GPT2, GPT2Layer, QKVProjection
from gpt2_jax.ops.attention import attention_weights, score_scale


class ModelOutputs(NamedTuple):
    """The logits of a call, and the hidden states and attention weights of every layer."""

    logits: Float[Array, "B T V"]
    hidden_states: tuple[Float[Array, "B T D"], ...]
    """L + 1 arrays, as in transformers: the embeddings, the outputs of all layers but the last, and the output of the
    final norm."""
    attentions: tuple[Float[Array, "B H T S"], ...]
    """For each layer, the weight of each key S for each query T, before dropout, in at least float32."""


def model_outputs(
    model: GPT2,
    params: Mapping[str, Any],
    input_ids: Int[Array, "B T"] | None = None,
    attention_mask: Int[Array, "B T"] | None = None,
    *,
    segment_ids: Int[Array, "B T"] | None = None,
    position_ids: Int[Array, "B T"] | None = None,
    inputs_embeds: Float[Array, "B T D"] | None = None,
) -> ModelOutputs:
    """Call the model, and also return the hidden states and attention weights of every layer.

    Further arguments are those of the call. The attention weights are computed again, because fast implementations of
    attention do not return them.

    Args:
        params: the model's parameters, with stacked or unstacked layers.
    """
    logits, state = model.apply(
        {"params": params},
        input_ids,
        attention_mask,
        segment_ids=segment_ids,
        position_ids=position_ids,
        inputs_embeds=inputs_embeds,
        capture_intermediates=_is_recorded,
    )
    recorded: Any = state["intermediates"]
    layers = [
        jax.tree.map(lambda x, i=i: x[i], recorded["h"]) if model.scan else recorded[f"h_{i}"]
        for i in range(model.config.n_layer)
    ]
    mask = None if attention_mask is None else attention_mask.astype(bool)[:, None, None, :]
    attentions = []
    for i, layer in enumerate(layers):
        q_BTHK, k_BSHK, _ = layer["attn"]["c_attn"]["__call__"][0]
        scale = score_scale(model.config, i)
        attentions.append(attention_weights(q_BTHK, k_BSHK, mask, segment_ids=segment_ids, is_causal=True, scale=scale))
    outputs = (node["__call__"][0] for node in (recorded["drop"], *layers[:-1], recorded["ln_f"]))
    return ModelOutputs(logits, tuple(outputs), tuple(attentions))


def _is_recorded(module: nn.Module, method: str) -> bool:
    is_whole = isinstance(module, GPT2Layer | QKVProjection) or module.path in (("drop",), ("ln_f",))
    return is_whole and method == "__call__"
