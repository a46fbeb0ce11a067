"""What test_meshes.py runs in a process that makes eight devices of its CPU.

python on_meshes.py NAME FILE.json
"""

from __future__ import annotations

import itertools
import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import numpy as np

from bridge import GPT2Config
from gpt2_jax.loss import IGNORED
from gpt2_jax.sharding import make_mesh
from gpt2_jax.train import OptimizerConfig, TrainConfig, make_optimizer, make_train_step
from gpt2_jax.train.batches import rows_of_step
from gpt2_jax.train.begin import described_state, first_state, make_model

MODEL = GPT2Config(vocab_size=61, n_positions=16, n_embd=32, n_layer=3, n_head=8)
CONFIG = TrainConfig(
    model=MODEL,
    optimizer=OptimizerConfig(learning_rate=1e-2, warmup_steps=3),
    batch_size=16,
    length=12,
    steps=20,
    vocab_multiple=8,
)

SIZES = (1, 2, 4, 8)
MESHES = [mesh for mesh in itertools.product(SIZES, repeat=3) if np.prod(mesh) <= 8]


def batches(config: TrainConfig, steps: int) -> list[dict[str, np.ndarray]]:
    rng = np.random.default_rng(1)
    made = []
    for _ in range(steps):
        ids = rng.integers(0, MODEL.vocab_size, (config.batch_size, config.length + 1)).astype(np.int32)
        labels = ids[:, 1:].copy()
        labels[rng.random(labels.shape) < 0.2] = IGNORED
        made.append({"input_ids": ids[:, :-1], "labels": labels})
    return made


def curve(config: TrainConfig, mesh_text: str, steps: int = 20) -> dict[str, Any]:
    """Losses, norms of gradients, and sums over the last parameters."""
    mesh = make_mesh(mesh_text)
    model, tx = make_model(config), make_optimizer(config.optimizer, config.steps)
    with jax.set_mesh(mesh):
        state = first_state(config, model, tx, None, mesh)
        step = make_train_step(model, tx, seed=config.seed, accumulate=config.accumulate, ema_decay=config.ema_decay)
        rows, losses, norms = rows_of_step(config, mesh), [], []
        for batch in batches(config, steps):
            state, metrics = step(state, rows.put({n: a[rows.own] for n, a in batch.items()}))
            losses.append(float(metrics["loss"]))
            norms.append(float(metrics["grad_norm"]))
        expected = described_state(config, model, tx, mesh)
        misplaced = [
            jax.tree_util.keystr(path)
            for (path, leaf), like in zip(
                jax.tree_util.tree_leaves_with_path(state), jax.tree.leaves(expected), strict=True
            )
            if not leaf.sharding.is_equivalent_to(like.sharding, leaf.ndim)
        ]
    return {"losses": losses, "norms": norms, "misplaced": misplaced, "compilations": step._cache_size()}


def every_mesh() -> dict[str, Any]:
    config = replace(CONFIG, dtype="float32")
    return {name(mesh): curve(config, name(mesh)) for mesh in MESHES}


def name(mesh: tuple[int, ...]) -> str:
    return "data={},fsdp={},tensor={}".format(*mesh)


if __name__ == "__main__":
    Path(sys.argv[2]).write_text(json.dumps(globals()[sys.argv[1]]()))
