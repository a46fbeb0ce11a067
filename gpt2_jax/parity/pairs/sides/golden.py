"""Saved inputs and outputs of a side, which can replace the side in a later comparison.

The container is safetensors with a description as JSON in its metadata. The arrays are `inputs/0`, ...,
`float64/outputs/NAME`, `float64/intermediates/NAME`, and the same in float32, from which tolerances are derived.
"""

from __future__ import annotations

import json
import platform
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import numpy as np

import bridge
from bridge import BridgeError
from bridge.containers.safetensors import read_file, write_file
from bridge.errors import quoted
from bridge.storage.atomic_writes import new_file
from bridge.storage.json_text import parse_plain_object
from bridge.storage.stored_file import StoredFile
from bridge.storage.tensors import LazyTensorMap
from gpt2_jax.parity.pairs.sides.side import Arrays, Description, Forward, Inputs, Side

KIND = "gpt2-bridge golden"
VERSION = 1
MOST_BYTES = 64 * 2**20
"""Maximum size of a file."""

_MOST_ARRAYS = 10_000
_MOST_ELEMENTS = 2_000  # of the description
_DTYPES = ("float64", "float32")
_SECTIONS = ("outputs", "intermediates")
_PACKAGES = ("torch", "jax", "flax", "numpy")


class GoldenError(BridgeError):
    """A file is not a golden, is damaged, or was made from other inputs."""


def save_golden(
    path: str | Path, side: Side, inputs: Inputs, *, intermediates: bool = True, overwrite: bool = False
) -> None:
    """Run a side in float64 and float32 and write its inputs, its outputs and what passes between its modules.

    Args:
        path: the file. Name it without the suffix `.safetensors`: some tools load every such file as weights.
        intermediates: whether to keep the intermediates.
        overwrite: replace an existing golden. Any other file is never replaced.

    Raises:
        BridgeError: the side fails, the arrays have more than 64 MiB, or the file exists.
    """
    arrays = {f"inputs/{k}": np.asarray(array) for k, array in enumerate(inputs)}
    for dtype in _DTYPES:
        forward = side.forward(inputs, dtype)
        for section in _SECTIONS[: 1 + intermediates]:
            for name, array in getattr(forward, section).items():
                is_float = np.issubdtype(array.dtype, np.floating) or array.dtype.kind == "V"
                arrays[f"{dtype}/{section}/{name}"] = array.astype(dtype) if is_float else array
    if (size := sum(array.nbytes for array in arrays.values())) > MOST_BYTES:
        raise GoldenError(f"the arrays have {size} bytes; the limit is {MOST_BYTES}; use smaller inputs")
    description = {"side": side.name, "versions": _versions()}
    metadata = {"kind": KIND, "version": str(VERSION), "description": json.dumps(description)}
    with new_file(path, overwrite=lambda: overwrite and is_golden(Path(path))) as temporary:
        write_file(temporary, LazyTensorMap.of(arrays), metadata)


def golden_side(path: str | Path) -> GoldenSide:
    """Read a golden as one side of `compare`. Needs neither PyTorch nor the code of the model.

    Everything is validated before it is used.

    Raises:
        BridgeError: the file is missing, damaged, or not a golden. The message names it.
    """
    path = Path(path)
    tensors, metadata = _open(path)
    if metadata.get("kind") != KIND:
        raise GoldenError(f"{quoted(path)} is not a golden; its metadata has no kind {KIND!r}")
    if metadata.get("version") != str(VERSION):
        raise GoldenError(
            f"{quoted(path)} has version {quoted(metadata.get('version'))}; this version of the project reads version "
            f"{VERSION}; make the golden again"
        )
    text = metadata.get("description", "").encode("utf-8", "replace")
    description = parse_plain_object(text, f"{quoted(path)}: the description", GoldenError, _MOST_ELEMENTS)
    name, versions = description.get("side"), description.get("versions")
    if not isinstance(name, str) or not name or not isinstance(versions, dict):
        raise GoldenError(f"{quoted(path)}: the description must have the name of a side, and versions")
    if len(tensors) > _MOST_ARRAYS:
        raise GoldenError(f"{quoted(path)}: {len(tensors)} arrays; the limit is {_MOST_ARRAYS}")
    inputs = _inputs(path, tensors)
    forwards = {dtype: _forward(path, tensors, dtype) for dtype in _DTYPES}
    known = len(inputs) + sum(len(getattr(f, section)) for f in forwards.values() for section in _SECTIONS)
    if known < len(tensors):
        raise GoldenError(f"{quoted(path)}: {len(tensors) - known} arrays that are neither inputs nor outputs")
    return GoldenSide(f"golden of {name}", inputs, forwards, {str(k): str(v) for k, v in versions.items()})


