"""transformers 4's Flax checkpoints: `config.json` with `flax_model.msgpack`, whole or in shards.

Names are those of `FlaxGPT2LMHeadModel`. Kernels are `[out, in]`, the layout of `FlaxConv1D`. The kernel of an untied
head is `[in, out]`, the layout of `Dense`. A tree of `FlaxGPT2Model` has no head and no `transformer` level.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from bridge.checkpoint import Checkpoint
from bridge.config import GPT2Config, config_diagnostics, harmless_fields
from bridge.containers.msgpack import is_msgpack, read_file, write_file
from bridge.conversion import canonicalize, differences
from bridge.errors import ConfigError, ConversionError, bullet_list, quoted
from bridge.formats.directory import CONFIG, carry_files, config_beside, files_beside_config, read_json, write_json
from bridge.formats.format import Format
from bridge.formats.sharded import is_index, read_shards, write_shards
from bridge.formats.single_file import require_implied
from bridge.parameter_table import Parameter, parameters
from bridge.storage.tensors import LazyTensor, LazyTensorMap, transposed

NAME = "flax_msgpack"
WEIGHTS = ("flax_model.msgpack", "flax_model.msgpack.index.json")
"""In transformers' order: the first of these that a directory holds is read."""
MAX_SHARD_BYTES = 10 * 10**9  # transformers' own default for Flax, "10GB"

_SHARDS = (".msgpack",)

_TRANSFORMER, _HEAD = "transformer/", "lm_head/kernel"

# Settings that modeling_flax_gpt2.py ignores -> the behaviour that it hard-codes.
_IGNORED = {"scale_attn_weights": True, "scale_attn_by_inverse_layer_idx": False, "reorder_and_upcast_attn": False}
# ACT2FN of its modeling_flax_utils.py.
_ACTIVATIONS = ("gelu", "relu", "silu", "swish", "gelu_new", "quick_gelu", "gelu_pytorch_tanh", "tanh")


def find(path: Path) -> list[Path]:
    if path.is_dir():
        return files_beside_config(path, WEIGHTS)
    return [path] if is_index(path, _SHARDS) or is_msgpack(path) else []


def read(weights: Path) -> Checkpoint:
    stored = read_shards(weights, read_file) if weights.suffix == ".json" else read_file(weights)
    hf = read_json(config_beside(weights))
    config = GPT2Config.from_hf(hf)
    tensors = _canonical(stored, config, weights)
    notes = config_diagnostics(hf) + _diagnostics(stored, config)
    return Checkpoint(config, tensors, NAME, weights.parent, harmless_fields(hf), notes)


def left_out(checkpoint: Checkpoint) -> tuple[str, ...]:
    """Return no sentence, because everything is stored. Raises `ConfigError` for settings that the model ignores."""
    config = checkpoint.config
    config.to_hf()
    require_implied(config, "transformers 4's Flax", _IGNORED)
    if config.activation_function not in _ACTIVATIONS:
        raise ConfigError(
            f"activation_function={quoted(config.activation_function)}: transformers 4's Flax has only "
            f"{', '.join(_ACTIVATIONS)}"
        )
    return ()


def write(checkpoint: Checkpoint, directory: Path, *, max_shard_bytes: int = MAX_SHARD_BYTES) -> None:
    """Write what `FlaxGPT2LMHeadModel.save_pretrained` writes.

    Args:
        max_shard_bytes: maximum size of a file. A single larger tensor gets its own file.
    """
    config = checkpoint.config
    write_json(directory / CONFIG, config.to_hf(checkpoint.extra))
    entries = {_path(p): _as_stored(checkpoint.tensors.entries[p.torch_name], p) for p in parameters(config)}
    write_shards(directory, "flax_model", "msgpack", entries, max_shard_bytes, write_file)
    carry_files(checkpoint, directory)


def _canonical(stored: Mapping[str, LazyTensor], config: GPT2Config, weights: Path) -> LazyTensorMap:
    tied = config.tie_word_embeddings and _HEAD not in stored  # a tied head may be stored too
    expected = {_path(p): p for p in parameters(replace(config, tie_word_embeddings=tied))}
    if _is_bare(stored):
        stored = {_TRANSFORMER + name: entry for name, entry in stored.items()}
    shapes = {path: p.torch_shape[::-1] if _is_transposed(p) else p.torch_shape for path, p in expected.items()}
    if problems := differences(shapes, stored):
        raise ConversionError(f"{quoted(weights)} does not hold the tensors of its GPT-2:\n" + bullet_list(problems))
    return canonicalize(
        LazyTensorMap({p.torch_name: _as_stored(stored[path], p) for path, p in expected.items()}), config
    )


def _is_bare(stored: Mapping[str, LazyTensor]) -> bool:
    """Whether this is the tree of `FlaxGPT2Model`."""
    return "wte/embedding" in stored and not any(name.startswith(_TRANSFORMER) for name in stored)


def _path(parameter: Parameter) -> str:
    """Return the path of a parameter in the file, for example `transformer/h/3/attn/c_attn/kernel`."""
    *modules, leaf = parameter.flax_path
    if modules == ["lm_head"]:
        return _HEAD
    if parameter.layer is not None:
        modules[:1] = ["h", str(parameter.layer)]
    return _TRANSFORMER + "/".join([*modules, leaf])


def _is_transposed(parameter: Parameter) -> bool:
    """Whether the file stores the transpose: projections are `[out, in]`, and the head is `[in, out]`, not `[V, D]`."""
    return parameter.is_projection or parameter.torch_name == "lm_head.weight"


def _as_stored(entry: LazyTensor, parameter: Parameter) -> LazyTensor:
    """Convert between the canonical layout and that of the file, in either direction."""
    return transposed(entry) if _is_transposed(parameter) else entry


def _diagnostics(stored: Mapping[str, LazyTensor], config: GPT2Config) -> tuple[str, ...]:
    notes = [
        f"{name}={getattr(config, name)!r}, which transformers 4's Flax ignores: its output differs from this model's"
        for name, hard_coded in _IGNORED.items()
        if getattr(config, name) != hard_coded
    ]
    if _is_bare(stored):
        notes.append("the file has no head, because it was saved from FlaxGPT2Model; the head is tied")
    if config.tie_word_embeddings and _HEAD in stored:
        notes.append(f"{_HEAD} is stored although the head is tied; it equals wte/embedding")
    return tuple(notes)


FORMAT = Format(
    name=NAME,
    find=find,
    read=read,
    write=write,
    left_out=left_out,
    weight_files=r"flax_model(-\d{5}-of-\d{5})?\.msgpack|flax_model\.msgpack\.index\.json",
    family="transformers",
)
