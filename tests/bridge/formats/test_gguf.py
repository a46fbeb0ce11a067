"""GGUF checkpoints, compared with the gguf package (0.19.0), and files that are not a GPT-2 of llama.cpp.

The package's `GGUFWriter` writes files like those of llama.cpp's converter, with the names of its own table. llama.cpp
(b11549) was tested by hand with files of every type: it computes the logits of the reference.
"""

from __future__ import annotations

import json
import os
import shutil
import tracemalloc
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import ml_dtypes
import numpy as np
import pytest
import tiktoken
from support.gguf_bytes import (
    Pairs,
    array,
    described,
    file_of,
    gguf_tensors,
    gpt2,
    gpt2_pairs,
    int32s,
    number,
    text,
    texts,
)
from support.models import SMALLEST, TINY, random_checkpoint, random_state
from support.refusals import MOST_BYTES, assert_refused
from support.tokenizers_for_tests import END, OPENAI_CACHE, TEXTS, needs_openai_cache, of_tiktoken

import bridge
from bridge import Checkpoint, CheckpointError, ConfigError, ConversionError, GPT2Config, TokenizerError
from bridge.diagnostics import find_diagnostics
from bridge.errors import BridgeError
from bridge.tokenizers.byte_level_bpe import WORDS, ByteLevelBPE
from bridge.tokenizers.loading import openai_tokenizer
from bridge.tokenizers.tokenizer import Tokenizer

FOUR_HEADS = replace(TINY, n_head=4)
UNTIED = replace(FOUR_HEADS, tie_word_embeddings=False)
CONFIGS = pytest.mark.parametrize("config", [FOUR_HEADS, UNTIED], ids=["tied", "untied"])
DTYPES = pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16], ids=["f32", "f16", "bf16"])
BF16 = np.dtype(ml_dtypes.bfloat16)


def assert_same(found: Checkpoint, expected: Checkpoint) -> None:
    assert found.config == expected.config
    assert bridge.fingerprint(found.tensors) == bridge.fingerprint(expected.tensors)


def saved(path: Path, checkpoint: Checkpoint) -> Path:
    bridge.save(checkpoint, path, format="gguf")
    return path


def fields_of(path: Path) -> dict[str, Any]:
    """Return the metadata, read by the package."""
    return {name: field.contents() for name, field in gguf.GGUFReader(path).fields.items()}


# Round trips


@CONFIGS
@DTYPES
@pytest.mark.parametrize("name", ["m.gguf", "directory"])
def test_the_round_trip_is_bit_for_bit(tmp_path: Path, config: GPT2Config, dtype: type, name: str) -> None:
    checkpoint = random_checkpoint(config, dtype)
    assert bridge.save(checkpoint, tmp_path / name, format="gguf") == ()
    back = bridge.load(tmp_path / name)
    assert back.format == "gguf"
    assert back.diagnostics == ()
    assert_same(back, checkpoint)
    if name == "directory":
        assert sorted(file.name for file in (tmp_path / name).iterdir()) == ["config.json", "model.gguf"]


@pytest.mark.parametrize("n_inner", [None, 192, 100])
def test_the_width_of_the_feed_forward_layer_is_kept(tmp_path: Path, n_inner: int | None) -> None:
    checkpoint = random_checkpoint(replace(TINY, n_inner=n_inner))
    assert bridge.load(saved(tmp_path / "m.gguf", checkpoint)).config.feed_forward_size == n_inner or 192
    assert_same(bridge.load(saved(tmp_path / "directory", checkpoint)), checkpoint)


def test_mixed_dtypes_are_kept(tmp_path: Path) -> None:
    """Each type is used by every third tensor, including vectors."""
    types = (np.float32, np.float16, BF16)
    state = {name: values.astype(types[i % 3]) for i, (name, values) in enumerate(random_state(TINY).items())}
    checkpoint = Checkpoint.of(state, TINY)
    assert_same(bridge.load(saved(tmp_path / "m.gguf", checkpoint)), checkpoint)


def test_non_finite_values_are_kept_on_request(tmp_path: Path) -> None:
    state = random_state(SMALLEST, BF16)
    for name in ("wte.weight", "ln_f.bias", "h.0.mlp.c_fc.weight"):
        state[name].reshape(-1)[:3] = np.nan, np.inf, -np.inf
    checkpoint = Checkpoint.of(state, SMALLEST)
    with pytest.raises(ConversionError, match="values that are not finite"):
        saved(tmp_path / "m.gguf", checkpoint)
    bridge.save(checkpoint, tmp_path / "m.gguf", format="gguf", allow_non_finite=True)
    assert_same(bridge.load(tmp_path / "m.gguf"), checkpoint)


def test_training_settings_are_left_out_and_reported(tmp_path: Path) -> None:
    config = replace(TINY, embd_pdrop=0.1, initializer_range=0.01)
    (sentence,) = bridge.save(random_checkpoint(config), tmp_path / "m.gguf", format="gguf")
    assert "initializer_range=0.01" in sentence
    assert "embd_pdrop=0.1" in sentence
    assert bridge.load(tmp_path / "m.gguf").config == TINY
    assert bridge.save(random_checkpoint(config), tmp_path / "directory", format="gguf") == ()
    assert bridge.load(tmp_path / "directory").config == config


# Against the package


