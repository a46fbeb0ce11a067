"""`manifest.json` of a checkpoint, with a valid or an invalid seal."""

from __future__ import annotations

import hashlib
import json
import random
from contextlib import suppress
from pathlib import Path

from fuzz import json_damage

from bridge import CheckpointError
from bridge.storage import manifest

FILES = {"a": b"first", "b/c": b"second", "b/d/e": b""}


def samples(folder: Path) -> list[Path]:
    source = folder / "committed"
    for name, content in FILES.items():
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        (source / name).write_bytes(content)
    manifest.commit(source, {"step": 7, "val_loss": 1.25, "config": {"n_layer": 2}})
    return [source]


def mutable(source: Path) -> list[Path]:
    return [source / manifest.MANIFEST]


def damage(content: bytes, file: Path, rng: random.Random) -> bytes:
    return json_damage.damaged_json(content, rng)


def repair(source: Path) -> None:
    """Update the hashes, as an attacker can."""
    path = source / manifest.MANIFEST
    with suppress(ValueError, RecursionError):
        content = json.loads(path.read_bytes())
        if isinstance(content, dict):
            content.pop("seal", None)
            seal = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
            path.write_bytes((json.dumps({**content, "seal": seal}, indent=1) + "\n").encode())


def judge(source: Path) -> str:
    try:
        about = manifest.verify(source)
    except CheckpointError as error:
        assert str(error).isprintable()
        return "refused"
    content = json.loads((source / manifest.MANIFEST).read_bytes())
    assert json.dumps(about) == json.dumps(content["about"])
    assert content["files"] == {
        name: {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()} for name, data in FILES.items()
    }
    return "loaded"
