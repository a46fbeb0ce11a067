"""Benchmark tasks in JAX, with the code of `gpt2 train`, `from_pretrained` and `gpt2 generate`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import bridge
import gpt2_jax
from gpt2_jax.parallel.sharding import make_mesh
from gpt2_jax.training import make_optimizer, make_train_step
from gpt2_jax.training.config import TrainConfig, from_flat
from gpt2_jax.training.state import initial_state, make_model

DECODE_VOCAB_MULTIPLE = 64
"""Decoding pads the vocabulary to a multiple of this and of `vocab_multiple`, which is faster on CPU."""

Action = Callable[[], Any]


def import_packages(name: str) -> None:
    """Does nothing: this module imports all packages at its top."""


def prepare(job: dict[str, Any]) -> tuple[Action, Action]:
    action = {"train": _train, "forward": _forward, "decode": _decode, "load": _load}[job["task"]](job)
    return action, lambda: None


def device_info() -> dict[str, Any]:
    device = jax.local_devices()[0]
    stats = (device.memory_stats() if device.platform != "cpu" else None) or {}
    kind = "CPU" if device.platform == "cpu" else device.device_kind
    return {"device": kind, "device_peak_bytes": stats.get("peak_bytes_in_use")}


def _train(job: dict[str, Any]) -> Action:
    config = from_flat(job["config"])
    model, tx = make_model(config), make_optimizer(config.optimizer, config.max_steps, config.model.n_layer)
    state = initial_state(config, model, tx, None, make_mesh(devices=jax.devices()[:1]))
    train_step = make_train_step(model, tx, seed=config.seed, max_grad_norm=config.optimizer.max_grad_norm)
    ids = job["ids"].astype(np.int32)
    batch = jax.device_put({"input_ids": ids[:, :-1], "labels": ids[:, 1:]})

    def step() -> float:
        nonlocal state
        state, metrics = train_step(state, batch)
        return float(jax.block_until_ready((state, metrics))[1]["loss"])

    return step


def _forward(job: dict[str, Any]) -> Action:
    config = from_flat(job["config"])
    model, params = _init(config)
    ids = jnp.asarray(job["ids"][:, :-1], jnp.int32)
    logits = jax.jit(lambda params, ids: model.apply({"params": params}, ids))
    return lambda: jax.block_until_ready(logits(params, ids))


def _decode(job: dict[str, Any]) -> Action:
    config = from_flat(job["config"])
    multiple = int(np.lcm(config.vocab_multiple, DECODE_VOCAB_MULTIPLE))
    model, params = _init(replace(config, scan=False, vocab_multiple=multiple))
    decoder = gpt2_jax.Decoder(model, params, dtype=jnp.dtype(config.dtype))
    prompts, generation = job["ids"][:, :-1].tolist(), bridge.GenerationConfig(job["new_tokens"])
    return lambda: decoder.generate(prompts, generation)


def _load(job: dict[str, Any]) -> Action:
    return lambda: jax.block_until_ready(gpt2_jax.from_pretrained(job["directory"])[1])


def _init(config: TrainConfig) -> tuple[gpt2_jax.GPT2, Any]:
    model = make_model(config)
    key, ids = jax.random.key(config.seed), jnp.zeros((1, 1), jnp.int32)
    return model, jax.jit(model.init)(key, ids)["params"]
