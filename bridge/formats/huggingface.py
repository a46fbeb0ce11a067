"""Hugging Face directories: `config.json` with `model.safetensors`, whole or in shards."""

from __future__ import annotations

import os
from pathlib import Path

from bridge.arrays import LazyTensors, TensorEntry
from bridge.checkpoint import Checkpoint
from bridge.config import GPT2Config, harmless_fields
from bridge.convert import canonical_names, canonicalize
from bridge.errors import CheckpointError, bullet_list, quoted
from bridge.formats.directory import CONFIG, carry_files, read_json, write_json
from bridge.safetensors_file import read_file, write_file

NAME = "huggingface"
WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
MAX_SHARD_BYTES = 5 * 10**9  # transformers' own default, "5GB"


def sniff(path: Path) -> bool:
    return (path / CONFIG).is_file() and ((path / WEIGHTS).is_file() or (path / INDEX).is_file())


def read(path: Path) -> Checkpoint:
    hf = read_json(path / CONFIG)
    config = GPT2Config.from_hf(hf)
    stored = read_file(path / WEIGHTS)[0] if (path / WEIGHTS).is_file() else _read_shards(path)
    tensors = canonicalize(stored, config)
    return Checkpoint(config, tensors, NAME, path, harmless_fields(hf), _oddities(stored, config))


def write(checkpoint: Checkpoint, directory: Path, *, max_shard_bytes: int = MAX_SHARD_BYTES) -> None:
    """Names as `GPT2LMHeadModel.save_pretrained` writes them; a tied head is left out.

    Args:
        max_shard_bytes: start a new file before one grows past this; a single larger tensor has
            a file to itself.
    """
    if max_shard_bytes < 1:
        raise CheckpointError(f"max_shard_bytes={max_shard_bytes}: must be at least 1")
    write_json(directory / CONFIG, checkpoint.config.to_hf(checkpoint.extra))
    entries = {_saved_name(name): entry for name, entry in checkpoint.tensors.entries.items()}
    shards = _split(entries, max_shard_bytes)
    metadata = {"format": "pt"}  # transformers refuses files without it
    if len(shards) == 1:
        write_file(directory / WEIGHTS, LazyTensors(shards[0]), metadata)
    else:
        weight_map = {}
        for number, shard in enumerate(shards, start=1):
            file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
            write_file(directory / file, LazyTensors(shard), metadata)
            weight_map.update(dict.fromkeys(shard, file))
        total = sum(entry.nbytes for entry in entries.values())
        write_json(directory / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})
    carry_files(checkpoint, directory)


def _saved_name(canonical: str) -> str:
    return canonical if canonical == "lm_head.weight" else f"transformer.{canonical}"


def _split(entries: dict[str, TensorEntry], max_bytes: int) -> list[dict[str, TensorEntry]]:
    shards: list[dict[str, TensorEntry]] = [{}]
    size = 0
    for name, entry in entries.items():
        if shards[-1] and size + entry.nbytes > max_bytes:
            shards.append({})
            size = 0
        shards[-1][name] = entry
        size += entry.nbytes
    return shards


def _read_shards(path: Path) -> LazyTensors:
    """The tensors that the index lists, after holding the index against what the shards contain."""
    index = read_json(path / INDEX)
    weight_map = index.get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(file, str) for file in weight_map.values()):
        raise CheckpointError(f"{quoted(path / INDEX)}: weight_map must map tensor names to file names")
    entries: dict[str, TensorEntry] = {}
    problems = []
    for file in sorted(set(weight_map.values())):
        # The index is somebody else's text: a shard is a file of this directory and nothing else.
        if file in ("", ".", "..") or any(c in file for c in "/\\\0:"):
            problems.append(f"{quoted(file)} is not a plain file name")
            continue
        if not os.path.isfile(path / file):  # unlike Path.is_file, False also for a name too long to exist
            problems.append(f"{quoted(file)} is missing; download it, or copy it beside the index")
            continue
        if not _stays_inside(path, file):
            problems.append(f"{quoted(file)} is a link that leads out of the directory")
            continue
        shard = read_file(path / file)[0].entries
        listed = {name for name, where in weight_map.items() if where == file}
        problems += [f"{quoted(name)} should be in {quoted(file)} and is not" for name in listed - set(shard)]
        for name in shard.keys() - listed:
            where = f"in {quoted(weight_map[name])}" if name in weight_map else "nowhere"
            problems.append(f"{quoted(name)} is in {quoted(file)}; the index says {where}")
        entries.update(shard)
    total = sum(entry.nbytes for entry in entries.values())
    metadata = index.get("metadata")
    declared = metadata.get("total_size", total) if isinstance(metadata, dict) else total
    if not problems and declared != total:
        problems.append(f"total_size is {quoted(declared)}, the shards hold {total} bytes")
    if problems:
        raise CheckpointError(f"{quoted(path / INDEX)} and the shards disagree:\n" + bullet_list(sorted(problems)))
    return LazyTensors(entries)


def _stays_inside(path: Path, file: str) -> bool:
    """Whether a shard lies in its directory, or in the blobs of the Hugging Face cache that this is part of."""
    home, shard = path.resolve(), (path / file).resolve()
    blobs = [home.parent.parent / "blobs"] if home.parent.name == "snapshots" else []
    return shard.parent in (home, *blobs)


def _oddities(stored: LazyTensors, config: GPT2Config) -> tuple[str, ...]:
    used = canonical_names(stored)
    dropped = len(stored) - len(used)
    odd = []
    if dropped:
        odd.append(f"{dropped} causal-mask buffers of an old transformers version were left out")
    if config.tie_word_embeddings and "lm_head.weight" in used:
        odd.append("lm_head.weight is stored although it is tied; it equals wte.weight")
    if dtypes := {str(entry.dtype) for name, entry in stored.entries.items() if name in used.values()}:
        if len(dtypes) > 1:
            odd.append(f"mixed dtypes: {', '.join(sorted(dtypes))}")
    return tuple(odd)
