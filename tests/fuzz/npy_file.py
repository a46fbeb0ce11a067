"""Token ids in `.npy`, read by numpy."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np

from gpt2_jax.data import DataError, TokenStream
from gpt2_jax.data.tokens.files import token_file

IDS = np.arange(40)
PARTS = ("descr", "fortran_order", "shape", "True", "False", "'<u2'", "'|O'", "'<f8'", "(40,)", *"()-,{}")
PIECES = (*PARTS, *"L'\" 09[]\n", str(2**70), "1e3", "(True,)", "(40, 1)", "()", "None")


def samples(folder: Path) -> list[Path]:
    paths = [folder / f"{dtype[1:]}.npy" for dtype in ("<u2", "<i4", "<u4", "<i8")]
    for path in paths:
        np.save(path, IDS.astype(f"<{path.stem}"))
    return paths


def mutable(source: Path) -> list[Path]:
    return [source]


def damage(content: bytes, file: Path, rng: random.Random) -> bytes:
    """Replace pieces of the header. The length field stays correct."""
    header = content[10:128].decode().strip()
    for _ in range(rng.choice((1, 1, 2, 3))):
        old, new = rng.choice([part for part in PARTS if part in header] or [header]), rng.choice(PIECES)
        repeated = rng.choice((1, 1, 1, 2, 1000))
        header = header.replace(old, new * repeated, 1) if rng.random() < 0.7 else header.replace(old, old + new, 1)
    encoded = (header + "\n").encode()[:60_000]
    return content[:8] + len(encoded).to_bytes(2, "little") + encoded + content[128:]


def judge(source: Path) -> str:
    try:
        ours = TokenStream.of([token_file(source)])
        ids = ours.read(0, len(ours))
    except DataError:
        return "refused"
    np.testing.assert_array_equal(ids, np.load(source, allow_pickle=False))
    return "loaded"
