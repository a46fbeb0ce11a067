"""Training an adapter here and with PEFT and torch, from the same initial values, on the same batches."""

from __future__ import annotations

import warnings
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.models import random_state
from support.peft_adapters import model_of_transformers

import bridge
from bridge import GPT2Config
from bridge.containers.safetensors import read_file
from gpt2_jax import GPT2, LoRAConfig, adapter_from_lora, lora_init
from gpt2_jax.training import OptimizerConfig, init_state, make_optimizer, make_train_step

STEPS = 200
AGREEMENT = 1e-4
"""Of losses and of factors, whose values are up to 1, in float32."""
CONFIG = GPT2Config(vocab_size=61, n_positions=16, n_embd=24, n_layer=2, n_head=3)
LORA = LoRAConfig(rank=4, alpha=8.0, targets="c_attn,c_proj")
OPTIMIZER = OptimizerConfig(
    learning_rate=2e-3, schedule="constant", warmup_steps=0, beta2=0.999, weight_decay=0.1, max_grad_norm=1.0
)
pytestmark = [
    pytest.mark.slow,
    pytest.mark.usefixtures("quick_compilation"),
    pytest.mark.skipif(find_spec("peft") is None, reason="needs peft, which is not installed"),
]


def batches() -> list[np.ndarray]:
    """Return rows [4, 16] in which every second token repeats the one before, so that there is something to learn."""
    ids = np.random.default_rng(0).integers(0, CONFIG.vocab_size, (10, 4, 8))
    return list(ids.repeat(2, axis=2).astype(np.int32))


def trained_here(lora: Any, model: GPT2) -> tuple[list[float], Any]:
    params = jax.tree.map(jnp.asarray, bridge.to_flax(random_state(CONFIG), CONFIG, stacked=True))
    tx = make_optimizer(OPTIMIZER, STEPS)
    step = make_train_step(model, tx, max_grad_norm=OPTIMIZER.max_grad_norm)
    state, losses = init_state(lora, tx, frozen=params), []
    rows = batches()
    for i in range(STEPS):
        ids = rows[i % len(rows)]
        state, metrics = step(state, {"input_ids": ids[:, :-1], "labels": ids[:, 1:]})
        losses.append(float(metrics["loss"]))
    return losses, state.params


def trained_with_peft(adapter: Path, target: Path) -> list[float]:
    import peft
    import torch

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about the name of the base
        model = peft.PeftModel.from_pretrained(model_of_transformers(CONFIG), adapter, is_trainable=True)
        o = OPTIMIZER
        parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        optimizer = torch.optim.AdamW(
            parameters, o.learning_rate, (o.beta1, o.beta2), o.epsilon, weight_decay=o.weight_decay
        )
        losses, rows = [], [torch.tensor(ids, dtype=torch.long) for ids in batches()]
        for i in range(STEPS):
            ids = rows[i % len(rows)]
            loss = torch.nn.functional.cross_entropy(model(ids[:, :-1]).logits.flatten(0, 1), ids[:, 1:].flatten())
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(parameters, o.max_grad_norm)
            optimizer.step()
            losses.append(loss.item())
        model.save_pretrained(target)
    return losses


def test_200_steps_agree_with_peft(tmp_path: Path) -> None:
    model = GPT2(CONFIG, scan=True, lora=LORA)
    lora = jax.jit(lora_init, static_argnums=1)(jax.random.key(0), model)
    bridge.save_lora(adapter_from_lora(lora, LORA), tmp_path / "initial")
    theirs = trained_with_peft(tmp_path / "initial", tmp_path / "theirs")
    ours, trained = trained_here(lora, model)
    assert ours[0] - ours[-1] > 0.5
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=AGREEMENT)
    bridge.save_lora(adapter_from_lora(trained, LORA), tmp_path / "ours")
    found, expected = (dict(read_file(tmp_path / side / "adapter_model.safetensors")[0]) for side in ("ours", "theirs"))
    assert found.keys() == expected.keys() and len(found) == 2 * 3 * CONFIG.n_layer
    for name, factor in expected.items():
        np.testing.assert_allclose(found[name], factor, rtol=0, atol=AGREEMENT, err_msg=name)
