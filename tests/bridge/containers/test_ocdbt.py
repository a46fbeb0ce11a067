"""Array databases crafted by an attacker who knows the format: reading never aborts, hangs or exhausts memory."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import google_crc32c
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import orbax.checkpoint.experimental.v1 as ocp
import pytest
from support import ocdbt_bytes as ocdbt
from support.refusals import within_budget

from bridge import CheckpointError
from bridge.containers.ocdbt import open_arrays

BYTES = {"name": "bytes", "configuration": {"endian": "little"}}
ZSTD = {"name": "zstd", "configuration": {"level": 3}}
VALUES = np.arange(3, dtype="<f4")


def sharded(codecs: list[Any], chunk: tuple[int, ...] = (3,), **changes: Any) -> dict[str, Any]:
    settings = {"chunk_shape": chunk, "codecs": codecs, "index_codecs": [BYTES, {"name": "crc32c"}], **changes}
    return {"name": "sharding_indexed", "configuration": settings}


def description(shape: Any = (3,), chunk: Any = None, codecs: Any = (BYTES,), **changes: Any) -> bytes:
    fields = {
        "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": shape if chunk is None else chunk}},
        "chunk_key_encoding": {"name": "default"},
        "codecs": codecs,
        "data_type": "float32",
        "fill_value": 0.0,
        "node_type": "array",
        "shape": shape,
        "zarr_format": 3,
        **changes,
    }
    return json.dumps({name: value for name, value in fields.items() if value is not ...}).encode()


def database(
    state: Path, zarr: bytes | ocdbt.Location | None = None, chunk: bytes | ocdbt.Location | None = None
) -> Path:
    """Write an array with one chunk. The description and the chunk are given as bytes or as a location."""
    zarr, chunk = zarr or description(), chunk or VALUES.tobytes()
    return ocdbt.write(state, [ocdbt.leaf({"params.a/zarr.json": zarr, "params.a/c/0": chunk})])


def compressed(state: Path, frame: bytes, **changes: Any) -> Path:
    leaf = ocdbt.leaf(
        {"params.a/zarr.json": description(codecs=[BYTES, ZSTD], **changes), "params.a/c/0": (0, 0, len(frame))}
    )
    return ocdbt.write(state, [frame, leaf])


def node(state: Path, content: bytes, compression: int = 0) -> Path:
    return ocdbt.write(state, [ocdbt.framed(ocdbt.NODE, content, compression)])


def in_another_file(state: Path, name: str) -> Path:
    (state.parent / "secret").write_bytes(b"secretsecret")
    files = (ocdbt.DATA_FILE, name)
    leaf = ocdbt.leaf({"params.a/zarr.json": description(), "params.a/c/0": (1, 0, 12)}, files)
    return ocdbt.write(state, [leaf], files=files)


def linked(state: Path) -> Path:
    database(state)
    (state / "d").rename(state.parent / "elsewhere")
    (state / "d").symlink_to(state.parent / "elsewhere")
    return state


def no_file(state: Path, name: str, make: Callable[[Path], object]) -> Path:
    database(state)
    (state / name).unlink()
    make(state / name)
    return state


def nodes_of_nodes(state: Path, height: int = 30) -> Path:
    """Write thirty nodes, each with two links to the next: there are 2^30 paths from the root to the leaf."""
    nodes, start = [ocdbt.leaf({"zz/zarr.json": description()})], 0
    for level in range(1, height + 1):
        below = (0, start, len(nodes[-1]))
        start += len(nodes[-1])
        first = chr(ord("z") - level) if level < 26 else "A"
        nodes.append(ocdbt.interior(level, {f"{first}0": below, f"{first}1": below}))
    return ocdbt.write(state, nodes, height)


def itself(state: Path) -> Path:
    size = len(ocdbt.interior(1, {"a": (0, 0, 100)}))
    return ocdbt.write(state, [ocdbt.interior(1, {"a": (0, 0, size)})], 1)


def bomb_of_a_table(state: Path) -> Path:
    """Write a compressed table of 2^30 files without names in 33 kB, for which TensorStore allocates 3 GB."""
    head = bytes([0]) + ocdbt.varint(2**33)
    frame = ocdbt.ZSTD + b"\0\x38" + (len(head) << 3).to_bytes(3, "little") + head + ocdbt.zstd_zeros(2**30)[6:]
    return node(state, frame, 1)


def overlong(state: Path) -> Path:
    """Like `bomb_of_a_table`, but the varint of the version takes two bytes, which shifts the compression field."""
    bomb_of_a_table(state)
    content = (state / ocdbt.DATA_FILE).read_bytes()[14:-4]
    whole = ocdbt.framed(ocdbt.NODE, b"\x01" + content)
    patched = bytearray(whole[:-4])
    patched[12:14] = b"\x80\0"
    return ocdbt.write(state, [bytes(patched) + google_crc32c.value(bytes(patched)).to_bytes(4, "little")])


HOSTILE: dict[str, Callable[[Path], Path]] = {
    **{f"shape {shape}": lambda state, shape=shape: database(state, description(shape, (3,)))
       for shape in ([2**40], [2**70], [-3], [0], [True], ["3"], [3.0], 3, [3, 3], [1] * 100, [2**31 - 1] * 3)},
    **{f"chunk shape {chunk}": lambda state, chunk=chunk: database(state, description((3,), chunk))
       for chunk in ([2**40], [4], [0], [-1], [True], ["3"], [], [3, 1], 3)},
    **{f"data type {dtype}": lambda state, dtype=dtype: database(state, description(data_type=dtype))
       for dtype in ("object", "string", "complex64", "float128", "r8", "", None, 3, ["float32"], {"name": "struct"})},
    **{f"codecs {number}": lambda state, codecs=codecs: database(state, description(codecs=codecs))
       for number, codecs in enumerate((
           [], None, "bytes", [ZSTD], [BYTES, {"name": "gzip", "configuration": {"level": 5}}], [BYTES, ZSTD, ZSTD],
           [BYTES, {"name": "blosc", "configuration": {}}], [{"name": "bytes", "configuration": {"endian": "big"}}],
           [{"name": "transpose", "configuration": {"order": [0]}}, BYTES], [sharded([BYTES]), ZSTD],
           [sharded([sharded([BYTES])])], [sharded([BYTES], (1,))], [sharded([BYTES], (2**40,))],
           [sharded([BYTES], index_location="start")], [sharded([BYTES], index_codecs=[BYTES, ZSTD])],
           [BYTES, {"name": "zstd", "configuration": {"level": "x"}}], [[BYTES]], [{"name": ["bytes"]}]))},
    **{f"{name} {value!r}": lambda state, name=name, value=value: database(state, description(**{name: value}))
       for name, value in (("node_type", "group"), ("zarr_format", 2), ("fill_value", [1]),
                           ("storage_transformers", [{"name": "x"}]), ("chunk_key_encoding", {"name": "v2"}),
                           ("chunk_grid", {"name": "irregular"}), ("chunk_grid", None), ("codecs", ...))},
    "a description that is deep": lambda state: database(state, b"[" * 500),
    "a description that is not JSON": lambda state: database(state, b"{"),
    "a description that is too long": lambda state: database(state, description() + b" " * 2**15),
    "a description beyond the file": lambda state: database(state, (0, 0, 2**60)),
    "a chunk beyond the file": lambda state: database(state, chunk=(0, 0, 2**60)),
    "a chunk before the file": lambda state: database(state, chunk=(0, 2**62, 2**62)),
    "a chunk that is short": lambda state: database(state, chunk=bytes(11)),
    "a chunk that is long": lambda state: database(state, chunk=bytes(13)),
    "a chunk of two gigabytes": lambda state: compressed(state, ocdbt.zstd_zeros(2**31, 2**31)),
    "a chunk that claims 12 bytes": lambda state: compressed(state, ocdbt.zstd_zeros(2**31, 12)),
    "a chunk without a size": lambda state: compressed(state, ocdbt.zstd_zeros(2**31)),
    "a chunk of a million blocks": lambda state: compressed(state, ocdbt.ZSTD + b"\0\x38" + bytes(3_000_000)),
    "a chunk that is no frame": lambda state: compressed(state, b"not zstd at all"),
    "two frames": lambda state: compressed(state, 2 * ocdbt.zstd_zeros(12, 12)),
    "a node of two gigabytes": lambda state: node(state, ocdbt.zstd_zeros(2**31), 1),
    "a table of a billion files": bomb_of_a_table,
    "a table of a billion files behind an overlong number": overlong,
    "a table that claims 2^40 files": lambda state: node(state, bytes([0]) + ocdbt.varint(2**40) + bytes(1000)),
    "a node that is no frame": lambda state: node(state, b"not zstd at all", 1),
    "another kind of compression": lambda state: node(state, bytes(100), 2),
    "a node that is empty": lambda state: node(state, b""),
    "a file outside the database": lambda state: in_another_file(state, "../secret"),
    "a file outside the database, through a folder": lambda state: in_another_file(state, "d/../../secret"),
    "a file with an absolute path": lambda state: in_another_file(state, str(state.parent / "secret")),
    "a file named with NUL": lambda state: in_another_file(state, "d/\0"),
    "a file that is missing": lambda state: in_another_file(state, "d/missing"),
    "a folder that is a link": linked,
    "data in a pipe": lambda state: no_file(state, ocdbt.DATA_FILE, os.mkfifo),
    "a manifest in a pipe": lambda state: no_file(state, "manifest.ocdbt", os.mkfifo),
    "a manifest that is a link": lambda state: no_file(
        state, "manifest.ocdbt", lambda path: path.symlink_to("/dev/zero")),
    "no manifest": lambda state: no_file(state, "manifest.ocdbt", lambda path: None),
    "an empty manifest": lambda state: no_file(state, "manifest.ocdbt", Path.touch),
    "a manifest of 100 MB": lambda state: no_file(
        state, "manifest.ocdbt", lambda path: path.write_bytes(bytes(100_000_000))),
    "a manifest that decompresses to gigabytes": lambda state: no_file(
        state, "manifest.ocdbt",
        lambda path: path.write_bytes(ocdbt.framed(ocdbt.MANIFEST, ocdbt.zstd_zeros(2**32), 1))),
    "a numbered manifest": lambda state: no_file(
        state, "manifest.ocdbt", lambda path: path.write_bytes(ocdbt.manifest((0, 0, 1), kind=1))),
    "2^30 paths through the nodes": nodes_of_nodes,
    "a node that refers to itself": itself,
    "a key that is not of an array": lambda state: ocdbt.write(state, [ocdbt.leaf({"\x1b[31m": b"x"})]),
    "a key with ..": lambda state: ocdbt.write(state, [ocdbt.leaf({"../a/zarr.json": description()})]),
    "a long key": lambda state: ocdbt.write(state, [ocdbt.leaf({"a" * 5000 + "/zarr.json": description()})]),
    "an array without a description": lambda state: ocdbt.write(state, [ocdbt.leaf({"a/c/0": b"x"})]),
    "a chunk outside the array": lambda state: ocdbt.write(
        state, [ocdbt.leaf({"a/zarr.json": description(), "a/c/1": bytes(12)})]),
    "a chunk of another rank": lambda state: ocdbt.write(
        state, [ocdbt.leaf({"a/zarr.json": description(), "a/c/0/0": bytes(12)})]),
}  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_database_is_refused_at_once(tmp_path: Path, name: str) -> None:
    state = HOSTILE[name](tmp_path / "state")
    with within_budget(), pytest.raises(CheckpointError, match="state") as error:
        for array in open_arrays(state).values():
            array.read()
    message = str(error.value)
    assert message.isprintable() and "Traceback" not in message and len(message) < 1000


def test_a_missing_chunk_is_an_error_and_not_zeros(tmp_path: Path) -> None:
    state = ocdbt.write(tmp_path / "state", [ocdbt.leaf({"params.a/zarr.json": description()})])
    with pytest.raises(CheckpointError, match="another checkpoint"):
        open_arrays(state)["params.a"].read()


def two_nodes(state: Path) -> Path:
    first, second = (
        ocdbt.leaf({key: value})
        for key, value in (("params.a/c/0", VALUES.tobytes()), ("params.a/zarr.json", description()))
    )
    children = {"params.a/c/0": (0, 0, len(first)), "params.a/zarr.json": (0, len(first), len(second))}
    return ocdbt.write(state, [first, second, ocdbt.interior(1, children)], 1)


@pytest.mark.parametrize("write", [database, two_nodes])
def test_a_database_written_by_hand_is_read(tmp_path: Path, write: Callable[[Path], Path]) -> None:
    arrays = open_arrays(write(tmp_path / "state"))
    assert arrays.keys() == {"params.a"}
    assert (arrays["params.a"].shape, arrays["params.a"].dtype) == ((3,), np.float32)
    np.testing.assert_array_equal(arrays["params.a"].read(), VALUES)
    assert arrays["params.a"].read(1) == 1


@pytest.mark.parametrize("use_compression", [True, False])
def test_databases_of_orbax_are_read(tmp_path: Path, use_compression: bool) -> None:
    """Earlier versions compressed runs. The arrays have zeros, normal numbers, or both, in one block or many."""
    rng = np.random.default_rng(0)
    noise = rng.normal(size=(600, 512)).astype(np.float32)
    arrays = {
        "noise": noise,
        "zeros": np.zeros((1200, 1024), np.float32),
        "both": np.where(np.arange(512) < 200, noise, 0).astype(np.float32),
        "narrow": noise.astype(ml_dtypes.bfloat16),
        "scalar": np.int32(3),
        "integers": np.arange(7),
        "flags": np.array([True, False]),
    }
    arrays = {name: np.asarray(jnp.asarray(array)) for name, array in arrays.items()}
    context = ocp.Context()
    context.array.saving.use_compression = use_compression
    with context:
        ocp.save(tmp_path / "saved", {"params": jax.tree.map(jnp.asarray, arrays)})
    (state,) = {path.parent for path in (tmp_path / "saved").rglob("manifest.ocdbt") if "process" not in str(path)}
    found = open_arrays(state)
    assert found.keys() == {f"params.{name}" for name in arrays}
    for name, array in arrays.items():
        stored = found[f"params.{name}"]
        assert (stored.shape, stored.dtype) == (array.shape, array.dtype)
        assert stored.read().tobytes() == array.tobytes()
