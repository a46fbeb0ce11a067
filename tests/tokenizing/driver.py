"""Compare ids and decoded text with transformers' AutoTokenizer, on any number of generated strings.

    PYTHONPATH=.:tests python -m tokenizing.driver --strings 10000 [--seed 1] [--kinds unigram ...]
    PYTHONPATH=.:tests python -m tokenizing.driver --directories 1000 [--seed 1]

`make test-tokenizers` runs both with larger numbers. Prints one line for each kind of tokenizer. Exits with 1 at the
first difference. `--directories` compares random directories of tokenizer files instead of the kinds.
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
from tokenizing.directories import TEXTS, write_random_files
from tokenizing.kinds import KINDS, ROWS
from tokenizing.strings import generated
from transformers import AutoTokenizer

from bridge import BridgeError
from bridge.tokenizers.added_tokens import ROLES
from bridge.tokenizers.loading import load_tokenizer
from bridge.tokenizers.tokenizer import Tokenizer

BATCH = 1000


def prepared(kind: str, directory: Path) -> tuple[Tokenizer, Any]:
    """Write a tokenizer of this kind and GPT-2's config.json. Returns what this project and transformers read."""
    KINDS[kind](directory)
    return read_by_both(directory)


def read_by_both(directory: Path) -> tuple[Tokenizer, Any]:
    """Add GPT-2's config.json to tokenizer files. Returns what this project and transformers read."""
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


def compare_roles(ours: Tokenizer, theirs: Any) -> None:
    """Assert that the special tokens by role, and the ids that end a text, are equal."""
    roles = {role: token for role, token in theirs.special_tokens_map.items() if role in ROLES}
    assert {f"{role}_token": token for role, token in ours.special.by_role().items()} == roles
    assert ours.eos_token_ids == (() if theirs.eos_token_id is None else (theirs.eos_token_id,))


def compare_random_directory(directory: Path, seed: int) -> None:
    write_random_files(directory, seed)
    ours, theirs = read_by_both(directory)
    compare(ours, theirs, [text for text in TEXTS if not _panics(theirs, text)])
    compare_roles(ours, theirs)


def _panics(theirs: Any, text: str) -> bool:
    """Whether the `tokenizers` package panics, as it does where two added tokens strip the same white space."""
    try:
        theirs(text)
    except BaseException as error:  # pyo3's PanicException is not an Exception
        assert type(error).__name__ == "PanicException", error
        return True
    return False


def compare_directories(count: int, seed: int) -> None:
    start, rejected = time.perf_counter(), 0
    for each in range(seed, seed + count):
        with tempfile.TemporaryDirectory() as directory:
            try:
                compare_random_directory(Path(directory), each)
            except (AssertionError, BridgeError) as error:
                raise SystemExit(f"--directories 1 --seed {each}: {error!r}") from error
            except ValueError:  # of transformers
                rejected += 1
    same = f"{count - rejected} random directories give the same ids and text"
    print(f"{same}, transformers rejects {rejected} ({time.perf_counter() - start:.1f} s)")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--strings", type=int, default=10_000)
    parser.add_argument("--directories", type=int)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--kinds", nargs="+", choices=[*KINDS], default=[*KINDS])
    arguments = parser.parse_args()
    if arguments.directories is not None:
        compare_directories(arguments.directories, arguments.seed)
        return
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
