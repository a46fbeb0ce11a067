"""The training step of `gpt2 train`, compiled for a mesh of devices that need not be here."""

from __future__ import annotations

import re
import time
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
from jax.errors import JaxRuntimeError
from jax.sharding import Mesh

from gpt2_jax.choices import Implementation
from gpt2_jax.model import GPT2
from gpt2_jax.ops.attention import fastest
from gpt2_jax.plan.errors import PlanError
from gpt2_jax.training import TrainConfig, TrainState, make_optimizer, make_train_step
from gpt2_jax.training.batches import Rows, rows_of_step
from gpt2_jax.training.state import described_state, make_model

_REFUSED = (
    re.compile(r"\((?P<needed>[\d.]+)(?P<n>[KMGT])\) exceeds available HBM \((?P<had>[\d.]+)(?P<h>[KMGT])\)"),
    re.compile(r"Used (?P<needed>[\d.]+)(?P<n>[KMGT]) of (?P<had>[\d.]+)(?P<h>[KMGT]) hbm"),
)
"""How libtpu says that a program is too large: before it is scheduled, and after."""

_UNITS = {"K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


@dataclass(frozen=True)
class Step:
    """A step before it is compiled."""

    config: TrainConfig
    """With the attention that it runs."""
    mesh: Mesh
    state: TrainState
    """Shape, dtype and place of each array."""
    batch: dict[str, jax.ShapeDtypeStruct]
    model: GPT2


@dataclass(frozen=True)
class Program:
    """What the compiler says of a program; bytes are a device's. Without a text it was refused, for it needs `needed`
    bytes and has `had`."""

    seconds: float
    """That compiling took."""
    text: str | None = None
    arguments: int = 0
    outputs: int = 0
    aliased: int = 0
    """Of the outputs, those that lie where an argument lay: the state is donated."""
    temporaries: int = 0
    peak: int | None = None
    """The compiler's own figure; None where it gives none, as for CPU."""
    needed: int | None = None
    had: int | None = None


def described_step(config: TrainConfig, mesh: Mesh) -> Step:
    """What the step takes and where that lies; raises `MeshError` or `TrainingError` where the mesh does not divide
    it."""
    rows = rows_of_step(config, mesh)
    # Of what a device runs: made with "auto", because a kernel for TPU is none that this process could name.
    model = make_model(replace(config, attention="auto"))
    state = described_state(config, model, make_optimizer(config.optimizer, config.max_steps), mesh)
    config = replace(config, attention=_attention(config, mesh))
    return Step(config, mesh, state, _batch(config, rows), model.clone(attention=config.attention))


def compile_step(step: Step) -> Program:
    """Compile it as `gpt2 train` does."""
    config, tx = step.config, make_optimizer(step.config.optimizer, step.config.max_steps)
    train_step: Any = make_train_step(
        step.model,
        tx,
        seed=config.seed,
        num_microbatches=config.num_microbatches,
        max_grad_norm=config.optimizer.max_grad_norm,
        ema_decay=config.ema_decay,
    )
    began = time.perf_counter()
    try:
        with jax.set_mesh(step.mesh):
            compiled = train_step.lower(step.state, step.batch).compile()
    except JaxRuntimeError as error:
        needed, had = refusal(str(error))
        return Program(time.perf_counter() - began, needed=needed, had=had)
    memory = compiled.memory_analysis()
    on_tpu = step.mesh.devices.flat[0].platform == "tpu"
    return Program(
        time.perf_counter() - began,
        compiled.as_text(),
        memory.argument_size_in_bytes,
        memory.output_size_in_bytes,
        memory.alias_size_in_bytes,
        memory.temp_size_in_bytes,
        memory.peak_memory_in_bytes if on_tpu else None,
    )


def refusal(message: str) -> tuple[int, int]:
    """Bytes that a program needs and has, by the compiler's message; raises `PlanError` for any other."""
    for pattern in _REFUSED:
        if (found := pattern.search(message)) is not None:
            needed, had = float(found["needed"]) * _UNITS[found["n"]], float(found["had"]) * _UNITS[found["h"]]
            return int(needed), int(had)
    raise PlanError(f"the compiler does not take this step: {message.splitlines()[0]}")


def _attention(config: TrainConfig, mesh: Mesh) -> Implementation:
    """As "auto" takes it on the mesh's devices, which may be others than this process's."""
    platform = mesh.devices.flat[0].platform
    if config.attention != "auto":
        if {"cudnn": "gpu", "splash": "tpu"}.get(config.attention, platform) != platform:
            raise PlanError(f"attention={config.attention}: not on {platform}; choose auto, xla or blockwise")
        return config.attention
    if config.model.attn_pdrop > 0 or config.examples == "documents":
        return "xla"
    return fastest(platform, jnp.dtype(config.dtype), config.seq_len, config.model.head_size)


def _batch(config: TrainConfig, rows: Rows) -> dict[str, jax.ShapeDtypeStruct]:
    names = ("input_ids", "labels", *(("attention_mask",) if config.examples == "documents" else ()))
    array = jax.ShapeDtypeStruct((config.batch_size, config.seq_len), jnp.int32, sharding=rows.sharding)
    return dict.fromkeys(names, array)
