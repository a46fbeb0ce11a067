"""Compare ids and decoded text with transformers' AutoTokenizer, on any number of generated strings.

    python -m tokenizing.driver --strings 10000 [--seed 1] [--kinds unigram ...]

Run it in `tests/`. Prints one line for each kind of tokenizer, and exits with 1 at the first difference.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from support.models import TINY
from tokenizing.kinds import KINDS, ROWS
from tokenizing.strings import generated
from transformers import AutoTokenizer

from bridge.tokenizers.loading import load_tokenizer
from bridge.tokenizers.tokenizer import Tokenizer

BATCH = 1000


def prepared(kind: str, directory: Path) -> tuple[Tokenizer, Any]:
    """Write a tokenizer of this kind and GPT-2's config.json. Returns it as we read it, and as transformers does."""
    KINDS[kind](directory)
    (directory / "config.json").write_text(json.dumps({**TINY.to_hf(), "vocab_size": ROWS}))
    return load_tokenizer(directory, ROWS), AutoTokenizer.from_pretrained(directory)


def compare(ours: Tokenizer, theirs: Any, strings: list[str]) -> None:
    """Assert that ids, with and without special tokens around the text, decoded text and streamed text are equal."""
    for around in (True, False):
        found = ours.encode_batch(strings, add_special_tokens=around)
        for text, ids, expected in zip(
            strings, found, theirs(strings, add_special_tokens=around)["input_ids"], strict=True
        ):
            assert ids == expected, f"{text!r} gives {ids}, not {expected} (add_special_tokens={around})"
    for ids in found:
        for skip in (True, False):
            text = theirs.decode(ids, skip_special_tokens=skip)
            assert ours.decode(ids, skip_special_tokens=skip) == text, (ids, skip)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--strings", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--kinds", nargs="+", choices=[*KINDS], default=[*KINDS])
    arguments = parser.parse_args()
    for kind in arguments.kinds:
        with tempfile.TemporaryDirectory() as directory:
            ours, theirs = prepared(kind, Path(directory))
            start, strings = time.perf_counter(), generated(arguments.strings, arguments.seed, [*ours.added])
            while batch := list(itertools.islice(strings, BATCH)):
                compare(ours, theirs, batch)
            read = f"{ours.kind}, {type(ours).__name__}, {time.perf_counter() - start:.1f} s"
            print(f"{kind}: {arguments.strings} strings give the same ids and text ({read})", flush=True)


if __name__ == "__main__":
    sys.exit(main())
