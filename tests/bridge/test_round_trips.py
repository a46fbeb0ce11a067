"""Conversion from every format to every other: the weights and the configuration do not change.

If a format cannot store a model, the error names the field.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from support.models import TINY, random_checkpoint

import bridge
from bridge import ConfigError, ConversionError, GPT2Config
from bridge.formats import WRITABLE

# Four heads detect an order of q, k and v by head, and sizes that differ widely detect a transpose.
PLAIN = replace(TINY, n_head=4, n_inner=None, n_layer=2)
MODELS: dict[str, GPT2Config] = {
    "plain": PLAIN,
    "untied": replace(PLAIN, tie_word_embeddings=False),
    "nanogpt": replace(PLAIN, activation_function="gelu", embd_pdrop=0.1, attn_pdrop=0.1, resid_pdrop=0.1),
    "without biases": replace(PLAIN, activation_function="gelu", bias=False),
    "narrow": replace(PLAIN, n_inner=100),
    "epsilon": replace(PLAIN, layer_norm_epsilon=1e-6),
    "relu": replace(PLAIN, activation_function="relu"),
    "scaled": replace(PLAIN, scale_attn_by_inverse_layer_idx=True),
    "upcast": replace(PLAIN, reorder_and_upcast_attn=True),
    "unscaled": replace(PLAIN, scale_attn_weights=False),
}
# Format -> model -> the field for which the format refuses it. A format can hold the models that are not listed.
REFUSED_FOR: dict[str, dict[str, str]] = {
    "flax": {},
    "huggingface": {"without biases": "bias"},
    "flax_msgpack": {
        "without biases": "bias",
        "scaled": "scale_attn_by_inverse_layer_idx",
        "upcast": "reorder_and_upcast_attn",
        "unscaled": "scale_attn_weights",
    },
    "nanogpt": {
        "plain": "activation_function",
        "untied": "tie_word_embeddings",
        "narrow": "n_inner",
        "epsilon": "layer_norm_epsilon",
        "relu": "activation_function",
        "scaled": "scale_attn_by_inverse_layer_idx",
        "upcast": "reorder_and_upcast_attn",
        "unscaled": "scale_attn_weights",
    },
    "llmc": {
        "untied": "tie_word_embeddings",
        "nanogpt": "activation_function",
        "without biases": "bias",
        "narrow": "n_inner",
        "epsilon": "layer_norm_epsilon",
        "relu": "activation_function",
        "scaled": "scale_attn_by_inverse_layer_idx",
        "upcast": "reorder_and_upcast_attn",
        "unscaled": "scale_attn_weights",
    },
    "gguf": {
        "nanogpt": "activation_function",
        "without biases": "bias",
        "relu": "activation_function",
        "scaled": "scale_attn_by_inverse_layer_idx",
        "upcast": "reorder_and_upcast_attn",
        "unscaled": "scale_attn_weights",
    },
}
DTYPES = {"float32": np.dtype("f4"), "bfloat16": np.dtype(ml_dtypes.bfloat16), "float16": np.dtype("f2")}
NOT_HELD = {("llmc", "float16")}

PAIRS = [
    (first, second, model, dtype)
    for first in WRITABLE
    for second in WRITABLE
    for model in MODELS
    for dtype in DTYPES
    if all(model not in REFUSED_FOR[f] and (f, dtype) not in NOT_HELD for f in (first, second))
]


@pytest.mark.sampled(5)
@pytest.mark.parametrize(("first", "second", "model", "dtype"), PAIRS)
def test_every_pair_of_formats_carries_the_model(
    tmp_path: Path, first: str, second: str, model: str, dtype: str
) -> None:
    original = random_checkpoint(MODELS[model], DTYPES[dtype])
    bridge.save(original, tmp_path / "first", format=first)
    bridge.save(bridge.load(tmp_path / "first"), tmp_path / "second", format=second)
    found = bridge.load(tmp_path / "second")
    assert found.format == second
    assert found.config == replace(MODELS[model], n_inner=found.config.n_inner)
    assert found.config.feed_forward_size == MODELS[model].feed_forward_size
    assert bridge.fingerprint(found.tensors) == bridge.fingerprint(original.tensors)


@pytest.mark.parametrize(
    ("format", "model", "field"),
    [(f, model, field) for f, refused in REFUSED_FOR.items() for model, field in refused.items()],
)
def test_a_format_names_the_field_that_it_cannot_store(tmp_path: Path, format: str, model: str, field: str) -> None:
    with pytest.raises(ConfigError, match=f"{field}="):
        bridge.save(random_checkpoint(MODELS[model]), tmp_path / "out", format=format)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("activation", ["gelu_python", "gelu_accurate", "mish", "relu2", "relu6", "sigmoid", "linear"])
def test_only_formats_that_name_the_activation_hold_the_rarer_ones(tmp_path: Path, activation: str) -> None:
    checkpoint = random_checkpoint(replace(PLAIN, activation_function=activation, n_layer=1))
    for format in WRITABLE:
        if format in ("huggingface", "flax"):
            bridge.save(checkpoint, tmp_path / format, format=format)
            assert bridge.load(tmp_path / format).config == checkpoint.config
        else:
            with pytest.raises(ConfigError, match=f"activation_function='{activation}'"):
                bridge.save(checkpoint, tmp_path / format, format=format)


@pytest.mark.parametrize(("format", "dtype"), NOT_HELD)
def test_a_format_names_the_dtype_that_it_cannot_store(tmp_path: Path, format: str, dtype: str) -> None:
    with pytest.raises(ConversionError, match=f"holds {dtype}"):
        bridge.save(random_checkpoint(PLAIN, DTYPES[dtype]), tmp_path / "out", format=format)
    assert list(tmp_path.iterdir()) == []


def test_the_fingerprint_depends_on_every_bit_name_dtype_and_shape() -> None:
    tensors = {"a": np.arange(6, dtype=np.float32).reshape(2, 3), "b": np.zeros(2, np.float32)}
    fingerprint = bridge.fingerprint(tensors)
    assert bridge.fingerprint(dict(reversed(tensors.items()))) == fingerprint, "order"
    assert bridge.fingerprint({**tensors, "a": np.asfortranarray(tensors["a"])}) == fingerprint, "strides"
    others = [
        {**tensors, "b": -tensors["b"]},
        {**tensors, "b": np.zeros(2, np.int32)},
        {**tensors, "a": tensors["a"].reshape(3, 2)},
        {**tensors, "a": tensors["a"].T.reshape(2, 3)},
        {"a": tensors["b"], "b": tensors["a"]},
        {"a": tensors["a"]},
    ]
    assert len({fingerprint, *map(bridge.fingerprint, others)}) == 1 + len(others)
