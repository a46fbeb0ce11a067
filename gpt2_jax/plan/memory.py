"""A device's memory: what lies there by the table of shardings, to the byte, and what the compiler adds."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax

import bridge
from gpt2_jax.plan.compiled import Program, Step
from gpt2_jax.training import TrainConfig

FLOAT32 = 4
WIDTH = {"float32": 4, "bfloat16": 2}


@dataclass(frozen=True)
class State:
    """Bytes on each device between steps."""

    parameters: int
    optimizer: int
    mean: int
    """The running mean of the parameters, where one is kept."""
    batch: int

    @property
    def total(self) -> int:
        return self.parameters + self.optimizer + self.mean + self.batch


@dataclass(frozen=True)
class Peak:
    """Bytes on the fullest device while a step runs, and what there is."""

    needed: int
    available: int | None
    """None where no chip is named."""

    @property
    def missing(self) -> int:
        """More than 0 where it does not fit."""
        return 0 if self.available is None else max(0, self.needed - self.available)


def state_bytes(step: Step) -> State:
    """Of the step's arrays, in the parts that the mesh makes of them."""
    return State(
        device_bytes(step.state.params),
        device_bytes(step.state.opt_state),
        device_bytes(step.state.ema_params),
        device_bytes(step.batch),
    )


def device_bytes(tree: Any) -> int:
    """Of one device's part of described arrays."""
    return sum(math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def peak(program: Program, available: int | None) -> Peak:
    """The compiler's own figure where it gives one; else what goes in, what comes out beside it, and temporaries, as
    if all were there at once."""
    if program.needed is not None:
        return Peak(program.needed, program.had)
    return Peak(program.peak or sum_of_parts(program), available)


def sum_of_parts(program: Program) -> int:
    """No less than the peak: temporaries that are not there at the same time are counted for both."""
    return program.arguments + program.outputs - program.aliased + program.temporaries


def kept_bytes(config: TrainConfig, mesh: Mapping[str, int]) -> int:
    """Of activations that a device keeps for the backward pass, by arithmetic: a part's rows, every layer.

    What of a layer is kept: its input (`full`); besides, the results of its products and of attention (`dots`); and
    besides, what norms and activations take (`none`).
    """
    c = config.model
    D, split = c.n_embd, mesh["tensor"]
    inputs, projected, attended = D, 2 * D, D / split
    inner = (3 * D + c.feed_forward_size) / split  # query, key and value, and the feed-forward's
    row_sums = FLOAT32 * c.n_head / split  # of attention
    width = WIDTH[config.dtype]
    per_token = {
        "full": width * inputs,
        "dots": width * (inputs + projected + attended + inner) + row_sums,
        "none": width * (3 * inputs + projected + attended + inner + 2 * c.feed_forward_size / split) + row_sums,
    }[config.remat]
    tokens = config.batch_size // config.num_microbatches * config.seq_len / (mesh["data"] * mesh["fsdp"])
    return int(tokens * c.n_layer * per_token)


def layer_parameters(config: TrainConfig) -> int:
    """Of all layers: what is neither an embedding nor the last norm."""
    c = config.model
    embeddings = (1 if c.tie_word_embeddings else 2) * c.vocab_size + c.n_positions
    return bridge.num_parameters(c) - embeddings * c.n_embd - c.n_embd * (2 if c.bias else 1)
