"""One hash for one set of weights, whatever file they lie in."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import numpy as np

from bridge.storage.tensors import LazyTensorMap, contiguous


def fingerprint(tensors: Mapping[str, np.ndarray]) -> str:
    """SHA-256, in hex, over canonical names, dtypes, shapes and bytes; reads one tensor at a time.

    `tensors`: canonical name -> array, as `Checkpoint.tensors` is. The order does not matter; every bit does.
    """
    digest = hashlib.sha256()
    lazy = LazyTensorMap.of(tensors)
    for name in sorted(lazy):
        array = contiguous(lazy[name])
        digest.update(f"{name} {array.dtype} {list(array.shape)}\n".encode())
        digest.update(array.reshape(-1).view(np.uint8).data)
    return digest.hexdigest()