class GoldenSide:
    """See `golden_side`."""

    def __init__(self, name: str, inputs: Inputs, forwards: Mapping[str, Forward], versions: Mapping[str, str]) -> None:
        self.name = name
        self.dtypes: tuple[str, ...] = tuple(forwards)
        self.inputs = inputs
        """The inputs that the golden was made from."""
        self.versions = versions
        """Package -> version, when the golden was made."""
        self._forwards = forwards

    def parameters(self) -> Arrays:
        return {}

    def describe(self, inputs: Inputs) -> Description:
        return Description()

    def forward(self, inputs: Inputs, dtype: str) -> Forward:
        same = len(inputs) == len(self.inputs) and all(
            a.dtype == b.dtype and np.array_equal(a, b) for a, b in zip(inputs, self.inputs, strict=True)
        )
        if not same:
            raise GoldenError("a golden has the outputs of its own inputs only; pass its attribute `inputs`")
        return self._forwards[dtype]

    def gradients(self, inputs: Inputs, dtype: str) -> None:
        return None


def is_golden(path: Path) -> bool:
    """Whether a file is a golden of any version."""
    try:
        return _open(path)[1].get("kind") == KIND
    except BridgeError:
        return False


def _open(path: Path) -> tuple[LazyTensorMap, dict[str, str]]:
    if (size := StoredFile.open(path).size) > MOST_BYTES + 2**20:
        raise GoldenError(f"{quoted(path)} has {size} bytes, and a golden at most {MOST_BYTES}")
    return read_file(path)


def _inputs(path: Path, tensors: LazyTensorMap) -> Inputs:
    count = sum(name.startswith("inputs/") for name in tensors)
    names = [f"inputs/{k}" for k in range(count)]
    if not count or any(name not in tensors for name in names):
        raise GoldenError(f"{quoted(path)}: the inputs must be inputs/0, inputs/1, ...")
    if wrong := [name for name in names if tensors.entries[name].dtype.kind not in "iufb"]:
        raise GoldenError(f"{quoted(path)}: {wrong[0]} holds {tensors.entries[wrong[0]].dtype}")
    return tuple(tensors[name] for name in names)


def _forward(path: Path, tensors: LazyTensorMap, dtype: str) -> Forward:
    sections = []
    for section in _SECTIONS:
        prefix, arrays = f"{dtype}/{section}/", {}
        for name, entry in tensors.entries.items():
            if not name.startswith(prefix):
                continue
            if entry.dtype != dtype and entry.dtype.kind not in "iub":
                raise GoldenError(f"{quoted(path)}: {quoted(name)} holds {entry.dtype}; it must hold {dtype}")
            arrays[name.removeprefix(prefix)] = tensors[name]
            if np.isnan(arrays[name.removeprefix(prefix)]).any() and section == "outputs":
                raise GoldenError(f"{quoted(path)}: {quoted(name)} has values that are not numbers")
        sections.append(arrays)
    if not sections[0]:
        raise GoldenError(f"{quoted(path)} has no outputs in {dtype}")
    return Forward(*sections)


def _versions() -> dict[str, str]:
    versions = {"python": platform.python_version(), "gpt2-bridge": bridge.__version__}
    for package in _PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    return versions