def llama_cpps_names(config: GPT2Config) -> dict[str, str]:
    """Return canonical name -> GGUF name, from the package's own table."""
    table = gguf.get_tensor_name_map(gguf.MODEL_ARCH.GPT2, config.n_layer)
    names = {}
    for parameter in bridge.parameters(config):
        name = parameter.torch_name
        theirs = name if name.startswith("lm_head") else f"transformer.{name}"
        names[name] = table.get_name(theirs, try_suffixes=(".weight", ".bias"))
    return names


def is_transposed(name: str) -> bool:
    return name.endswith(("c_attn.weight", "c_proj.weight", "c_fc.weight"))


def as_the_converter(path: Path, checkpoint: Checkpoint, matrices: gguf.GGMLQuantizationType, **dropped: bool) -> Path:
    """Write with the package the file that convert_hf_to_gguf.py makes of a GPT-2."""
    config = checkpoint.config
    writer = gguf.GGUFWriter(path, "gpt2")
    writer.add_name("Tiny")
    writer.add_type("model")
    writer.add_block_count(config.n_layer)
    writer.add_context_length(config.n_positions)
    writer.add_embedding_length(config.n_embd)
    writer.add_feed_forward_length(config.feed_forward_size)
    writer.add_head_count(config.n_head)
    writer.add_layer_norm_eps(config.layer_norm_epsilon)
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_F16)
    writer.add_quantization_version(2)
    names = llama_cpps_names(config)
    for name, values in checkpoint.tensors.items():
        kind = matrices if values.ndim == 2 else gguf.GGMLQuantizationType.F32
        stored = gguf.quants.quantize(np.ascontiguousarray(values.T if is_transposed(name) else values), kind)
        writer.add_tensor(names[name], stored, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@CONFIGS
@pytest.mark.parametrize("kind", ["F32", "F16", "BF16"])
def test_files_like_those_of_llama_cpps_converter_are_read(tmp_path: Path, config: GPT2Config, kind: str) -> None:
    dtype = {"F32": np.float32, "F16": np.float16, "BF16": BF16}[kind]
    exact = {  # the package rounds ties to bfloat16 differently from ml_dtypes
        name: values.astype(dtype).astype(np.float32) for name, values in random_state(config).items()
    }
    path = as_the_converter(tmp_path / "m.gguf", Checkpoint.of(exact, config), getattr(gguf.GGMLQuantizationType, kind))
    expected = {name: values.astype(dtype) if values.ndim == 2 else values for name, values in exact.items()}
    back = bridge.load(path)
    assert_same(back, Checkpoint.of(expected, config))
    mixed = [line for line in find_diagnostics(back) if "mixed dtypes" in line]
    assert len(mixed) == (kind != "F32")


@CONFIGS
@DTYPES
def test_the_package_reads_written_files(tmp_path: Path, config: GPT2Config, dtype: type) -> None:
    checkpoint = random_checkpoint(config, dtype)
    reader = gguf.GGUFReader(saved(tmp_path / "m.gguf", checkpoint))
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    names = llama_cpps_names(config)
    assert set(tensors) == set(names.values())
    for name, values in checkpoint.tensors.items():
        tensor = tensors[names[name]]
        theirs = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        np.testing.assert_array_equal(theirs, (values.T if is_transposed(name) else values).astype(np.float32))
        if values.ndim == 1:
            assert tensor.tensor_type == gguf.GGMLQuantizationType.F32, "llama.cpp ends its process on others"
    found = {name: field.contents() for name, field in reader.fields.items() if not name.startswith("GGUF.")}
    assert {key: value for key, value in found.items() if not key.startswith("gpt2_bridge.")} == {
        "general.architecture": "gpt2",
        "general.file_type": {np.float32: 0, np.float16: 1, ml_dtypes.bfloat16: 32}[dtype],
        "gpt2.context_length": 40,
        "gpt2.embedding_length": 48,
        "gpt2.feed_forward_length": 100,
        "gpt2.block_count": 5,
        "gpt2.attention.head_count": 4,
        "gpt2.attention.layer_norm_epsilon": float(np.float32(1e-5)),
        "gpt2.vocab_size": 257,
        "tokenizer.ggml.model": "none",
    }


# Vectors widened for llama.cpp


def test_vectors_are_stored_in_float32_and_read_in_their_old_dtype(tmp_path: Path) -> None:
    path = saved(tmp_path / "m.gguf", random_checkpoint(SMALLEST, BF16))
    named = fields_of(path)["gpt2_bridge.widened_from_bf16"]
    assert sorted(named) == sorted(t.name for t in gguf.GGUFReader(path).tensors if len(t.shape) == 1)
    assert {entry.dtype for entry in bridge.load(path).tensors.entries.values()} == {BF16}


def test_a_vector_that_no_longer_fits_its_old_type_is_an_error(tmp_path: Path) -> None:
    pairs = [*gpt2_pairs(), (b"gpt2_bridge.widened_from_f16", texts(["output_norm.bias"]))]
    tensors = gguf_tensors()
    tensors["output_norm.bias"][:] = 0.5
    (tmp_path / "m.gguf").write_bytes(gpt2(pairs, tensors))
    assert bridge.load(tmp_path / "m.gguf").tensors["ln_f.bias"].dtype == np.float16
    tensors["output_norm.bias"][3] = 1 + 2**-20
    (tmp_path / "m.gguf").write_bytes(gpt2(pairs, tensors))
    with pytest.raises(ConversionError, match=r"m\.gguf': output_norm.bias has values that float16 cannot represent"):
        bridge.load(tmp_path / "m.gguf").tensors["ln_f.bias"]


# Tied and untied


def with_head(head: np.ndarray) -> bytes:
    return gpt2(tensors={**gguf_tensors(), "output.weight": head})


def test_a_head_that_equals_the_embedding_is_tied(tmp_path: Path) -> None:
    (tmp_path / "m.gguf").write_bytes(with_head(gguf_tensors()["token_embd.weight"]))
    back = bridge.load(tmp_path / "m.gguf")
    assert_same(back, random_checkpoint(SMALLEST))
    assert back.diagnostics == ("output.weight is stored although it equals token_embd.weight: the head is tied",)


def test_a_head_that_differs_in_a_bit_is_untied(tmp_path: Path) -> None:
    head = gguf_tensors()["token_embd.weight"].copy()
    head[-1, -1] = np.nextafter(head[-1, -1], 9)
    (tmp_path / "m.gguf").write_bytes(with_head(head))
    back = bridge.load(tmp_path / "m.gguf")
    assert back.config == replace(SMALLEST, tie_word_embeddings=False)
    np.testing.assert_array_equal(back.tensors["lm_head.weight"], head)


def test_an_untied_head_that_equals_the_embedding_is_not_written(tmp_path: Path) -> None:
    config = replace(SMALLEST, tie_word_embeddings=False)
    state = random_state(config)
    state["lm_head.weight"] = state["wte.weight"]
    with pytest.raises(ConfigError, match=r"tie_word_embeddings=False, but lm_head.weight equals wte.weight"):
        saved(tmp_path / "m.gguf", Checkpoint.of(state, config))
    assert list(tmp_path.iterdir()) == []


# The epsilon


@pytest.mark.parametrize("epsilon", [1e-5, 1e-6, 1e-12, 3e-5, 1.1e-5, 0.1, 1e-38])
def test_an_epsilon_of_few_digits_survives_a_round_trip(tmp_path: Path, epsilon: float) -> None:
    checkpoint = random_checkpoint(replace(SMALLEST, layer_norm_epsilon=epsilon))
    assert bridge.load(saved(tmp_path / "m.gguf", checkpoint)).config.layer_norm_epsilon == epsilon


@pytest.mark.parametrize("epsilon", [1.00000000001e-5, 1 / 3, 1e-300, 1e300, 1e-46])
def test_an_epsilon_that_float32_cannot_represent_is_refused(tmp_path: Path, epsilon: float) -> None:
    with pytest.raises(ConfigError, match=r"layer_norm_epsilon=.*GGUF stores it in float32"):
        saved(tmp_path / "m.gguf", random_checkpoint(replace(SMALLEST, layer_norm_epsilon=epsilon)))


# Models that the format cannot store


@pytest.mark.parametrize(
    "changed",
    [
        {"activation_function": "gelu"},
        {"activation_function": "relu"},
        {"scale_attn_weights": False},
        {"scale_attn_by_inverse_layer_idx": True},
        {"reorder_and_upcast_attn": True},
        {"bias": False},
    ],
    ids=str,
)
def test_a_function_that_llama_cpp_does_not_have_is_refused_by_field(tmp_path: Path, changed: dict[str, Any]) -> None:
    ((name, value),) = changed.items()
    with pytest.raises(ConfigError, match=f"{name}='{value}': GGUF's GPT-2 has only"):
        saved(tmp_path / "m.gguf", random_checkpoint(replace(SMALLEST, **changed)))
    assert list(tmp_path.iterdir()) == []


def test_float64_is_not_written(tmp_path: Path) -> None:
    with pytest.raises(ConversionError, match=r"wte.weight holds float64: GGUF has only float32, float16, bfloat16"):
        saved(tmp_path / "m.gguf", random_checkpoint(SMALLEST, np.float64))


# Files that are not exactly a GPT-2


def without(name: str) -> bytes:
    return gpt2(tensors={key: values for key, values in gguf_tensors().items() if key != name})


def changed(**pairs: bytes | None) -> bytes:
    return gpt2(gpt2_pairs(**pairs))


def with_pair(key: str, value: bytes) -> bytes:
    return gpt2([*gpt2_pairs(), (key.encode(), value)])


def renamed(old: str, new: str) -> bytes:
    return gpt2(tensors={new if name == old else name: values for name, values in gguf_tensors().items()})


def transposed() -> bytes:
    """Return a file with all projections `[in, out]`."""
    return gpt2(tensors={name: v.T.copy() if v.ndim == 2 else v for name, v in gguf_tensors().items()})


def vectors_widened(names: bytes) -> bytes:
    return with_pair("gpt2_bridge.widened_from_bf16", names)


QKV = "blk.0.attn_qkv.weight"
WRONG = [*gpt2_pairs(), (b"gpt2.vocab_size", number(10)), (b"gpt2.rope.freq_base", number(1e4, "float32"))]

# The content of the file, the error, and a part of its message.
NOT_GPT2: dict[str, tuple[bytes, type[BridgeError], str]] = {
    "no keys": (gpt2([]), ConfigError, "general.architecture is missing; only 'gpt2' is supported"),
    "a text of the maximum length": (
        file_of([(b"a.b", text("x" * (2**24 - 100)))]),
        ConfigError,
        "general.architecture is missing",
    ),
    "another architecture": (changed(architecture=text("llama")), ConfigError, "general.architecture is 'llama'"),
    "an architecture that is not a text": (changed(architecture=number(2)), ConfigError, "architecture is '2'"),
    "an architecture not UTF-8": (changed(architecture=text(b"\xff\x1b")), ConfigError, "architecture is '\ufffd"),
    "an architecture that is an array": (changed(architecture=texts(["gpt2"])), ConfigError, "is an array of 1"),
    "one of several files": (with_pair("split.count", number(2, "uint16")), CheckpointError, "merge them first"),
    "several files, in an array": (with_pair("split.count", int32s([1])), CheckpointError, "split.count is an array"),
    # Sizes
    "no context_length": (changed(context_length=None), ConfigError, "gpt2.context_length is missing"),
    "no head_count": (changed(head_count=None), ConfigError, "gpt2.attention.head_count is missing"),
    "no epsilon": (changed(layer_norm_epsilon=None), ConfigError, "layer_norm_epsilon is missing, not a float32"),
    "embedding_length a float": (changed(embedding_length=number(8, "float32")), ConfigError, "is '8.0', not an int"),
    "block_count a text": (changed(block_count=text("2")), ConfigError, "gpt2.block_count is '2', not an integer"),
    "block_count a bool": (changed(block_count=number(1, "bool")), ConfigError, "block_count is 'True', not an int"),
    "block_count 0": (changed(block_count=number(0)), ConfigError, "n_layer='0': must be between 1"),
    "block_count -1": (changed(block_count=number(-1, "int32")), ConfigError, "n_layer='-1': must be between 1"),
    "block_count 10^9": (changed(block_count=number(10**9)), ConfigError, "n_layer='1000000000'"),
    "block_count 10,000": (changed(block_count=number(10**4)), ConversionError, "is 10000, but there are 28 tensors"),
    "block_count too small": (changed(block_count=number(1)), ConversionError, "'blk.1.attn_norm.weight' is not a"),
    "block_count too large": (changed(block_count=number(3)), ConversionError, "blk.2.attn_norm.weight is missing"),
    "head_count 0": (changed(head_count=number(0)), ConfigError, "n_head='0': must be between 1"),
    "head_count 3": (changed(head_count=number(3)), ConfigError, "n_embd='8' is not divisible by n_head='3'"),
    "head_count an array": (changed(head_count=int32s([2, 2])), ConfigError, "head_count is an array of 2, not an int"),
    "feed_forward_length 0": (changed(feed_forward_length=number(0)), ConfigError, "n_inner='0'"),
    "feed_forward_length 4 n_embd": (changed(feed_forward_length=number(32)), ConversionError, "blk.0.ffn_up.weight h"),
    "embedding_length 2^63": (changed(embedding_length=number(2**63, "uint64")), ConfigError, "n_embd="),
    "context_length other than stored": (changed(context_length=number(6)), ConversionError, "position_embd.weight ha"),
    "epsilon 0": (changed(layer_norm_epsilon=number(0, "float32")), ConfigError, "layer_norm_epsilon='0.0'"),
    "epsilon negative": (changed(layer_norm_epsilon=number(-1e-5, "float32")), ConfigError, "layer_norm_epsilon='-1e-"),
    "epsilon NaN": (changed(layer_norm_epsilon=number(np.nan, "float32")), ConfigError, "epsilon is 'nan', not a floa"),
    "epsilon infinite": (changed(layer_norm_epsilon=number(np.inf, "float32")), ConfigError, "layer_norm_epsilon='inf"),
    "epsilon a whole number": (changed(layer_norm_epsilon=number(1)), ConfigError, "epsilon is '1', not a float32"),
    "epsilon in float64": (changed(layer_norm_epsilon=number(1e-5, "float64")), ConfigError, "not a float32"),
    "epsilon past float32": (changed(layer_norm_epsilon=number(1e300, "float64")), ConfigError, "not a float32"),
    # Other mathematics
    "a vocabulary of another size": (with_pair("gpt2.vocab_size", number(12)), ConfigError, "vocab_size is '12'; this"),
    "fewer heads for keys": (with_pair("gpt2.attention.head_count_kv", number(1)), ConfigError, "head_count_kv is '1'"),
    "wider keys": (with_pair("gpt2.attention.key_length", number(8)), ConfigError, "key_length is '8'; this model has"),
    "wider values": (with_pair("gpt2.attention.value_length", number(8)), ConfigError, "value_length is '8'"),
    "attention to the future": (with_pair("gpt2.attention.causal", number(0, "bool")), ConfigError, "causal is 'False"),
    "rotary positions": (with_pair("gpt2.rope.freq_base", number(1e4, "float32")), ConfigError, "'gpt2.rope.freq_base"),
    "experts": (with_pair("gpt2.expert_count", number(8)), ConfigError, "'gpt2.expert_count' is '8': unknown, and"),
    "an unknown array": (with_pair("gpt2.x", int32s([1, 2])), ConfigError, "'gpt2.x' is an array of 2: unknown"),
    "an odd key": (with_pair("gpt2.\x1b[31m", number(1)), ConfigError, r"'gpt2.\x1b[31m' is '1': unknown"),
    "several faults, all named": (gpt2(WRONG), ConfigError, "gpt2.vocab_size is '10'; this model has 11"),
    # Tensors
    "no tensors": (file_of(gpt2_pairs()), ConversionError, "token_embd.weight is missing"),
    "no embedding": (without("token_embd.weight"), ConversionError, "token_embd.weight is missing"),
    "no positions": (without("position_embd.weight"), ConversionError, "position_embd.weight is missing (shape (5, 8)"),
    "no bias": (without("blk.1.ffn_down.bias"), ConversionError, "blk.1.ffn_down.bias is missing (shape (8,))"),
    "a projection missing": (without(QKV), ConversionError, f"{QKV} is missing (shape (24, 8))"),
    "an unknown tensor": (renamed(QKV, "blk.0.attn_q.weight"), ConversionError, "'blk.0.attn_q.weight' is not a"),
    "Hugging Face's names": (renamed("token_embd.weight", "wte.weight"), ConversionError, "token_embd.weight is missi"),
    "a canonical name beside it": (renamed(QKV, "h.0.attn.c_attn.weight"), ConversionError, f"{QKV} is missing"),
    "a name with ..": (renamed(QKV, "../../etc/passwd"), ConversionError, "'../../etc/passwd' is not a parameter"),
    "a name with escape codes": (renamed(QKV, "\x1b[31m\n"), ConversionError, r"'\x1b[31m\n' is not a parameter"),
    "projections [in, out]": (transposed(), ConversionError, "has shape (8, 24); the configuration requires (24, 8)"),
    "a head of another size": (with_head(np.ones((12, 8), "f")), ConversionError, "output.weight has shape (12, 8)"),
    "an embedding of one axis": (
        gpt2(tensors={**gguf_tensors(), "token_embd.weight": np.ones(11, "f")}),
        ConversionError,
        "token_embd.weight has shape (11,); the configuration requires (11, 8)",
    ),
    "an embedding of no rows": (
        gpt2(tensors={**gguf_tensors(), "token_embd.weight": np.ones((0, 8), "f")}),
        ConfigError,
        "vocab_size='0': must be between 1",
    ),
    "two billion empty rows": (
        file_of(gpt2_pairs(), [described("token_embd.weight", (0, 2**40))]),
        ConfigError,
        "vocab_size='1099511627776'",
    ),
    # Metadata of this project
    "widened: a number": (vectors_widened(number(1)), CheckpointError, "widened_from_bf16 is '1', not a list of"),
    "widened: numbers": (vectors_widened(int32s([1])), CheckpointError, "is an array of 1, not a list of tensor names"),
    "widened: too many": (vectors_widened(texts(["x"] * 29)), CheckpointError, "is an array of 29, not a list"),
    "widened: unknown": (vectors_widened(texts(["\x1b[31m"])), CheckpointError, r"names '\x1b[31m', which is not an"),
    "widened: not UTF-8": (vectors_widened(texts([b"\xff"])), CheckpointError, "which is not an F32 vector"),
    "widened: a matrix": (vectors_widened(texts([QKV])), CheckpointError, f"names '{QKV}', which is not an F32 vector"),
    "widened: twice": (vectors_widened(texts(["output_norm.bias"] * 2)), CheckpointError, "which is not an F32 vector"),
    "widened: rounded": (vectors_widened(texts(["output_norm.bias"])), ConversionError, "values that bfloat16 cannot"),
}  # fmt: skip


@pytest.mark.parametrize(("content", "error", "message"), NOT_GPT2.values(), ids=NOT_GPT2)
def test_a_file_that_is_not_llama_cpps_gpt2_is_refused_by_field(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], content: bytes, error: type[BridgeError], message: str
) -> None:
    (tmp_path / "other.gguf").write_bytes(content)
    assert_refused(tmp_path / "other.gguf", message, capsys, error)


