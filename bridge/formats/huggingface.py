"""Hugging Face directories: `config.json` with safetensors or torch's `.bin`, whole or in shards.

Reads files of all versions of transformers: names with or without `transformer.`, LayerNorms with `gamma` and `beta`,
causal-mask buffers beside the weights, and tied heads that are stored or omitted. Also reads the state_dicts of
wrappers, such as DDP and TRL's models with a value head, and Lightning's checkpoints.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from bridge.checkpoint import Checkpoint
from bridge.config import GPT2Config, config_diagnostics, harmless_fields
from bridge.containers.safetensors import is_safetensors, read_file, write_file
from bridge.containers.torch_zip import is_torch_file
from bridge.containers.torch_zip import read_file as read_torch_file
from bridge.conversion import canonicalize
from bridge.errors import CheckpointError, bullet_list, quoted
from bridge.formats.directory import CONFIG, carry_files, config_beside, files_beside_config, read_json, write_json
from bridge.formats.format import Format
from bridge.formats.sharded import is_index, read_shards, write_shards
from bridge.names import canonical_names, extra_heads, wrapper_prefix
from bridge.storage.tensors import LazyTensor, LazyTensorMap

NAME = "huggingface"
WEIGHTS = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
"""In transformers' order: the first of these that a directory holds is read."""
MAX_SHARD_BYTES = 5 * 10**9  # transformers' own default, "5GB"

_SHARDS = (".safetensors", ".bin")
_STATE_DICT = "state_dict"
"""The entry with the weights in Lightning's checkpoints, and in those of many other training loops."""
_MOST_LISTED = 40


def find(path: Path) -> list[Path]:
    if path.is_dir():
        return files_beside_config(path, WEIGHTS)
    return [path] if is_safetensors(path) or is_torch_file(path) or is_index(path, _SHARDS) else []


def read(weights: Path, drop_extra_heads: bool = False) -> Checkpoint:
    stored, notes = stored_tensors(weights)
    if drop_extra_heads and (dropped := extra_heads(stored)):
        stored = LazyTensorMap({name: entry for name, entry in stored.entries.items() if name not in {*dropped}})
        notes += (f"tensors of heads for other tasks were left out: {_listed(dropped)}",)
    hf = read_json(config_beside(weights))
    config = GPT2Config.from_hf(hf)
    tensors = canonicalize(stored, config)
    notes += config_diagnostics(hf) + _diagnostics(stored, config)
    return Checkpoint(config, tensors, NAME, weights.parent, harmless_fields(hf), notes)


def left_out(checkpoint: Checkpoint) -> tuple[str, ...]:
    """Return no sentence, because everything is stored. Raises `ConfigError` if transformers cannot hold the model."""
    checkpoint.config.to_hf()
    return ()


def write(checkpoint: Checkpoint, directory: Path, *, max_shard_bytes: int = MAX_SHARD_BYTES) -> None:
    """Write the names that `GPT2LMHeadModel.save_pretrained` writes. A tied head is not stored.

    Args:
        max_shard_bytes: maximum size of a file. A single larger tensor gets its own file.
    """
    write_json(directory / CONFIG, checkpoint.config.to_hf(checkpoint.extra))
    entries = {_saved_name(name): entry for name, entry in checkpoint.tensors.entries.items()}
    write_model(directory, entries, max_shard_bytes)
    carry_files(checkpoint, directory)


def write_model(directory: Path, entries: Mapping[str, LazyTensor], max_shard_bytes: int = MAX_SHARD_BYTES) -> None:
    """Write `model.safetensors`, or shards and their index, with the names in `entries`."""

    def write_shard(file: Path, tensors: LazyTensorMap) -> None:
        write_file(file, tensors, {"format": "pt"})  # transformers rejects files without this entry

    write_shards(directory, "model", "safetensors", entries, max_shard_bytes, write_shard)


def _saved_name(canonical: str) -> str:
    return canonical if canonical == "lm_head.weight" else f"transformer.{canonical}"


def stored_tensors(weights: Path) -> tuple[LazyTensorMap, tuple[str, ...]]:
    """Return the tensors of a file or of the shards in an index, and one sentence for each part that is not read."""
    if weights.suffix == ".json":
        return LazyTensorMap(read_shards(weights, lambda shard: tensors_of_file(shard)[0])), ()
    tensors, notes = tensors_of_file(weights)
    return LazyTensorMap(tensors), notes


def tensors_of_file(file: Path) -> tuple[Mapping[str, LazyTensor], tuple[str, ...]]:
    """Return the tensors of one file, and one sentence for each part of it that is not read.

    The file's content determines its kind. Raises `CheckpointError` if it holds anything but a state_dict.
    """
    if is_torch_file(file) and not is_safetensors(file):  # a safetensors header's length may look like a pickle's start
        return _state_dict(file, read_torch_file(file))
    return read_file(file)[0].entries, ()


def _state_dict(file: Path, saved: Any) -> tuple[dict[str, LazyTensor], tuple[str, ...]]:
    if not isinstance(saved, dict):
        raise CheckpointError(f"{quoted(file)} holds {type(saved).__name__}, not a state_dict; save model.state_dict()")
    notes: tuple[str, ...] = ()
    if isinstance(saved.get(_STATE_DICT), dict):
        if others := [name for name in saved if name != _STATE_DICT]:
            notes = (f"read from {_STATE_DICT!r}; the file also holds {_listed(others)}, which was not read",)
        saved = saved[_STATE_DICT]
    others = [f"{quoted(name)} is not a valid name of a tensor" for name in saved if not isinstance(name, str)]
    others += [
        f"{quoted(name)} is {type(value).__name__}, not a tensor"
        for name, value in saved.items()
        if not isinstance(value, LazyTensor)
    ]
    if others:
        raise CheckpointError(
            f"{quoted(file)} holds more than a state_dict; save model.state_dict() alone:\n" + bullet_list(others)
        )
    return saved, notes


def _listed(names: Iterable[object]) -> str:
    shown = list(map(quoted, names))
    more = f" and {len(shown) - _MOST_LISTED} more" if len(shown) > _MOST_LISTED else ""
    return ", ".join(shown[:_MOST_LISTED]) + more


def _diagnostics(stored: LazyTensorMap, config: GPT2Config) -> tuple[str, ...]:
    used = canonical_names(stored)
    notes = []
    if prefix := wrapper_prefix(stored):
        notes.append(f"the names of the tensors have the prefix {quoted(prefix)} of a wrapper, which was removed")
    if dropped := len(stored) - len(used):
        notes.append(f"{dropped} causal-mask buffers, which old versions of transformers saved, were left out")
    if config.tie_word_embeddings and "lm_head.weight" in used:
        notes.append("lm_head.weight is stored although the head is tied; it equals wte.weight")
    if any(name.endswith((".gamma", ".beta")) for name in stored):
        notes.append("the LayerNorm parameters have their old names, gamma and beta; they were read as weight and bias")
    return tuple(notes)


FORMAT = Format(
    name=NAME,
    find=find,
    read=read,
    write=write,
    left_out=left_out,
    weight_files=r"model(-\d{5}-of-\d{5})?\.safetensors|model\.safetensors\.index\.json",
    family="transformers",
    may_have_extra_heads=True,
)
