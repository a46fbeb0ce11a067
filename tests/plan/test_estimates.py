"""Time estimates and mesh suggestions, with hand-counted numbers."""

from __future__ import annotations

from dataclasses import replace

import pytest

from bridge import GPT2Config, num_parameters
from gpt2_jax.hardware import TPU_CHIPS, TpuChip
from gpt2_jax.parallel.sharding import make_mesh
from gpt2_jax.plan.communication.collectives import Collective, Collectives
from gpt2_jax.plan.compiled import describe_step
from gpt2_jax.plan.memory import StateBytes, layer_parameters
from gpt2_jax.plan.roofline import hbm_bytes, program_roofline, step_flops
from gpt2_jax.plan.suggest import (
    Suggestion,
    estimated_memory,
    estimated_traffic,
    possible_meshes,
    state_bytes_on,
    suggest,
)
from gpt2_jax.plan.topology import Topology
from gpt2_jax.training import PRESETS, TrainConfig

MODEL = GPT2Config(vocab_size=64, n_positions=16, n_embd=24, n_layer=2, n_head=4)
CONFIG = replace(PRESETS["nano"], model=MODEL, batch_size=12, num_microbatches=3, seq_len=16, dtype="bfloat16")
ONE, FOUR = {"data": 1, "fsdp": 1, "tensor": 1}, {"data": 1, "fsdp": 4, "tensor": 1}


def chip(memory: int = 2**40, link: float = 1e3) -> TpuChip:
    return TpuChip("made-up", (), 1e6, memory, memory, 1e12, link, 4, 10.0, {})


def suggested(config: TrainConfig, of: TpuChip, devices: int = 4, slices: int = 1) -> Suggestion | None:
    step = describe_step(replace(config, batch_size=1, num_microbatches=1), make_mesh("data=1"))
    return suggest(config, step.state, Topology("made-up", (None,) * devices, of, slices))


def test_flops_follow_palm_and_full_remat_adds_the_layers_forward_pass() -> None:
    tokens, D, L, T = 12 * 16, 24, 2, 16
    model = tokens * (6 * (num_parameters(MODEL) - 16 * D) + 12 * L * D * T)
    assert step_flops(CONFIG, ONE) == (model, 0.0)
    frozen = step_flops(CONFIG, ONE, trained=0.0)[0]  # a third of 6 N computes gradients of weights
    assert model - frozen == tokens * 2 * (num_parameters(MODEL) - 16 * D)
    again = tokens * (2 * layer_parameters(CONFIG) + 4 * L * D * T)
    assert step_flops(replace(CONFIG, remat="full"), FOUR) == (model / 4, again / 4)


def test_the_roofline_divides_by_the_chips_rates() -> None:
    state = StateBytes(parameters=400, optimizer=800, ema=0, batch=1)
    pair = Collective("all-reduce", ("f32[100]",), ((0, 1), (2, 3)), 5)
    across = Collective("all-reduce", ("f32[3]",), ((0, 2), (1, 3)), 1)
    line = program_roofline(CONFIG, FOUR, state, Collectives((pair, across)), (0, 0, 1, 1), chip())
    assert line.link_bytes == 5 * 400 / 2  # each device of a pair sends 400 bytes over two links
    assert line.network_bytes == 12
    assert line.communication_seconds == 1000 / 1e3 + 12 / 10.0
    assert line.compute_seconds == line.flops / 1e6
    assert line.hbm_seconds == hbm_bytes(CONFIG, FOUR, state) / 1e12
    assert line.overlapped_seconds == max(line.compute_seconds, line.hbm_seconds, line.communication_seconds)
    assert line.serial_seconds == max(line.compute_seconds, line.hbm_seconds) + line.communication_seconds
    assert line.mfu(line.compute_seconds) == pytest.approx(1.0, rel=1e-12)


