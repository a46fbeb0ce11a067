"""Hugging Face's sharded checkpoints: several files, and an index that maps each tensor to its file."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from bridge.errors import CheckpointError, bullet_list, quoted
from bridge.formats.directory import read_json, write_json
from bridge.storage.companions import stays_inside
from bridge.storage.regular_file import first_bytes
from bridge.storage.tensors import LazyTensor, LazyTensorMap

_INDEX_START = 2**16  # bytes at the start of the index, enough to contain a shard's name


def is_index(file: Path, suffixes: tuple[str, ...]) -> bool:
    """Whether a JSON file is an index of shards with one of the `suffixes`. Returns False if it cannot be read."""
    start = first_bytes(file, _INDEX_START) if file.suffix == ".json" else b""
    return b'"weight_map"' in start and any(f'{suffix}"'.encode() in start for suffix in suffixes)


def read_shards(index_file: Path, read_file: Callable[[Path], Mapping[str, LazyTensor]]) -> dict[str, LazyTensor]:
    """Return the tensors that an index lists, after checking that the shards contain exactly these.

    Args:
        index_file: `{"metadata": {"total_size": bytes}, "weight_map": {tensor: file}}`, with the files beside it.
        read_file: returns the tensors of one shard.
    """
    directory, index = index_file.parent, read_json(index_file)
    weight_map = index.get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(file, str) for file in weight_map.values()):
        raise CheckpointError(f"{quoted(index_file)}: weight_map must map tensor names to file names")
    entries: dict[str, LazyTensor] = {}
    problems = []
    for file in sorted(set(weight_map.values())):
        if problem := _unusable(directory, file):
            problems.append(problem)
            continue
        shard = read_file(directory / file)
        listed = {name for name, where in weight_map.items() if where == file}
        problems += [f"{quoted(name)} should be in {quoted(file)} but is not" for name in listed - set(shard)]
        for name in shard.keys() - listed:
            instead = f"names {quoted(weight_map[name])}" if name in weight_map else "does not list it"
            problems.append(f"{quoted(name)} is in {quoted(file)}, but the index {instead}")
        entries.update(shard)
    problems = problems or [*_wrong_total(index, entries)]
    if problems:
        raise CheckpointError(f"{quoted(index_file)} and the shards disagree:\n" + bullet_list(sorted(problems)))
    return entries


def write_shards(
    directory: Path,
    stem: str,
    suffix: str,
    entries: Mapping[str, LazyTensor],
    max_shard_bytes: int,
    write_file: Callable[[Path, LazyTensorMap], object],
) -> None:
    """Write one file `STEM.SUFFIX`, or several files and `STEM.SUFFIX.index.json`.

    Args:
        max_shard_bytes: maximum size of a file. A single larger tensor gets its own file.
    """
    if max_shard_bytes < 1:
        raise CheckpointError(f"max_shard_bytes={max_shard_bytes}: must be at least 1")
    shards = _split(entries, max_shard_bytes)
    if len(shards) == 1:
        write_file(directory / f"{stem}.{suffix}", LazyTensorMap(shards[0]))
        return
    weight_map = {}
    for number, shard in enumerate(shards, start=1):
        file = f"{stem}-{number:05d}-of-{len(shards):05d}.{suffix}"
        write_file(directory / file, LazyTensorMap(shard))
        weight_map.update(dict.fromkeys(shard, file))
    total = sum(entry.nbytes for entry in entries.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    write_json(directory / f"{stem}.{suffix}.index.json", index)


def _split(entries: Mapping[str, LazyTensor], max_bytes: int) -> list[dict[str, LazyTensor]]:
    shards: list[dict[str, LazyTensor]] = [{}]
    size = 0
    for name, entry in entries.items():
        if shards[-1] and size + entry.nbytes > max_bytes:
            shards.append({})
            size = 0
        shards[-1][name] = entry
        size += entry.nbytes
    return shards


def _unusable(directory: Path, file: str) -> str | None:
    """Return why this shard name, which is untrusted input, is rejected; None if it names a file beside the index."""
    if file in ("", ".", "..") or any(c in file for c in "/\\\0:"):
        return f"{quoted(file)} is not a plain file name"
    if not os.path.isfile(directory / file):  # unlike Path.is_file, returns False for a name that is too long
        return f"{quoted(file)} is missing; download it, or copy it beside the index"
    if not stays_inside(directory, file):
        return f"{quoted(file)} is a link out of the directory"
    return None


def _wrong_total(index: Mapping[str, Any], entries: Mapping[str, LazyTensor]) -> Iterator[str]:
    metadata = index.get("metadata")
    if not isinstance(metadata, dict) or "total_size" not in metadata:
        return
    total = sum(entry.nbytes for entry in entries.values())
    # Depending on its version, transformers counts a tied head once or twice, and a bool of a mask buffer as one bit.
    head = sum(entry.nbytes for name, entry in entries.items() if name.endswith("lm_head.weight"))
    bits = sum(entry.nbytes for entry in entries.values() if entry.dtype == np.bool_) * 7 / 8
    known = (total, total - head, total - bits, total - bits - head)
    declared = metadata["total_size"]
    if type(declared) not in (int, float) or not any(abs(declared - size) < 1 for size in known):
        yield f"total_size is {quoted(declared)}, but the shards hold {total} bytes"
