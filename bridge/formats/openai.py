"""OpenAI's own release: a TensorFlow 1 checkpoint with `hparams.json`, `encoder.json` and `vocab.bpe`.

`hparams.json` has the sizes. OpenAI's src/model.py hard-codes the rest: the tanh form of GELU, epsilon 1e-5, a tied
head, and biases. Projections are `[1, in, out]`, as convolutions of width one. This format is read-only.
Source: https://github.com/openai/gpt-2, src/model.py and download_model.py.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from bridge.checkpoint import Checkpoint
from bridge.config import GPT2Config
from bridge.containers.tensor_bundle import is_index, read_bundle
from bridge.conversion import differences
from bridge.errors import CheckpointError, ConfigError, ConversionError, bullet_list, quoted
from bridge.formats.directory import read_json, reshaped
from bridge.formats.format import Format
from bridge.parameter_table import Parameter, parameters
from bridge.storage.companions import has_companion, read_companion, stays_inside
from bridge.storage.regular_file import first_bytes
from bridge.storage.tensors import LazyTensor, LazyTensorMap

NAME = "openai"
HPARAMS = "hparams.json"
STATE = "checkpoint"
"""The text file in which TensorFlow names the newest of its checkpoints."""

_SIZES: Mapping[str, str] = {
    "n_vocab": "vocab_size",
    "n_ctx": "n_positions",
    "n_embd": "n_embd",
    "n_head": "n_head",
    "n_layer": "n_layer",
}
_KINDS: Mapping[str, str] = {"kernel": "w", "bias": "b", "scale": "g"}  # a LayerNorm's bias is b, too
_STATE_LINE = re.compile(r'^model_checkpoint_path: "([^"]*)"\s*$', re.MULTILINE)
# Variables that fine-tuning scripts save beside the weights: Adam's moments and beta powers, and the step.
_TRAINING = re.compile(r"model/.*/Adam(_1)?|(.*/)?beta[12]_power(_1)?|(.*/)?global_step|(.*/)?counter")


def find(path: Path) -> list[Path]:
    """In a directory, return the index that the state file names, or every index if there is no state file.

    If the state file cannot be read or names a missing index, return the state file itself, for which `read` raises.
    """
    if not path.is_dir():
        return [path] if is_index(path) or _is_state(path) else []
    if not has_companion(path, HPARAMS):
        return []
    indexes, state = _indexes(path), path / STATE
    if not indexes or not has_companion(path, STATE):
        return indexes
    try:
        named = _named_by(state)
    except CheckpointError:  # `read` raises the error again
        return [state]
    return [named if named in indexes else state]


def read(path: Path) -> Checkpoint:
    """Read an index, or the index that a state file names."""
    directory = path.parent
    config = _config(directory / HPARAMS)
    index = path if is_index(path) else _named_by(path)
    if index != path and index not in _indexes(directory):
        raise CheckpointError(
            f"{quoted(path)} names the checkpoint {quoted(index.name.removesuffix('.index'))}, which is not beside it"
        )
    for data in directory.glob("*.data-*-of-*"):
        if not stays_inside(directory, data.name):
            raise CheckpointError(f"{quoted(data)} is a link out of the checkpoint's directory; replace it with a copy")
    stored = read_bundle(index).entries
    weights = {name: entry for name, entry in stored.items() if not _TRAINING.fullmatch(name)}
    if config.n_layer > len(weights):  # checked before the names of all layers are generated
        raise ConversionError(f"{quoted(index)}: n_layer is {config.n_layer}, but there are {len(weights)} tensors")
    expected = {_name(p): p for p in parameters(config)}
    shapes = {name: _shape(p) for name, p in expected.items()}
    if problems := differences(shapes, weights):
        raise ConversionError(f"{quoted(index)} does not hold the tensors of its GPT-2:\n" + bullet_list(problems))
    entries = {p.torch_name: reshaped(weights[name], p.torch_shape) for name, p in expected.items()}
    return Checkpoint(config, LazyTensorMap(entries), NAME, directory, {}, tuple(_diagnostics(index, stored, weights)))


def _config(file: Path) -> GPT2Config:
    hparams = read_json(file)
    problems = [f"{name} is missing" for name in _SIZES if name not in hparams]
    problems += [f"{quoted(name)} is not one of {', '.join(_SIZES)}" for name in hparams if name not in _SIZES]
    if problems:
        raise ConfigError(f"{quoted(file)} does not describe a GPT-2:\n" + bullet_list(problems))
    sizes: dict[str, Any] = {field: hparams[name] for name, field in _SIZES.items()}
    return GPT2Config(**sizes)


def _indexes(directory: Path) -> list[Path]:
    return sorted(index for index in directory.glob("*.index") if is_index(index))


def _is_state(file: Path) -> bool:
    return first_bytes(file, 64).startswith(b"model_checkpoint_path:")


def _named_by(state: Path) -> Path:
    """Return the index that a state file names, in the directory of that file.

    Only the last part of the stored path is used, because the path may be from another machine.
    """
    found = _STATE_LINE.search(read_companion(state.parent, state.name).decode("utf-8", "replace"))
    name = found.group(1).rpartition("/")[2] if found else ""
    return state.parent / f"{name}.index"


def _name(p: Parameter) -> str:
    """`h.3.attn.c_attn.weight` -> `model/h3/attn/c_attn/w`; the embeddings have no kind."""
    *modules, kind = p.flax_path
    path = "/".join(["model", *modules]).replace(f"/h_{p.layer}", f"/h{p.layer}")
    return path if kind == "embedding" else f"{path}/{_KINDS[kind]}"


def _shape(p: Parameter) -> tuple[int, ...]:
    return (1, *p.torch_shape) if p.is_projection else p.torch_shape


def _diagnostics(index: Path, stored: Mapping[str, LazyTensor], weights: Mapping[str, LazyTensor]) -> Iterator[str]:
    if left_out := len(stored) - len(weights):
        yield f"{left_out} training variables, such as Adam's moments, were left out"
    if others := [quoted(other.name) for other in _indexes(index.parent) if other != index]:
        yield f"read from {quoted(index.name)}; the directory also holds {', '.join(others[:10])}, which was not read"


FORMAT = Format(name=NAME, find=find, read=read)
