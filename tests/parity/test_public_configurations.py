"""Configurations of public GPT-2 models load, compute what transformers computes, and survive every conversion."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from support.implementations import jax_logits, torch_logits
from support.models import random_ids, random_state
from support.public_configurations import PUBLIC, Fields, shrunk

import bridge
from bridge import Checkpoint, ConfigError, GPT2Config
from bridge.config_fields import ALIASES
from bridge.containers.safetensors import write_file
from bridge.formats import WRITABLE
from bridge.storage.tensors import LazyTensorMap

FP32_ABSOLUTE = 1e-5  # as in test_agreement.py

REWRITTEN = {"architectures", "model_type", "n_ctx", *(alias for names in ALIASES.values() for alias in names)}
"""Fields that an export has whatever the source had, and aliases, which it does not need."""

each_configuration = pytest.mark.parametrize("fields", [fields for _, fields in PUBLIC.values()], ids=list(PUBLIC))


def directory(path: Path, fields: Fields) -> Path:
    """Write a small random model with this `config.json`, as transformers would have saved it."""
    path.mkdir()
    small = shrunk(fields)
    (path / "config.json").write_text(json.dumps(small, indent=2))
    state = random_state(GPT2Config.from_hf(small))
    halved = {f"transformer.{name}": w if w.mean() > 0.5 else w / 2 for name, w in state.items()}
    write_file(path / "model.safetensors", LazyTensorMap.of(halved), {"format": "pt"})
    return path


def in_transformers(path: Path, ids: np.ndarray) -> np.ndarray:
    """The logits of the model as transformers opens the directory, with every tensor from the file."""
    model, report = transformers.GPT2LMHeadModel.from_pretrained(
        path, attn_implementation="eager", output_loading_info=True
    )
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    with torch.no_grad():
        return model.eval()(torch.from_numpy(ids)).logits.numpy()


def kept(fields: Fields) -> dict[str, Any]:
    return {name: value for name, value in fields.items() if name not in REWRITTEN}


@each_configuration
def test_the_logits_are_those_of_transformers(tmp_path: Path, fields: Fields) -> None:
    path = directory(tmp_path / "model", fields)
    checkpoint = bridge.load(path)
    ids = random_ids(checkpoint.config, length=min(9, checkpoint.config.n_positions))
    theirs = in_transformers(path, ids)
    assert np.abs(torch_logits(checkpoint, ids) - theirs).max() <= FP32_ABSOLUTE
    assert np.abs(jax_logits(checkpoint, ids) - theirs).max() <= FP32_ABSOLUTE
    bridge.save(checkpoint, tmp_path / "export", format="huggingface")
    np.testing.assert_array_equal(in_transformers(tmp_path / "export", ids), theirs)


@each_configuration
def test_every_format_carries_the_model_or_names_the_field(tmp_path: Path, fields: Fields) -> None:
    original = bridge.load(directory(tmp_path / "model", fields))
    holding = []
    for format in WRITABLE:
        try:
            bridge.save(original, tmp_path / format, format=format)
        except ConfigError as error:
            assert any(f"{name}=" in str(error) for name in vars(original.config)), error
            continue
        holding.append(format)
        found = bridge.load(tmp_path / format)
        assert_same(found, original)
        bridge.save(found, tmp_path / f"{format}-back", format="huggingface")
        back = bridge.load(tmp_path / f"{format}-back")
        assert_same(back, original)
        exported = json.loads((tmp_path / f"{format}-back" / "config.json").read_bytes())
        assert exported["n_ctx"] == exported["n_positions"] == original.config.n_positions
        written = kept(json.loads((tmp_path / "model" / "config.json").read_bytes()))
        assert written.items() <= exported.items()
    assert {"huggingface", "flax"} <= set(holding)


def assert_same(found: Checkpoint, original: Checkpoint) -> None:
    assert found.config == original.config
    assert kept(found.extra) == kept(original.extra)
    assert bridge.fingerprint(found.tensors) == bridge.fingerprint(original.tensors)


def test_there_are_forty_configurations_of_different_models() -> None:
    assert len(PUBLIC) >= 40
    assert len({json.dumps(fields, sort_keys=True) for _, fields in PUBLIC.values()}) == len(PUBLIC)
