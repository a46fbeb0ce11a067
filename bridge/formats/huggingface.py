"""Hugging Face directories: `config.json` with safetensors or torch's `.bin`, whole or in shards.

All generations of transformers: names with or without `transformer.`, LayerNorms with `gamma` and `beta`, causal-mask
buffers beside the weights, a tied head stored or not.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bridge.arrays import LazyTensors, TensorEntry
from bridge.checkpoint import Checkpoint
from bridge.companions import has_companion
from bridge.config import GPT2Config, harmless_fields
from bridge.convert import canonical_names, canonicalize
from bridge.errors import CheckpointError, bullet_list, quoted
from bridge.formats.directory import CONFIG, carry_files, read_json, write_json
from bridge.formats.sharded import read_shards, write_shards
from bridge.safetensors_file import is_safetensors, read_file, write_file
from bridge.torch_file import is_torch_file
from bridge.torch_file import read_file as read_torch_file

NAME = "huggingface"
WEIGHTS = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
"""The first of these that a directory has is read."""
MAX_SHARD_BYTES = 5 * 10**9  # transformers' own default, "5GB"


def sniff(path: Path) -> bool:
    if path.is_dir():
        return (path / CONFIG).is_file() and _weights(path) is not None
    return is_safetensors(path) or is_torch_file(path)


def read(path: Path) -> Checkpoint:
    weights = _weights(path) if path.is_dir() else path
    assert weights is not None  # or sniff would have said no
    is_index = weights.suffix == ".json"
    stored = LazyTensors(read_shards(weights, _tensors) if is_index else _tensors(weights))
    directory = weights.parent
    if not has_companion(directory, CONFIG):
        raise CheckpointError(
            f"{quoted(weights)} holds tensors and there is no {CONFIG} beside it; put the model's there, because what "
            "they compute cannot be told from them"
        )
    hf = read_json(directory / CONFIG)
    config = GPT2Config.from_hf(hf)
    tensors = canonicalize(stored, config)
    return Checkpoint(config, tensors, NAME, directory, harmless_fields(hf), _oddities(stored, config))


def write(checkpoint: Checkpoint, directory: Path, *, max_shard_bytes: int = MAX_SHARD_BYTES) -> None:
    """Names as `GPT2LMHeadModel.save_pretrained` writes them; a tied head is left out.

    Args:
        max_shard_bytes: start a new file before one grows past this; a single larger tensor has
            a file to itself.
    """
    write_json(directory / CONFIG, checkpoint.config.to_hf(checkpoint.extra))
    entries = {_saved_name(name): entry for name, entry in checkpoint.tensors.entries.items()}

    def write_shard(file: Path, tensors: LazyTensors) -> None:
        write_file(file, tensors, {"format": "pt"})  # transformers refuses files without it

    write_shards(directory, "model", "safetensors", entries, max_shard_bytes, write_shard)
    carry_files(checkpoint, directory)


def _weights(directory: Path) -> Path | None:
    return next((directory / name for name in WEIGHTS if (directory / name).is_file()), None)


def _saved_name(canonical: str) -> str:
    return canonical if canonical == "lm_head.weight" else f"transformer.{canonical}"


def _tensors(file: Path) -> Mapping[str, TensorEntry]:
    """The tensors of one file, of whichever kind its content shows it to be."""
    if is_torch_file(file) and not is_safetensors(file):  # whose header's length may be spelled as a pickle begins
        return _state_dict(file, read_torch_file(file))
    return read_file(file)[0].entries


def _state_dict(file: Path, saved: Any) -> dict[str, TensorEntry]:
    if not isinstance(saved, dict):
        raise CheckpointError(f"{quoted(file)} holds {type(saved).__name__}, not a state_dict; save model.state_dict()")
    others = [f"{quoted(name)} is no name of a tensor" for name in saved if not isinstance(name, str)]
    others += [
        f"{quoted(name)} is {type(value).__name__}, not a tensor"
        for name, value in saved.items()
        if not isinstance(value, TensorEntry)
    ]
    if others:
        raise CheckpointError(
            f"{quoted(file)} holds more than a state_dict; save model.state_dict() alone:\n" + bullet_list(others)
        )
    return saved


def _oddities(stored: LazyTensors, config: GPT2Config) -> tuple[str, ...]:
    used = canonical_names(stored)
    odd = []
    if dropped := len(stored) - len(used):
        odd.append(f"{dropped} causal-mask buffers of an old transformers version were left out")
    if config.tie_word_embeddings and "lm_head.weight" in used:
        odd.append("lm_head.weight is stored although it is tied; it equals wte.weight")
    if any(name.endswith((".gamma", ".beta")) for name in stored):
        odd.append("LayerNorms have gamma and beta, as before transformers: they are weight and bias")
    return tuple(odd)