def test_the_unedited_file_of_these_tests_is_valid(tmp_path: Path) -> None:
    (tmp_path / "m.gguf").write_bytes(gpt2())
    assert_same(bridge.load(tmp_path / "m.gguf"), random_checkpoint(SMALLEST))


def test_irrelevant_keys_are_ignored(tmp_path: Path) -> None:
    pairs: Pairs = [
        (b"general.name", text("\xff")),
        (b"general.tags", texts(["text-generation"])),
        (b"general.file_type", number(7)),
        (b"split.count", number(1, "uint16")),
        (b"gpt2.vocab_size", number(11)),
        (b"gpt2.attention.head_count_kv", number(2, "uint64")),
        (b"gpt2.attention.key_length", number(4)),
        (b"gpt2.attention.value_length", number(4)),
        (b"gpt2.attention.causal", number(1, "bool")),
        (b"llama.block_count", number(80)),
    ]
    (tmp_path / "m.gguf").write_bytes(gpt2([*gpt2_pairs(), *pairs]))
    assert_same(bridge.load(tmp_path / "m.gguf"), random_checkpoint(SMALLEST))


def test_integers_of_any_type_are_read(tmp_path: Path) -> None:
    sizes = {"context_length": 5, "embedding_length": 8, "feed_forward_length": 12, "block_count": 2, "head_count": 2}
    for kind in ("uint8", "int8", "uint16", "int16", "int32", "uint64", "int64"):
        (tmp_path / "m.gguf").write_bytes(changed(**{key: number(size, kind) for key, size in sizes.items()}))
        assert bridge.load(tmp_path / "m.gguf").config == SMALLEST


