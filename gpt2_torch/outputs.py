"""The hidden states and attention weights of every layer, which transformers calls `output_hidden_states` and
`output_attentions`."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple, cast

from jaxtyping import Float, Int
from torch import Tensor, nn

from gpt2_torch.model import GPT2, GPT2Layer
from gpt2_torch.ops.attention import attention_weights, score_scale


class ModelOutputs(NamedTuple):
    """The logits of a call, and the hidden states and attention weights of every layer."""

    logits: Float[Tensor, "B T V"]
    hidden_states: tuple[Float[Tensor, "B T D"], ...]
    """L + 1 tensors, as in transformers: the embeddings, the outputs of all layers but the last, and the output of the
    final norm."""
    attentions: tuple[Float[Tensor, "B H T S"], ...]
    """For each layer, the weight of each key S for each query T, before dropout, in at least float32."""


def model_outputs(
    model: GPT2,
    input_ids: Int[Tensor, "B T"] | None = None,
    attention_mask: Int[Tensor, "B T"] | None = None,
    *,
    segment_ids: Int[Tensor, "B T"] | None = None,
    position_ids: Int[Tensor, "B T"] | None = None,
    inputs_embeds: Float[Tensor, "B T D"] | None = None,
) -> ModelOutputs:
    """Call the model, and also return the hidden states and attention weights of every layer.

    Arguments are those of the call. The attention weights are computed again, because the model's fused attention does
    not return them.
    """
    recorded: dict[str, Any] = {}

    def record(name: str, module: nn.Module) -> Any:
        return module.register_forward_hook(lambda _, __, output: recorded.__setitem__(name, output))

    layers = [*enumerate(cast("Iterable[GPT2Layer]", model.h))]
    hooks = [record("drop", model.drop), record("ln_f", model.ln_f)]
    for i, layer in layers:
        hooks += [record(f"h.{i}", layer), record(f"h.{i}.attn.c_attn", layer.attn.c_attn)]
    try:
        logits = model(
            input_ids,
            attention_mask,
            segment_ids=segment_ids,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
        )
    finally:
        for hook in hooks:
            hook.remove()
    mask = None if attention_mask is None else attention_mask.bool()[:, None, None, :]
    attentions = []
    for i, _ in layers:
        q_BTHK, k_BSHK, _ = recorded[f"h.{i}.attn.c_attn"]
        scale = score_scale(model.config, i)
        attentions.append(attention_weights(q_BTHK, k_BSHK, mask, segment_ids=segment_ids, is_causal=True, scale=scale))
    hidden = (recorded["drop"], *(recorded[f"h.{i}"] for i, _ in layers[:-1]), recorded["ln_f"])
    return ModelOutputs(logits, hidden, tuple(attentions))
