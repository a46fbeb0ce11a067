"""Functions that test_meshes.py runs in a process with eight simulated CPU devices.

    python on_meshes.py NAME FILE.json ARGUMENT ...

The sizes of the model are pairwise different, so that a shape in a compiled program identifies its array.
"""

from __future__ import annotations

import itertools
import json
import math
import re
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import bridge
from bridge import IGNORE_INDEX, GPT2Config
from bridge.storage.tensors import LazyTensor, LazyTensorMap
from gpt2_jax.loading import sharded_params
from gpt2_jax.lora import LoRAConfig
from gpt2_jax.loss import summed_loss
from gpt2_jax.model import GPT2
from gpt2_jax.parallel.sharding import DATA, TENSOR, make_mesh, shardings
from gpt2_jax.training import OptimizerConfig, TrainConfig, make_optimizer, make_train_step
from gpt2_jax.training.batch_placement import batch_rows
from gpt2_jax.training.partial import model_variables
from gpt2_jax.training.state import abstract_state, initial_state, make_model, random_state

MODEL = GPT2Config(vocab_size=71, n_positions=24, n_embd=32, n_layer=5, n_head=8)
CONFIG = TrainConfig(
    model=MODEL,
    optimizer=OptimizerConfig(learning_rate=1e-2, warmup_steps=3),
    batch_size=16,
    seq_len=10,
    max_steps=20,
    vocab_multiple=8,
)
V, D, F, L, B, T = 72, MODEL.n_embd, MODEL.feed_forward_size, MODEL.n_layer, CONFIG.batch_size, CONFIG.seq_len

SAME_CURVE = 1e-5
"""Nats. Float32 losses may differ by the order of sums over devices."""

TINY = 1e-30
"""The first gradient of A is zero, because B is zero."""

ALL = [sizes for sizes in itertools.product((1, 2, 4, 8), repeat=3) if math.prod(sizes) <= 8]
SOME = [(2, 2, 2)]


def curves(dtype: str, which: str, num_microbatches: str = "1", lora_rank: str = "0") -> dict[str, Any]:
    """Return, for each mesh, the difference to one device in losses and gradients, and arrays with a wrong sharding."""
    config = replace(
        CONFIG,
        num_microbatches=int(num_microbatches),
        optimizer=replace(CONFIG.optimizer, weight_decay=0.3),
        lora=LoRAConfig(rank=int(lora_rank), alpha=8, targets="all-linear"),
    )
    model = make_model(config).clone(dtype=jnp.dtype(dtype), param_dtype=jnp.dtype(dtype))
    tx = make_optimizer(config.optimizer, config.max_steps)
    losses, gradients, _ = _curve(config, model, tx, (1, 1, 1))
    found = {}
    for sizes in ALL if which == "all" else SOME:
        other_losses, other_gradients, misplaced = _curve(config, model, tx, sizes)
        found[_text(sizes)] = {
            "losses": max(abs(a - b) for a, b in zip(losses, other_losses, strict=True)),
            "gradients": max(
                float(np.abs(a - b).max() / max(np.abs(a).max(), TINY))
                for a, b in zip(gradients, other_gradients, strict=True)
            ),
            "misplaced": misplaced,
            "learned": losses[0] - other_losses[-1],
        }
    return found


def _curve(
    config: TrainConfig, model: GPT2, tx: optax.GradientTransformation, sizes: tuple[int, ...]
) -> tuple[list[float], list[np.ndarray], list[str]]:
    mesh = make_mesh(_text(sizes))
    rows, losses = batch_rows(config, mesh), []
    with jax.set_mesh(mesh):
        state = initial_state(config, model, tx, None, mesh)
        step = make_train_step(model, tx, num_microbatches=config.num_microbatches)

        def loss(trained: Any, frozen: Any, batch: Any) -> jax.Array:
            params, lora = model_variables(model, trained, frozen)
            return summed_loss(model, params, batch, lora=lora)

        own = [rows.put({name: array[rows.own] for name, array in batch.items()}) for batch in _batches(config)]
        gradients = jax.tree.map(
            np.asarray, jax.tree.leaves(jax.jit(jax.grad(loss))(state.params, state.frozen, own[0]))
        )
        for batch in own:
            state, metrics = step(state, batch)
            losses.append(float(metrics["loss"]))
        assert step._cache_size() == 1, "the output state has the shardings of the input state"
        described = jax.tree_util.tree_leaves_with_path(abstract_state(config, model, tx, mesh))
    pairs = zip(described, jax.tree.leaves(state), strict=True)
    misplaced = [jax.tree_util.keystr(path) for (path, like), leaf in pairs if leaf.sharding != like.sharding]
    return losses, gradients, misplaced