# Directories


def test_a_directory_with_several_files_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "d").mkdir()
    for name in ("a.gguf", "b.gguf"):
        (tmp_path / "d" / name).write_bytes(gpt2())
    assert_refused(
        tmp_path / "d", "holds several checkpoints:\n  - gguf: 'a.gguf'\n  - gguf: 'b.gguf'\n", capsys, CheckpointError
    )
    assert_same(bridge.load(tmp_path / "d" / "b.gguf"), random_checkpoint(SMALLEST))


def test_a_config_that_disagrees_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = saved(tmp_path / "d", random_checkpoint(SMALLEST))
    fields = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**fields, "activation_function": "relu"}))
    message = "activation_function is 'relu' in config.json, but 'gelu_new' in 'model.gguf'"
    assert_refused(path, message, capsys, ConfigError)


# Tokenizers


def small_bpe() -> ByteLevelBPE:
    """Return a tokenizer with reordered bytes, merges, ids without a token, and two special tokens."""
    ranks = {bytes([b]): (7 * b) % 256 for b in range(256)}
    ranks |= {token: 256 + i for i, token in enumerate((b" t", b"he", b" the", "é".encode(), b"\n\n", b"\x00\xff"))}
    return of_tiktoken("small", pat_str=WORDS, mergeable_ranks=ranks, special_tokens={END: 270, "<|é|>": 265})


