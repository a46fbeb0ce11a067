"""OpenAI's own release: a TensorFlow 1 checkpoint with `hparams.json`, `encoder.json` and `vocab.bpe`.

`hparams.json` has the sizes; the rest is what gpt-2's src/model.py computes: the tanh form of GELU, epsilon 1e-5, a
tied head, biases. Projections are `[1, in, out]`, as convolutions of width one. It is read and not written.
Source: https://github.com/openai/gpt-2, src/model.py and download_model.py.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bridge.arrays import LazyTensors, TensorEntry
from bridge.checkpoint import Checkpoint
from bridge.companions import has_companion, read_companion
from bridge.config import GPT2Config
from bridge.convert import differences
from bridge.errors import CheckpointError, ConfigError, ConversionError, bullet_list, quoted
from bridge.formats.directory import read_json, reshaped
from bridge.params import Parameter, parameters
from bridge.tensor_bundle import is_index, read_bundle

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
# What fine-tuning scripts save beside the weights: Adam's moments and its powers, the step.
_TRAINING = re.compile(r"model/.*/Adam(_1)?|(.*/)?beta[12]_power(_1)?|(.*/)?global_step|(.*/)?counter")


def sniff(path: Path) -> bool:
    return (path / HPARAMS).is_file() and any(is_index(index) for index in path.glob("*.index"))


def read(path: Path) -> Checkpoint:
    config = _config(path / HPARAMS)
    index = _index(path)
    stored = read_bundle(index).entries
    weights = {name: entry for name, entry in stored.items() if not _TRAINING.fullmatch(name)}
    if config.n_layer > len(weights):  # before the names of so many are made
        raise ConversionError(f"{quoted(index)}: n_layer is {config.n_layer}, with {len(weights)} tensors")
    expected = {_name(p): p for p in parameters(config)}
    shapes = {name: _shape(p) for name, p in expected.items()}
    if problems := differences(shapes, weights):
        raise ConversionError(f"{quoted(index)} does not hold the tensors of its GPT-2:\n" + bullet_list(problems))
    entries = {p.torch_name: reshaped(weights[name], p.torch_shape) for name, p in expected.items()}
    return Checkpoint(config, LazyTensors(entries), NAME, path, {}, _oddities(stored, weights))


def _config(file: Path) -> GPT2Config:
    hparams = read_json(file)
    problems = [f"{name} is missing" for name in _SIZES if name not in hparams]
    problems += [f"{quoted(name)} is not one of {', '.join(_SIZES)}" for name in hparams if name not in _SIZES]
    if problems:
        raise ConfigError(f"{quoted(file)} is not that of a GPT-2:\n" + bullet_list(problems))
    sizes: dict[str, Any] = {field: hparams[name] for name, field in _SIZES.items()}
    return GPT2Config(**sizes)


def _index(path: Path) -> Path:
    """The checkpoint that the state file names, which has to lie beside it, or the only one that there is."""
    there = sorted(index for index in path.glob("*.index") if is_index(index))
    if not has_companion(path, STATE):
        if len(there) > 1:
            names = ", ".join(quoted(index.name) for index in there)
            raise CheckpointError(f"{quoted(path)} holds several checkpoints: {names}; name one in a file {STATE!r}")
        return there[0]
    text = read_companion(path, STATE).decode("utf-8", "replace")
    found = _STATE_LINE.search(text)
    # Training scripts write absolute paths of machines that are gone: only the last part is looked for.
    named = found.group(1).rpartition("/")[2] if found else ""
    index = path / f"{named}.index"
    if index not in there:
        raise CheckpointError(f"{quoted(path / STATE)} names the checkpoint {quoted(named)}, which is not beside it")
    return index


def _name(p: Parameter) -> str:
    """`h.3.attn.c_attn.weight` -> `model/h3/attn/c_attn/w`; the embeddings have no kind."""
    *modules, kind = p.flax_path
    path = "/".join(["model", *modules]).replace(f"/h_{p.layer}", f"/h{p.layer}")
    return path if kind == "embedding" else f"{path}/{_KINDS[kind]}"


def _shape(p: Parameter) -> tuple[int, ...]:
    return (1, *p.torch_shape) if p.is_projection else p.torch_shape


def _oddities(stored: Mapping[str, TensorEntry], weights: Mapping[str, TensorEntry]) -> tuple[str, ...]:
    left_out = len(stored) - len(weights)
    return (f"{left_out} variables of its training, Adam's for one, were left out",) if left_out else ()
