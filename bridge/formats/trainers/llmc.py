"""llm.c's `model.bin`: a header of 256 int32, then the parameters, each kind stacked over the layers.

Projections are `[out, in]`, the vocabulary is padded, and the head is tied and not stored. llm.c's programs hard-code
all other settings: GPT-2's own activation, epsilon and widths, and biases everywhere.
Source: llm.c, `write_model` in train_gpt2.py and `gpt2_build_from_checkpoint` in train_gpt2.cu.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from bridge.checkpoint import Checkpoint
from bridge.config import GPT2Config
from bridge.errors import CheckpointError, ConversionError, bullet_list, quoted
from bridge.formats.directory import files_by_content
from bridge.formats.format import Format
from bridge.formats.single_file import require_dtypes, require_implied, settings_left_out, with_sidecar
from bridge.parameter_table import Parameter, num_parameters, padded_vocab_size, parameters
from bridge.storage.dtypes import DTYPES
from bridge.storage.regular_file import first_bytes
from bridge.storage.stored_file import StoredFile, write_array
from bridge.storage.tensors import LazyTensor, LazyTensorMap, transposed

NAME = "llmc"
SUFFIXES = (".bin",)

MAGIC = 20240326
VERSIONS: Mapping[int, np.dtype] = {3: DTYPES["float32"], 5: DTYPES["bfloat16"]}
OTHER_FILES: Mapping[int, str] = {
    20240327: "llm.c's debug state",
    20240328: "llm.c's tokenizer",
    20240520: "llm.c's tokenized text, which is for `gpt2 train --data`",
    20240522: "llm.c's questions for evaluation",
    20240527: "the state of llm.c's optimizer; the weights are in the model_*.bin beside it",
    20240801: "llm.c's tokenized text, which is for `gpt2 train --data`",
}
VOCAB_MULTIPLE = 128
"""llm.c's own export pads the rows of the vocabulary to a multiple of this."""

_HEADER = np.dtype("<i4")
_HEADER_BYTES = 256 * _HEADER.itemsize
_FIELDS = ("n_positions", "vocab_size", "n_layer", "n_head", "n_embd")  # after magic and version, before the padding
_IMPLIED: Mapping[str, Any] = {
    "activation_function": "gelu_new",
    "layer_norm_epsilon": 1e-5,
    "tie_word_embeddings": True,
    "bias": True,
    "scale_attn_weights": True,
    "scale_attn_by_inverse_layer_idx": False,
    "reorder_and_upcast_attn": False,
}


def find(path: Path) -> list[Path]:
    """Return the models. Another llm.c file is returned only if `path` names it, so that `read` can say what it is."""
    return files_by_content(path, SUFFIXES, _is_model if path.is_dir() else _is_known)


def read(path: Path, config_json: Path | None) -> Checkpoint:
    file = StoredFile.open(path)
    config, dtype, rows = _header(file)
    entries = {p.torch_name: _entry(file, dtype, p, offset) for p, offset in _places(config, dtype, rows)}
    tensors = LazyTensorMap({p.torch_name: entries[p.torch_name] for p in parameters(config)})
    config, extra, notes = with_sidecar(config, file.path, config_json)
    padding = rows - config.vocab_size
    if padding:
        notes = (f"{padding} rows of vocabulary padding were left out", *notes)
    return Checkpoint(config, tensors, NAME, file.path.parent, extra, notes)


def left_out(checkpoint: Checkpoint) -> tuple[str, ...]:
    """Return what llm.c cannot store. Raises `ConfigError` or `ConversionError` if it cannot store the model."""
    config, tensors = checkpoint.config, checkpoint.tensors
    require_implied(config, "llm.c", {"n_inner": 4 * config.n_embd, **_IMPLIED})
    require_dtypes(tensors, "llm.c", VERSIONS.values())
    dtype = tensors.entries["wte.weight"].dtype
    if mismatched := [f"{name} holds {entry.dtype}" for name, entry in tensors.entries.items() if entry.dtype != dtype]:
        raise ConversionError(
            f"llm.c stores all tensors in one dtype; these differ from wte.weight, which holds {dtype}:\n"
            + bullet_list(mismatched)
        )
    return settings_left_out(config, stored=GPT2Config())