def with_tokenizer(encoding: Tokenizer, rows: int = 280) -> Checkpoint:
    return replace(random_checkpoint(replace(SMALLEST, vocab_size=rows)), own_tokenizer=lambda: encoding)


def assert_same_tokenizer(found: Tokenizer, expected: Tokenizer) -> None:
    assert bridge.tokenizer_fingerprint(found) == bridge.tokenizer_fingerprint(expected)
    for sample in (*TEXTS, f"a{END}<|é|>b"):
        assert found.encode(sample) == expected.encode(sample)


@pytest.mark.parametrize("make", [small_bpe, bridge.byte_tokenizer], ids=["BPE", "bytes"])
@pytest.mark.parametrize("name", ["m.gguf", "directory"])
def test_the_tokenizer_survives_a_round_trip(tmp_path: Path, make: Any, name: str) -> None:
    back = bridge.load(saved(tmp_path / name, with_tokenizer(make())))
    assert back.own_tokenizer is not None
    assert back.diagnostics == ()
    assert_same_tokenizer(back.tokenizer(), make())


def test_arrays_of_a_file_with_a_tokenizer_keep_it(tmp_path: Path) -> None:
    opened = bridge.load(saved(tmp_path / "m.gguf", with_tokenizer(small_bpe())))
    made = Checkpoint.of(dict(opened.tensors.items()), opened.config, like=opened)
    assert_same_tokenizer(made.tokenizer(), small_bpe())
    bridge.save(made, tmp_path / "hf", format="huggingface")
    assert_same_tokenizer(bridge.load(tmp_path / "hf").tokenizer(), small_bpe())


