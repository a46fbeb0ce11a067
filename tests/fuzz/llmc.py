"""llm.c's files, read with numpy according to its train_gpt2.py."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import ml_dtypes
import numpy as np
from support.models import SMALLEST, random_checkpoint

import bridge

CONFIG = replace(SMALLEST, n_inner=None)


def samples(folder: Path) -> list[Path]:
    for name, dtype in (("fp32.bin", np.float32), ("bf16.bin", ml_dtypes.bfloat16)):
        bridge.save(random_checkpoint(CONFIG, dtype), folder / name, format="llmc")
    return [folder / "fp32.bin", folder / "bf16.bin"]


def mutable(source: Path) -> list[Path]:
    return [source]


def oracle(source: Path) -> dict[str, np.ndarray]:
    """Read the arrays in the order of `write_tensors` in train_gpt2.py."""
    header = np.fromfile(source, "<i4", 256).tolist()
    version, positions, vocabulary, layers, _, width, rows = header[1:8]
    numbers = np.fromfile(source, {3: np.float32, 5: ml_dtypes.bfloat16}[version], offset=1024)
    position = 0

    def take(*shape: int) -> np.ndarray:
        nonlocal position
        start, position = position, position + int(np.prod(shape))
        return numbers[start:position].reshape(shape)

    found = {"wte.weight": take(rows, width)[:vocabulary], "wpe.weight": take(positions, width)}
    linear = {"attn.c_attn": (3 * width, width), "attn.c_proj": (width, width)}
    linear_2 = {"mlp.c_fc": (4 * width, width), "mlp.c_proj": (width, 4 * width)}
    for norm, projections in (("ln_1", linear), ("ln_2", linear_2)):
        for kind in ("weight", "bias"):
            found |= {f"h.{i}.{norm}.{kind}": vector for i, vector in enumerate(take(layers, width))}
        for name, shape in projections.items():
            found |= {f"h.{i}.{name}.weight": matrix.T for i, matrix in enumerate(take(layers, *shape))}
            found |= {f"h.{i}.{name}.bias": vector for i, vector in enumerate(take(layers, shape[0]))}
    found |= {f"ln_f.{kind}": take(width) for kind in ("weight", "bias")}
    assert position == len(numbers)
    return found
