"""Compile attention for four TPUs on a machine without TPUs. test_jax_attention.py runs it in a separate process.

    python for_tpu.py splash|segments|dots|full|xla LENGTH FILE

Writes the compiled program for value and gradients to FILE. `dots` and `full` are the splash kernel with that `remat`;
`segments` is the splash kernel with `segment_ids`.
"""

from __future__ import annotations

import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import topologies
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from gpt2_jax.ops.attention import attention
from gpt2_jax.parallel.remat import POLICIES
from gpt2_jax.parallel.sharding import BATCH_AXES, TENSOR


def program(name: str, length: int) -> str:
    topology = topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x2")
    devices = np.array(topology.devices).reshape(2, 1, 2)
    mesh = Mesh(devices, (*BATCH_AXES, TENSOR), axis_types=(AxisType.Auto,) * 3)
    spread = NamedSharding(mesh, PartitionSpec(BATCH_AXES, None, TENSOR, None))
    heads = jax.ShapeDtypeStruct((4, length, 12, 64), jnp.bfloat16, sharding=spread)

    rows = NamedSharding(mesh, PartitionSpec(BATCH_AXES, None))
    ids = jax.ShapeDtypeStruct((4, length), jnp.int32, sharding=rows)

    def layer(q: jax.Array, k: jax.Array, v: jax.Array, ids: jax.Array) -> jax.Array:
        kind = "xla" if name == "xla" else "splash"
        segments = ids if name == "segments" else None
        context = attention(q, k, v, None, segment_ids=segments, is_causal=True, scale=0.125, implementation=kind)
        return jnp.sin(context.astype(jnp.float32))

    layer = jax.checkpoint(layer, policy=POLICIES[name]) if name in POLICIES else layer
    with jax.set_mesh(mesh):
        total = jax.value_and_grad(lambda *given: layer(*given).sum(), (0, 1, 2))
        return jax.jit(total).lower(heads, heads, heads, ids).compile().as_text()


if __name__ == "__main__":
    Path(sys.argv[3]).write_text(program(sys.argv[1], int(sys.argv[2])))
