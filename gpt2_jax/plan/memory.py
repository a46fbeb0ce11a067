"""Memory of a device during a training step: exact sizes of the state, and estimates of activations."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax

import bridge
from gpt2_jax.plan.compiled import AbstractStep, Program
from gpt2_jax.training import TrainConfig

FLOAT32_BYTES = 4
DTYPE_BYTES = {"float32": 4, "bfloat16": 2}


@dataclass(frozen=True)
class StateBytes:
    """Bytes on each device between steps."""

    parameters: int
    """The trained parameters: all weights, the weights that are not frozen, or the adapter."""
    optimizer: int
    ema: int
    """The exponential moving average of the parameters; 0 without one."""
    batch: int
    frozen: int = 0
    """The parameters that are not trained."""

    @property
    def total(self) -> int:
        return self.parameters + self.optimizer + self.ema + self.batch + self.frozen


@dataclass(frozen=True)
class Peak:
    """Peak memory of a step, in bytes, on the device that uses the most."""

    needed: int
    available: int | None
    """None for CPU devices."""

    @property
    def missing(self) -> int:
        """Bytes by which the step exceeds the memory; 0 if it fits."""
        return 0 if self.available is None else max(0, self.needed - self.available)


def state_bytes(step: AbstractStep) -> StateBytes:
    """Sizes of the step's arguments on one device."""
    return StateBytes(
        parameters=device_bytes(step.state.params),
        optimizer=device_bytes(step.state.opt_state),
        ema=device_bytes(step.state.ema_params),
        batch=device_bytes(step.batch),
        frozen=device_bytes(step.state.frozen),
    )


def device_bytes(tree: Any) -> int:
    """Size of one device's shards of a tree of `jax.ShapeDtypeStruct`."""
    return sum(math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def peak_memory(program: Program, available: int | None) -> Peak:
    """The compiler's figure for the peak if it reports one, otherwise an upper bound."""
    if program.required_bytes is not None:
        return Peak(program.required_bytes, program.limit_bytes)
    return Peak(program.peak_bytes or peak_upper_bound(program), available)


def peak_upper_bound(program: Program) -> int:
    """Bytes of arguments, outputs and temporaries, as if all were alive at once."""
    return program.argument_bytes + program.output_bytes - program.alias_bytes + program.temp_bytes


def saved_activation_bytes(config: TrainConfig, mesh: Mapping[str, int]) -> int:
    """Estimated bytes of activations that a device saves for the backward pass of one microbatch.

    For each layer, remat `full` saves its input. `dots` also saves the results of matrix products and of attention.
    `none` also saves the inputs of norms and activation functions.
    """
    c = config.model
    D, split = c.n_embd, mesh["tensor"]
    inputs, projected, attended = D, 2 * D, D / split
    inner = (3 * D + c.feed_forward_size) / split  # query, key and value, and the hidden layer of the feed-forward
    row_sums = FLOAT32_BYTES * c.n_head / split  # of attention
    width = DTYPE_BYTES[config.dtype]
    per_token = {
        "full": width * inputs,
        "dots": width * (inputs + projected + attended + inner) + row_sums,
        "none": width * (3 * inputs + projected + attended + inner + 2 * c.feed_forward_size / split) + row_sums,
    }[config.remat]
    tokens = config.batch_size // config.num_microbatches * config.seq_len / (mesh["data"] * mesh["fsdp"])
    return int(tokens * c.n_layer * per_token)


def layer_parameters(config: TrainConfig) -> int:
    """Number of parameters of all layers, without embeddings, output projection and final norm."""
    c = config.model
    embeddings = (1 if c.tie_word_embeddings else 2) * c.vocab_size + c.n_positions
    return bridge.num_parameters(c) - embeddings * c.n_embd - c.n_embd * (2 if c.bias else 1)