def _batches(config: TrainConfig) -> list[dict[str, np.ndarray]]:
    """Return rows that count up from a random id, which is easy to learn. Rows have different numbers of labels."""
    rng, (steps, rows) = np.random.default_rng(1), (config.max_steps, config.batch_size)
    ids = (rng.integers(0, 71, (steps, rows, 1)) + np.arange(config.seq_len + 1, dtype=np.int32)) % MODEL.vocab_size
    hidden = rng.random(ids.shape) < np.linspace(0, 0.8, rows)[:, None]
    ids, labels = (x.astype(np.int32) for x in (ids, np.where(hidden, IGNORE_INDEX, ids)))
    return [{"input_ids": i[:, :-1], "labels": k[:, 1:]} for i, k in zip(ids, labels, strict=True)]


def programs() -> dict[str, Any]:
    """Return, for each mesh, the result shapes of the programs for initial state and step, and of all-gathers."""
    model, tx = make_model(CONFIG), make_optimizer(CONFIG.optimizer, CONFIG.max_steps)
    found = {}
    for sizes in ALL[1:]:
        mesh = make_mesh(_text(sizes))
        with jax.set_mesh(mesh):
            state, rows = abstract_state(CONFIG, model, tx, mesh), batch_rows(CONFIG, mesh)
            ids = jax.ShapeDtypeStruct((B, T), jnp.int32, sharding=rows.sharding)
            places = jax.tree.map(lambda leaf: leaf.sharding, state)
            draw = jax.jit(random_state(CONFIG, model, tx), out_shardings=places)
            drawn = draw.lower(jax.random.key(0), jnp.zeros((1, 1), jnp.int32)).compile().as_text()
            step = make_train_step(model, tx).lower(state, {"input_ids": ids, "labels": ids}).compile().as_text()
        found[_text(sizes)] = {
            "drawn": _results(drawn),
            "step": _results(step),
            "gathers": _results(step, "all-gather"),
        }
    return found


def foreign_meshes() -> dict[str, Any]:
    """Return, for each mesh with other axis names, the difference to one device, and the rows on each device.

    Compares the logits and the loss of a step.
    """
    model, tx = make_model(CONFIG), make_optimizer(CONFIG.optimizer, CONFIG.max_steps)
    first = initial_state(CONFIG, model, tx, None, make_mesh("data=1", jax.devices()[:1]))
    state, batch = jax.tree.map(np.asarray, first), _batches(CONFIG)[0]
    ids, found = batch["input_ids"], {}

    def logits(params: Any, ids: Any) -> Any:
        return model.apply({"params": params}, ids)

    expected = np.asarray(jax.jit(logits)(state.params, ids))
    loss = float(make_train_step(model, tx)(jax.tree.map(jnp.array, state), batch)[1]["loss"])
    for names in (("dp",), ("data",), ("data", "model"), ("fsdp", "other")):
        mesh = jax.make_mesh((8, *[1] * (len(names) - 1)), names, axis_types=(AxisType.Auto,) * len(names))
        rows = NamedSharding(mesh, PartitionSpec(names[0]))
        with jax.set_mesh(mesh):
            placed = jax.tree.map(jnp.array, state)
            given = {name: jax.device_put(array, rows) for name, array in batch.items()}
            result = jax.jit(logits)(placed.params, given["input_ids"])
            difference = abs(float(make_train_step(model, tx)(placed, given)[1]["loss"]) - loss)
        differences = max(difference, float(np.abs(np.asarray(result) - expected).max()))
        found[" ".join(names)] = differences, result.addressable_shards[0].data.shape[0]
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    spec = PartitionSpec("data")
    mapped = jax.shard_map(logits, mesh=mesh, in_specs=(PartitionSpec(), spec), out_specs=spec, check_vma=False)
    result = jax.jit(mapped)(state.params, ids)
    found["shard_map"] = float(np.abs(np.asarray(result) - expected).max()), result.addressable_shards[0].data.shape[0]
    return found