def test_the_tokenizer_is_written_to_other_formats(tmp_path: Path) -> None:
    path = saved(tmp_path / "m.gguf", with_tokenizer(small_bpe()))
    bridge.save(bridge.load(path), tmp_path / "hf", format="huggingface")
    assert_same_tokenizer(bridge.load(tmp_path / "hf").tokenizer(), small_bpe())
    bridge.save(bridge.load(tmp_path / "hf"), tmp_path / "again.gguf", format="gguf")
    assert (tmp_path / "again.gguf").read_bytes() == path.read_bytes()


def test_the_package_finds_the_tokenizer(tmp_path: Path) -> None:
    """The keys and token types are those that llama.cpp reads. There is one entry per row."""
    found = fields_of(saved(tmp_path / "m.gguf", with_tokenizer(small_bpe())))
    tokens, types = found["tokenizer.ggml.tokens"], found["tokenizer.ggml.token_type"]
    assert (found["tokenizer.ggml.model"], found["tokenizer.ggml.pre"]) == ("gpt2", "gpt-2")
    assert len(tokens) == len(types) == len(set(tokens)) == 280
    assert (tokens[256], tokens[258], tokens[270], tokens[279]) == ("Ġt", "Ġthe", END, "[PAD279]")
    assert [types.count(kind) for kind in gguf.TokenType] == [262, 0, 2, 0, 16, 0]
    assert types[270] == gguf.TokenType.CONTROL
    assert found["tokenizer.ggml.merges"][:3] == ["Ġ t", "h e", "Ġt he"]
    assert found["tokenizer.ggml.bos_token_id"] == found["tokenizer.ggml.eos_token_id"] == 270


def test_a_character_tokenizer_is_left_out_and_reported(tmp_path: Path) -> None:
    characters = bridge.character_tokenizer("hello")
    checkpoint = with_tokenizer(characters, 4)
    (sentence,) = bridge.save(checkpoint, tmp_path / "m.gguf", format="gguf")
    assert sentence == "its tokenizer 'characters': it is not byte-level BPE with GPT-2's pre-tokenizer"
    assert bridge.load(tmp_path / "m.gguf").own_tokenizer is None
    bridge.save(checkpoint, tmp_path / "directory", format="gguf")
    assert bridge.load(tmp_path / "directory").tokenizer().encode("hello") == characters.encode("hello")


def test_a_file_without_a_tokenizer_has_none(tmp_path: Path) -> None:
    back = bridge.load(saved(tmp_path / "m.gguf", random_checkpoint(TINY)))
    assert back.own_tokenizer is None
    with pytest.raises(bridge.NoTokenizerError):
        back.tokenizer()


def test_openais_vocabulary_is_not_needed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def offline(name: str) -> None:
        raise ConnectionError

    monkeypatch.setattr(tiktoken, "get_encoding", offline)
    config = replace(SMALLEST, vocab_size=50_257)
    bridge.save(random_checkpoint(config), tmp_path / "hf", format="huggingface")
    path = saved(tmp_path / "m.gguf", bridge.load(tmp_path / "hf"))
    assert fields_of(path)["tokenizer.ggml.model"] == "none"


