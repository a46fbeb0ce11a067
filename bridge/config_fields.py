"""Which fields of a Hugging Face `config.json` change what a GPT-2 computes, beside those of `GPT2Config`.

transformers' GPT-2 ignores most other fields, so a configuration may say things that are not true of the model. The
lists below decide. docs/reference/configurations.md describes how they were made. A test compares them with the fields
that the installed transformers reads.

The lists need no entry for sizes of tensors: a size that is not the model's shows in the shapes, which are checked.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

ALIASES: Mapping[str, tuple[str, ...]] = {
    "n_positions": ("max_position_embeddings",),
    "n_embd": ("hidden_size",),
    "n_head": ("num_attention_heads",),
    "n_layer": ("num_hidden_layers",),
}
"""Field of `GPT2Config` -> other names that transformers accepts for it (`GPT2Config.attribute_map`)."""

STATED: Mapping[str, str] = {
    **dict.fromkeys(("n_vocab", "padded_vocab_size", "unpadded_vocab_size"), "vocab_size"),
    "vocab_size_or_config_json_file": "vocab_size",  # the first parameter of GPT2Config until 2019
    **dict.fromkeys(("d_model", "embed_dim", "embedding_size", "embedding_dim"), "n_embd"),
    **dict.fromkeys(("n_layers", "num_layers"), "n_layer"),
    **dict.fromkeys(("n_heads", "num_heads"), "n_head"),
    **dict.fromkeys(("num_key_value_heads", "num_kv_heads", "n_kv_heads", "n_kv_head", "n_head_kv"), "n_head"),
    **dict.fromkeys(("head_dim", "d_head", "d_kv", "kv_channels", "attention_head_size"), "head_size"),
    **dict.fromkeys(("d_ff", "d_inner", "dff", "ffn_dim", "ffn_hidden_size"), "feed_forward_size"),
    **dict.fromkeys(("bias", "use_bias", "add_bias_linear", "attention_bias", "attn_bias"), "bias"),
    **dict.fromkeys(("qkv_bias", "mlp_bias", "norm_bias", "enable_bias"), "bias"),
    **dict.fromkeys(("tie_weights", "tied_embeddings", "share_embeddings"), "tie_word_embeddings"),
    **dict.fromkeys(("act_fn", "afn"), "activation_function"),
}
"""Field -> the attribute of `GPT2Config` that it must equal. The names are those of other programs."""

MUST_BE: Mapping[str, Any] = {
    "is_causal": True,
    "causal": True,
    "causal_mask": True,
    "use_causal_mask": True,
    "causal_attention": True,
    "do_layer_norm_before": True,
    "normalize_before": True,
    "pre_norm": True,
}
"""Field -> the only value that is GPT-2."""

UNSUPPORTED: Mapping[str, tuple[Any, ...]] = {
    # transformers reads these for a GPT-2: 4.x, 5.x or both.
    **dict.fromkeys(("add_cross_attention", "cross_attention_hidden_size", "is_encoder_decoder"), ()),
    **dict.fromkeys(("tie_encoder_decoder", "pruned_heads", "quantization_config", "auto_map"), ()),
    **dict.fromkeys(("sliding_window", "attention_chunk_size", "layer_types", "mtp_layer_types"), ()),
    **dict.fromkeys(("per_layer_config", "kv_sharing_modes", "text_config", "decoder", "generator"), ()),
    **dict.fromkeys(("transformers_weights", "_heterogeneity_spec"), ()),
    # Other kinds of layers and models
    **dict.fromkeys(("layers_block_type", "block_types", "new_decoder_architecture"), ()),
    **dict.fromkeys(("vision_config", "audio_config"), ()),
    # Positions
    **dict.fromkeys(("alibi", "use_alibi", "rotary", "use_rotary", "rotary_dim", "rotary_pct", "rotary_emb_base"), ()),
    **dict.fromkeys(("use_rope", "rope_theta", "rope_scaling", "rope_parameters", "partial_rotary_factor"), ()),
    "position_embedding_type": ("absolute", "learned", "learned_absolute"),
    "position_encoding": ("absolute", "learned", "learned_absolute"),
    "learned_pos_emb": (True,),
    "relative_attention": (),
    # Attention
    **dict.fromkeys(("attention_window", "local_attention", "sparse_attention", "linear_attention"), ()),
    **dict.fromkeys(("attention_types", "attention_layers"), ()),
    "attention_type": ("full", "dense", "full_attention", "causal", "original_full", "softmax"),
    **dict.fromkeys(("multi_query", "multi_query_attention", "use_mqa", "use_gqa"), ()),
    **dict.fromkeys(("qk_norm", "use_qk_norm", "qk_layernorm", "use_qk_clip", "clip_qkv"), ()),
    **dict.fromkeys(("v_head_dim", "index_head_dim", "index_n_heads", "index_topk", "attn_layers"), ()),
    **dict.fromkeys(("linear_num_key_heads", "linear_num_value_heads", "state_size"), ()),
    **dict.fromkeys(("bidirectional", "use_bidirectional_attention", "prefix_lm"), ()),
    **dict.fromkeys(("attn_sink", "attention_sink", "num_kv_shared_layers", "softmax_offset"), ()),
    # Norms and residuals
    **dict.fromkeys(("use_rms_norm", "use_rms", "rmsnorm", "rms_norm", "rms_norm_eps"), ()),
    **dict.fromkeys(("post_ln", "post_norm", "sandwich_norm", "deepnorm", "embedding_layernorm"), ()),
    "norm_type": ("layernorm", "layer_norm", "LayerNorm"),
    "normalization": ("layernorm", "layer_norm", "LayerNorm"),
    "apply_residual_connection_post_layernorm": (),
    **dict.fromkeys(("parallel_attn", "parallel_residual", "use_parallel_residual", "parallel_block"), ()),
    # Feed-forward network
    **dict.fromkeys(("moe", "use_moe", "is_moe", "num_experts", "n_experts", "num_local_experts"), ()),
    **dict.fromkeys(("num_experts_per_tok", "n_routed_experts", "n_shared_experts", "moe_intermediate_size"), ()),
    **dict.fromkeys(("routed_scaling_factor", "route_scale", "n_group", "topk_group", "first_k_dense_replace"), ()),
    **dict.fromkeys(("mlp_layer_types", "mlp_only_layers"), ()),
    **dict.fromkeys(("gated_mlp", "use_swiglu", "use_glu", "glu", "swiglu", "ffn_gate", "is_gated_act"), ()),
    "feed_forward_proj": (),
    "mlp_type": ("mlp", "gelu"),
    # Scaling
    **dict.fromkeys(("embedding_multiplier", "logit_multiplier", "residual_multiplier", "logit_scale"), (1,)),
    **dict.fromkeys(("logits_scaling", "embeddings_scale", "embedding_scale", "scale_emb", "scale_depth"), (1,)),
    **dict.fromkeys(("output_logits_scale", "mup_output_alpha", "mup_embeddings_scale", "width_scale"), (1,)),
    **dict.fromkeys(("attention_multiplier", "attn_scale", "query_pre_attn_scalar"), ()),
    **dict.fromkeys(("scale_embedding", "scale_embeddings", "mup_scale_qk_dot_by_d", "mup"), ()),
    "softmax_temperature": (1,),
    **dict.fromkeys(("final_logit_softcapping", "attn_logit_softcapping", "logits_soft_cap"), ()),
    **dict.fromkeys(("lm_head_bias", "head_bias", "no_bias"), ()),
    # Changed weights
    **dict.fromkeys(("quantized", "quantization", "quantize", "load_in_8bit", "load_in_4bit"), ()),
    **dict.fromkeys(("adapters", "adapter_size", "lora_rank", "lora_r", "lora_alpha", "use_lora"), ()),
}
"""Field -> values beside false, 0, null and empty ones with which it is a GPT-2 as implemented here."""

_IGNORED = """
hidden_act hidden_activation hidden_dropout_prob attention_probs_dropout_prob intermediate_size type_vocab_size
layer_norm_eps norm_eps directionality pooler_fc_size pooler_num_attention_heads pooler_num_fc_layers
pooler_size_per_head pooler_type window_size context_window_size use_sliding_window max_window_layers vocab_file
dropout attention_dropout activation_dropout hidden_dropout resid_dropout embd_dropout activation_checkpointing
model_parallel tensor_parallel use_flash_attention use_flash_attn _flash_attn_2_enabled flash_attn fused_mlp
fused_bias_fc fused_dropout_add_ln scale_grad_by_freq attention_softmax_in_fp32 scale_attention_softmax_in_fp32
scaled_init scale_init mup_base_width context_window
"""
IGNORED: frozenset[str] = frozenset(_IGNORED.split())
"""Fields whose names suggest a computation, and that do not change the logits of a GPT-2. They are reported."""

_TRANSFORMERS = """
model_type architectures transformers_version chunk_size_feed_forward torch_dtype dtype name_or_path _name_or_path
_commit_hash tie_last_hidden_states use_cache output_past return_dict return_dict_in_generate output_attentions
output_cross_attentions output_hidden_states output_scores output_logits torchscript use_bfloat16 tf_legacy_loss
xla_device gradient_checkpointing keys_to_ignore_at_inference is_decoder is_composition finetuning_task
task_specific_params problem_type id2label label2id num_labels _num_labels classifier_dropout summary_type
summary_use_proj summary_activation summary_proj_to_labels summary_first_dropout summary_last_dropout prefix
tokenizer_class bos_token_id eos_token_id pad_token_id sep_token_id decoder_start_token_id forced_bos_token_id
forced_eos_token_id suppress_tokens begin_suppress_tokens bad_words_ids do_sample early_stopping num_beams
num_beam_groups diversity_penalty temperature top_k top_p min_p typical_p epsilon_cutoff eta_cutoff repetition_penalty
encoder_repetition_penalty length_penalty exponential_decay_length_penalty no_repeat_ngram_size
encoder_no_repeat_ngram_size max_length min_length max_new_tokens min_new_tokens num_return_sequences
remove_invalid_values renormalize_logits attn_implementation _attn_implementation _attn_implementation_autoset
_attn_implementation_internal _experts_implementation _experts_implementation_internal experts_implementation
_output_attentions fusion_config loss_type vision_aspect_ratio vision_feature_layer vision_feature_select_strategy
assistant_confidence_threshold assistant_lookbehind num_assistant_tokens num_assistant_tokens_schedule
target_lookbehind cache_implementation guidance_scale sequence_bias stop_strings
"""
TRANSFORMERS: frozenset[str] = frozenset(_TRANSFORMERS.split())
"""Fields of transformers' own that do not change the logits of a GPT-2. They are not reported."""

