"""`run.json`: what a run was begun with."""

from __future__ import annotations

import json
import random
from pathlib import Path

from fuzz import json_damage

from gpt2_jax.training import PRESETS, TrainingError
from gpt2_jax.training.config import _ADDED, flat, from_flat
from gpt2_jax.training.run.directory import stored_identity


def samples(folder: Path) -> list[Path]:
    sources = [folder / preset for preset in ("nano", "gpt2")]
    for source in sources:
        source.mkdir()
        stored = {"version": 1, "config": flat(PRESETS[source.name]), "data": "0" * 64, "tokenizer": "1" * 64}
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
    added = dict.fromkeys(_ADDED)  # runs of earlier versions lack these
    assert flat(identity.config) == {**added, **stored["config"]}
    return "loaded"
