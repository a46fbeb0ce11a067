"""Train the SentencePiece models of this directory, and record the ids that transformers gives with them.

    python tests/files/sentencepiece-0.2.3/write.py

Needs the packages sentencepiece and protobuf. transformers needs both to read a `spiece.model`; the tests need neither.
"""

from __future__ import annotations

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
ROWS = 1000

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
}


def main() -> None:
    for name, (options, settings) in MODELS.items():
        directory = HERE / name
        directory.mkdir(exist_ok=True)
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(CORPUS),
            model_prefix=str(directory / "m"),
            vocab_size=180,
            hard_vocab_limit=False,
            minloglevel=2,
            **options,
        )
        (directory / "m.vocab").unlink()
        (directory / "m.model").replace(directory / "spiece.model")
        (directory / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "T5Tokenizer", **settings}))
        with tempfile.TemporaryDirectory() as scratch:
            shutil.copytree(directory, scratch, dirs_exist_ok=True)
            (Path(scratch) / "config.json").write_text(json.dumps({**TINY.to_hf(), "vocab_size": ROWS}))
            theirs = AutoTokenizer.from_pretrained(scratch)
            added = {token.content: i for i, token in theirs.added_tokens_decoder.items()}
            recorded = []
            for text in generated(STRINGS, 0, [*added]):
                ids = theirs(text)["input_ids"]
                recorded.append([text, ids, theirs.decode(ids)])
            roles = theirs.special_tokens_map
        expected = {"added": added, "roles": roles, "strings": recorded}
        (directory / "expected.json").write_text(json.dumps(expected, ensure_ascii=True) + "\n")


if __name__ == "__main__":
    main()
