"""Batches from the host to the device mesh. Each process reads its own rows; together they form one global array."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from gpt2_jax.parallel.sharding import BATCH_AXES, batch_parts
from gpt2_jax.training.config import TrainConfig
from gpt2_jax.training.errors import TrainingError


@dataclass(frozen=True)
class Rows:
    """The placement of the `size` rows of a batch on a mesh."""

    size: int
    mesh: Mesh

    @property
    def sharding(self) -> NamedSharding:
        return NamedSharding(self.mesh, PartitionSpec(BATCH_AXES))

    @property
    def own(self) -> slice:
        """The rows that this process reads: from the first to the last row of its devices."""
        indices = self.sharding.addressable_devices_indices_map((self.size,)).values()
        bounds = [index[0].indices(self.size) for index in indices if index is not None]
        return slice(min(start for start, _, _ in bounds), max(stop for _, stop, _ in bounds))

    def put(self, batch: Mapping[str, np.ndarray]) -> dict[str, jax.Array]:
        """Return the global arrays of a batch, given this process's own rows of each."""
        first = self.own.start

        def array(own: np.ndarray) -> jax.Array:
            def shard(index: Any) -> np.ndarray:
                start, stop, _ = index[0].indices(self.size)
                return own[start - first : stop - first]

            return jax.make_array_from_callback((self.size, *own.shape[1:]), self.sharding, shard)

        return {name: array(own) for name, own in batch.items()}


def batch_rows(config: TrainConfig, mesh: Mesh) -> Rows:
    """Return the rows of a training step. Raises `TrainingError` if the mesh does not divide them."""
    _require_divisible(config, mesh)
    return Rows(config.batch_size, mesh)


def microbatch_rows(config: TrainConfig, mesh: Mesh) -> Rows:
    """Return the rows of a microbatch, which is also the batch of an evaluation. Raises as `batch_rows`."""
    _require_divisible(config, mesh)
    return Rows(config.batch_size // config.num_microbatches, mesh)


def _require_divisible(config: TrainConfig, mesh: Mesh) -> None:
    rows, shards = config.batch_size // config.num_microbatches, batch_parts(mesh.shape)
    if rows % shards:
        raise TrainingError(
            f"batch_size={config.batch_size} in num_microbatches={config.num_microbatches} gives {rows} rows per "
            f"microbatch, which the mesh's data x fsdp = {shards} does not divide; "
            f"{_suggested_flag(config.batch_size, config.num_microbatches, shards)}, or another --mesh "
            f"(data={math.gcd(rows, shards)} takes fewer devices)"
        )


def _suggested_flag(batch_size: int, num_microbatches: int, shards: int) -> str:
    """Return the flag with the valid value nearest to the given one."""
    valid = [n for n in range(1, batch_size + 1) if batch_size % n == 0 and batch_size // n % shards == 0]
    if valid:
        return f"choose --num-microbatches {min(valid, key=lambda n: abs(n - num_microbatches))}"
    step = shards * num_microbatches
    return f"choose --batch-size {-(-batch_size // step) * step}"
