"""Configurations of public GPT-2 models and of the tools that write them, as data.

They are modelled on the published `config.json` files: the same fields, with the values that matter. `shrunk` reduces
the sizes. The table of docs/reference/configurations.md is generated from `PUBLIC`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from bridge import GPT2Config
from bridge.config_fields import STATED

Fields = Mapping[str, Any]

# transformers 2: what OpenAI's four models and most models until 2020 have.
V2: Fields = {
    "activation_function": "gelu_new",
    "architectures": ["GPT2LMHeadModel"],
    "attn_pdrop": 0.1,
    "bos_token_id": 50256,
    "embd_pdrop": 0.1,
    "eos_token_id": 50256,
    "initializer_range": 0.02,
    "layer_norm_epsilon": 1e-05,
    "model_type": "gpt2",
    "n_ctx": 1024,
    "n_embd": 768,
    "n_head": 12,
    "n_layer": 12,
    "n_positions": 1024,
    "resid_pdrop": 0.1,
    "summary_activation": None,
    "summary_first_dropout": 0.1,
    "summary_proj_to_labels": True,
    "summary_type": "cls_index",
    "summary_use_proj": True,
    "vocab_size": 50257,
}
TEXT_GENERATION: Fields = {"task_specific_params": {"text-generation": {"do_sample": True, "max_length": 50}}}
ONE_LABEL: Fields = {"_num_labels": 1, "id2label": {"0": "LABEL_0"}, "label2id": {"LABEL_0": 0}}
# transformers 4.0 to 4.6
V4: Fields = {
    **V2,
    "gradient_checkpointing": False,
    "n_inner": None,
    "transformers_version": "4.3.2",
    "use_cache": True,
}
# Later versions of transformers 4 write no n_ctx of their own.
V4_LATE: Fields = {
    **{name: value for name, value in V4.items() if name not in ("n_ctx", "gradient_checkpointing")},
    "reorder_and_upcast_attn": False,
    "scale_attn_by_inverse_layer_idx": False,
    "scale_attn_weights": True,
    "torch_dtype": "float32",
    "transformers_version": "4.28.1",
}
V5: Fields = {
    **{name: value for name, value in V4_LATE.items() if name != "torch_dtype"},
    "add_cross_attention": False,
    "dtype": "float32",
    "pad_token_id": None,
    "tie_word_embeddings": True,
    "transformers_version": "5.4.0",
}
# Megatron's and pytorch-pretrained-bert's form: sizes alone.
SIZES: Fields = {
    "initializer_range": 0.02,
    "layer_norm_epsilon": 1e-05,
    "n_ctx": 1024,
    "n_embd": 768,
    "n_head": 12,
    "n_layer": 12,
    "n_positions": 1024,
    "vocab_size": 50257,
}
NO_DROPOUT: Fields = {"attn_pdrop": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0}
MEDIUM: Fields = {"n_embd": 1024, "n_head": 16, "n_layer": 24}
LARGE: Fields = {"n_embd": 1280, "n_head": 20, "n_layer": 36}
SPECIAL: Fields = {"n_special": 0, "predict_special_tokens": True}
CHINESE: Fields = {"tokenizer_class": "BertTokenizer", "vocab_size": 21128}
MISTRAL: Fields = {"reorder_and_upcast_attn": True, "scale_attn_by_inverse_layer_idx": True}


def without(fields: Fields, *names: str) -> dict[str, Any]:
    return {name: value for name, value in fields.items() if name not in names}


def ids(bos: int | None, eos: int | None, pad: int | None = None) -> Fields:
    found = {"bos_token_id": bos, "eos_token_id": eos, "pad_token_id": pad}
    return found if pad is not None else without(found, "pad_token_id")


SMALLEST_VOCABULARY = 512
"""Rows for all tokenizers in `tokenizing.kinds`."""

PUBLIC: Mapping[str, tuple[str, Fields]] = {
    "gpt2": ("OpenAI's 124M", {**V2, **TEXT_GENERATION}),
    "gpt2-medium": (
        "`n_special` and `predict_special_tokens` of GPT-1",
        {**V2, **TEXT_GENERATION, **MEDIUM, **SPECIAL},
    ),
    "gpt2-large": ("OpenAI's 774M", {**V2, **TEXT_GENERATION, **LARGE}),
    "gpt2-xl": ("`output_past`", {**V2, **TEXT_GENERATION, "n_embd": 1600, "n_head": 25, "output_past": True}),
    "distilgpt2": ("six layers; one label", {**V2, **TEXT_GENERATION, **ONE_LABEL, "n_layer": 6}),
    "microsoft/DialoGPT-small": (
        "`task_specific_params` for conversation",
        {**V2, "task_specific_params": {"conversational": {"max_length": 1000}}},
    ),
    "microsoft/DialoGPT-medium": (
        "the same at 355M",
        {**V2, **MEDIUM, "task_specific_params": {"conversational": {"max_length": 1000}}},
    ),
    "microsoft/DialoGPT-large": (
        "the same at 774M",
        {**V2, **LARGE, "task_specific_params": {"conversational": {"max_length": 1000}}},
    ),
    "DialoGPT 345M, original release": ("no `model_type`, no architectures", {**SIZES, **MEDIUM}),
    "uer/gpt2-chinese-cluecorpussmall": (
        "`output_past`, BERT's tokenizer",
        {**without(V4, "transformers_version"), **CHINESE, "output_past": True},
    ),
    "uer/gpt2-distil-chinese-cluecorpussmall": (
        "six layers",
        {**without(V4, "transformers_version"), **CHINESE, "output_past": True, "n_layer": 6},
    ),
    "uer/gpt2-chinese-poem": (
        "a vocabulary of characters",
        {**without(V4, "transformers_version"), **CHINESE, "vocab_size": 22557},
    ),
    "ckiplab/gpt2-base-chinese": (
        "`tokenizer_class` of the fast tokenizer",
        {**V4, **CHINESE, **ids(101, 102, 0), "tokenizer_class": "BertTokenizerFast"},
    ),
    "GPT2-Chinese, model_config_small.json": (
        "no `model_type`; ten layers",
        {**SIZES, "n_layer": 10, "vocab_size": 13317, "finetuning_task": None},
    ),
    "GPT2-chitchat": (
        "no `model_type`; 300 positions",
        {**SIZES, "n_ctx": 300, "n_positions": 300, "n_layer": 10, "vocab_size": 13317},
    ),
    "IDEA-CCNL/Wenzhong-GPT2-110M": ("`n_inner` in full", {**V4, "n_inner": 3072, "vocab_size": 50257}),
    "IDEA-CCNL/Wenzhong2.0-GPT2-3.5B-chinese": (
        "a padded vocabulary",
        {**V4_LATE, "n_embd": 3072, "n_head": 32, "n_layer": 30, "n_inner": 12288, "vocab_size": 50304},
    ),
    "rinna/japanese-gpt2-medium": (
        "SentencePiece; `eos_token_id` 2",
        {**V4, **MEDIUM, **ids(1, 2), "n_inner": 4096, "vocab_size": 32000, "scale_attn_weights": True},
    ),
    "rinna/japanese-gpt2-xsmall": (
        "`n_inner` that is not 4 D",
        {**V4, **ids(1, 2), "n_embd": 512, "n_head": 8, "n_layer": 6, "n_inner": 2304, "vocab_size": 32000},
    ),
    "rinna/japanese-gpt-1b": (
        "1.3B",
        {**V4, **ids(2, 3, 1), "n_embd": 2048, "n_head": 16, "n_layer": 24, "n_inner": 8192, "vocab_size": 44928},
    ),
    "abeja/gpt2-large-japanese": (
        "T5's tokenizer class",
        {**V4_LATE, **LARGE, **ids(2, 3, 1), "tokenizer_class": "T5Tokenizer", "vocab_size": 32000},
    ),
    "nlp-waseda/gpt2-small-japanese": (
        "reordered and upcast attention",
        {**V4_LATE, **MISTRAL, **ids(0, 0), "vocab_size": 32000},
    ),
    "skt/kogpt2-base-v2": (
        "`author`, `created_date` and `license`",
        {
            **V4,
            **ONE_LABEL,
            **ids(0, 1, 3),
            "author": "Heewon Jeon",
            "created_date": "2021-04-28",
            "license": "CC-BY-NC-SA 4.0",
            "vocab_size": 51200,
            "scale_attn_weights": True,
        },
    ),
    "KoGPT2 1.0": ("no `model_type`; exact GELU", {**SIZES, "vocab_size": 50000, "activation_function": "gelu"}),
    "microsoft/CodeGPT-small-py": ("tokens added to OpenAI's", {**V2, **TEXT_GENERATION, "vocab_size": 50001}),
    "microsoft/CodeGPT-small-java-adaptedGPT2": (
        "three tokens past OpenAI's",
        {**V2, **TEXT_GENERATION, **ids(50256, 50256, 50259), "vocab_size": 50260},
    ),
    "dbmdz/german-gpt2": ("another BPE vocabulary", {**V4, **TEXT_GENERATION, "vocab_size": 50265}),
    "GroNLP/gpt2-small-dutch": ("ids 0 for bos and eos", {**V4, **TEXT_GENERATION, **ids(0, 0), "vocab_size": 40000}),
    "GroNLP/gpt2-medium-italian-embeddings": (
        "the same at 355M",
        {**V4, **TEXT_GENERATION, **MEDIUM, **ids(0, 0), **SPECIAL, "vocab_size": 30001},
    ),
    "pierreguillou/gpt2-small-portuguese": (
        "transformers 3",
        {**V2, **TEXT_GENERATION, "gradient_checkpointing": False},
    ),
    "datificate/gpt2-small-spanish": ("`_name_or_path`", {**V2, **TEXT_GENERATION, "_name_or_path": "checkpoint"}),
    "LorenzoDeMattei/GePpeTto": ("30000 tokens", {**V2, "vocab_size": 30000}),
    "antoiloui/belgpt2": ("French", {**V2, **TEXT_GENERATION, "output_past": True}),
    "asi/gpt-fr-cased-small": (
        "heads of 66",
        {**V4, **ids(0, 2, 1), "n_embd": 792, "n_inner": 3168, "vocab_size": 50000},
    ),
    "stanford-crfm/alias-gpt2-small-x21": (
        "attention scaled by the layer's number, and upcast",
        {**V4_LATE, **MISTRAL, **TEXT_GENERATION, "n_ctx": 1024, "gradient_checkpointing": False},
    ),
    "cerebras/Cerebras-GPT-111M": (
        "exact GELU, no dropout, 2048 positions",
        {**V4_LATE, **NO_DROPOUT, "activation_function": "gelu", "n_inner": 3072, "n_layer": 10, "n_positions": 2048},
    ),
    "cerebras/Cerebras-GPT-256M": (
        "17 heads",
        {
            **V4_LATE,
            **NO_DROPOUT,
            "activation_function": "gelu",
            "n_positions": 2048,
            "n_embd": 1088,
            "n_head": 17,
            "n_inner": 4352,
            "n_layer": 14,
        },
    ),
    "cerebras/Cerebras-GPT-2.7B": (
        "heads of 80",
        {
            **V4_LATE,
            **NO_DROPOUT,
            "activation_function": "gelu",
            "n_positions": 2048,
            "n_embd": 2560,
            "n_head": 32,
            "n_inner": 10240,
            "n_layer": 32,
        },
    ),
    "codeparrot/codeparrot-small": (
        "as the mistral models; ids 0",
        {**V4_LATE, **MISTRAL, **ids(0, 0), "vocab_size": 32768},
    ),
    "ai-forever/rugpt3small_based_on_gpt2": (
        "2048 positions",
        {**V4, **ids(1, 2, 0), "n_ctx": 2048, "n_positions": 2048, "vocab_size": 50264},
    ),
    "ai-forever/rugpt3medium_based_on_gpt2": (
        "fields of five versions of transformers",
        {
            **V4_LATE,
            **MEDIUM,
            **SPECIAL,
            **ids(1, 2, 0),
            "n_ctx": 2048,
            "n_positions": 2048,
            "id2label": {"0": "LABEL_0"},
            "label2id": {"LABEL_0": 0},
            "output_past": True,
            "torch_dtype": "float32",
        },
    ),
    "ai-forever/mGPT": (
        "a vocabulary of 100000",
        {**V4_LATE, "n_ctx": 2048, "n_embd": 2048, "n_head": 16, "n_positions": 2048, "vocab_size": 100000},
    ),
    "nferruz/ProtGPT2": ("proteins", {**V4_LATE, **LARGE, **TEXT_GENERATION, **ids(0, 0), "n_ctx": 1024}),
    "flax-community/gpt2-small-indonesian": (
        "trained in Flax without dropout",
        {**V4, **NO_DROPOUT, **TEXT_GENERATION, "scale_attn_weights": True},
    ),
    "akhooli/gpt2-small-arabic": ("`line_by_line` of a script", {**V2, **TEXT_GENERATION, "line_by_line": False}),
    "HooshvareLab/gpt2-fa": ("42001 tokens", {**V4, **ids(5, 9, 0), "vocab_size": 42001}),
    "PlanTL-GOB-ES/gpt2-base-bne": ("no dropout", {**V4_LATE, **NO_DROPOUT, "vocab_size": 50262}),
    "readerbench/RoGPT2-base": ("Romanian", {**V4, "scale_attn_weights": True}),
    "pranavpsv/gpt2-genre-story-generator": ("nine added tokens", {**V2, **TEXT_GENERATION, "vocab_size": 50266}),
    "lvwerra/gpt2-imdb": ("one label, no eos", {**V2, **ONE_LABEL, **TEXT_GENERATION}),
    "huggingtweets": (
        "sampling settings in `config.json`",
        {**V4, "task_specific_params": {"text-generation": {"top_p": 0.95, "max_length": 160}}, "top_k": 40},
    ),
    "ResembleAI/chatterbox, GPT2_medium": (
        "`hidden_size` beside `n_embd`; 8196 positions",
        {**V2, **MEDIUM, **SPECIAL, "hidden_size": 1024, "n_ctx": 8196, "n_positions": 8196, "vocab_size": 50276},
    ),
    "transformers 5": ("`dtype`; no `n_ctx`", {**V5}),
    "transformers 4.6 with more positions": (
        "`n_ctx` differs from `n_positions`",
        {**V4, "n_positions": 2048},
    ),
    "a GPT-2 with BERT's fields": (
        "BERT's names, which GPT-2 ignores",
        {
            **V4,
            **CHINESE,
            "hidden_act": "gelu",
            "hidden_dropout_prob": 0.1,
            "intermediate_size": 3072,
            "attention_probs_dropout_prob": 0.1,
            "type_vocab_size": 2,
            "vocab_file": "vocab.txt",
            "layer_norm_eps": 1e-12,
            "position_embedding_type": "absolute",
            "directionality": "bidi",
        },
    ),
    "a GPT-2 with GPT-Neo's fields": (
        "windows and dropout rates that GPT-2 does not have",
        {
            **V4,
            "window_size": 256,
            "context_window_size": 256,
            "dropout": 0.1,
            "attention_dropout": 0.0,
            "activation_checkpointing": True,
            "num_layers": 12,
            "num_heads": 12,
        },
    ),
    "a GPT-2 with adapters' fields": (
        "`adapters`, empty, and `pruned_heads`, empty",
        {**V4, "adapters": {"adapters": {}, "config_map": {}}, "pruned_heads": {}},
    ),
    "a GPT-2 with Megatron's fields": (
        "sizes under other names, with the same values",
        {
            **V4,
            "n_vocab": 50257,
            "padded_vocab_size": 50257,
            "vocab_size_or_config_json_file": 50257,
            "head_dim": 64,
            "d_model": 768,
            "embedding_size": 768,
            "num_key_value_heads": 12,
            "bias": True,
            "use_bias": True,
        },
    ),
    "a GPT-2 of a general trainer": (
        "switches of other architectures, off",
        {
            **V4_LATE,
            "model_parallel": False,
            "use_flash_attention": False,
            "_flash_attn_2_enabled": False,
            "alibi": False,
            "moe": False,
            "rotary": False,
            "quantized": False,
            "use_rms_norm": False,
            "parallel_attn": False,
            "num_experts": 0,
        },
    ),
}
"""Model -> what is particular about its configuration, and its fields."""


def shrunk(fields: Fields, vocab_size: int | None = None) -> dict[str, Any]:
    """Return the same fields with small sizes: an eighth of the heads, heads of 4, two layers, a 32nd of the positions.

    Sizes of one model that are equal stay equal, and those that differ stay different. Most models get one width, so
    that JAX compiles few shapes.

    Args:
        vocab_size: the size of the vocabulary. By default, different sizes stay different.
    """
    small = dict(fields)
    small["n_head"] = max(2, fields["n_head"] // 8)
    width = 4 * small["n_head"]
    for name in ("n_embd", "hidden_size", "n_inner", "intermediate_size"):
        if fields.get(name) is not None:
            small[name] = fields[name] * width // fields["n_embd"]
    for name in ("n_positions", "n_ctx"):
        if name in fields:
            small[name] = fields[name] // 32
    small["n_layer"] = min(fields["n_layer"], 2)
    small["vocab_size"] = fields["vocab_size"] // 1000 + SMALLEST_VOCABULARY if vocab_size is None else vocab_size
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        if fields.get(name) is not None:
            small[name] = min(fields[name], small["vocab_size"] - 1)
    own = {name: small[name] for name in ("vocab_size", "n_embd", "n_layer", "n_head", "n_inner") if name in small}
    for name, attribute in STATED.items():
        if name in small:
            small[name] = getattr(GPT2Config(**own), attribute)
    return small