def explicit_meshes() -> dict[str, Any]:
    """Return, for the loss and gradients inside `auto_axes`, the difference to one device and the first spec."""
    model = make_model(CONFIG)
    params = jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, 1), jnp.int32))["params"]
    batch = _batches(CONFIG)[0]

    def derivatives(params: Any, batch: Any) -> Any:
        return jax.value_and_grad(lambda p: summed_loss(model, p, batch))(params)

    loss, gradients = jax.tree.map(np.asarray, jax.jit(derivatives)(params, batch))
    mesh = jax.make_mesh((4, 2), (DATA, TENSOR))
    places = jax.tree.map(lambda place: place.spec, shardings(params, make_mesh("data=4,tensor=2")))
    with jax.set_mesh(mesh):
        placed = jax.tree.map(lambda leaf, spec: jax.device_put(leaf, NamedSharding(mesh, spec)), params, places)
        given = {name: jax.device_put(x, NamedSharding(mesh, PartitionSpec(DATA))) for name, x in batch.items()}
        automatic = jax.sharding.auto_axes(derivatives, out_sharding=(PartitionSpec(), places))
        found_loss, found = jax.jit(automatic)(placed, given)
    pairs = zip(jax.tree.leaves(gradients), jax.tree.leaves(found), strict=True)
    return {
        "loss": abs(float(found_loss - loss)) / float(loss),
        "gradients": max(float(np.abs(a - b).max() / np.abs(a).max()) for a, b in pairs),
        "spec": str(jax.typeof(found["wte"]["embedding"]).sharding.spec[0]),
    }


def loaded(directory: str) -> dict[str, Any]:
    """Return, for each checkpoint in both forms, the parameters that differ and the number of tensors read twice."""
    return {
        f"{path.name} {scan}": _loaded(path, scan)
        for path in sorted(Path(directory).iterdir())
        for scan in (False, True)
    }


def _loaded(path: Path, scan: bool) -> dict[str, Any]:
    mesh, checkpoint, reads = make_mesh("data=2,fsdp=2,tensor=2"), bridge.load(path), list[str]()

    def counted(name: str, entry: LazyTensor) -> LazyTensor:
        return LazyTensor(entry.dtype, entry.shape, lambda: reads.append(name) or entry.read())

    expected = bridge.to_flax(checkpoint.tensors, checkpoint.config, stacked=scan, vocab_multiple=8)
    tensors = LazyTensorMap({name: counted(name, entry) for name, entry in checkpoint.tensors.entries.items()})
    params = sharded_params(replace(checkpoint, tensors=tensors), mesh, scan=scan, vocab_multiple=8)
    arrays = list(zip(*map(jax.tree.leaves, (params, expected, shardings(params, mesh))), strict=True))
    return {
        "differing": [
            str(array.shape)
            for array, like, place in arrays
            if array.sharding != place or array.dtype != like.dtype or not np.array_equal(np.asarray(array), like)
        ],
        "read again": len(reads) - len({*reads}),
    }


def _results(program: str, operation: str = r"[\w-]+") -> list[list[int]]:
    """Return the distinct result shapes of operations of this kind."""
    lines = re.findall(rf"= (\(?[^=]*?) {operation}\(", program)
    shapes = {shape for line in lines for shape in re.findall(r"\w+\[([\d,]+)\]", line)}
    return sorted([int(size) for size in shape.split(",")] for shape in shapes)


def _text(sizes: tuple[int, ...]) -> str:
    return "data={},fsdp={},tensor={}".format(*sizes)


if __name__ == "__main__":
    Path(sys.argv[2]).write_text(json.dumps(globals()[sys.argv[1]](*sys.argv[3:])))
