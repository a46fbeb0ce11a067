"""`jax.export` with symbolic batch and length: one program for all shapes, which runs without this project."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export
from support.implementations import jax_model
from support.models import TINY, random_checkpoint, random_ids

CONFIG = replace(TINY, n_layer=2)
SHAPES = ((1, 1), (3, 9), (2, CONFIG.n_positions))
ROUNDING = 1e-5
"""Float32 logits of order 1. A program with a fixed shape sums in another order."""


OTHERS = {
    "attention_mask": lambda ids: (np.arange(ids.shape[1]) >= np.arange(len(ids))[:, None]).astype(np.int32),
    "segment_ids": lambda ids: np.broadcast_to(np.arange(ids.shape[1], dtype=np.int32) // 5 + 1, ids.shape),
}
"""A further input of the shape of the ids."""


@pytest.mark.parametrize("scan", [False, True], ids=["loop", "scan"])
def test_a_symbolic_length_needs_a_bound(scan: bool) -> None:
    model, params = jax_model(random_checkpoint(CONFIG), scan=scan)
    ids = jax.ShapeDtypeStruct(export.symbolic_shape("b, t"), jnp.int32)
    with pytest.raises(ValueError, match="t <= 40"):
        export.export(jax.jit(lambda p, i: model.apply({"params": p}, i)))(params, ids)


@pytest.mark.processes
@pytest.mark.parametrize("name", OTHERS)
@pytest.mark.parametrize("scan", [False, True], ids=["loop", "scan"])
def test_an_exported_program_runs_without_this_project(scan: bool, name: str, tmp_path: Path) -> None:
    pytest.importorskip("flatbuffers")  # JAX needs it to serialize
    model, params = jax_model(random_checkpoint(CONFIG), scan=scan)

    def logits(params: Any, ids: Any, other: Any) -> Any:
        return model.apply({"params": params}, ids, **{name: other})

    shape = export.symbolic_shape("b, t", constraints=(f"t <= {CONFIG.n_positions}",))
    ids = jax.ShapeDtypeStruct(shape, jnp.int32)
    (tmp_path / "program").write_bytes(export.export(jax.jit(logits))(params, ids, ids).serialize())
    given = {f"ids {shape}": random_ids(CONFIG, *shape).astype(np.int32) for shape in SHAPES}
    others = {f"other {shape}": OTHERS[name](given[f"ids {shape}"]) for shape in SHAPES}
    leaves = {f"parameter {i}": np.asarray(leaf) for i, leaf in enumerate(jax.tree.leaves(params))}
    np.savez(tmp_path / "inputs.npz", **given, **others, **leaves)
    script = Path(__file__).with_name("exported.py")
    files = [tmp_path / each for each in ("program", "inputs.npz", "outputs.npz")]
    subprocess.run([sys.executable, script, *files], check=True, timeout=300)
    found = np.load(tmp_path / "outputs.npz")
    for shape in SHAPES:
        expected = logits(params, given[f"ids {shape}"], others[f"other {shape}"])
        assert np.abs(found[f"ids {shape}"] - expected).max() <= ROUNDING, shape
