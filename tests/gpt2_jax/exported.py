"""Call an exported model in a process that cannot import this project.

python exported.py PROGRAM INPUTS.npz OUTPUTS.npz
"""

from __future__ import annotations

import sys
from pathlib import Path

for package in ("gpt2_jax", "gpt2_torch", "bridge", "flax"):
    sys.modules[package] = None  # type: ignore[assignment]  # importing it is an error

import jax  # noqa: E402
import numpy as np  # noqa: E402
from jax import export  # noqa: E402


def main(program: Path, inputs: Path, outputs: Path) -> None:
    exported = export.deserialize(bytearray(program.read_bytes()))
    arrays = np.load(inputs)
    names = [name for name in arrays if name.startswith("ids")]
    leaves = [arrays[f"parameter {i}"] for i in range(exported.in_tree.num_leaves - 2)]
    (params, _, _), _ = jax.tree.unflatten(exported.in_tree, [*leaves, 0, 0])
    found = {name: exported.call(params, arrays[name], arrays[name.replace("ids", "other")]) for name in names}
    np.savez(outputs, **{name: np.asarray(logits) for name, logits in found.items()})


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
