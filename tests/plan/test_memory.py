"""Bytes per device, compared with explicit formulas, and the compiler's messages."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from bridge import GPT2Config, num_parameters
from gpt2_jax.lora import LoRAConfig
from gpt2_jax.parallel.sharding import make_mesh
from gpt2_jax.plan.compiled import Program, compile_step, describe_step, parse_out_of_memory
from gpt2_jax.plan.errors import PlanError
from gpt2_jax.plan.memory import (
    layer_parameters,
    peak_memory,
    peak_upper_bound,
    saved_activation_bytes,
    state_bytes,
)
from gpt2_jax.plan.suggest import can_shard, state_bytes_on
from gpt2_jax.training import PRESETS, TrainConfig, TrainState

COUNTS = 2 * 4
"""The step counts of AdamW and of the schedule, int32."""


def described(config: TrainConfig) -> TrainState:
    return describe_step(replace(config, batch_size=1, num_microbatches=1), make_mesh("data=1")).state


def parameter_bytes(c: GPT2Config, rows: int, fsdp: int, tensor: int) -> int:
    """Bytes of one device's parameters.

    Position embeddings are not sharded over `tensor`. Some biases are; other biases and norms are not sharded.
    """
    D, F = c.n_embd, c.feed_forward_size
    embeddings = rows * D // (fsdp * tensor) + c.n_positions * D // fsdp
    projections = (3 * D * D + D * D + 2 * D * F) // (fsdp * tensor)
    return 4 * (embeddings + c.n_layer * (projections + (3 * D + F) // tensor + 2 * D + 4 * D) + 2 * D)


@pytest.mark.parametrize("mesh", [(1, 1, 1), (4, 1, 1), (1, 4, 1), (1, 16, 1), (4, 4, 1), (1, 2, 2)])
def test_state_bytes_equal_the_formula_on_every_mesh(mesh: tuple[int, int, int]) -> None:
    config = replace(PRESETS["gpt2"], batch_size=480, ema_decay=0.9)
    data, fsdp, tensor = mesh
    spread = state_bytes_on(config, described(config), {"data": data, "fsdp": fsdp, "tensor": tensor})
    assert spread.parameters == parameter_bytes(config.model, 50304, fsdp, tensor)
    assert spread.optimizer == 2 * spread.parameters + COUNTS
    assert spread.ema == spread.parameters
    assert spread.batch == 2 * 4 * 480 // (data * fsdp) * 1024
    assert spread.total == 4 * spread.parameters + COUNTS + spread.batch


def test_state_bytes_of_the_largest_model() -> None:
    config = PRESETS["gpt2-xl"]
    state, c = described(config), config.model
    whole = state_bytes_on(config, state, {"data": 1, "fsdp": 1, "tensor": 1})
    assert whole.parameters == 4 * (num_parameters(c) + (50304 - 50257) * c.n_embd)
    in_sixteen = state_bytes_on(config, state, {"data": 1, "fsdp": 16, "tensor": 1})
    assert in_sixteen.parameters == parameter_bytes(c, 50304, 16, 1)
    assert can_shard(state, {"data": 1, "fsdp": 64, "tensor": 1})
    assert not can_shard(state, {"data": 1, "fsdp": 256, "tensor": 1})  # 1600 columns
    assert not can_shard(state, {"data": 1, "fsdp": 1, "tensor": 2})  # 25 heads


@pytest.mark.parametrize(
    ("examples", "third", "attention"),
    [
        ("documents", "attention_mask", "xla"),  # the only implementation that supports a mask
        ("packed", "segment_ids", "blockwise"),
    ],
)
def test_a_described_step_has_the_arguments_of_training(examples: Any, third: str, attention: str) -> None:
    config = replace(PRESETS["gpt2"], examples=examples, batch_size=4, num_microbatches=2)
    step = describe_step(config, make_mesh("data=1"))
    assert set(step.batch) == {"input_ids", "labels", third}
    assert step.batch["labels"].shape == (4, 1024)
    assert step.config.attention == step.model.attention == attention
    assert state_bytes(step).batch == 3 * 4 * 4 * 1024
    for kernel in ("cudnn", "splash"):
        with pytest.raises(PlanError, match=f"attention={kernel}: not available on cpu"):
            describe_step(replace(PRESETS["gpt2"], attention=kernel), make_mesh("data=1"))


def test_an_adapter_alone_has_gradients_and_optimizer_state() -> None:
    config = replace(PRESETS["gpt2"], lora=LoRAConfig(rank=8), batch_size=4, num_microbatches=1)
    sizes = state_bytes(describe_step(config, make_mesh("data=1")))
    assert sizes.frozen == parameter_bytes(config.model, 50304, 1, 1)
    assert sizes.parameters == 4 * 12 * 8 * (768 + 3 * 768)
    assert sizes.optimizer == 2 * sizes.parameters + 8
    assert sizes.total == sizes.frozen + 3 * sizes.parameters + 8 + sizes.batch


def test_saved_activation_bytes() -> None:
    """4 sequences of 8 tokens in two microbatches over two devices; D 6, F 24, H 2, L 3."""
    model = GPT2Config(vocab_size=11, n_positions=8, n_embd=6, n_layer=3, n_head=2)
    config = replace(PRESETS["nano"], model=model, batch_size=4, num_microbatches=2, seq_len=8)
    mesh, tokens = {"data": 1, "fsdp": 2, "tensor": 1}, 8 * 3
    assert saved_activation_bytes(replace(config, remat="full"), mesh) == tokens * 4 * 6
    assert saved_activation_bytes(config, mesh) == tokens * 4 * (6 + 18 + 6 + 6 + 24 + 6 + 2)
    assert saved_activation_bytes(config, {"data": 1, "fsdp": 2, "tensor": 2}) == tokens * 4 * (
        18 + (18 + 6 + 24 + 2) / 2
    )
    assert layer_parameters(config) == 3 * (4 * 36 + 2 * 144 + 18 + 6 + 24 + 6 + 24)


def test_the_peak_is_the_compilers_if_it_reports_one() -> None:
    program = Program(1.0, "", argument_bytes=50, output_bytes=40, alias_bytes=30, temp_bytes=7)
    assert peak_upper_bound(program) == 67
    assert peak_memory(program, 60).missing == 7
    assert peak_memory(program, None).missing == 0
    assert peak_memory(replace(program, peak_bytes=55), 60).needed == 55
    refused = Program(1.0, required_bytes=90, limit_bytes=64)
    assert (peak_memory(refused, 60).needed, peak_memory(refused, 60).missing) == (
        90,
        26,
    )  # the limit that the compiler reports


MESSAGES = {
    "RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO temporaries (38.50G) exceeds "
    "available HBM (15.75G).": (38.5, 15.75),
    "RESOURCE_EXHAUSTED: XLA:TPU compile permanent error. Ran out of memory in memory space hbm. Used 20.25G of "
    "15.75G hbm. Exceeded hbm capacity by 4.50G.": (20.25, 15.75),
    "RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 1.5T of 512M hbm.": (1536, 0.5),
}


@pytest.mark.parametrize("message", MESSAGES)
def test_required_and_available_bytes_are_parsed_from_out_of_memory_messages(message: str) -> None:
    required, limit = MESSAGES[message]
    assert parse_out_of_memory(message) == (required * 2**30, limit * 2**30)


def test_other_compiler_errors_are_reported() -> None:
    with pytest.raises(PlanError, match="rejects this step: INVALID_ARGUMENT: no such thing"):
        parse_out_of_memory("INVALID_ARGUMENT: no such thing\nand more")


def test_the_compiled_step_skips_non_finite_updates_if_the_configuration_does() -> None:
    model = GPT2Config(vocab_size=64, n_positions=16, n_embd=32, n_layer=1, n_head=2)
    config = TrainConfig(model=model, batch_size=2, seq_len=16, num_microbatches=1)
    stop, skip = (
        compile_step(describe_step(replace(config, non_finite=choice), make_mesh("data=1")))
        for choice in ("stop", "skip")
    )
    assert stop.text is not None and skip.text is not None
    assert skip.text.count(" is-finite(") > stop.text.count(" is-finite(")  # of every gradient, not of the loss alone
    assert skip.temp_bytes > stop.temp_bytes  # the old parameters are kept until the new ones are known to be finite
