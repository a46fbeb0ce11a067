"""`run.json`, in the current version and in version 1."""

from __future__ import annotations

import json
import random
from pathlib import Path

from fuzz import json_damage

from gpt2_jax.training import PRESETS, TrainingError
from gpt2_jax.training.config import flat, from_flat
from gpt2_jax.training.run.identity import RENAMED_SINCE_1, VERSION, migrated, stored_identity


def samples(folder: Path) -> list[Path]:
    sources = [folder / preset for preset in ("nano", "gpt2")]
    current, old = (flat(PRESETS[source.name]) for source in sources)
    names = {new: name for name, new in RENAMED_SINCE_1.items()}
    old = {names.get(name, name): value for name, value in old.items()}
    for source, version, config in zip(sources, (VERSION, 1), (current, old), strict=True):
        source.mkdir()
        stored = {"version": version, "config": config, "data": "0" * 64, "tokenizer": "1" * 64}
        (source / "run.json").write_text(json.dumps({**stored, "versions": {"jax": "0.10"}, "flags": {}}, indent=2))
    return sources


def mutable(source: Path) -> list[Path]:
    return [source / "run.json"]


def damage(content: bytes, file: Path, rng: random.Random) -> bytes:
    return json_damage.damaged_json(content, rng)


def judge(source: Path) -> str:
    try:
        identity = stored_identity(source)
    except TrainingError as error:
        assert str(error).replace("\n", "").isprintable() and "run.json" in str(error)
        return "refused"
    stored = json.loads((source / "run.json").read_bytes())
    assert from_flat(json.loads(json.dumps(flat(identity.config)))) == identity.config
    config = stored["config"]
    assert flat(identity.config) == (migrated(config) if stored["version"] == 1 else config)
    return "loaded"
