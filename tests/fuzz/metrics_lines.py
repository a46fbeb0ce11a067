"""`metrics.jsonl`: lines that are not records are skipped."""

from __future__ import annotations

import json
import random
from pathlib import Path

from fuzz import json_damage

from gpt2_jax.training.run.metrics import METRICS, read_metrics

RECORDS = [{"step": step, "train_loss": 2.5, "tokens_per_second": 1e5} for step in range(0, 20, 2)]


def samples(folder: Path) -> list[Path]:
    (folder / METRICS).write_text("".join(json.dumps(record) + "\n" for record in RECORDS))
    return [folder]


def mutable(source: Path) -> list[Path]:
    return [source / METRICS]


def damage(content: bytes, file: Path, rng: random.Random) -> bytes:
    lines = content.splitlines()
    at = rng.randrange(len(lines))
    lines[at] = json_damage.damaged_json(lines[at], rng)
    return b"\n".join(lines) + b"\n"


def judge(source: Path) -> str:
    records = read_metrics(source)
    for record in records:
        assert type(record["step"]) is int and 0 <= record["step"] < 2**31
        assert all(type(value) in (int, float) for value in record.values())
    if records == RECORDS:
        return "loaded"
    return "refused" if len(records) < len(RECORDS) else "another record"
