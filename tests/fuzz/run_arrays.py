"""The arrays of a run, with valid or invalid checksums and manifests."""

from __future__ import annotations

import hashlib
import json
import random
import struct
from collections.abc import Iterator
from pathlib import Path

import google_crc32c
import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint.experimental.v1 as ocp
from support import ocdbt_bytes as ocdbt
from support.models import SMALLEST, random_state

import bridge
from bridge import CheckpointError, ConversionError
from bridge.formats.directory import write_config
from bridge.storage import manifest

NODE = struct.pack(">I", ocdbt.NODE)
TELLING = (*b"chunk_shape shape codecs bytes zstd little float32 [8] 8 1".split(), b'"', b"/")
PIECES = (*TELLING, *b"gzip [1099511627776] -1 99999999999 true null 1e999 {} ../ \x80".split())


def samples(folder: Path) -> list[Path]:
    """Write an ordinary run, a compressed one, and one whose uncompressed B-tree lets more mutants through."""
    params = {"params": bridge.to_flax(random_state(SMALLEST), SMALLEST, stacked=True)}
    sources = [folder / name / "checkpoints" / "7" for name in ("plain", "compressed", "by_hand")]
    for source in sources:
        source.mkdir(parents=True)
        write_config(source.parent.parent / "config.json", SMALLEST)
        (source.parent.parent / "run.json").write_text("{}")
        if source == sources[2]:
            ocdbt.write(source / "state", [ocdbt.leaf(dict(_zarr(params)))])
        else:
            context = ocp.Context()
            context.array.saving.use_compression = source == sources[1]
            with context:
                ocp.save(source / "saved", jax.tree.map(jnp.asarray, params))
            (source / "saved" / "state").rename(source / "state")
        manifest.commit(source, {"step": 7, "val_loss": 1.0})
    return sources


def _zarr(params: object) -> Iterator[tuple[str, bytes]]:
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        name, array = jax.tree_util.keystr(path, simple=True, separator="."), np.asarray(leaf)
        fields = {
            "chunk_grid": {"configuration": {"chunk_shape": array.shape}, "name": "regular"},
            "chunk_key_encoding": {"name": "default"},
            "codecs": [{"configuration": {"endian": "little"}, "name": "bytes"}],
            "data_type": "float32",
            "fill_value": 0.0,
            "node_type": "array",
            "shape": array.shape,
            "zarr_format": 3,
        }
        yield f"{name}/zarr.json", json.dumps(fields, separators=(",", ":")).encode()
        yield f"{name}/c" + "/0" * array.ndim, array.tobytes()


def mutable(source: Path) -> list[Path]:
    state = source / "state"
    return [
        source / "manifest.json",
        *sorted(p for p in state.rglob("*") if p.parent.name == "d"),
        state / "manifest.ocdbt",
    ]


def damage(content: bytes, file: Path, rng: random.Random) -> bytes:
    """Replace a piece of text, usually by one of the same length."""
    found = [piece for piece in TELLING if piece in content] or [content[:1]]
    old, new = rng.choice(found), rng.choice(PIECES)
    places = [at for at in range(len(content)) if content.startswith(old, at)]
    at = rng.choice(places)
    changed = content[:at] + new.ljust(len(old))[: len(old)] + content[at + len(old) :]
    return changed if rng.random() < 0.8 else content[:at] + new + content[at + len(old) :]


def repair(source: Path) -> None:
    """Update the checksums, as an attacker can."""
    for file in mutable(source)[1:]:
        content = bytearray(file.read_bytes())
        starts = [at for at in range(len(content)) if content.startswith(NODE, at)]
        for start in [0] if file.name == "manifest.ocdbt" else starts:
            size = int.from_bytes(content[start + 4 : start + 12], "little")
            if 16 <= size <= len(content) - start:
                end = start + size - 4
                content[end : end + 4] = struct.pack("<I", google_crc32c.value(bytes(content[start:end])))
        file.write_bytes(content)
    files = {
        path.relative_to(source).as_posix(): {
            "bytes": path.stat().st_size,
            "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
        }
        for path in sorted(source.rglob("*"))
        if path.is_file() and path.name != manifest.MANIFEST
    }
    content = manifest._rendered({"about": {"step": 7, "val_loss": 1.0}, "files": files})
    (source / manifest.MANIFEST).write_bytes(content)


def judge(source: Path) -> str:
    try:
        tensors = bridge.load(source).tensors
        arrays = dict(tensors.items())
    except (CheckpointError, ConversionError) as error:
        message = str(error)
        assert message.replace("\n", "").isprintable() and "Traceback" not in message and len(message) < 10_000
        return "refused"
    assert {name: array.shape for name, array in arrays.items()} == {
        p.torch_name: p.torch_shape for p in bridge.parameters(SMALLEST)
    }
    return "loaded"
