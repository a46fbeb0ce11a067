"""The kind of a data file by its name: plain or compressed, text, records or a mixture."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Literal

Compression = Literal["gzip", "xz", "zstd"]
RecordFormat = Literal["json lines", "json", "csv", "tsv", "parquet", "arrow"]

_COMPRESSIONS: dict[str, Compression] = {".gz": "gzip", ".xz": "xz", ".zst": "zstd"}
_FORMATS: dict[str, RecordFormat] = {
    ".jsonl": "json lines",
    ".jsonlines": "json lines",
    ".jl": "json lines",
    ".ndjson": "json lines",
    ".json": "json",
    ".csv": "csv",
    ".tsv": "tsv",
    ".parquet": "parquet",
    ".arrow": "arrow",
}
_DATASET_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*(:[\w.-]+)?", re.ASCII)
_TEXT_AND_TOKEN_SUFFIXES = frozenset({".txt", ".md", ".bin", ".npy", ".toml", *_COMPRESSIONS})
RECORD_SUFFIXES = tuple(_FORMATS)


def is_mixture_file(source: str | Path) -> bool:
    """Whether a source is a single file with the suffix `.toml`, which describes a mixture of sources."""
    return Path(source).suffix == ".toml" and Path(source).is_file()


def is_dataset_id(source: str | Path) -> bool:
    """Whether a source has the form of a data set's name on the Hugging Face hub, and not that of a file name.

    A path in an existing directory is not such a name, so a misspelled file name is not sent to the hub.

    >>> is_dataset_id("roneneldan/TinyStories"), is_dataset_id("Salesforce/wikitext:wikitext-2-v1")
    (True, True)
    """
    path = Path(source)
    if _DATASET_ID.fullmatch(str(source)) is None or path.exists() or path.parent.is_dir():
        return False
    return record_format(path) is None and path.suffix.lower() not in _TEXT_AND_TOKEN_SUFFIXES


def compression_of(path: Path) -> Compression | None:
    """Return how a file is compressed, by the last suffix of its name."""
    return _COMPRESSIONS.get(path.suffix.lower())


def record_format(path: Path) -> RecordFormat | None:
    """Return the format of a file of records, by the suffix of its name, or None for text.

    >>> record_format(Path("train.jsonl.gz"))
    'json lines'
    >>> record_format(Path("book.txt.gz")) is None
    True
    """
    plain = path.with_suffix("") if compression_of(path) else path
    return _FORMATS.get(plain.suffix.lower())
