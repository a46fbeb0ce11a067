"""Compile the training step of `gpt2 train` for a mesh of devices that need not be available."""

from __future__ import annotations

import re
import time
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.errors import JaxRuntimeError
from jax.sharding import Mesh

from gpt2_jax.choices import Implementation
from gpt2_jax.model import GPT2
from gpt2_jax.ops.attention import fastest
from gpt2_jax.plan.errors import PlanError
from gpt2_jax.training import TrainConfig, TrainState, make_optimizer, make_train_step
from gpt2_jax.training.batch_placement import Rows, batch_rows
from gpt2_jax.training.state import abstract_state, make_model

_OUT_OF_MEMORY = (
    re.compile(r"\((?P<required>[\d.]+)(?P<r>[KMGT])\) exceeds available HBM \((?P<limit>[\d.]+)(?P<l>[KMGT])\)"),
    re.compile(r"Used (?P<required>[\d.]+)(?P<r>[KMGT]) of (?P<limit>[\d.]+)(?P<l>[KMGT]) hbm"),
)
"""libtpu's messages for a program that is too large, before and after scheduling."""

_UNITS = {"K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


@dataclass(frozen=True)
class AbstractStep:
    """A training step before compilation: its configuration, and the shapes of its arguments."""

    config: TrainConfig
    """With the attention implementation that the step runs, instead of "auto"."""
    mesh: Mesh
    state: TrainState
    """Shape, dtype and sharding of each array."""
    batch: dict[str, jax.ShapeDtypeStruct]
    model: GPT2


@dataclass(frozen=True)
class Program:
    """What the compiler reports for one device. If the program does not fit into memory, `text` is None."""

    compile_seconds: float
    text: str | None = None
    """The compiled program as HLO text."""
    argument_bytes: int = 0
    output_bytes: int = 0
    alias_bytes: int = 0
    """Size of the outputs that reuse the memory of an argument, because the state is donated."""
    temp_bytes: int = 0
    peak_bytes: int | None = None
    """The compiler's figure for the peak; None if it reports none, as on CPU."""
    required_bytes: int | None = None
    """The memory that the program needs, if it does not fit."""
    limit_bytes: int | None = None
    """The memory that is available, if the program does not fit."""


def describe_step(config: TrainConfig, mesh: Mesh) -> AbstractStep:
    """Return the shapes and shardings of the step's arguments.

    Raises:
        MeshError, TrainingError: the mesh does not divide the model or the batch.
    """
    rows = batch_rows(config, mesh)
    # Initialise with "auto", because this process's devices may not support the attention of the mesh's devices.
    model = make_model(replace(config, attention="auto"))
    state = abstract_state(config, model, _optimizer(config), mesh)
    config = replace(config, attention=_attention(config, mesh))
    return AbstractStep(config, mesh, state, _batch(config, rows), model.clone(attention=config.attention))


def _optimizer(config: TrainConfig) -> optax.GradientTransformation:
    return make_optimizer(config.optimizer, config.max_steps, config.model.n_layer)


def compile_step(step: AbstractStep) -> Program:
    """Compile the step as `gpt2 train` does."""
    config, tx = step.config, _optimizer(step.config)
    train_step: Any = make_train_step(
        step.model,
        tx,
        seed=config.seed,
        num_microbatches=config.num_microbatches,
        max_grad_norm=config.optimizer.max_grad_norm,
        ema_decay=config.ema_decay,
        skip_non_finite=config.non_finite == "skip",
    )
    began = time.perf_counter()
    try:
        with jax.set_mesh(step.mesh):
            compiled = train_step.lower(step.state, step.batch).compile()
    except JaxRuntimeError as error:
        required, limit = parse_out_of_memory(str(error))
        return Program(time.perf_counter() - began, required_bytes=required, limit_bytes=limit)
    memory = compiled.memory_analysis()
    on_tpu = step.mesh.devices.flat[0].platform == "tpu"
    return Program(
        compile_seconds=time.perf_counter() - began,
        text=compiled.as_text(),
        argument_bytes=memory.argument_size_in_bytes,
        output_bytes=memory.output_size_in_bytes,
        alias_bytes=memory.alias_size_in_bytes,
        temp_bytes=memory.temp_size_in_bytes,
        peak_bytes=memory.peak_memory_in_bytes if on_tpu else None,
    )


def parse_out_of_memory(message: str) -> tuple[int, int]:
    """Return the required and the available bytes in the compiler's message. Raises `PlanError` for other messages."""
    for pattern in _OUT_OF_MEMORY:
        if (found := pattern.search(message)) is not None:
            required, limit = float(found["required"]) * _UNITS[found["r"]], float(found["limit"]) * _UNITS[found["l"]]
            return int(required), int(limit)
    raise PlanError(f"the compiler rejects this step: {message.splitlines()[0]}")


def _attention(config: TrainConfig, mesh: Mesh) -> Implementation:
    """The implementation that "auto" selects on the mesh's devices, which may differ from this process's devices."""
    platform = mesh.devices.flat[0].platform
    if config.attention != "auto":
        if {"cudnn": "gpu", "splash": "tpu"}.get(config.attention, platform) != platform:
            raise PlanError(f"attention={config.attention}: not available on {platform}; use auto, xla or blockwise")
        return config.attention
    if config.model.attn_pdrop > 0 or config.examples == "documents":
        return "xla"
    arrays = jnp.dtype(config.dtype), config.seq_len, config.model.head_size
    return fastest(platform, *arrays, has_segments=config.examples == "packed")


def _batch(config: TrainConfig, rows: Rows) -> dict[str, jax.ShapeDtypeStruct]:
    third = {"documents": ("attention_mask",), "packed": ("segment_ids",)}.get(config.examples, ())
    names = ("input_ids", "labels", *third)
    array = jax.ShapeDtypeStruct((config.batch_size, config.seq_len), jnp.int32, sharding=rows.sharding)
    return dict.fromkeys(names, array)
