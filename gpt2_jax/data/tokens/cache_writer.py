"""Write the tokens of a source into a directory of the token cache."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Generator, Mapping
from contextlib import ExitStack, closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Protocol

import numpy as np

from bridge.errors import quoted
from bridge.tokenizers.tokenizer import Tokenizer
from gpt2_jax.data.errors import DataError
from gpt2_jax.data.text.blocks import Block, Tasks, run_in_order
from gpt2_jax.data.text.documents import Document
from gpt2_jax.data.tokens.files import SIDECAR

TaskProgress = Callable[[str, int, int], None]
"""Called with the name of the task, the number of bytes done and their total."""

FORMAT = 1
ENDS, COUNTS = "document_ends.bin", "counts_in_loss.bin"
TOKENS = {"<u2": "tokens.bin", "<u4": "tokens.uint32"}  # `.bin` alone means uint16, as in nanoGPT
FILES = {SIDECAR, ENDS, COUNTS, *TOKENS.values()}


class Source(Protocol):
    """A source of text: `Documents`, or `gpt2_jax.data.records.files.Records`."""

    @property
    def source(self) -> str: ...
    @property
    def files(self) -> tuple[Document, ...]: ...
    @property
    def size(self) -> int: ...


@dataclass(frozen=True)
class Encoding:
    """How a source becomes tokens."""

    tokenizer: Tokenizer
    key: str
    """What distinguishes it from other encodings of the same files."""
    tasks: Callable[[], Tasks]
    """Returns the tasks that encode the source."""
    if_empty: str
    """The reason to report for a source without text if no record was left out."""
    masked: bool = False
    """Whether some tokens do not count in the loss."""


def write_tokens(directory: Path, source: Source, encoding: Encoding, progress: TaskProgress | None) -> None:
    """Write the files of a directory of the cache. Raises `DataError` if the source has no text."""
    tokenizer = encoding.tokenizer
    about: dict[str, Any] = {
        "format": FORMAT,
        "source": source.source,
        "tokenizer": {"name": tokenizer.name, "fingerprint": tokenizer.fingerprint},
        "dtype": "<u2" if tokenizer.max_token_id < 2**16 else "<u4",
    }
    with ExitStack() as stack:

        def new(name: str) -> _HashedFile:
            return _HashedFile(stack.enter_context((directory / name).open("xb")))

        files = _Files(new(TOKENS[about["dtype"]]), new(ENDS), new(COUNTS) if encoding.masked else None)
        about |= _encode(source, run_in_order(encoding.tasks()), files, np.dtype(about["dtype"]), progress)
    if not about["characters"]:
        left_out = about.get("left_out")
        why = described(left_out) if left_out else encoding.if_empty
        raise DataError(f"{quoted(Path(source.source))} has no text: {why}")
    (directory / SIDECAR).write_text(json.dumps(about, indent=2) + "\n", encoding="utf-8")


class _HashedFile:
    """A file that is written once, and the hash of its content."""

    def __init__(self, file: BinaryIO) -> None:
        self._file, self._digest = file, hashlib.sha256()

    def write(self, array: np.ndarray) -> None:
        self._digest.update(array.data)
        self._file.write(array.data)

    @property
    def sha256(self) -> str:
        return self._digest.hexdigest()


@dataclass(frozen=True)
class _Files:
    tokens: _HashedFile
    ends: _HashedFile
    counts: _HashedFile | None


def _encode(
    source: Source,
    encoded: Generator[Block, None, None],
    files: _Files,
    dtype: np.dtype,
    progress: TaskProgress | None,
) -> dict[str, Any]:
    """Write the blocks. Returns the counts and the hashes for the sidecar."""
    count = Counter(tokens=0, documents=0, skipped=len(source.files), bytes=0, characters=0)
    left_out: Counter[str] = Counter()
    read = 0
    with closing(encoded) as blocks:
        for block in blocks:
            files.tokens.write(block.ids.astype(dtype))
            files.ends.write((count["tokens"] + block.ends).astype("<i8"))
            if files.counts is not None:
                counts = np.ones(len(block.ids), np.uint8) if block.counts is None else block.counts.astype(np.uint8)
                files.counts.write(counts)
            count.update(tokens=len(block.ids), documents=len(block.ends), bytes=block.bytes, skipped=-block.files)
            count.update(characters=block.characters)
            left_out.update(block.left_out)
            read += block.read
            if progress and block.read:
                progress("tokenising", min(read, source.size), source.size)
    hashes = {"sha256": files.tokens.sha256, "document_ends_sha256": files.ends.sha256}
    if files.counts is not None:
        hashes["counts_sha256"] = files.counts.sha256
    return {**count, **hashes, **({"left_out": dict(left_out)} if left_out else {})}


def described(left_out: Mapping[str, int]) -> str:
    """Describe how many records were left out, by reason."""
    reasons = ", ".join(f"{number:,} {reason}" for reason, number in left_out.items())
    total = sum(left_out.values())
    return f"{total:,} record{'s were' if total > 1 else ' was'} left out: {reasons}"