@pytest.mark.thorough
@needs_openai_cache
def test_openais_vocabulary_survives_a_round_trip(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(OPENAI_CACHE))
    config = replace(SMALLEST, vocab_size=50_257)
    bridge.save(random_checkpoint(config), tmp_path / "hf", format="huggingface")
    path = saved(tmp_path / "m.gguf", bridge.load(tmp_path / "hf"))
    assert_same_tokenizer(bridge.load(path).tokenizer(), openai_tokenizer())


def test_a_tokenizer_larger_than_the_vocabulary_is_not_written(tmp_path: Path) -> None:
    with pytest.raises(TokenizerError, match="'small' has ids up to 270, but the model's vocabulary has only 270"):
        saved(tmp_path / "m.gguf", with_tokenizer(small_bpe(), 270))
    clash = of_tiktoken("clash", pat_str=WORDS, mergeable_ranks=small_bpe().ranks, special_tokens={"he": 270})
    with pytest.raises(TokenizerError, match="two tokens with the same spelling"):
        saved(tmp_path / "m.gguf", with_tokenizer(clash))
    assert list(tmp_path.iterdir()) == []


def test_tokens_of_several_bytes_need_merges(tmp_path: Path) -> None:
    """In old files without `pre` and `token_type`, tokens that are neither bytes nor merges are special."""
    ranks, special = small_bpe().ranks, {t.content: t.id for t in small_bpe().added.values()}
    path = saved(tmp_path / "m.gguf", with_tokenizer(small_bpe()))
    fields = fields_of(path)
    tokens = [token for token in fields["tokenizer.ggml.tokens"] if not token.startswith("[PAD")]
    assert len(tokens) == len(ranks) + len(special)
    config = replace(SMALLEST, vocab_size=len(tokens) + 1)
    pairs = [
        *gpt2_pairs(config),
        (b"tokenizer.ggml.model", text("gpt2")),
        (b"tokenizer.ggml.tokens", texts(tokens)),
        (b"tokenizer.ggml.merges", texts(fields["tokenizer.ggml.merges"])),
    ]
    (tmp_path / "old.gguf").write_bytes(gpt2(pairs, gguf_tensors(config)))
    back = bridge.load(tmp_path / "old.gguf")
    assert back.tokenizer().added.keys() == {END, "<|é|>"}
    assert back.tokenizer().encode(" the") == [tokens.index("Ġthe")]
    assert back.diagnostics == (
        f"tokenizer.ggml.tokens has {len(tokens)} entries and token_embd.weight has {len(tokens) + 1} rows; llama.cpp "
        "rejects a file in which the two numbers differ",
    )


