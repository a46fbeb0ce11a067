"""Two hundred training steps by the fast path and by a plain one.

Fast: blockwise attention, the loss in chunks, and rematerialization. Plain: all attention scores, all logits, no
rematerialization, and a step written from its definition."""

from __future__ import annotations

from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from support.models import random_state

import bridge
import gpt2_jax.ops.blockwise_attention
import gpt2_jax.ops.cross_entropy
from bridge import IGNORE_INDEX, GPT2Config
from gpt2_jax.model import GPT2
from gpt2_jax.ops.cross_entropy import cross_entropy
from gpt2_jax.training import OptimizerConfig, init_state, make_optimizer, make_train_step

EQUAL = 1e-5
"""Nats, at every step: ten float32 roundings of a loss near 4, and a tenth of bfloat16's error."""
NOISE = 1.5
"""Relative to bfloat16's error in the plain path, 1e-4 nats on average. The fast path rounds as often, at other places,
so that the errors over two hundred steps differ by a tenth or two."""

CONFIG = GPT2Config(vocab_size=61, n_positions=40, n_embd=32, n_layer=2, n_head=4)
OPTIMIZER = OptimizerConfig(learning_rate=3e-3, warmup_steps=20)
STEPS, BATCH, LENGTH = 200, 8, 40

pytestmark = pytest.mark.usefixtures("quick_compilation")


def batch(step: int) -> dict[str, np.ndarray]:
    """Each token is determined by the previous one, except for one in ten. Part of one row has no labels."""
    rng = np.random.default_rng(step)
    tokens = rng.integers(0, CONFIG.vocab_size, (BATCH, LENGTH + 1)).astype(np.int32)
    for t in range(LENGTH):
        follows = rng.random(BATCH) < 0.9
        tokens[follows, t + 1] = (3 * tokens[follows, t] + 1) % CONFIG.vocab_size
    labels = tokens[:, 1:].copy()
    labels[0, LENGTH // 2 :] = IGNORE_INDEX
    return {"input_ids": tokens[:, :-1].copy(), "labels": labels}


@cache
def curve(path: str, dtype: str) -> np.ndarray:
    """The loss at every step."""
    tx = make_optimizer(OPTIMIZER, STEPS)
    params = jax.tree.map(lambda x: jnp.asarray(x / 4), bridge.to_flax(random_state(CONFIG), CONFIG, stacked=True))
    state, losses = init_state(params, tx), []
    step = {"fast": fast_step, "plain": plain_step}[path](tx, jnp.dtype(dtype))
    for i in range(STEPS):
        state, metrics = step(state, batch(i))
        losses.append(float(metrics["loss"]))
    return np.array(losses)


def fast_step(tx: optax.GradientTransformation, dtype: Any) -> Any:
    model = GPT2(CONFIG, dtype=dtype, scan=True, remat="dots", attention="blockwise")
    return make_train_step(model, tx)


def plain_step(tx: optax.GradientTransformation, dtype: Any) -> Any:
    model = GPT2(CONFIG, dtype=dtype, scan=True, remat="none", attention="xla")

    def loss(params: Any, batch: Any) -> jax.Array:
        hidden = model.apply({"params": params}, batch["input_ids"], method="last_hidden_state")
        logits = model.apply({"params": params}, hidden, method="head")
        return cross_entropy(logits, batch["labels"]).sum() / (batch["labels"] != IGNORE_INDEX).sum()

    @jax.jit
    def step(state: Any, batch: Any) -> Any:
        value, gradients = jax.value_and_grad(loss)(state.params, batch)
        norm = jnp.sqrt(sum((g**2).sum() for g in jax.tree.leaves(gradients)))
        gradients = jax.tree.map(lambda g: g * jnp.minimum(1, 1 / (norm + 1e-6)), gradients)
        updates, opt_state = tx.update(gradients, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        return state._replace(step=state.step + 1, params=params, opt_state=opt_state), {"loss": value}

    return step


@pytest.fixture(autouse=True)
def small_blocks_and_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three blocks of queries and three chunks of the loss, the last of which is partial."""
    monkeypatch.setattr(gpt2_jax.ops.blockwise_attention, "BLOCK", 16)
    monkeypatch.setattr(gpt2_jax.ops.cross_entropy, "default_chunk_bytes", lambda: 4 * BATCH * CONFIG.vocab_size * 14)


@pytest.mark.thorough
def test_both_paths_have_the_same_loss_at_every_step() -> None:
    fast, plain = curve("fast", "float32"), curve("plain", "float32")
    print(f"largest difference in {STEPS} steps: {np.abs(fast - plain).max():.1e} nats")
    assert plain[0] > 4 and plain[-20:].mean() < 2  # the model has learned something
    np.testing.assert_allclose(fast, plain, rtol=0, atol=EQUAL)


@pytest.mark.thorough
def test_in_bfloat16_both_paths_have_the_same_mean_error() -> None:
    exact = curve("plain", "float32")
    fast, plain = (np.abs(curve(path, "bfloat16") - exact) for path in ("fast", "plain"))
    print(f"mean error: fast {fast.mean():.2e}, plain {plain.mean():.2e}; largest {fast.max():.2e}, {plain.max():.2e}")
    assert fast.mean() <= NOISE * plain.mean()
