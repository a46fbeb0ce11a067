"""`config.json`, read by transformers. Harmless extra fields survive an export."""

from __future__ import annotations

import json
import logging
import random
from pathlib import Path

import transformers
from fuzz import json_damage
from support.models import SMALLEST

import bridge
from bridge.config import GPT2Config, harmless_fields
from bridge.formats.directory import read_json, write_json

logging.getLogger("transformers").setLevel(logging.CRITICAL)
COMPARED = tuple(name for name in GPT2Config().to_hf() if name not in ("architectures", "model_type", "n_ctx"))


def samples(folder: Path) -> list[Path]:
    ours = SMALLEST.to_hf({"torch_dtype": "float32", "id2label": {"0": "LABEL_0"}, "bos_token_id": 10})
    for name, fields in (("ours", ours), ("theirs", json.loads(transformers.GPT2Config().to_json_string(False)))):
        (folder / name).mkdir()
        write_json(folder / name / "config.json", {**fields, "model_type": "gpt2"})
    return [folder / "ours", folder / "theirs"]


def mutable(source: Path) -> list[Path]:
    return [source / "config.json"]


def damage(content: bytes, file: Path, rng: random.Random) -> bytes:
    return json_damage.damaged_json(content, rng)


def judge(source: Path) -> str:
    """A file that loads must have the values that transformers reads, and survive a round trip."""
    try:
        fields = read_json(source / "config.json")
        config = GPT2Config.from_hf(fields)
    except bridge.BridgeError:
        return "refused"
    carried = harmless_fields(fields)
    write_json(source.parent / "written.json", config.to_hf(carried))
    again = read_json(source.parent / "written.json")
    assert GPT2Config.from_hf(again) == config
    assert harmless_fields(again) == carried
    try:
        theirs = transformers.GPT2Config.from_dict(json.loads((source / "config.json").read_bytes()))
    except Exception:  # its validation raises any exception
        return "only we load it"
    compared = set(COMPARED)
    if not {"n_positions", "max_position_embeddings"} & fields.keys():
        compared.remove("n_positions")  # n_ctx stands in for it here, and 1024 in transformers
    different = [name for name in sorted(compared) if getattr(config, name) != getattr(theirs, name)]
    assert not different, f"transformers reads {different} as {[getattr(theirs, name) for name in different]}"
    return "loaded"