def byte_tokens() -> list[str]:
    """Return the characters that represent the 256 bytes."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    moved = iter(range(256, 512))
    return [chr(b) if b in plain else chr(next(moved)) for b in range(256)]


def tokenizer_pairs(**replaced: bytes | None) -> Pairs:
    """Return the metadata of a tokenizer of the 256 bytes. Keyword: last part of a key -> value, or None to omit it."""
    parts = {"model": text("gpt2"), "tokens": texts(byte_tokens()), "merges": texts([]), **replaced}
    return [(f"tokenizer.ggml.{key}".encode(), value) for key, value in parts.items() if value is not None]


BYTES = replace(SMALLEST, vocab_size=256)

# The metadata of a tokenizer, and a part of the error message.
BAD_TOKENIZERS: dict[str, tuple[Pairs, str]] = {
    "another kind": (tokenizer_pairs(model=text("llama")), "is 'llama' with the pre-tokenizer 'default'; only GPT-2's"),
    "a kind that is not a text": (tokenizer_pairs(model=number(3)), "the tokenizer is '3'"),
    "another word pattern": (tokenizer_pairs(pre=text("llama-bpe")), "with the pre-tokenizer 'llama-bpe'"),
    "a word pattern that is an array": (tokenizer_pairs(pre=texts(["gpt-2"])), "with the pre-tokenizer an array of 1"),
    "no tokens": (tokenizer_pairs(tokens=None), "tokenizer.ggml.tokens is missing"),
    "tokens of numbers": (tokenizer_pairs(tokens=int32s([1])), "tokenizer.ggml.tokens is not an array of strings"),
    "tokens not UTF-8": (tokenizer_pairs(tokens=texts([b"\xff"])), "tokens contains 'b'\\xff'', which is not UTF-8"),
    "more tokens than rows": (tokenizer_pairs(tokens=texts(["a"] * 257)), "has 257 entries, but the model's"),
    "a token twice": (tokenizer_pairs(tokens=texts(["a", "b", "a"])), "tokenizer.ggml.tokens has a token twice"),
    "bytes missing": (tokenizer_pairs(tokens=texts(["a"])), "some of the 256 bytes have no token"),
    "no merges": (tokenizer_pairs(merges=None), "tokenizer.ggml.merges is missing"),
    "merges of one": (tokenizer_pairs(merges=texts(["ab"])), "the merge '('ab',)' is not a pair of tokens"),
    "merges of three": (tokenizer_pairs(merges=texts(["a b c"])), "is not a pair of tokens"),
    "merges of unknown tokens": (tokenizer_pairs(merges=texts(["a b"])), "the merge 'a b' needs 'ab', which has no"),
    "merges not UTF-8": (tokenizer_pairs(merges=texts([b"\xff \xfe"])), "tokenizer.ggml.merges contains"),
    "types too few": (tokenizer_pairs(token_type=int32s([1] * 255)), "token_type is not an array of 256 integers"),
    "types of strings": (tokenizer_pairs(token_type=texts(["1"] * 256)), "token_type is not an array of 256 integ"),
    "types of floats": (tokenizer_pairs(token_type=array(bytes(1024), 6, 256)), "token_type is not an array of 256"),
    "types a number": (tokenizer_pairs(token_type=number(1)), "token_type is not an array of 256 integers"),
    "more merges than rows": (tokenizer_pairs(merges=texts(["a b"] * 257)), "merges has 257 entries, but the model's"),
    "merges of spaces": (tokenizer_pairs(merges=texts(["  "])), "is not a pair of tokens"),
    "bytes that are never used": (tokenizer_pairs(token_type=int32s([5] * 256)), "some of the 256 bytes have no token"),
}  # fmt: skip


@pytest.mark.parametrize(("pairs", "message"), BAD_TOKENIZERS.values(), ids=BAD_TOKENIZERS)
def test_an_unusable_tokenizer_raises_on_access(tmp_path: Path, pairs: Pairs, message: str) -> None:
    (tmp_path / "m.gguf").write_bytes(gpt2([*gpt2_pairs(BYTES), *pairs], gguf_tensors(BYTES)))
    loaded = bridge.load(tmp_path / "m.gguf")
    assert_same(loaded, random_checkpoint(BYTES))
    with pytest.raises(TokenizerError) as caught:
        loaded.tokenizer()
    assert message in str(caught.value)
    assert "m.gguf" in str(caught.value)


@pytest.mark.parametrize("type", [1, 3, 4], ids=["normal", "control", "user defined"])
@pytest.mark.parametrize(
    ("added", "message"),
    [
        ([""], "a special token is empty"),
        (["x" * 10**6], "has 1000000 bytes; the limit is 512"),
        ([f"{i:04}" * 125 for i in range(1100)], "have 550000 bytes; the limit is 524288"),
    ],
    ids=["empty", "long", "many"],
)
def test_special_tokens_are_limited(tmp_path: Path, added: list[str], message: str, type: int) -> None:
    """A normal token that no merge produces is special too."""
    config = replace(SMALLEST, vocab_size=256 + len(added))
    types = int32s([1] * 256 + [type] * len(added))
    pairs = [*gpt2_pairs(config), *tokenizer_pairs(tokens=texts(byte_tokens() + added), token_type=types)]
    (tmp_path / "m.gguf").write_bytes(gpt2(pairs, gguf_tensors(config)))
    with pytest.raises(TokenizerError, match=message):
        bridge.load(tmp_path / "m.gguf").tokenizer()


def test_the_unedited_tokenizer_of_these_tests_is_valid(tmp_path: Path) -> None:
    (tmp_path / "m.gguf").write_bytes(gpt2([*gpt2_pairs(BYTES), *tokenizer_pairs()], gguf_tensors(BYTES)))
    assert bridge.load(tmp_path / "m.gguf").tokenizer().encode("hé") == [104, 0xC3, 0xA9]


# Laziness


def test_opening_reads_no_tensor(tmp_path: Path) -> None:
    """The file is sparse and has the size of GPT-2 XL in float32, 6 GB."""
    config = bridge.GPT2_SIZES["gpt2-xl"]
    shapes = {name: values.shape for name, values in gguf_tensors().items()}
    outside = {"token_embd.weight": (50_257, 1600), "position_embd.weight": (1024, 1600)}
    inside = {
        **dict.fromkeys(("attn_norm.weight", "attn_norm.bias", "ffn_norm.weight", "ffn_norm.bias"), (1600,)),
        "attn_qkv.weight": (4800, 1600),
        "attn_qkv.bias": (4800,),
        "ffn_up.weight": (6400, 1600),
        "ffn_up.bias": (6400,),
        "ffn_down.weight": (1600, 6400),
        "ffn_down.bias": (1600,),
        "attn_output.weight": (1600, 1600),
        "attn_output.bias": (1600,),
    }
    layers = {f"blk.{i}.{name}": shape for i in range(48) for name, shape in inside.items()}
    shapes = {**outside, **layers, "output_norm.weight": (1600,), "output_norm.bias": (1600,)}
    descriptions, position = [], 0
    for name, shape in shapes.items():
        descriptions.append(described(name, shape[::-1], position))
        position += 4 * int(np.prod(shape))  # all are multiples of the alignment
    path = tmp_path / "xl.gguf"
    path.write_bytes(file_of(gpt2_pairs(config), descriptions))
    os.truncate(path, path.stat().st_size + position)
    tracemalloc.start()
    try:
        loaded = bridge.load(path)
        assert tracemalloc.get_traced_memory()[1] < MOST_BYTES / 10
    finally:
        tracemalloc.stop()
    assert loaded.config == config
    assert loaded.tensors.entries["h.47.mlp.c_proj.weight"].shape == (6400, 1600)
    assert not loaded.tensors["h.47.ln_1.bias"].any()


def test_every_access_reads_again_in_the_canonical_layout(tmp_path: Path) -> None:
    loaded = bridge.load(saved(tmp_path / "m.gguf", random_checkpoint(SMALLEST)))
    weight = loaded.tensors["h.0.attn.c_attn.weight"]
    assert weight.shape == (8, 24)
    assert weight.T.flags.c_contiguous, "transposed as a view, not copied"
    weight[:] = 0
    assert loaded.tensors["h.0.attn.c_attn.weight"].any()


def test_a_moved_directory_can_be_read(tmp_path: Path) -> None:
    path = saved(tmp_path / "d", with_tokenizer(small_bpe()))
    shutil.move(path, tmp_path / "elsewhere")
    assert bridge.load(tmp_path / "elsewhere").path == tmp_path / "elsewhere"