def test_hbm_traffic() -> None:
    state = StateBytes(parameters=400, optimizer=800, ema=0, batch=1)
    kept = 16 * 2 * ((24 + 48 + 24 + 72 + 96) * 2 + 4 * 4)  # one sequence per microbatch and device
    part = 2 * 2 * layer_parameters(CONFIG) + 2 * kept + 2 * 400
    assert hbm_bytes(CONFIG, FOUR, state) == 3 * part + 2 * 1200 + 400


def test_traffic_of_each_mesh_axis() -> None:
    layers, embedding = 2 * layer_parameters(CONFIG), 64 * 24
    assert estimated_traffic(CONFIG, ONE) == (0.0, 0.0)
    embeddings = 2 * embedding * (2 + 4) * 3 / 4
    links, network = estimated_traffic(CONFIG, {"data": 4, "fsdp": 1, "tensor": 1})
    assert (links, network) == (3 * (2 * layers * 3 / 4 + embeddings), 0.0)
    links, _ = estimated_traffic(CONFIG, FOUR)
    assert links == 3 * (3 * layers * 3 / 4 + embeddings) + 2 * embedding * 3 / 4
    links, _ = estimated_traffic(CONFIG, {"data": 1, "fsdp": 1, "tensor": 4})
    assert links == 4 * 2 * 2 * (2 * 24 * 16 * 12) * 3 / 4
    _, network = estimated_traffic(CONFIG, {"data": 2, "fsdp": 1, "tensor": 1}, slices=2)
    assert network == 3 * (2 * layers / 2 + 2 * embedding * 6 / 2)


def test_possible_meshes_are_complete_and_data_is_a_multiple_of_slices() -> None:
    assert len(list(possible_meshes(4))) == 6
    assert {mesh["data"] for mesh in possible_meshes(8, slices=2)} == {2, 4, 8}


def test_data_parallelism_without_microbatches_is_suggested_if_everything_fits() -> None:
    found = suggested(replace(CONFIG, batch_size=1200), chip())
    assert found is not None
    assert (found.mesh, found.num_microbatches) == ({"data": 4, "fsdp": 1, "tensor": 1}, 1)
    assert found.flags == "--mesh data=4 --batch-size 1200 --num-microbatches 1"


def test_with_less_memory_the_state_is_sharded_and_with_too_little_nothing_is_suggested() -> None:
    step = describe_step(replace(CONFIG, batch_size=1, num_microbatches=1), make_mesh("data=1"))
    needed = {
        axis: estimated_memory(replace(CONFIG, num_microbatches=3), mesh, state_bytes_on(CONFIG, step.state, mesh))
        for axis in ("data", "fsdp")
        if (mesh := {**ONE, axis: 4})
    }
    assert needed["fsdp"] < needed["data"]
    found = suggested(CONFIG, chip(int(needed["fsdp"] / 0.83) + 2))
    assert found is not None
    assert found.memory_bytes <= needed["fsdp"]
    assert found.mesh["data"] < 4
    assert suggested(CONFIG, chip(10**6)) is None


def test_a_batch_that_does_not_divide_over_the_devices_is_changed() -> None:
    odd = replace(MODEL, n_head=3, vocab_size=63)  # so that tensor must be 1
    found = suggested(replace(CONFIG, model=odd, batch_size=6, num_microbatches=1), chip())
    assert found is not None
    assert (found.batch_size, found.mesh["tensor"]) == (8, 1)
    assert suggested(CONFIG, chip(), devices=2, slices=2).mesh["data"] == 2  # type: ignore[union-attr]


def test_without_a_chip_nothing_is_suggested() -> None:
    step = describe_step(replace(CONFIG, batch_size=1, num_microbatches=1), make_mesh("data=1"))
    assert suggest(CONFIG, step.state, Topology("4 x CPU", (None,) * 4, None)) is None


def test_topologies_of_weak_scaling_have_the_stated_number_of_chips() -> None:
    for one in TPU_CHIPS.values():
        for chips, shape in one.sizes.items():
            sides = [int(side) for side in shape.split("x")]
            assert len(sides) == one.links / 2
            count = 1
            for side in sides:
                count *= side
            assert count == chips
