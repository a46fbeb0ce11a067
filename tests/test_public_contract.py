"""The names that do not change: verbs, flags, presets and the Python API that other people's scripts use.

Everything else may be renamed between versions. A test that fails here means that scripts break.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest
from support.commands import run
from support.models import TINY, huggingface_directory

import bridge
import gpt2_jax
from gpt2_jax.training import PRESETS

FLAGS: Mapping[str, Sequence[str]] = {
    "inspect": ["--json"],
    "convert": ["--to", "--json"],
    "verify": ["--json"],
    "diff": ["--no-function", "--text", "--json"],
    "generate": ["--json"],
    "train": ["--data", "--init-from", "--out", "--resume", "--preset", "--mesh", "--json"],
    "eval": ["--data", "--json", "--per-document", "--per-token"],
    "plan": ["--preset", "--mesh", "--json"],
    "push": ["--license", "--dry-run", "--no-dry-run", "--json"],
    "bench": ["--preset", "--json"],
    "demo": ["--out"],
}
"""Verb -> flags."""

PRESET_NAMES = [
    "nano",
    "finetune",
    "shakespeare-char",
    "shakespeare",
    "shakespeare-char-gpu",
    "gpt2",
    "gpt2-medium",
    "gpt2-large",
    "gpt2-xl",
]


@pytest.mark.parametrize("verb", FLAGS)
def test_verbs_and_flags(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(verb, "--help") == 0
    shown = capsys.readouterr().out
    offered = set(re.findall(r"(?<!\S)--[a-z][a-z-]*", shown))
    assert {*FLAGS[verb]} <= offered


def test_the_help_lists_the_verbs(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--help") == 0
    listed = re.findall(r"• (\S+)", capsys.readouterr().out)
    assert sorted(listed) == sorted(FLAGS)


def test_presets() -> None:
    assert sorted(PRESETS) == sorted(PRESET_NAMES)


def test_the_bridge_converts_there_and_back(tmp_path: Path) -> None:
    checkpoint = bridge.load(huggingface_directory(tmp_path / "source"))
    params = bridge.to_flax(checkpoint.tensors, checkpoint.config)
    state = bridge.to_torch(params, checkpoint.config)
    assert {*state} == {*checkpoint.tensors}
    for name, array in checkpoint.tensors.items():
        np.testing.assert_array_equal(state[name], array)
    bridge.save(checkpoint, tmp_path / "flax", format="flax")
    assert bridge.fingerprint(bridge.load(tmp_path / "flax").tensors) == bridge.fingerprint(checkpoint.tensors)


def test_both_from_pretrained_take_a_path(tmp_path: Path) -> None:
    import gpt2_torch

    source = huggingface_directory(tmp_path / "source", TINY)
    assert isinstance(gpt2_torch.GPT2.from_pretrained(source), gpt2_torch.GPT2)
    model, params = gpt2_jax.from_pretrained(source)
    assert isinstance(model, gpt2_jax.GPT2)
    assert "wte" in params


def test_generate_takes_model_params_ids_and_sampling_by_name() -> None:
    arguments = (
        inspect.signature(gpt2_jax.generate).bind("model", "params", "ids", max_new_tokens=1, temperature=0.5).arguments
    )
    assert [*arguments.values()][:3] == ["model", "params", "ids"]
    assert {"max_new_tokens", "temperature"} <= {field.name for field in fields(bridge.GenerationConfig)}
