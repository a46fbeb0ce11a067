"""The estimate of time, and the mesh that is suggested, on numbers that can be counted by hand."""

from __future__ import annotations

from dataclasses import replace

import pytest

from bridge import GPT2Config, num_parameters
from gpt2_jax.hardware import TPU_CHIPS, TpuChip
from gpt2_jax.parallel.sharding import make_mesh
from gpt2_jax.plan.collectives import Collective, Exchange
from gpt2_jax.plan.compiled import described_step
from gpt2_jax.plan.memory import State, layer_parameters
from gpt2_jax.plan.roofline import hbm_bytes, roofline, step_flops
from gpt2_jax.plan.suggest import Suggestion, needed_bytes, possible_meshes, sent_bytes, spread_state, suggest
from gpt2_jax.plan.topology import Topology
from gpt2_jax.training import PRESETS, TrainConfig

MODEL = GPT2Config(vocab_size=64, n_positions=16, n_embd=24, n_layer=2, n_head=4)
CONFIG = replace(PRESETS["nano"], model=MODEL, batch_size=12, num_microbatches=3, seq_len=16, dtype="bfloat16")
ONE, FOUR = {"data": 1, "fsdp": 1, "tensor": 1}, {"data": 1, "fsdp": 4, "tensor": 1}


def chip(memory: int = 2**40, link: float = 1e3) -> TpuChip:
    return TpuChip("made-up", (), 1e6, memory, memory, 1e12, link, 4, 10.0, {})


def suggested(config: TrainConfig, of: TpuChip, devices: int = 4, slices: int = 1) -> Suggestion | None:
    step = described_step(replace(config, batch_size=1, num_microbatches=1), make_mesh("data=1"))
    return suggest(config, step.state, Topology("made-up", (None,) * devices, of, slices))


def test_flops_are_palms_and_full_remat_adds_the_layers_forward_pass() -> None:
    tokens, D, L, T = 12 * 16, 24, 2, 16
    model = tokens * (6 * (num_parameters(MODEL) - 16 * D) + 12 * L * D * T)
    assert step_flops(CONFIG, ONE) == (model, 0.0)
    again = tokens * (2 * layer_parameters(CONFIG) + 4 * L * D * T)
    assert step_flops(replace(CONFIG, remat="full"), FOUR) == (model / 4, again / 4)


def test_the_roofline_divides_by_the_chips_rates() -> None:
    state = State(parameters=400, optimizer=800, mean=0, batch=1)
    pair = Collective("all-reduce", ("f32[100]",), ((0, 1), (2, 3)), 5)
    across = Collective("all-reduce", ("f32[3]",), ((0, 2), (1, 3)), 1)
    line = roofline(CONFIG, FOUR, state, Exchange((pair, across)), (0, 0, 1, 1), chip())
    assert line.link_bytes == 5 * 400 / 2  # of a pair each sends 400, over two links
    assert line.network_bytes == 12
    assert line.communication == 1000 / 1e3 + 12 / 10.0
    assert line.compute == line.flops / 1e6
    assert line.hbm == hbm_bytes(CONFIG, FOUR, state) / 1e12
    assert line.overlapped == max(line.compute, line.hbm, line.communication)
    assert line.in_turn == max(line.compute, line.hbm) + line.communication
    assert line.mfu(line.compute) == pytest.approx(1.0, rel=1e-12)


def test_what_is_read_and_written_in_memory() -> None:
    state = State(parameters=400, optimizer=800, mean=0, batch=1)
    kept = 16 * 2 * ((24 + 48 + 24 + 72 + 96) * 2 + 4 * 4)  # a row a part and device
    part = 2 * 2 * layer_parameters(CONFIG) + 2 * kept + 2 * 400
    assert hbm_bytes(CONFIG, FOUR, state) == 3 * part + 2 * 1200 + 400


def test_each_axis_sends_what_it_is_for() -> None:
    layers, embedding = 2 * layer_parameters(CONFIG), 64 * 24
    assert sent_bytes(CONFIG, ONE) == (0.0, 0.0)
    embeddings = 2 * embedding * (2 + 4) * 3 / 4
    links, network = sent_bytes(CONFIG, {"data": 4, "fsdp": 1, "tensor": 1})
    assert (links, network) == (3 * (2 * layers * 3 / 4 + embeddings), 0.0)
    links, _ = sent_bytes(CONFIG, FOUR)
    assert links == 3 * (3 * layers * 3 / 4 + embeddings) + 2 * embedding * 3 / 4
    links, _ = sent_bytes(CONFIG, {"data": 1, "fsdp": 1, "tensor": 4})
    assert links == 4 * 2 * 2 * (2 * 24 * 16 * 12) * 3 / 4
    _, network = sent_bytes(CONFIG, {"data": 2, "fsdp": 1, "tensor": 1}, slices=2)
    assert network == 3 * (2 * layers / 2 + 2 * embedding * 6 / 2)


def test_meshes_are_all_that_there_are_and_slices_are_parted_by_data() -> None:
    assert len(list(possible_meshes(4))) == 6
    assert {mesh["data"] for mesh in possible_meshes(8, slices=2)} == {2, 4, 8}


def test_data_alone_is_suggested_for_many_rows_where_all_fits_and_in_one_part() -> None:
    found = suggested(replace(CONFIG, batch_size=1200), chip())
    assert found is not None
    assert (found.mesh, found.num_microbatches) == ({"data": 4, "fsdp": 1, "tensor": 1}, 1)
    assert found.flags == "--mesh data=4 --batch-size 1200 --num-microbatches 1"


def test_less_memory_asks_for_parts_of_the_state_and_too_little_for_nothing() -> None:
    step = described_step(replace(CONFIG, batch_size=1, num_microbatches=1), make_mesh("data=1"))
    needed = {
        axis: needed_bytes(replace(CONFIG, num_microbatches=3), mesh, spread_state(CONFIG, step.state, mesh))
        for axis in ("data", "fsdp")
        if (mesh := {**ONE, axis: 4})
    }
    assert needed["fsdp"] < needed["data"]
    found = suggested(CONFIG, chip(int(needed["fsdp"] / 0.83) + 2))
    assert found is not None
    assert found.needed <= needed["fsdp"]
    assert found.mesh["data"] < 4
    assert suggested(CONFIG, chip(10**6)) is None


def test_a_batch_that_cannot_be_spread_is_suggested_otherwise() -> None:
    odd = replace(MODEL, n_head=3, vocab_size=63)  # so that tensor must be 1
    found = suggested(replace(CONFIG, model=odd, batch_size=6, num_microbatches=1), chip())
    assert found is not None
    assert (found.batch_size, found.mesh["tensor"]) == (8, 1)
    assert suggested(CONFIG, chip(), devices=2, slices=2).mesh["data"] == 2  # type: ignore[union-attr]


def test_without_a_chip_nothing_is_suggested() -> None:
    step = described_step(replace(CONFIG, batch_size=1, num_microbatches=1), make_mesh("data=1"))
    assert suggest(CONFIG, step.state, Topology("4 x CPU", (None,) * 4, None)) is None


def test_chips_have_a_topology_of_every_size() -> None:
    for one in TPU_CHIPS.values():
        for chips, shape in one.sizes.items():
            sides = [int(side) for side in shape.split("x")]
            assert len(sides) == one.links / 2
            count = 1
            for side in sides:
                count *= side
            assert count == chips
