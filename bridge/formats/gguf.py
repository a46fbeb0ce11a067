"""GGUF, the format of llama.cpp: F32, F16 and BF16 weights, with the tokenizer in the file.

Names and semantics are those of llama.cpp's GPT-2 (src/models/gpt2.cpp), which always has biases and the tanh GELU. The
head is tied if there is no `output.weight`. Projections are `[out, in]`.

llama.cpp aborts if biases or LayerNorm parameters are not F32. They are therefore written as F32, which changes no
value. Metadata keys of this project record their types, which are restored on reading.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import DTypeLike

from bridge.checkpoint import Checkpoint
from bridge.config import GPT2Config
from bridge.containers.gguf import (
    DTYPES,
    Array,
    GGUFFile,
    Value,
    float32,
    is_gguf,
    shown,
    string,
    strings,
    uint32,
    write_file,
)
from bridge.conversion import differences
from bridge.errors import (
    CheckpointError,
    ConfigError,
    ConversionError,
    NoTokenizerError,
    TokenizerError,
    bullet_list,
    quoted,
)
from bridge.formats.directory import files_by_content
from bridge.formats.format import Format
from bridge.formats.single_file import require_dtypes, require_implied, settings_left_out, with_sidecar
from bridge.parameter_table import Parameter, parameters
from bridge.storage.tensors import LazyTensor, LazyTensorMap, same_bytes, transposed
from bridge.tokenizers.byte_level_bpe import SPELLINGS_OF_WORDS, ByteLevelBPE
from bridge.tokenizers.readers.gguf import MODEL, NO_TOKENIZER, TOKENS, metadata_of, tokenizer_of

NAME = "gguf"
SUFFIXES = (".gguf",)

_MODULES: Mapping[str, str] = {
    "wte": "token_embd",
    "wpe": "position_embd",
    "ln_1": "attn_norm",
    "attn.c_attn": "attn_qkv",
    "attn.c_proj": "attn_output",
    "ln_2": "ffn_norm",
    "mlp.c_fc": "ffn_up",
    "mlp.c_proj": "ffn_down",
    "ln_f": "output_norm",
    "lm_head": "output",
}
_EMBEDDING, _HEAD = "token_embd.weight", "output.weight"

_SIZES: Mapping[str, str] = {
    "n_positions": "gpt2.context_length",
    "n_embd": "gpt2.embedding_length",
    "n_inner": "gpt2.feed_forward_length",
    "n_layer": "gpt2.block_count",
    "n_head": "gpt2.attention.head_count",
}
_EPSILON = "gpt2.attention.layer_norm_epsilon"

_IMPLIED = {
    "activation_function": "gelu_new",
    "scale_attn_weights": True,
    "scale_attn_by_inverse_layer_idx": False,
    "reorder_and_upcast_attn": False,
    "bias": True,
}
_REMEDY = (
    " (checkpoint.with_biases(), or gpt2 convert --zero-biases, adds biases of zero; checkpoint.with_activation(), or "
    "--activation, changes the activation and the model's output)"
)

_WIDENED_FROM: Mapping[np.dtype, str] = {
    DTYPES["F16"]: "gpt2_bridge.widened_from_f16",
    DTYPES["BF16"]: "gpt2_bridge.widened_from_bf16",
}
"""Original element type -> the metadata key that lists the names of the widened tensors."""

_FILE_TYPES = {DTYPES["F32"]: 0, DTYPES["F16"]: 1, DTYPES["BF16"]: 32}  # llama_ftype


def find(path: Path) -> list[Path]:
    return files_by_content(path, SUFFIXES, is_gguf)


def read(file: Path, config_json: Path | None) -> Checkpoint:
    gguf = GGUFFile.open(file)
    _require_gpt2(gguf.metadata, file)
    stored = _narrowed(gguf)
    config = _config(gguf.metadata, stored, file)
    entries = _canonical(stored, config, file)
    diagnostics = _diagnostics(gguf.metadata, config)
    if not config.tie_word_embeddings and same_bytes(entries["lm_head.weight"], entries["wte.weight"]):
        config = replace(config, tie_word_embeddings=True)
        del entries["lm_head.weight"]
        diagnostics.append(f"{_HEAD} is stored although it equals {_EMBEDDING}: the head is tied")
    config, extra, notes = with_sidecar(config, file, config_json)
    own_tokenizer = None
    if gguf.metadata.get(MODEL) not in (None, *NO_TOKENIZER):
        own_tokenizer = partial(tokenizer_of, gguf.metadata, config.vocab_size, quoted(file))
    tensors = LazyTensorMap(entries)
    return Checkpoint(config, tensors, NAME, file.parent, extra, (*diagnostics, *notes), own_tokenizer=own_tokenizer)


def left_out(checkpoint: Checkpoint) -> tuple[str, ...]:
    """Return what GGUF cannot store. Raises `ConfigError` or `ConversionError` if it cannot store the model."""
    _require_storable(checkpoint)
    return settings_left_out(checkpoint.config, stored=GPT2Config()) + _tokenizer(checkpoint)[1]


def write(checkpoint: Checkpoint, file: Path) -> None:
    config, entries = checkpoint.config, checkpoint.tensors.entries
    tokenizer, _ = _tokenizer(checkpoint)
    stored, widened_from = _widened({_name(p): _as_stored(entries[p.torch_name], p) for p in parameters(config)})
    sizes = {field: getattr(config, field) for field in _SIZES} | {"n_inner": config.feed_forward_size}
    metadata = {
        "general.architecture": string("gpt2"),
        "general.file_type": uint32(_file_type(stored)),
        **{key: uint32(sizes[field]) for field, key in _SIZES.items()},
        _EPSILON: float32(config.layer_norm_epsilon),
        "gpt2.vocab_size": uint32(config.vocab_size),
        **widened_from,
        **({MODEL: string("none")} if tokenizer is None else metadata_of(tokenizer, config.vocab_size)),
    }
    write_file(file, metadata, stored)


def _require_storable(checkpoint: Checkpoint) -> None:
    config, entries = checkpoint.config, checkpoint.tensors.entries
    require_implied(config, "GGUF's GPT-2", _IMPLIED, _REMEDY)
    require_dtypes(checkpoint.tensors, "GGUF", DTYPES.values())
    epsilon = config.layer_norm_epsilon
    if _shortest(epsilon) != epsilon:
        raise ConfigError(
            f"layer_norm_epsilon={epsilon!r}: GGUF stores it in float32, which rounds it to {_shortest(epsilon)!r}; "
            "set it to that value"
        )
    if not config.tie_word_embeddings and same_bytes(entries["lm_head.weight"], entries["wte.weight"]):
        raise ConfigError(
            "tie_word_embeddings=False, but lm_head.weight equals wte.weight, which means in GGUF that they are tied; "
            "set tie_word_embeddings to true"
        )


def _require_gpt2(metadata: Mapping[str, Value], file: Path) -> None:
    architecture = metadata.get("general.architecture")
    if architecture != b"gpt2":
        raise ConfigError(f"{quoted(file)}: general.architecture is {shown(architecture)}; only 'gpt2' is supported")
    if metadata.get("split.count", 0) not in (0, 1):
        raise CheckpointError(
            f"{quoted(file)} is one of several files of a model (split.count is {shown(metadata['split.count'])}); "
            "merge them first: llama-gguf-split --merge FIRST.gguf OUT.gguf"
        )


def _config(metadata: Mapping[str, Value], stored: LazyTensorMap, file: Path) -> GPT2Config:
    """Return the configuration, from the metadata, the shape of the embedding and the presence of a head."""
    sizes: dict[str, Any] = {field: metadata.get(key) for field, key in _SIZES.items()}
    problems = [
        f"{_SIZES[field]} is {shown(value)}, not an integer" for field, value in sizes.items() if type(value) is not int
    ]
    epsilon: Any = metadata.get(_EPSILON)
    if type(epsilon) is not float or _in_float32(epsilon) != epsilon:
        problems.append(f"{_EPSILON} is {shown(epsilon)}, not a float32")
    if problems:
        raise ConfigError(f"{quoted(file)}:\n" + bullet_list(problems))
    if _EMBEDDING not in stored:
        raise ConversionError(f"{quoted(file)}: {_EMBEDDING} is missing")
    if sizes["n_inner"] == 4 * sizes["n_embd"]:
        sizes["n_inner"] = None
    config = GPT2Config(
        vocab_size=stored.entries[_EMBEDDING].shape[0],
        layer_norm_epsilon=_shortest(epsilon),
        tie_word_embeddings=_HEAD not in stored,
        **sizes,
    )
    if config.n_layer > len(stored):  # checked before the names of all layers are generated
        raise ConversionError(
            f"{quoted(file)}: gpt2.block_count is {config.n_layer}, but there are {len(stored)} tensors"
        )
    _require_plain_gpt2(metadata, config, file)
    return config


def _require_plain_gpt2(metadata: Mapping[str, Value], config: GPT2Config, file: Path) -> None:
    """Raise `ConfigError` if other metadata of the architecture is unknown, or contradicts the configuration."""
    implied = {
        "gpt2.vocab_size": config.vocab_size,
        "gpt2.attention.head_count_kv": config.n_head,
        "gpt2.attention.key_length": config.head_size,
        "gpt2.attention.value_length": config.head_size,
        "gpt2.attention.causal": True,
    }
    problems = []
    for key in metadata.keys() - {*_SIZES.values(), _EPSILON}:
        value = metadata[key]
        if key in implied and (type(value) is not type(implied[key]) or value != implied[key]):
            problems.append(f"{key} is {shown(value)}; this model has {implied[key]}")
        elif key.startswith("gpt2.") and key not in implied:
            problems.append(
                f"{quoted(key)} is {shown(value)}: unknown, and it may affect the model's output; remove it if it "
                "does not (gguf-new-metadata --remove-metadata KEY IN.gguf OUT.gguf)"
            )
    if problems:
        raise ConfigError(f"{quoted(file)} describes a model that is not supported:\n" + bullet_list(sorted(problems)))


def _widened(entries: Mapping[str, LazyTensor]) -> tuple[LazyTensorMap, dict[str, bytes]]:
    """Widen biases and LayerNorm parameters to F32. Returns the tensors, and metadata that records their types."""
    vectors = {name: entry for name, entry in entries.items() if len(entry.shape) == 1 and entry.dtype != np.float32}
    recorded = {}
    for dtype, key in _WIDENED_FROM.items():
        if names := [name for name, entry in vectors.items() if entry.dtype == dtype]:
            recorded[key] = strings(names)
    in_float32 = {name: _cast(entry, np.float32, name) for name, entry in vectors.items()}
    return LazyTensorMap({**entries, **in_float32}), recorded


def _narrowed(gguf: GGUFFile) -> LazyTensorMap:
    """Return the tensors of a file, after casting widened tensors back to their recorded types."""
    entries = dict(gguf.tensors().entries)
    for dtype, key in _WIDENED_FROM.items():
        names = gguf.metadata.get(key)
        if names is None:
            continue
        if not isinstance(names, Array) or names.type != "string" or names.count > len(entries):
            raise CheckpointError(f"{quoted(gguf.file.path)}: {key} is {shown(names)}, not a list of tensor names")
        for name in (text.decode(errors="replace") for text in names.read()):
            if name not in entries or entries[name].dtype != np.float32 or len(entries[name].shape) != 1:
                raise CheckpointError(
                    f"{quoted(gguf.file.path)}: {key} names {quoted(name)}, which is not an F32 vector"
                )
            entries[name] = _cast(entries[name], dtype, f"{quoted(gguf.file.path)}: {name}")
    return LazyTensorMap(entries)


def _cast(entry: LazyTensor, dtype: DTypeLike, where: str) -> LazyTensor:
    """Cast a tensor on read. Raises `ConversionError` if a value changes."""

    def read() -> np.ndarray:
        array = entry.read()
        with np.errstate(over="ignore", invalid="ignore"):
            cast = array.astype(dtype)
        if not np.array_equal(cast.astype(array.dtype), array, equal_nan=True):
            raise ConversionError(f"{where} has values that {np.dtype(dtype)} cannot represent")
        return cast

    return LazyTensor(np.dtype(dtype), entry.shape, read)


def _canonical(stored: LazyTensorMap, config: GPT2Config, file: Path) -> dict[str, LazyTensor]:
    expected = {_name(p): p for p in parameters(config)}
    shapes = {name: p.torch_shape[::-1] if p.is_projection else p.torch_shape for name, p in expected.items()}
    if problems := differences(shapes, stored.entries):
        raise ConversionError(f"{quoted(file)} does not hold the tensors of its GPT-2:\n" + bullet_list(problems))
    return {p.torch_name: _as_stored(stored.entries[name], p) for name, p in expected.items()}


def _as_stored(entry: LazyTensor, parameter: Parameter) -> LazyTensor:
    """Convert between the canonical layout and that of the file, in either direction."""
    return transposed(entry) if parameter.is_projection else entry


def _name(parameter: Parameter) -> str:
    """`h.3.attn.c_attn.weight` -> `blk.3.attn_qkv.weight`."""
    module, _, kind = parameter.torch_name.rpartition(".")
    if parameter.layer is None:
        return f"{_MODULES[module]}.{kind}"
    return f"blk.{parameter.layer}.{_MODULES[module.removeprefix(f'h.{parameter.layer}.')]}.{kind}"


def _tokenizer(checkpoint: Checkpoint) -> tuple[ByteLevelBPE | None, tuple[str, ...]]:
    """Return the checkpoint's tokenizer, or None and a sentence if GGUF cannot store its kind."""
    try:
        tokenizer = checkpoint.tokenizer()
    except NoTokenizerError:
        return None, ()
    except TokenizerError as error:
        return None, (f"its tokenizer, which cannot be read: {error}",)
    if not isinstance(tokenizer, ByteLevelBPE) or tokenizer.pattern not in SPELLINGS_OF_WORDS:
        return None, (f"its tokenizer {quoted(tokenizer.name)}: it is not byte-level BPE with GPT-2's pre-tokenizer",)
    return tokenizer, ()


