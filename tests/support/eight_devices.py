"""Computations on several devices, in a process with eight simulated CPU devices.

python eight_devices.py NAME FILE.npz
"""

from __future__ import annotations

import itertools
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from bridge import GPT2Config
from gpt2_jax import GPT2, next_token_loss, summed_loss
from gpt2_jax.ops.attention import _splash, attention
from gpt2_jax.ops.cross_entropy import summed_cross_entropy
from gpt2_jax.parallel.sharding import BATCH_AXES, TENSOR, shardings

ROOT = Path(__file__).parents[2]


def run(name: str, directory: Path) -> dict[str, np.ndarray]:
    """Return the results of the function `name` of this file, run in such a process."""
    file = directory / f"{name}.npz"
    environment = {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8",
        "PYTHONPATH": str(ROOT),
    }
    command = [sys.executable, "-W", "error", __file__, name, str(file)]
    child = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert child.returncode == 0, child.stderr
    with np.load(file) as arrays:
        return dict(arrays)


def make_mesh() -> jax.sharding.Mesh:
    return jax.make_mesh((2, 2, 2), (*BATCH_AXES, TENSOR), axis_types=(AxisType.Auto,) * 3)


def spread_attention() -> dict[str, Any]:
    """Return values and gradients of `xla` attention on one device, and of the other implementations on a mesh.

    Each is also computed with segments. On the mesh, also returns the collectives in the program and the shape of a
    device's shard.
    """
    rng = np.random.default_rng(0)
    q, k, v, d = (jnp.asarray(rng.normal(size=(4, 128, 4, 8)), jnp.float32) for _ in range(4))
    ids = jnp.asarray(np.sort(rng.integers(0, 5, (4, 128))), jnp.int32)

    def value_and_gradients(kind: str, q: jax.Array, k: jax.Array, v: jax.Array, d: jax.Array, ids: jax.Array) -> Any:
        name, _, segmented = kind.partition(" ")
        segments = ids if segmented else None

        def function(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
            if name == "splash":
                return _splash(q * 0.3, k, v, segments, interpret=True)
            return attention(q, k, v, None, segment_ids=segments, is_causal=True, scale=0.3, implementation=name)

        value, pullback = jax.vjp(function, q, k, v)
        return [value, *pullback(d)]

    compiled, results = jax.jit(value_and_gradients, static_argnums=0), {}
    plain = {end: compiled(f"xla{end}", q, k, v, d, ids) for end in ("", " segments")}
    mesh = make_mesh()
    spread = NamedSharding(mesh, PartitionSpec(BATCH_AXES, None, TENSOR, None))
    with jax.set_mesh(mesh):
        given = [jax.device_put(x, spread) for x in (q, k, v, d)]
        given.append(jax.device_put(ids, NamedSharding(mesh, PartitionSpec(BATCH_AXES, None))))
        for name, end in itertools.product(("splash", "blockwise"), plain):
            name += end
            program = compiled.lower(name, *given).compile()
            moves = re.findall(r" (all-[a-z]+|collective-[a-z]+|reduce-scatter)\(", program.as_text())
            found = program(*given)
            results |= {f"mesh/{name}/{i}": x for i, x in enumerate(found)}
            results |= {f"plain/{name}/{i}": x for i, x in enumerate(plain[end])}
            results |= {f"moves/{name}": moves, f"parts/{name}": found[0].addressable_shards[0].data.shape}
    return results


def spread_loss() -> dict[str, Any]:
    """Return loss and gradients of a batch on one device, and with its rows sharded over eight."""
    rng = np.random.default_rng(0)
    hidden = jnp.asarray(rng.normal(size=(16, 7, 12)), jnp.float32)
    embedding = jnp.asarray(rng.normal(size=(29, 12)), jnp.float32)
    labels = jnp.asarray(rng.integers(0, 29, (16, 7)), jnp.int32).at[3].set(-100)

    def loss(hidden: jax.Array, embedding: jax.Array, labels: jax.Array) -> jax.Array:
        return summed_cross_entropy(hidden, embedding, labels, chunk_bytes=4 * 16 * 29 * 3)

    compiled = jax.jit(jax.value_and_grad(loss, (0, 1)))
    one = compiled(hidden, embedding, labels)
    mesh = make_mesh()
    rows = NamedSharding(mesh, PartitionSpec((*BATCH_AXES, TENSOR)))
    whole = NamedSharding(mesh, PartitionSpec())
    given = jax.device_put(hidden, rows), jax.device_put(embedding, whole), jax.device_put(labels, rows)
    with jax.set_mesh(mesh):
        eight = compiled(*given)
    results = {f"one/{i}": x for i, x in enumerate(jax.tree.leaves(one))}
    results |= {f"eight/{i}": x for i, x in enumerate(jax.tree.leaves(eight))}
    return results | {"parts": [shard.data.shape for shard in eight[1][0].addressable_shards]}


def spread_packed_documents() -> dict[str, Any]:
    """Return loss and gradients of a batch with segments on one device and on a mesh, and the mesh's logits' shard."""
    config = GPT2Config(vocab_size=32, n_positions=16, n_embd=8, n_layer=2, n_head=2)
    model, rng = GPT2(config, scan=True), np.random.default_rng(0)
    batch = {
        "input_ids": jnp.asarray(rng.integers(0, 32, (8, 16)), jnp.int32),
        "labels": jnp.asarray(rng.integers(0, 32, (8, 16)), jnp.int32),
        "segment_ids": jnp.asarray(-np.sort(-rng.integers(0, 5, (8, 16))), jnp.int32),
    }
    params = model.init(jax.random.key(0), batch["input_ids"])["params"]
    compiled = jax.jit(jax.value_and_grad(lambda params, batch: summed_loss(model, params, batch)))
    results = {f"plain/{i}": x for i, x in enumerate(jax.tree.leaves(compiled(params, batch)))}
    mesh = make_mesh()
    with jax.set_mesh(mesh):
        given = jax.device_put(params, shardings(params, mesh))
        rows = jax.device_put(batch, NamedSharding(mesh, PartitionSpec(BATCH_AXES)))
        found = compiled(given, rows)
        logits = jax.jit(lambda p, b: model.apply({"params": p}, b["input_ids"], segment_ids=b["segment_ids"]))(
            given, rows
        )
    results |= {f"mesh/{i}": x for i, x in enumerate(jax.tree.leaves(found))}
    return results | {"part": logits.addressable_shards[0].data.shape}


def gradients_in_shard_map() -> dict[str, Any]:
    """Return gradients of a loss on one device, and inside a `shard_map` whose devices share the parameters."""
    config = GPT2Config(vocab_size=32, n_positions=8, n_embd=8, n_layer=1, n_head=2)
    ids = jnp.asarray(np.random.default_rng(0).integers(0, 32, (8, 8)), jnp.int32)
    params = GPT2(config).init(jax.random.key(0), ids)["params"]
    mesh = jax.make_mesh((8,), ("rows",), axis_types=(AxisType.Auto,))
    results = {}
    for name in ("xla", "blockwise"):
        model = GPT2(config, attention=name)

        def loss(params: Any, ids: jax.Array, model: GPT2 = model) -> jax.Array:
            return next_token_loss(model.apply({"params": params}, ids), ids)

        def gradient(params: Any, ids: jax.Array, loss: Any = loss) -> Any:
            return jax.grad(lambda params: jax.lax.pmean(loss(params, ids), "rows"))(params)

        whole, rows = PartitionSpec(), PartitionSpec("rows")
        mapped = jax.shard_map(gradient, mesh=mesh, in_specs=(whole, rows), out_specs=whole)
        one, eight = jax.jit(jax.grad(loss))(params, ids), jax.jit(mapped)(params, ids)
        results |= {f"one/{name}/{i}": x for i, x in enumerate(jax.tree.leaves(one))}
        results |= {f"eight/{name}/{i}": x for i, x in enumerate(jax.tree.leaves(eight))}
    return results


if __name__ == "__main__":
    np.savez(sys.argv[2], **globals()[sys.argv[1]]())
