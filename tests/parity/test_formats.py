"""Both backends compute the same logits from every format as from the original."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from support.models import SMALLEST, config_for, random_checkpoint, random_ids, random_state

import bridge
import gpt2_jax
import gpt2_torch
from bridge import BridgeError, Checkpoint, LoRA
from bridge.containers.safetensors import write_file
from bridge.formats import WRITABLE
from bridge.storage.tensors import LazyTensorMap
from gpt2_torch import GPT2
from gpt2_torch.loading import model_from_checkpoint

CONFIG = replace(SMALLEST, n_head=4, n_inner=None, n_positions=9)
ROUNDING = 1e-5
"""For float32 logits around 3. A stacked model sums in a different order, and so do two threads of XLA."""
IDS = random_ids(CONFIG, batch=2, length=9)


def logits_of_torch(model: GPT2) -> np.ndarray:
    with torch.no_grad():
        return model(torch.from_numpy(IDS)).numpy()


def logits_of_jax(model: gpt2_jax.GPT2, params: object) -> np.ndarray:
    return np.asarray(model.apply({"params": params}, jnp.asarray(IDS)))


@cache
def expected(activation: str) -> tuple[Checkpoint, np.ndarray, np.ndarray]:
    checkpoint = random_checkpoint(replace(CONFIG, activation_function=activation))
    in_jax = gpt2_jax.model_from_checkpoint(checkpoint)
    return checkpoint, logits_of_torch(model_from_checkpoint(checkpoint)), logits_of_jax(*in_jax)


@pytest.mark.sampled(3)
@pytest.mark.parametrize("scan", [False, True], ids=["layers", "stacked"])
@pytest.mark.parametrize("format", WRITABLE)
def test_both_backends_compute_the_same_from_every_format(tmp_path: Path, format: str, scan: bool) -> None:
    checkpoint, in_torch, in_jax = expected(config_for(format, CONFIG).activation_function)
    bridge.save(checkpoint, tmp_path / "model", format=format)
    assert np.array_equal(logits_of_torch(GPT2.from_pretrained(tmp_path / "model")), in_torch)
    found = logits_of_jax(*gpt2_jax.from_pretrained(tmp_path / "model", scan=scan))
    np.testing.assert_allclose(found, in_jax, atol=ROUNDING)


def same_weights_from_all(source: Path, **options: Any) -> np.ndarray:
    """Return the weights of `h.0.attn.c_attn`, which `bridge.load` and each `from_pretrained` read alike."""
    loaded = bridge.load(source, **options)
    models = GPT2.from_pretrained(source, **options), gpt2_torch.from_pretrained(source, **options)
    params = gpt2_jax.from_pretrained(source, **options)[1]
    in_jax = bridge.to_torch(params, loaded.config)
    for name, expected in loaded.tensors.items():
        for model in models:
            np.testing.assert_array_equal(model.state_dict()[name].numpy(), expected)
        np.testing.assert_array_equal(in_jax[name], expected)
    return loaded.tensors["h.0.attn.c_attn.weight"]


def test_both_backends_merge_an_adapter_into_its_base(tmp_path: Path) -> None:
    bridge.save(random_checkpoint(CONFIG), tmp_path / "base", format="huggingface")
    a, b = np.ones((1, CONFIG.n_embd), np.float32), np.ones((3 * CONFIG.n_embd, 1), np.float32)
    bridge.save_lora(LoRA.of({"h.0.attn.c_attn": (a, b)}, alpha=1), tmp_path / "adapter")
    merged = same_weights_from_all(tmp_path / "adapter", base=tmp_path / "base")
    np.testing.assert_allclose(merged, random_checkpoint(CONFIG).tensors["h.0.attn.c_attn.weight"] + 1, rtol=1e-6)
    for from_pretrained in (gpt2_torch.from_pretrained, gpt2_jax.from_pretrained):
        with pytest.raises(BridgeError, match="is an adapter for another model"):
            from_pretrained(tmp_path / "adapter")


def test_both_backends_leave_out_the_heads_of_other_tasks_on_request(tmp_path: Path) -> None:
    state = {**random_state(CONFIG), "score.weight": np.ones((2, CONFIG.n_embd), np.float32)}
    (tmp_path / "config.json").write_text(json.dumps(CONFIG.to_hf()))
    write_file(tmp_path / "model.safetensors", LazyTensorMap.of(state), {"format": "pt"})
    same_weights_from_all(tmp_path, drop_extra_heads=True)
    for from_pretrained in (gpt2_torch.from_pretrained, gpt2_jax.from_pretrained):
        with pytest.raises(BridgeError, match=r"'score\.weight' is not a parameter of this model"):
            from_pretrained(tmp_path)