def _file_type(tensors: LazyTensorMap) -> int:
    """Return llama.cpp's number of the type that most of the weights have."""
    bytes_of: Counter[np.dtype] = Counter()
    for entry in tensors.entries.values():
        bytes_of[entry.dtype] += entry.nbytes
    return _FILE_TYPES[bytes_of.most_common(1)[0][0]]


def _diagnostics(metadata: Mapping[str, Value], config: GPT2Config) -> list[str]:
    tokens = metadata.get(TOKENS)
    if not isinstance(tokens, Array) or tokens.count == config.vocab_size:
        return []
    return [
        f"{TOKENS} has {tokens.count} entries and {_EMBEDDING} has {config.vocab_size} rows; llama.cpp rejects a file "
        "in which the two numbers differ"
    ]


def _shortest(value: float) -> float:
    """Return the float with the fewest digits that equals `value` in float32: 1e-05 for 9.99999974737875e-06."""
    return float(str(np.float32(_in_float32(value))))


def _in_float32(value: float) -> float:
    with np.errstate(over="ignore"):
        return float(np.float32(value))


FORMAT = Format(
    name=NAME,
    find=find,
    read=read,
    write=write,
    left_out=left_out,
    file_name="model.gguf",
    suffixes=SUFFIXES,
    keeps_tokenizer=True,
)
