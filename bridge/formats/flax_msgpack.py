"""transformers 4's Flax checkpoints: `config.json` with `flax_model.msgpack`, whole or in shards.

Names are those of its `FlaxGPT2LMHeadModel`. The kernels of its `FlaxConv1D`, which are all but the head's, are
`[out, in]`; an untied head is a `Dense` and `[in, out]`. `FlaxGPT2Model` has no head, and its tree no `transformer`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from bridge.arrays import LazyTensors, TensorEntry, turned
from bridge.checkpoint import Checkpoint
from bridge.companions import has_companion
from bridge.config import ACTIVATIONS, GPT2Config, harmless_fields
from bridge.convert import canonicalize, differences
from bridge.errors import CheckpointError, ConfigError, ConversionError, bullet_list, quoted
from bridge.formats.directory import CONFIG, carry_files, read_json, write_json
from bridge.formats.sharded import read_shards, write_shards
from bridge.formats.single_file import require_implied
from bridge.msgpack_file import is_msgpack, read_file, write_file
from bridge.params import Parameter, parameters

NAME = "flax_msgpack"
WEIGHTS = ("flax_model.msgpack", "flax_model.msgpack.index.json")
"""The first of these that a directory has is read, as transformers does."""
MAX_SHARD_BYTES = 10 * 10**9  # transformers' own default for Flax, "10GB"

_TRANSFORMER, _HEAD = "transformer/", "lm_head/kernel"

# What its modeling_flax_gpt2.py does not look at, and does whatever config.json says.
_IGNORED = {"scale_attn_weights": True, "scale_attn_by_inverse_layer_idx": False, "reorder_and_upcast_attn": False}
_ACTIVATIONS = tuple(name for name in ACTIVATIONS if name != "gelu_fast")  # ACT2FN of its modeling_flax_utils.py


def sniff(path: Path) -> bool:
    if path.is_dir():
        return (path / CONFIG).is_file() and _weights(path) is not None
    return is_msgpack(path)


def read(path: Path) -> Checkpoint:
    weights = _weights(path) if path.is_dir() else path
    assert weights is not None  # or sniff would have said no
    stored = read_shards(weights, read_file) if weights.suffix == ".json" else read_file(weights)
    directory = weights.parent
    if not has_companion(directory, CONFIG):
        raise CheckpointError(
            f"{quoted(weights)} holds tensors and there is no {CONFIG} beside it; put the model's there, because what "
            "they compute cannot be told from them"
        )
    hf = read_json(directory / CONFIG)
    config = GPT2Config.from_hf(hf)
    tensors = _canonical(stored, config, weights)
    return Checkpoint(config, tensors, NAME, directory, harmless_fields(hf), _oddities(stored, config))


def write(checkpoint: Checkpoint, directory: Path, *, max_shard_bytes: int = MAX_SHARD_BYTES) -> None:
    """What `FlaxGPT2LMHeadModel.save_pretrained` writes; raises `ConfigError` naming what that model ignores.

    Args:
        max_shard_bytes: start a new file before one grows past this; a single larger tensor has a file to itself.
    """
    config = checkpoint.config
    require_implied(config, "transformers 4's Flax", _IGNORED)
    if config.activation_function not in _ACTIVATIONS:
        raise ConfigError(
            f"activation_function={quoted(config.activation_function)}: transformers 4's Flax has only "
            f"{', '.join(_ACTIVATIONS)}"
        )
    write_json(directory / CONFIG, config.to_hf(checkpoint.extra))
    entries = {_path(p): _as_stored(checkpoint.tensors.entries[p.torch_name], p) for p in parameters(config)}
    write_shards(directory, "flax_model", "msgpack", entries, max_shard_bytes, write_file)
    carry_files(checkpoint, directory)


def _weights(directory: Path) -> Path | None:
    return next((directory / name for name in WEIGHTS if (directory / name).is_file()), None)


def _canonical(stored: Mapping[str, TensorEntry], config: GPT2Config, weights: Path) -> LazyTensors:
    tied = config.tie_word_embeddings and _HEAD not in stored  # a tied head may be stored all the same
    expected = {_path(p): p for p in parameters(replace(config, tie_word_embeddings=tied))}
    if _is_bare(stored):
        stored = {_TRANSFORMER + name: entry for name, entry in stored.items()}
    shapes = {path: p.torch_shape[::-1] if _is_turned(p) else p.torch_shape for path, p in expected.items()}
    if problems := differences(shapes, stored):
        raise ConversionError(f"{quoted(weights)} does not hold the tensors of its GPT-2:\n" + bullet_list(problems))
    return canonicalize(
        LazyTensors({p.torch_name: _as_stored(stored[path], p) for path, p in expected.items()}), config
    )


def _is_bare(stored: Mapping[str, TensorEntry]) -> bool:
    """Whether this is the tree of `FlaxGPT2Model`."""
    return "wte/embedding" in stored and not any(name.startswith(_TRANSFORMER) for name in stored)


def _path(parameter: Parameter) -> str:
    """`transformer/h/3/attn/c_attn/kernel`."""
    *modules, leaf = parameter.flax_path
    if modules == ["lm_head"]:
        return _HEAD
    if parameter.layer is not None:
        modules[:1] = ["h", str(parameter.layer)]
    return _TRANSFORMER + "/".join([*modules, leaf])


def _is_turned(parameter: Parameter) -> bool:
    """The head is `[V, D]` in the canonical layout and `[in, out]` as a kernel, the projections the other way round."""
    return parameter.is_projection or parameter.torch_name == "lm_head.weight"


def _as_stored(entry: TensorEntry, parameter: Parameter) -> TensorEntry:
    """From the canonical layout to the file's, and back."""
    return turned(entry) if _is_turned(parameter) else entry


def _oddities(stored: Mapping[str, TensorEntry], config: GPT2Config) -> tuple[str, ...]:
    odd = [
        f"{name}={getattr(config, name)!r}, which transformers 4's Flax ignored: there this model computed "
        "another function"
        for name, obeyed in _IGNORED.items()
        if getattr(config, name) != obeyed
    ]
    if _is_bare(stored):
        odd.append("it was saved without a head, from FlaxGPT2Model; the head is tied")
    if config.tie_word_embeddings and _HEAD in stored:
        odd.append(f"{_HEAD} is stored although it is tied; it equals wte/embedding")
    return tuple(odd)
