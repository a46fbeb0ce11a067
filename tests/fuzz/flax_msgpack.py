"""transformers 4's Flax checkpoints, read by `flax.serialization`."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from unittest import mock

import ml_dtypes
import numpy as np
from flax.serialization import msgpack_restore
from flax.traverse_util import flatten_dict
from support.models import SMALLEST, random_checkpoint

import bridge
import bridge.containers.msgpack

_LEAVES = {"kernel": "weight", "scale": "weight", "embedding": "weight", "bias": "bias"}


def samples(folder: Path) -> list[Path]:
    tied, untied = SMALLEST, replace(SMALLEST, tie_word_embeddings=False)
    bridge.save(random_checkpoint(untied, ml_dtypes.bfloat16), folder / "untied", format="flax_msgpack")
    bridge.save(random_checkpoint(tied), folder / "shards", format="flax_msgpack", max_shard_bytes=4_000)
    with mock.patch.object(bridge.containers.msgpack, "MOST_CHUNK_BYTES", 100):
        bridge.save(random_checkpoint(tied), folder / "chunks", format="flax_msgpack")
    return [folder / "untied", folder / "shards", folder / "chunks"]


def mutable(source: Path) -> list[Path]:
    return sorted(source.glob("flax_model*"))


def oracle(source: Path) -> dict[str, np.ndarray]:
    arrays = {}
    for file in source.glob("*.msgpack"):
        for path, array in flatten_dict(msgpack_restore(file.read_bytes())).items():
            *modules, leaf = path[1:] if path[0] == "transformer" else path
            arrays[".".join([*modules, _LEAVES[leaf]])] = array.T if leaf == "kernel" else array
    return arrays