def write(checkpoint: Checkpoint, file: Path) -> None:
    config, tensors = checkpoint.config, checkpoint.tensors
    dtype = tensors.entries["wte.weight"].dtype
    version = next(number for number, stored in VERSIONS.items() if stored == dtype)
    rows = padded_vocab_size(config.vocab_size, VOCAB_MULTIPLE)
    header = np.zeros(256, _HEADER)
    header[:8] = [MAGIC, version, *(getattr(config, field) for field in _FIELDS), rows]
    with open(file, "xb") as out:
        out.write(header.tobytes())
        for p, _ in _places(config, dtype, rows):
            entry = tensors.entries[p.torch_name]
            write_array(out, p.torch_name, transposed(entry) if p.is_projection else entry)
            if p.has_vocabulary_rows:
                out.write(bytes((rows - config.vocab_size) * config.n_embd * dtype.itemsize))


def _magic(file: Path) -> int:
    return int.from_bytes(first_bytes(file, 4), "little")


def _is_model(file: Path) -> bool:
    return _magic(file) == MAGIC


def _is_known(file: Path) -> bool:
    return _magic(file) in (MAGIC, *OTHER_FILES)


def _header(file: StoredFile) -> tuple[GPT2Config, np.dtype, int]:
    """Return the sizes, the dtype and the rows of the embedding, validated against the length of the file."""
    if file.size < _HEADER_BYTES:
        raise CheckpointError(f"{quoted(file.path)}: {file.size} bytes; the file is truncated within llm.c's header")
    header = np.frombuffer(file.read(0, _HEADER_BYTES), _HEADER).tolist()
    magic, version, *sizes = header[:7]
    rows = header[7]
    if magic in OTHER_FILES:
        raise CheckpointError(f"{quoted(file.path)} is not a model: it is {OTHER_FILES[magic]}")
    if version not in VERSIONS:
        raise CheckpointError(
            f"{quoted(file.path)}: version {version} of llm.c's model is not supported, only 3 (float32) and 5 "
            "(bfloat16); write it again with a newer llm.c"
        )
    if any(header[8:]):
        raise CheckpointError(f"{quoted(file.path)}: the unused part of llm.c's header is not zero; it is damaged")
    config = GPT2Config(**dict(zip(_FIELDS, sizes, strict=True)))
    if rows < config.vocab_size:
        raise CheckpointError(
            f"{quoted(file.path)}: padded_vocab_size {rows} is less than vocab_size {config.vocab_size}"
        )
    dtype = VERSIONS[version]
    needed = _HEADER_BYTES + dtype.itemsize * (num_parameters(config) + (rows - config.vocab_size) * config.n_embd)
    if file.size != needed:
        raise CheckpointError(
            f"{quoted(file.path)}: {file.size} bytes, but the sizes in its header need {quoted(needed)}; it is damaged "
            "or truncated"
        )
    return config, dtype, rows


def _places(config: GPT2Config, dtype: np.dtype, rows: int) -> Iterator[tuple[Parameter, int]]:
    """Yield each parameter, in file order, with the offset of its first byte."""
    position = _HEADER_BYTES
    for p in _in_order(config):
        yield p, position
        padding = (rows - config.vocab_size) * config.n_embd if p.has_vocabulary_rows else 0
        position += dtype.itemsize * (math.prod(p.torch_shape) + padding)


def _in_order(config: GPT2Config) -> Iterator[Parameter]:
    """Yield the parameters in file order: embeddings, each parameter of a layer for all layers, the final LayerNorm."""
    kinds: dict[tuple[str, ...], list[Parameter]] = {}
    for p in parameters(config):
        kinds.setdefault(p.flax_path if p.layer is None else p.flax_path[1:], []).append(p)
    for kind in kinds.values():
        yield from kind


def _entry(file: StoredFile, dtype: np.dtype, p: Parameter, offset: int) -> LazyTensor:
    if p.is_projection:
        return transposed(file.entry(dtype, p.torch_shape[::-1], offset))
    return file.entry(dtype, p.torch_shape, offset)


FORMAT = Format(
    name=NAME, find=find, read=read, write=write, left_out=left_out, file_name="model.bin", suffixes=SUFFIXES
)
