"""Tokenizers and generation settings of the models in `public_configurations`, as data.

Each model has a tokenizer of the kind that it publishes, and the ids and generation settings that its `config.json`,
its `generation_config.json` or its model card states. Tokens are named by their spelling, because the tokenizers of the
tests are small; an integer is an id as published, which may be outside the small vocabulary.

`PUBLISHED` is written from memory of the published files and model cards, without fetching them. Settings of a model
card are in `generation_config.json` here. `ASSIGNED` contains a plausible kind of tokenizer and plausible settings for
invented models and for models whose settings are not known.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from support.tokenizers_for_tests import END

Settings = Mapping[str, Any]

MOST = {"max_length": 15, "min_length": 11, "max_new_tokens": 7, "num_beams": 2}
"""Limits for published settings, so that texts are short, and JAX compiles for one cache length."""


@dataclass(frozen=True)
class Text:
    """How one model reads and writes text."""

    tokenizer: str
    """A name in `tokenizing.kinds.KINDS`."""
    config: Settings = field(default_factory=dict)
    """Fields of config.json, over those of `public_configurations`."""
    generation: Settings | None = None
    """The content of generation_config.json beside the ids of config.json, which transformers saves there, too. None:
    there is no such file."""


def ids(bos: Any, eos: Any, **others: Any) -> Settings:
    return {"bos_token_id": bos, "eos_token_id": eos, **others}


ENDS = ids(END, END)
OPENAI = Text("vocab_and_merges_alone", ENDS, {"_from_model_config": True, **ENDS, "transformers_version": "4.26.0"})
S = ids("<s>", "</s>")
SAMPLED: Settings = {"do_sample": True, "top_k": 50, "top_p": 0.95}
UER = Text("chinese_wordpiece", ids(50256, 50256), {"do_sample": True, "max_length": 100})
DIALOGUE = Text("old_style", ENDS, {**ENDS, "max_length": 1000, "pad_token_id": END})
RINNA = Text(
    "t5",
    ids("▁", "</s>", pad_token_id="[SEP]"),
    {**SAMPLED, "max_length": 100, "min_length": 100, "pad_token_id": "<pad>", "bad_words_ids": [["<unk>"]]},
)
CEREBRAS: Settings = {"num_beams": 5, "max_new_tokens": 50, "early_stopping": True, "no_repeat_ngram_size": 2}
RUGPT3 = Text("with_bos", {**S, "pad_token_id": END}, {"top_k": 5, "top_p": 0.95, "repetition_penalty": 5.0})

PUBLISHED: Mapping[str, Text] = {
    "gpt2": OPENAI,
    "gpt2-medium": OPENAI,
    "gpt2-large": OPENAI,
    "gpt2-xl": OPENAI,
    "distilgpt2": OPENAI,
    "microsoft/DialoGPT-small": DIALOGUE,
    "microsoft/DialoGPT-medium": DIALOGUE,
    "microsoft/DialoGPT-large": DIALOGUE,
    "uer/gpt2-chinese-cluecorpussmall": UER,
    "uer/gpt2-distil-chinese-cluecorpussmall": UER,
    "uer/gpt2-chinese-poem": UER,
    "ckiplab/gpt2-base-chinese": Text("saved_wordpiece", ids("[CLS]", "[SEP]", pad_token_id="[PAD]")),
    "IDEA-CCNL/Wenzhong-GPT2-110M": Text(
        "old_style",
        ENDS,
        {"do_sample": True, "top_p": 0.6, "max_length": 150, "eos_token_id": END, "pad_token_id": 0},
    ),
    "IDEA-CCNL/Wenzhong2.0-GPT2-3.5B-chinese": Text(
        "old_style",
        ENDS,
        {"do_sample": True, "top_p": 0.6, "max_length": 150, "eos_token_id": END, "num_return_sequences": 5},
    ),
    "rinna/japanese-gpt2-medium": RINNA,
    "rinna/japanese-gpt2-xsmall": RINNA,
    "rinna/japanese-gpt-1b": Text(
        "t5", ids("▁", "</s>", pad_token_id="<pad>"), {**(RINNA.generation or {}), "top_k": 500}
    ),
    "abeja/gpt2-large-japanese": Text(
        "t5_with_sentinels",
        ids("</s>", "<pad>", pad_token_id="<unk>"),
        {"do_sample": True, "max_length": 50, "top_p": 0.95, "top_k": 500, "num_return_sequences": 3},
    ),
    "skt/kogpt2-base-v2": Text(
        "bpe_with_suffix",
        ids("</s>", "</s>", pad_token_id="<unk>"),
        {"max_length": 128, "repetition_penalty": 2.0, **ids("</s>", "</s>"), "use_cache": True},
    ),
    "microsoft/CodeGPT-small-py": Text("with_bos", {**ENDS, "eos_token_id": "</s>"}),
    "microsoft/CodeGPT-small-java-adaptedGPT2": Text("with_bos", {**S, "pad_token_id": END}),
    "antoiloui/belgpt2": Text("old_style", ENDS, {**SAMPLED, "max_length": 100, "num_return_sequences": 3}),
    "asi/gpt-fr-cased-small": Text(
        "with_bos_and_eos_and_prefix_space", {**S, "pad_token_id": END}, {**SAMPLED, "max_length": 100}
    ),
    "stanford-crfm/alias-gpt2-small-x21": Text("new_style", ENDS),
    "cerebras/Cerebras-GPT-111M": Text("new_style", ENDS, CEREBRAS),
    "cerebras/Cerebras-GPT-256M": Text("new_style", ENDS, CEREBRAS),
    "cerebras/Cerebras-GPT-2.7B": Text("new_style", ENDS, CEREBRAS),
    "codeparrot/codeparrot-small": Text(
        "new_style", ENDS, {"do_sample": True, "temperature": 0.2, "top_p": 0.95, "top_k": 0}
    ),
    "ai-forever/rugpt3small_based_on_gpt2": RUGPT3,
    "ai-forever/rugpt3medium_based_on_gpt2": RUGPT3,
    "ai-forever/mGPT": Text(
        "byte_level_of_its_own_words",
        ids(50256, 50256),
        {
            "min_length": 100,
            "max_length": 100,
            "eos_token_id": END,
            "pad_token_id": 1,
            "top_k": 10,
            "top_p": 0.0,
            "no_repeat_ngram_size": 5,
        },
    ),
    "nferruz/ProtGPT2": Text(
        "new_style",
        ENDS,
        {"max_length": 100, "do_sample": True, "top_k": 950, "repetition_penalty": 1.2, "eos_token_id": END},
    ),
    "lvwerra/gpt2-imdb": Text("old_style", ENDS),
    "huggingtweets": Text("old_style", {**ENDS, "top_k": 40}),
    "ResembleAI/chatterbox, GPT2_medium": Text(
        "with_plain_added_tokens",
        ENDS,
        {"do_sample": True, "temperature": 0.8, "top_p": 0.95, "repetition_penalty": 1.2, "min_p": 0.05},
    ),
}

ASSIGNED: Mapping[str, Text] = {
    "DialoGPT 345M, original release": Text(
        "vocab_and_merges_alone", {}, {"eos_token_id": END, "no_repeat_ngram_size": 3}
    ),
    "GPT2-Chinese, model_config_small.json": Text(
        "cased_wordpiece", {}, {"eos_token_id": "[SEP]", "suppress_tokens": ["[UNK]"], "repetition_penalty": 1.5}
    ),
    "GPT2-chitchat": Text(
        "chinese_wordpiece", {}, {"eos_token_id": "[SEP]", "bad_words_ids": [["[UNK]"], ["[PAD]"]], "max_length": 25}
    ),
    "nlp-waseda/gpt2-small-japanese": Text(
        "unigram",
        ids("<s>", "</s>", pad_token_id="<pad>"),
        {"do_sample": True, "num_return_sequences": 5, "max_length": 30},
    ),
    "KoGPT2 1.0": Text("xlm_roberta", {}, {"eos_token_id": ["</s>", "<mask>"], "temperature": 0.7}),
    "dbmdz/german-gpt2": Text(
        "with_prefix_space", ENDS, {"eos_token_id": [END], "max_length": 50, "min_new_tokens": 3}
    ),
    "GroNLP/gpt2-small-dutch": Text("new_over_old", ids("<new>", "<new>")),
    "GroNLP/gpt2-medium-italian-embeddings": Text(
        "with_special_tokens_of_the_map", ids("<user>", "<bot>"), {"eos_token_id": ["<bot>", "<user>"]}
    ),
    "pierreguillou/gpt2-small-portuguese": Text("old_style", ENDS, {"do_sample": True, "top_k": 40, "max_length": 50}),
    "datificate/gpt2-small-spanish": Text("new_style", ENDS, {"typical_p": 0.9, "do_sample": True}),
    "LorenzoDeMattei/GePpeTto": Text(
        "old_style_with_added_tokens", ids(END, "<speaker2>"), {**SAMPLED, "max_length": 30, "repetition_penalty": 1.0}
    ),
    "flax-community/gpt2-small-indonesian": Text("new_style", ENDS, {"max_length": 30, "renormalize_logits": False}),
    "akhooli/gpt2-small-arabic": Text("old_style", ENDS, {"num_beams": 5, "length_penalty": 0.6, "max_new_tokens": 7}),
    "HooshvareLab/gpt2-fa": Text(
        "new_style_with_added_tokens",
        ids("<user>", "<eos>", pad_token_id="<pad>"),
        {"eos_token_id": "<eos>", "sequence_bias": [[["<pad>"], -9.0]], "begin_suppress_tokens": ["<eos>"]},
    ),
    "PlanTL-GOB-ES/gpt2-base-bne": Text("with_post_processor", ENDS, {"forced_eos_token_id": END, "max_new_tokens": 6}),
    "readerbench/RoGPT2-base": Text(
        "llama", S, {"num_beams": 4, "early_stopping": True, "no_repeat_ngram_size": 2, "max_new_tokens": 20}
    ),
    "pranavpsv/gpt2-genre-story-generator": Text(
        "old_style_with_added_tokens",
        ids(END, "<speaker2>"),
        {"do_sample": True, "forced_bos_token_id": "<speaker1>", "eos_token_id": "<speaker2>"},
    ),
    "transformers 5": Text(
        "new_style", ENDS, {"eos_token_id": END, "pad_token_id": END, "transformers_version": "5.4.0"}
    ),
    "transformers 4.6 with more positions": Text("with_bos", {**S, "repetition_penalty": 1.3}),
    "a GPT-2 with BERT's fields": Text("chinese_wordpiece", ids("[CLS]", ["[SEP]", "[PAD]"])),
    "a GPT-2 with GPT-Neo's fields": Text(
        "bpe_with_byte_fallback", S, {"eos_token_id": "</s>", "exponential_decay_length_penalty": [2, 1.5]}
    ),
    "a GPT-2 with adapters' fields": Text(
        "word_level", ids("<s>", "<s>"), {"suppress_tokens": ["<unk>"], "eos_token_id": "<s>"}
    ),
    "a GPT-2 with Megatron's fields": Text("characters", ids("<unk>", "<unk>"), {"eos_token_id": "\n"}),
    "a GPT-2 of a general trainer": Text(
        "t5_with_sentinels", ids(None, "<pad>"), {"eos_token_id": None, "max_new_tokens": 5}
    ),
}

TEXT: Mapping[str, Text] = {**PUBLISHED, **ASSIGNED}
"""Model -> its tokenizer and generation settings."""


@cache
def files_of_kind(kind: str) -> tuple[Mapping[str, bytes], Mapping[str, int]]:
    """Return the files of a tokenizer, and spelling -> id as transformers' AutoTokenizer has them."""
    import transformers
    from tokenizing.kinds import KINDS

    with tempfile.TemporaryDirectory() as scratch:
        directory = Path(scratch)
        KINDS[kind](directory)
        files = {file.name: file.read_bytes() for file in directory.iterdir()}
        (directory / "config.json").write_text('{"model_type": "gpt2"}')
        return files, transformers.AutoTokenizer.from_pretrained(directory).get_vocab()


def write_text(directory: Path, text: Text) -> dict[str, Any]:
    """Write the tokenizer and the generation settings beside a config.json. Returns the fields of config.json."""
    files, vocabulary = files_of_kind(text.tokenizer)
    for name, content in files.items():
        (directory / name).write_bytes(content)
    if text.generation is not None:
        own = {name: value for name, value in text.config.items() if name.endswith("_token_id")}
        settings = _with_ids({**own, **text.generation}, vocabulary)
        (directory / "generation_config.json").write_text(json.dumps(settings))
    return _with_ids(text.config, vocabulary)


def _with_ids(settings: Settings, vocabulary: Mapping[str, int]) -> dict[str, Any]:
    """Return the settings with ids in place of spellings, and short lengths."""

    def replaced(value: Any) -> Any:
        if isinstance(value, list):
            return [replaced(each) for each in value]
        return vocabulary[value] if isinstance(value, str) else value

    names_ids = ("_token_id", "_ids", "_tokens", "_bias")
    found = {name: replaced(value) if name.endswith(names_ids) else value for name, value in settings.items()}
    return found | {name: min(found[name], most) for name, most in MOST.items() if name in found}
