"""Train the SentencePiece models of this directory, and record the ids that transformers gives with them.

    python tests/files/sentencepiece-0.2.3/write.py

Needs the packages sentencepiece and protobuf. transformers needs both to read a `spiece.model`; the tests need neither.
"""

from __future__ import annotations

import io
import json
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE.parents[1]), str(HERE.parents[2])]

import sentencepiece  # noqa: E402
from support.models import TINY  # noqa: E402
from support.tokenizers_for_tests import CORPUS  # noqa: E402
from tokenizing.strings import generated  # noqa: E402
from transformers import AutoTokenizer  # noqa: E402

STRINGS = 200
SHORT = 300  # characters; longer strings are left out of the models other than T5's
ROWS = 1000

BPE = {"model_type": "bpe", "normalization_rule_name": "identity"}
LLAMA = {**BPE, "byte_fallback": True, "vocab_size": 400, "user_defined_symbols": ["<user>", "的"]}

# Directory -> options of the trainer, and tokenizer_config.json.
MODELS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    # as rinna/japanese-gpt2-medium has it
    "rinna": (
        {"unk_id": 0, "bos_id": 1, "eos_id": 2, "control_symbols": ["[PAD]", "[CLS]", "[SEP]", "[MASK]"]},
        {
            "eos_token": "</s>",
            "unk_token": "<unk>",
            "pad_token": "[PAD]",
            "extra_ids": 0,
            "additional_special_tokens": [],
            "bos_token": "<s>",
            "cls_token": "[CLS]",
            "sep_token": "[SEP]",
            "mask_token": "[MASK]",
        },
    ),
    "t5": (
        {"pad_id": 0, "eos_id": 1, "unk_id": 2, "bos_id": -1, "user_defined_symbols": ["<user>", "的"]},
        {"extra_ids": 5},
    ),
    "not normalized": (
        {"pad_id": 0, "eos_id": 1, "unk_id": 2, "bos_id": 3, "normalization_rule_name": "identity"},
        {"extra_ids": 0},
    ),
    "llama": (LLAMA, {"tokenizer_class": "LlamaTokenizer", "add_bos_token": True, "add_eos_token": False}),
    "llama, legacy": (LLAMA, {"tokenizer_class": "LlamaTokenizerFast", "legacy": True, "pad_token": "<pad>"}),
    "llama without prefix": (
        {**BPE, "vocab_size": 160},
        {"tokenizer_class": "LlamaTokenizer", "add_prefix_space": False, "add_eos_token": True, "eos_token": "<end>"},
    ),
    "reformer": (
        {"normalization_rule_name": "identity", "pad_id": 3},
        {"tokenizer_class": "ReformerTokenizer", "pad_token": "<pad>"},
    ),
    "xlm-roberta": (
        {"normalization_rule_name": "identity"},
        {
            "tokenizer_class": "XLMRobertaTokenizer",
            "mask_token": {
                "__type": "AddedToken",
                "content": "<mask>",
                "lstrip": True,
                "rstrip": False,
                "normalized": False,
                "single_word": False,
            },
        },
    ),
    "general, BPE": ({**LLAMA, "bos_id": -1}, {"tokenizer_class": "PreTrainedTokenizerFast", "add_eos_token": True}),
    "general, Unigram": (
        {"unk_id": 3, "bos_id": 0, "eos_id": 1, "unk_piece": "[UNK]", "normalization_rule_name": "identity"},
        {"tokenizer_class": "TokenizersBackend", "add_bos_token": True},
    ),
}
FILES = {"T5Tokenizer": "spiece.model", "ReformerTokenizer": "spiece.model"}
FILES |= {"XLMRobertaTokenizer": "sentencepiece.bpe.model"}


def main() -> None:
    for name, (options, settings) in MODELS.items():
        directory = HERE / name
        directory.mkdir(exist_ok=True)
        model = io.BytesIO()
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(CORPUS),
            model_writer=model,
            **{"vocab_size": 180, "hard_vocab_limit": False, "minloglevel": 2, **options},
        )
        settings = {"tokenizer_class": "T5Tokenizer", **settings}
        (directory / FILES.get(settings["tokenizer_class"], "tokenizer.model")).write_bytes(model.getvalue())
        (directory / "tokenizer_config.json").write_text(json.dumps(settings))
        with tempfile.TemporaryDirectory() as scratch:
            shutil.copytree(directory, scratch, dirs_exist_ok=True)
            (Path(scratch) / "config.json").write_text(json.dumps({**TINY.to_hf(), "vocab_size": ROWS}))
            theirs = AutoTokenizer.from_pretrained(scratch)
            added = {token.content: i for i, token in theirs.added_tokens_decoder.items()}
            recorded = []
            for text in generated(STRINGS, 0, [*added]):
                if settings["tokenizer_class"] != "T5Tokenizer" and len(text) > SHORT:
                    continue
                ids = theirs(text)["input_ids"]
                recorded.append([text, ids, theirs.decode(ids)])
            roles = theirs.special_tokens_map
        expected = {"added": added, "roles": roles, "strings": recorded}
        (directory / "expected.json").write_text(json.dumps(expected, ensure_ascii=True) + "\n")


if __name__ == "__main__":
    main()
