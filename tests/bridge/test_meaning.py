"""Well-formed files with invalid content are rejected with an error that names the field or tensor."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from support.commands import run
from support.models import SMALLEST, config_for, random_checkpoint, random_state
from support.refusals import assert_refused

import bridge
from bridge import BridgeError, ConfigError, ConversionError
from bridge.containers.safetensors import write_file
from bridge.optimizer_state import AdamWState
from bridge.storage.tensors import LazyTensorMap

State = dict[str, np.ndarray]
Fields = dict[str, Any]


def written(path: Path, change: Callable[[State, Fields], object]) -> Path:
    """Write a Hugging Face directory of a small model after `change` has edited its tensors and fields."""
    state = {f"transformer.{name}": array for name, array in random_state(SMALLEST).items()}
    fields = SMALLEST.to_hf()
    change(state, fields)
    path.mkdir()
    write_file(path / "model.safetensors", LazyTensorMap.of(state), {"format": "pt"})
    (path / "config.json").write_text(json.dumps(fields))
    return path


def renamed(old: str, new: str) -> Callable[[State, Fields], object]:
    return lambda state, _: state.update({new: state.pop(old)})


def cast(name: str, dtype: object) -> Callable[[State, Fields], object]:
    return lambda state, _: state.update({name: state[name].astype(dtype)})


def field(name: str, value: object) -> Callable[[State, Fields], object]:
    return lambda _, fields: fields.update({name: value})


def without_layer(layer: int) -> Callable[[State, Fields], object]:
    def change(state: State, _: Fields) -> None:
        for name in [name for name in state if f".h.{layer}." in name]:
            del state[name]

    return change


def another_head(state: State, _: Fields) -> None:
    state["lm_head.weight"] = state["transformer.wte.weight"] + 1


C_FC = "transformer.h.0.mlp.c_fc.weight"
MEANINGLESS: dict[str, tuple[Callable[[State, Fields], object], str, type[BridgeError]]] = {
    "a layer is missing": (without_layer(1), "h.1.ln_1.weight is missing", ConversionError),
    "a layer is skipped": (without_layer(0), "h.0.ln_1.weight is missing", ConversionError),
    "a layer too many": (field("n_layer", 1), "'h.1.ln_1.weight' is not a parameter", ConversionError),
    "a tensor is missing": (lambda s, _: s.pop("transformer.ln_f.bias"), "ln_f.bias is missing", ConversionError),
    "an unknown name": (renamed(C_FC, "transformer.h.0.mlp.gate.weight"), "'h.0.mlp.gate.weight'", ConversionError),
    "a name with ..": (renamed(C_FC, "transformer.../../x"), "is not a parameter", ConversionError),
    "a name of escape codes": (renamed(C_FC, "\x1b[31m\0\n"), "\\x1b[31m\\x00\\n", ConversionError),
    "one tensor under two prefixes": (
        lambda s, _: s.update({"module.wpe.weight": s["transformer.wpe.weight"]}),
        "'wpe.weight' is the canonical name of 2 tensors",
        ConversionError,
    ),
    "gamma beside weight": (
        lambda s, _: s.update({"transformer.ln_f.gamma": s["transformer.ln_f.weight"]}),
        "'ln_f.weight' is the canonical name of 2 tensors",
        ConversionError,
    ),
    "another head although tied": (another_head, "lm_head.weight differs from wte.weight", ConversionError),
    "no head although untied": (field("tie_word_embeddings", False), "lm_head.weight is missing", ConversionError),
    "a padded vocabulary": (field("vocab_size", 10), "is the vocabulary padded? Set vocab_size to 11", ConversionError),
    "a vocabulary too small": (field("vocab_size", 12), "wte.weight has shape (11, 8)", ConversionError),
    "a transposed projection": (
        lambda s, _: s.update({C_FC: np.ascontiguousarray(s[C_FC].T)}),
        "h.0.mlp.c_fc.weight has shape (12, 8); the configuration requires (8, 12): it is transposed",
        ConversionError,
    ),
    "config and weights disagree": (field("n_inner", 16), "h.0.mlp.c_fc.weight has shape (8, 12)", ConversionError),
    "integers": (cast(C_FC, np.int32), "holds int32; weights must be one of", ConversionError),
    "booleans": (cast("transformer.ln_f.bias", bool), "holds bool; weights must be one of", ConversionError),
    "heads that do not divide the width": (field("n_head", 3), "n_embd='8' is not divisible", ConfigError),
    "no layer": (field("n_layer", 0), "n_layer='0'", ConfigError),
    "-1 layers": (field("n_layer", -1), "n_layer='-1'", ConfigError),
    "10^9 layers": (field("n_layer", 10**9), "n_layer='1000000000'", ConfigError),
    "layers a text": (field("n_layer", "12"), "n_layer='12': must be int", ConfigError),
    "layers true": (field("n_layer", True), "n_layer='True': must be int", ConfigError),
    "an unknown activation": (field("activation_function", "prelu"), "activation_function='prelu'", ConfigError),
    "an activation with escape codes": (field("activation_function", "\x1b[2J"), "\\x1b[2J", ConfigError),
    "code": (field("auto_map", {"AutoModel": "evil.Model"}), "auto_map=", ConfigError),
    "another model": (field("model_type", "llama"), "model_type='llama'", ConfigError),
    "an unknown attention setting": (field("attn_sink", 1), "attn_sink='1'", ConfigError),
}


@pytest.mark.parametrize(("change", "message", "error"), MEANINGLESS.values(), ids=MEANINGLESS)
def test_invalid_content_is_refused_by_name(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    change: Callable[[State, Fields], object],
    message: str,
    error: type[BridgeError],
) -> None:
    assert_refused(written(tmp_path / "model", change), message, capsys, error)


# The tests of each format are in tests/bridge/formats.


@pytest.mark.parametrize(
    "dtype", [np.float64, np.float32, np.float16, ml_dtypes.bfloat16], ids=lambda d: np.dtype(d).name
)
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_non_finite_values_are_reported_and_written_only_on_request(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], dtype: type, value: float
) -> None:
    state = random_state(SMALLEST, dtype)
    state["h.1.mlp.c_fc.bias"][3] = value
    checkpoint = bridge.Checkpoint.of(state, SMALLEST)
    assert "h.1.mlp.c_fc.bias has 1 values that are not finite" in bridge.find_diagnostics(checkpoint)
    bridge.save(checkpoint, tmp_path / "kept", format="huggingface", allow_non_finite=True)
    assert bridge.fingerprint(bridge.load(tmp_path / "kept").tensors) == bridge.fingerprint(checkpoint.tensors)

    assert run("convert", tmp_path / "kept", tmp_path / "out", "--to", "flax") == 2
    assert "h.1.mlp.c_fc.bias has 1 values that are not finite" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    assert run("convert", tmp_path / "kept", tmp_path / "out", "--to", "flax", "--allow-non-finite") == 0


@pytest.mark.parametrize("moment", ["exp_avg", "exp_avg_sq"])
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_non_finite_moments_are_written_only_on_request(tmp_path: Path, moment: str, value: float) -> None:
    config = config_for("nanogpt", SMALLEST)
    adamw_state = {name: random_state(config) for name in ("exp_avg", "exp_avg_sq")}
    adamw_state[moment]["h.1.mlp.c_fc.bias"][3] = value
    checkpoint = replace(random_checkpoint(config), optimizer=AdamWState(5, **adamw_state))
    with pytest.raises(bridge.ConversionError, match=rf"{moment} of h\.1\.mlp\.c_fc\.bias has 1 values"):
        bridge.save(checkpoint, tmp_path / "out.pt", format="nanogpt")
    assert not [*tmp_path.iterdir()]
    bridge.save(checkpoint, tmp_path / "out.pt", format="nanogpt", allow_non_finite=True)
    bridge.save(checkpoint, tmp_path / "hf", format="huggingface")  # stores no AdamW state


def test_a_layer_norm_of_zeros_is_reported() -> None:
    state = random_state(SMALLEST)
    state["h.1.ln_2.weight"][:] = 0
    assert bridge.find_diagnostics(bridge.Checkpoint.of(state, SMALLEST)) == ["h.1.ln_2.weight is all zeros"]


def test_wide_and_mixed_dtypes_are_reported_and_kept(tmp_path: Path) -> None:
    state = random_state(SMALLEST, np.float64)
    state["ln_f.weight"] = state["ln_f.weight"].astype(np.float32)
    checkpoint = bridge.Checkpoint.of(state, SMALLEST)
    mixed, wide = bridge.find_diagnostics(checkpoint)
    assert "mixed dtypes: float64 in 27 (wte.weight), float32 in 1 (ln_f.weight); conversion keeps them" in mixed
    assert "float64 weights, which JAX casts" in wide
    bridge.save(checkpoint, tmp_path / "kept", format="flax")
    assert bridge.fingerprint(bridge.load(tmp_path / "kept").tensors) == bridge.fingerprint(checkpoint.tensors)


def test_a_padded_vocabulary_is_reported_and_reduced_on_request(tmp_path: Path) -> None:
    padded = replace(SMALLEST, vocab_size=50304, n_layer=1, tie_word_embeddings=False)
    checkpoint = random_checkpoint(padded)
    assert any("is OpenAI's 50257 with padding" in diagnostic for diagnostic in bridge.find_diagnostics(checkpoint))
    bridge.save(checkpoint, tmp_path / "padded", format="huggingface")
    assert run("convert", tmp_path / "padded", tmp_path / "cut", "--to", "flax", "--vocab-size", 50257) == 0
    cut = bridge.load(tmp_path / "cut")
    assert cut.config == replace(padded, vocab_size=50257)
    assert cut.tensors["lm_head.weight"].tobytes() == checkpoint.tensors["lm_head.weight"][:50257].tobytes()
    for rows in (0, 50305):
        with pytest.raises(ConversionError, match=f"cannot be reduced to {rows}"):
            checkpoint.with_vocab_size(rows)


def test_another_activation_is_used_on_request(tmp_path: Path) -> None:
    bridge.save(random_checkpoint(SMALLEST), tmp_path / "a", format="huggingface")
    assert run("convert", tmp_path / "a", tmp_path / "b", "--to", "huggingface", "--activation", "gelu") == 0
    assert bridge.load(tmp_path / "b").config == replace(SMALLEST, activation_function="gelu")
    assert run("convert", tmp_path / "a", tmp_path / "c", "--to", "huggingface", "--activation", "prelu") == 2


def test_a_configuration_with_nan_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Python reads and writes NaN in JSON, but other programs do not, and every export would contain it."""
    path = written(tmp_path / "model", field("task_specific_params", {"a": float("nan")}))
    assert run("inspect", path) == 2
    assert "NaN is not a number in JSON" in capsys.readouterr().err
