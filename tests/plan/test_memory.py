"""Bytes of a device by the table of shardings, against formulas written out here; and what the compiler says."""

from __future__ import annotations

from dataclasses import replace

import pytest

from bridge import GPT2Config, num_parameters
from gpt2_jax.parallel.sharding import make_mesh
from gpt2_jax.plan.compiled import Program, described_step, refusal
from gpt2_jax.plan.errors import PlanError
from gpt2_jax.plan.memory import kept_bytes, layer_parameters, peak, state_bytes, sum_of_parts
from gpt2_jax.plan.suggest import divides, spread_state
from gpt2_jax.training import PRESETS, TrainConfig, TrainState

COUNTS = 2 * 4
"""AdamW's count of steps and its schedule's, of int32."""


def described(config: TrainConfig) -> TrainState:
    return described_step(replace(config, batch_size=1, num_microbatches=1), make_mesh("data=1")).state


def parameter_bytes(c: GPT2Config, rows: int, fsdp: int, tensor: int) -> int:
    """Of a device: the embeddings, of which positions do not follow `tensor`; projections, with those biases that do;
    other biases and norms, which are whole."""
    D, F = c.n_embd, c.feed_forward_size
    embeddings = rows * D // (fsdp * tensor) + c.n_positions * D // fsdp
    projections = (3 * D * D + D * D + 2 * D * F) // (fsdp * tensor)
    return 4 * (embeddings + c.n_layer * (projections + (3 * D + F) // tensor + 2 * D + 4 * D) + 2 * D)


@pytest.mark.parametrize("mesh", [(1, 1, 1), (4, 1, 1), (1, 4, 1), (1, 16, 1), (4, 4, 1), (1, 2, 2)])
def test_the_state_has_the_bytes_of_the_formula_on_every_mesh(mesh: tuple[int, int, int]) -> None:
    config = replace(PRESETS["gpt2"], batch_size=480, ema_decay=0.9)
    data, fsdp, tensor = mesh
    spread = spread_state(config, described(config), {"data": data, "fsdp": fsdp, "tensor": tensor})
    assert spread.parameters == parameter_bytes(config.model, 50304, fsdp, tensor)
    assert spread.optimizer == 2 * spread.parameters + COUNTS
    assert spread.mean == spread.parameters
    assert spread.batch == 2 * 4 * 480 // (data * fsdp) * 1024
    assert spread.total == 4 * spread.parameters + COUNTS + spread.batch


def test_the_largest_size_is_its_parameters_over_the_devices() -> None:
    config = PRESETS["gpt2-xl"]
    state, c = described(config), config.model
    whole = spread_state(config, state, {"data": 1, "fsdp": 1, "tensor": 1})
    assert whole.parameters == 4 * (num_parameters(c) + (50304 - 50257) * c.n_embd)
    in_sixteen = spread_state(config, state, {"data": 1, "fsdp": 16, "tensor": 1})
    assert in_sixteen.parameters == parameter_bytes(c, 50304, 16, 1)
    assert divides(state, {"data": 1, "fsdp": 64, "tensor": 1})
    assert not divides(state, {"data": 1, "fsdp": 256, "tensor": 1})  # 1600 columns
    assert not divides(state, {"data": 1, "fsdp": 1, "tensor": 2})  # 25 heads


def test_a_described_step_is_the_one_that_is_trained() -> None:
    config = replace(PRESETS["gpt2"], examples="documents", batch_size=4, num_microbatches=2)
    step = described_step(config, make_mesh("data=1"))
    assert set(step.batch) == {"input_ids", "labels", "attention_mask"}
    assert step.batch["labels"].shape == (4, 1024)
    assert step.config.attention == step.model.attention == "xla"  # which alone takes a mask
    assert state_bytes(step).batch == 3 * 4 * 4 * 1024
    for kernel in ("cudnn", "splash"):
        with pytest.raises(PlanError, match=f"attention={kernel}: not on cpu"):
            described_step(replace(PRESETS["gpt2"], attention=kernel), make_mesh("data=1"))


def test_what_is_kept_for_the_backward_pass() -> None:
    """4 rows of 8 in two parts, so two rows of 8 over two devices, D 6, F 24, H 2, L 3; by remat."""
    model = GPT2Config(vocab_size=11, n_positions=8, n_embd=6, n_layer=3, n_head=2)
    config = replace(PRESETS["nano"], model=model, batch_size=4, num_microbatches=2, seq_len=8)
    mesh, tokens = {"data": 1, "fsdp": 2, "tensor": 1}, 8 * 3
    assert kept_bytes(replace(config, remat="full"), mesh) == tokens * 4 * 6
    assert kept_bytes(config, mesh) == tokens * 4 * (6 + 18 + 6 + 6 + 24 + 6 + 2)
    assert kept_bytes(config, {"data": 1, "fsdp": 2, "tensor": 2}) == tokens * 4 * (18 + (18 + 6 + 24 + 2) / 2)
    assert layer_parameters(config) == 3 * (4 * 36 + 2 * 144 + 18 + 6 + 24 + 6 + 24)


def test_the_peak_is_the_compilers_where_it_gives_one() -> None:
    program = Program(1.0, "", arguments=50, outputs=40, aliased=30, temporaries=7)
    assert sum_of_parts(program) == 67
    assert peak(program, 60).missing == 7
    assert peak(program, None).missing == 0
    assert peak(replace(program, peak=55), 60).needed == 55
    refused = Program(1.0, needed=90, had=64)
    assert (peak(refused, 60).needed, peak(refused, 60).missing) == (90, 26)  # by the compiler's own limit


MESSAGES = {
    "RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO temporaries (38.50G) exceeds "
    "available HBM (15.75G).": (38.5, 15.75),
    "RESOURCE_EXHAUSTED: XLA:TPU compile permanent error. Ran out of memory in memory space hbm. Used 20.25G of "
    "15.75G hbm. Exceeded hbm capacity by 4.50G.": (20.25, 15.75),
    "RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 1.5T of 512M hbm.": (1536, 0.5),
}


@pytest.mark.parametrize("message", MESSAGES)
def test_a_refusal_says_how_much_is_needed_and_there(message: str) -> None:
    needed, had = MESSAGES[message]
    assert refusal(message) == (needed * 2**30, had * 2**30)


def test_any_other_refusal_is_passed_on() -> None:
    with pytest.raises(PlanError, match="does not take this step: INVALID_ARGUMENT: no such thing"):
        refusal("INVALID_ARGUMENT: no such thing\nand more")
