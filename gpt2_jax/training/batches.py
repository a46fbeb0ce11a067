"""Batches from the host to the mesh: every process reads its own rows, and together they are one array."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from gpt2_jax.parallel.sharding import BATCH_AXES, batch_parts
from gpt2_jax.training.config import TrainConfig, TrainingError


@dataclass(frozen=True)
class Rows:
    """Where the rows of a batch of `size` lie on a mesh."""

    size: int
    mesh: Mesh

    @property
    def sharding(self) -> NamedSharding:
        return NamedSharding(self.mesh, PartitionSpec(BATCH_AXES))

    @property
    def own(self) -> slice:
        """Those that this process's devices take: from the first to the last of them."""
        indices = self.sharding.addressable_devices_indices_map((self.size,)).values()
        bounds = [index[0].indices(self.size) for index in indices if index is not None]
        return slice(min(start for start, _, _ in bounds), max(stop for _, stop, _ in bounds))

    def put(self, batch: Mapping[str, np.ndarray]) -> dict[str, jax.Array]:
        """The whole batch as arrays of the mesh, from this process's own rows of each."""
        first = self.own.start

        def array(own: np.ndarray) -> jax.Array:
            def rows_of(index: Any) -> np.ndarray:
                start, stop, _ = index[0].indices(self.size)
                return own[start - first : stop - first]

            return jax.make_array_from_callback((self.size, *own.shape[1:]), self.sharding, rows_of)

        return {name: array(own) for name, own in batch.items()}


def rows_of_step(config: TrainConfig, mesh: Mesh) -> Rows:
    """Of a training step; raises `TrainingError` where the mesh does not divide them."""
    _require_divided(config, mesh)
    return Rows(config.batch_size, mesh)


def rows_of_part(config: TrainConfig, mesh: Mesh) -> Rows:
    """Of what a step has in memory at a time, which is what evaluation takes too."""
    _require_divided(config, mesh)
    return Rows(config.batch_size // config.num_microbatches, mesh)


def _require_divided(config: TrainConfig, mesh: Mesh) -> None:
    rows, parts = config.batch_size // config.num_microbatches, batch_parts(mesh.shape)
    if rows % parts:
        raise TrainingError(
            f"batch_size={config.batch_size} in num_microbatches={config.num_microbatches} is {rows} rows at a time, "
            f"which the mesh's data x fsdp = {parts} does not divide; "
            f"{_fitting_flag(config.batch_size, config.num_microbatches, parts)}, or another --mesh "
            f"(data={math.gcd(rows, parts)} takes fewer devices)"
        )


def _fitting_flag(batch_size: int, num_microbatches: int, parts: int) -> str:
    """Return the valid flag that is nearest to the given values."""
    fitting = [n for n in range(1, batch_size + 1) if batch_size % n == 0 and batch_size // n % parts == 0]
    if fitting:
        return f"choose --num-microbatches {min(fitting, key=lambda n: abs(n - num_microbatches))}"
    return f"choose --batch-size {-(-batch_size // (parts * num_microbatches)) * parts * num_microbatches}"
