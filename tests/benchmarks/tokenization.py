"""Speed of tokenising 100 MB of text, beside tiktoken and tokenizers.

    python -m tests.benchmarks.tokenization [--megabytes 100] [--rounds 3] [--kinds openai bpe wordpiece unigram]

The text is the Python files of the standard library, repeated. Every implementation uses all cores. They alternate.
Each line has the median of the rounds, and the ratio to each peer in the same round. `into the cache` is what
`gpt2 train` does: it also reads the files, and writes the ids and their SHA-256.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import tiktoken
import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from bridge.tokenizers.byte_level_bpe import ByteLevelBPE
from bridge.tokenizers.loading import load_tokenizer, openai_tokenizer
from bridge.tokenizers.tokenizer import Tokenizer
from gpt2_jax.data.text.documents import Documents, find_documents
from gpt2_jax.data.tokens.cache import cached_text

ROWS = 8000
DOCUMENT = 2**16
"""Characters of a document. A list of them is what each implementation gets."""
CORES = os.cpu_count() or 1
KINDS = ("openai", "bpe", "wordpiece", "unigram")


def write_text(directory: Path, megabytes: int) -> tuple[Documents, list[str]]:
    """Write the text to files of about 1 MB. Returns them, and the same text as a list of documents."""
    source = find_documents("stdlib").readable()
    text = "".join(block for document in source for block in document.blocks())
    text = (text * (1 + megabytes * 10**6 // len(text)))[: megabytes * 10**6]
    directory.mkdir()
    for i in range(0, len(text), 10**6):
        (directory / f"{i:012}.txt").write_text(text[i : i + 10**6])
    return find_documents(directory), [text[i : i + DOCUMENT] for i in range(0, len(text), DOCUMENT)]


def trained(kind: str, documents: list[str], directory: Path) -> Tokenizer:
    """Train a tokenizer on a part of the text, save it as transformers does, and load it as a user would."""
    special: dict[str, Any] = {"show_progress": False, "vocab_size": ROWS}
    if kind == "bpe":
        tokenizer = tokenizers.Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        added = ["<|endoftext|>", "<user>"]
        trainer: Any = trainers.BpeTrainer(special_tokens=added, initial_alphabet=alphabet, **special)
    elif kind == "wordpiece":
        tokenizer = tokenizers.Tokenizer(models.WordPiece(unk_token="[UNK]"))
        tokenizer.normalizer = normalizers.BertNormalizer()
        tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        tokenizer.decoder = decoders.WordPiece()
        trainer = trainers.WordPieceTrainer(special_tokens=["[UNK]", "[SEP]"], **special)
    else:
        tokenizer = tokenizers.Tokenizer(models.Unigram())
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
        tokenizer.decoder = decoders.Metaspace()
        trainer = trainers.UnigramTrainer(special_tokens=["<unk>", "</s>"], unk_token="<unk>", **special)
    tokenizer.train_from_iterator(documents[:40], trainer)
    directory.mkdir()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(directory)
    return load_tokenizer(directory, ROWS)


def peers_of(tokenizer: Tokenizer, documents: list[str]) -> Mapping[str, Callable[[], object]]:
    """Return the implementations by name. Their ids are equal, as the first of the documents shows."""
    engine = tokenizers.Tokenizer.from_str(json.dumps(tokenizer.pipeline()))
    found: dict[str, Callable[[], object]] = {
        "this project": lambda: tokenizer.encode_batch(documents),
        "tokenizers": lambda: engine.encode_batch_fast(documents),
    }
    assert engine.encode(documents[0]).ids == tokenizer.encode(documents[0])
    if isinstance(tokenizer, ByteLevelBPE):
        encoding = _tiktoken_of(tokenizer)
        found["tiktoken"] = lambda: encoding.encode_batch(documents, num_threads=CORES, allowed_special="all")
        assert encoding.encode(documents[0], allowed_special="all") == tokenizer.encode(documents[0])
    return found


def _tiktoken_of(tokenizer: ByteLevelBPE) -> tiktoken.Encoding:
    """Return tiktoken's encoding with OpenAI's pattern, not with the faster equivalent one of this project."""
    return tiktoken.Encoding(
        tokenizer.name,
        pat_str=tiktoken.get_encoding("gpt2")._pat_str,
        mergeable_ranks=dict(tokenizer.ranks),
        special_tokens={token.content: token.id for token in tokenizer.added.values()},
    )


def measure(kind: str, documents: Documents, texts: list[str], scratch: Path, rounds: int) -> None:
    tokenizer = openai_tokenizer() if kind == "openai" else trained(kind, texts, scratch / kind)
    works = dict(peers_of(tokenizer, texts))
    seconds: dict[str, list[float]] = {}
    for number in range(rounds):
        works["into the cache"] = lambda n=number: cached_text(documents, tokenizer, cache=scratch / f"{kind} {n}")  # type: ignore[misc]
        for name, work in works.items():
            start = time.perf_counter()
            work()
            seconds.setdefault(name, []).append(time.perf_counter() - start)
    size = sum(len(text.encode()) for text in texts) / 1e6
    for name, taken in seconds.items():
        ratios = [
            f"{statistics.median(ratio):.2f} times {peer} ({min(ratio):.2f} to {max(ratio):.2f})"
            for peer in ("tiktoken", "tokenizers")
            if peer in seconds
            and peer != name
            and (ratio := [theirs / own for theirs, own in zip(seconds[peer], taken, strict=True)])
        ]
        print(f"{kind:10} {name:15} {size / statistics.median(taken):6.1f} MB/s; {', '.join(ratios)}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=int, default=100)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=KINDS)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        documents, texts = write_text(Path(temporary) / "text", options.megabytes)
        for kind in options.kinds:
            measure(kind, documents, texts, Path(temporary), options.rounds)


if __name__ == "__main__":
    main()
