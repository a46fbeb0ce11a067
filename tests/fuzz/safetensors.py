"""Hugging Face's safetensors, read by the `safetensors` package."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import ml_dtypes
import numpy as np
from safetensors.numpy import load_file
from support.models import SMALLEST, random_checkpoint

import bridge


def samples(folder: Path) -> list[Path]:
    tied, untied = SMALLEST, replace(SMALLEST, tie_word_embeddings=False)
    bridge.save(random_checkpoint(tied), folder / "whole", format="huggingface")
    bridge.save(random_checkpoint(untied, ml_dtypes.bfloat16), folder / "untied", format="huggingface")
    bridge.save(random_checkpoint(tied), folder / "shards", format="huggingface", max_shard_bytes=4_000)
    return [folder / "whole", folder / "untied", folder / "shards"]


def mutable(source: Path) -> list[Path]:
    return sorted(source.glob("model*"))


def oracle(source: Path) -> dict[str, np.ndarray]:
    stored = {name: array for file in source.glob("*.safetensors") for name, array in load_file(file).items()}
    return {name.removeprefix("transformer."): array for name, array in stored.items()}