_COMPUTATION = re.compile(
    r"(^|_)(rope|rotary|glu|lora|moe|kv|qk|qkv|sinks?|gate|gated|gates|gating|ssm|conv|conv1d|rms)(_|$)"
    r"|\w+glu(_|$)|(^|_)(rms|rope)\w*|alibi|sinusoid|relative_(att|pos)|expert|router|soft_?cap|capping|sliding|window"
    r"|layer_?norm|(?<!grad)(^|_)norm(_|$)|(post|pre)_?(ln|norm)|adapter|prun(e|ing)|quanti[sz]|spars(e|ity)|mamba"
    r"|non_?causal|bidirection|parallel_(att|res|block|mlp)|residual|softmax|memory_(layer|token)"
    r"|(emb|embd|embedding|embeddings|attn|attention|logit|logits|qk|depth|width|weight|weights|head|mlp|key|residual)"
    r"_(scal(e|ing)|multiplier)|scal(e|ed)_(emb|attn|attention|logit|qk|weight)|mlp_type"
    r"|(att|attn|attention)_(type|types|kind|pattern|mode)|(pos|position|positional)_(emb|enc|embedding|encoding|bias)"
)
"""Names of computations that GPT-2 does not have: the second line, for fields that no list has."""


def unsupported(name: str, value: Any) -> str | None:
    """Return why this field describes a model that is not implemented, or None.

    Args:
        name: a field that `GPT2Config` does not have.
        value: its value, as read from JSON.
    """
    if name in MUST_BE:
        return None if value == MUST_BE[name] else f"must be {MUST_BE[name]!r}"
    if name in STATED or _is_empty(value):
        return None
    if name in UNSUPPORTED:
        accepted = UNSUPPORTED[name]
        return None if any(value == other for other in accepted) else _not_supported(accepted)
    if name not in IGNORED and name not in TRANSFORMERS and _COMPUTATION.search(name.lower()):
        return "unknown, and its name suggests that it changes the output; remove it from config.json if it does not"
    return None


def _is_empty(value: Any) -> bool:
    """Whether a value is false, 0, null or empty, or holds such values alone, as `{"adapters": {}}` does."""
    return not value or (isinstance(value, dict) and not any(value.values()))


def _not_supported(accepted: tuple[Any, ...]) -> str:
    values = f" or {', '.join(map(repr, accepted))}" if accepted else ""
    return f"not supported; it must be absent, empty, false, 0{values}"


def is_ignored(name: str) -> bool:
    """Whether a supported field has no meaning for transformers' GPT-2. Such fields are reported, and kept."""
    return not (name in MUST_BE or name in STATED or name in UNSUPPORTED or name in TRANSFORMERS)
