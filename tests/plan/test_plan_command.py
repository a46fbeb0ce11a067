"""`gpt2 plan` on virtual CPU devices, and with libtpu if it is installed."""

from __future__ import annotations

import importlib.util
import json
import math
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import jax
import pytest
from matplotlib.image import imread
from support.commands import run

from bridge import BridgeError, GPT2Config, num_parameters, parameters
from gpt2_jax.console.terminal import console
from gpt2_jax.hardware import TPU_CHIPS
from gpt2_jax.parallel.sharding import make_mesh
from gpt2_jax.plan.communication.collectives import find_collectives
from gpt2_jax.plan.compiled import Program, describe_step
from gpt2_jax.plan.plan import Plan, ScalingPoint, plan_program
from gpt2_jax.plan.plot import plot
from gpt2_jax.plan.report import show, show_scaling
from gpt2_jax.plan.report_json import to_json
from gpt2_jax.plan.roofline import program_roofline
from gpt2_jax.plan.topology import Topology
from gpt2_jax.training import PRESETS

COMMAND = (sys.executable, "-c", "from gpt2_jax.cli import main; main()", "plan")
TINY = ("--vocab-size", "64", "--n-positions", "16", "--n-embd", "32", "--n-layer", "2", "--n-head", "4")


def plan(*arguments: object, timeout: int = 300, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run the command in its own process, because JAX creates its devices only once per process."""
    paths = os.pathsep.join(path for path in sys.path if path)
    return subprocess.run(
        [*COMMAND, *(str(a) for a in arguments)],
        env={**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": paths, **environment},
        capture_output=True,
        text=True,
        timeout=timeout,
    )


def test_a_plan_for_virtual_cpu_devices(tmp_path: Path) -> None:
    file = tmp_path / "plan.json"
    mesh = ("--devices", 4, "--mesh", "fsdp=2,tensor=2", "--batch-size", 8, "--num-microbatches", 2, "--seq-len", 16)
    done = plan(*TINY, *mesh, "--json", file, JAX_DISABLE_MOST_OPTIMIZATIONS="1")
    assert (done.returncode, done.stderr) == (0, "")
    for expected in ("on 4 x CPU, fsdp=2,tensor=2", "parameters", "collectives per step", "no chip is given"):
        assert expected in done.stdout
    found = json.loads(file.read_text())
    D, F, V, P, L = 32, 128, 64, 16, 2
    layer = (4 * D * D + 2 * D * F) // 4 + (3 * D + F) // 2 + 6 * D
    assert found["state_bytes"]["parameters"] == 4 * (V * D // 4 + P * D // 2 + L * layer + 2 * D)
    assert found["state_bytes"]["optimizer"] == 2 * found["state_bytes"]["parameters"] + 8
    assert found["state_bytes"]["batch"] == 2 * 4 * 4 * 16
    state = sum(found["state_bytes"].values())
    assert found["program"]["argument_bytes"] == state + 8  # the counts of steps and of skipped steps
    assert found["program"]["peak_bytes"] is None
    assert found["peak_bytes"] == found["peak_upper_bound"] > state
    assert (found["mesh"], found["devices"]) == ({"data": 1, "fsdp": 2, "tensor": 2}, 4)
    assert (found["fits"], found["missing_bytes"], found["roofline"], found["suggestion"]) == (True, 0, None, None)
    assert found["uncounted_loops"] == []
    assert {row["kind"] for row in found["traffic"]} >= {"all-reduce", "all-gather"}
    c_fc = [f"f32[{D // 2},{F // 2}]"]  # a device's shard of the kernel; JAX 0.12 gives the layer's slice as op_name
    gathered = [one for one in found["collectives"] if one["kind"] == "all-gather" and one["operands"] == c_fc]
    forward = [one for one in gathered if "transpose" not in one["op_name"]]
    assert [one["count"] for one in forward] == [2 * L]  # for every microbatch and layer
    [gather] = forward
    assert gather["sent_bytes"] == 2 * L * 4 * D * F / 4  # gathers half of c_fc, of which a device has half


BAD = {
    "neither topology nor devices": ((), "give either --topology"),
    "both": (("--topology", "v5e:2x2", "--devices", "4"), "give either --topology"),
    "unknown chip": (("--topology", "v9:2x2"), "give a chip (v4, v5e, v5p, v6e)"),
    "no shape": (("--topology", "v5e"), "such as v5e:4x4, v5p:2x2x1 or v5e:4x4*2"),
    "no slices": (("--topology", "v5e:2x2*0"), "v5e:4x4*2"),
    "no devices": (("--devices", "0"), "--devices 0: must be from 1"),
    "unknown preset": (("--preset", "tiny", "--topology", "v5e:2x2"), "--preset tiny: must be one of"),
    "microbatches that do not divide the batch": (
        ("--devices", "4", "--num-microbatches", "3"),
        "num_microbatches=3: does not divide",
    ),
    "plot without scaling": (("--devices", "4", "--plot", "{tmp}/x.png"), "give --scaling too"),
    "plot of no format": (("--topology", "v5e:2x2", "--scaling", "--plot", "{tmp}/x.txt"), "must end in .png"),
    "unwritable json": (("--topology", "v5e:2x2", "--json", "{tmp}/nowhere/x.json"), "cannot write"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_exits_with_2_and_a_message(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments, message = BAD[name]
    assert run("plan", *(a.format(tmp=tmp_path) for a in arguments)) == 2
    errors = capsys.readouterr().err
    assert message in errors
    assert "Traceback" not in errors
    assert list(tmp_path.iterdir()) == []


def test_a_missing_libtpu_is_reported_with_its_installation(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "libtpu" else found(name))
    assert run("plan", "--topology", "v5e:2x2") == 2
    errors = capsys.readouterr().err
    assert "pip install 'gpt2-bridge[tpu]'" in errors
    assert "--devices N" in errors


def test_help_has_an_example(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("plan", "--help") == 0
    shown = capsys.readouterr().out
    for expected in ("Example: gpt2 plan", "--topology NAME", "--mesh AXIS=N", "--num-microbatches INT"):
        assert expected in shown


TEXT = """HloModule step

ENTRY %main (x: f32[1000,1000]) -> f32[1000,1000] {
  %x = f32[1000,1000] parameter(0)
  ROOT %y = f32[1000,1000] all-reduce(%x), replica_groups={{0,1}}, metadata={op_name="jit(step)/jvp(GPT2)/wte"}
}
"""


def hand_written_plan(program: Program) -> Plan:
    """A plan for a hand-written program."""
    config = replace(PRESETS["nano"], batch_size=4, remat="full")
    topology = Topology("v5e:1x1", (jax.devices()[0],), TPU_CHIPS["v5e"])
    made = plan_program(
        describe_step(config, make_mesh("data=1", topology.devices)), replace(program, text=None), topology
    )
    if program.text is None:
        return made
    found, slices = find_collectives(program.text, (0, 0)), (0, 0)
    line = program_roofline(made.config, made.mesh, made.state, found, slices, TPU_CHIPS["v5e"])
    return replace(made, program=program, collectives=found, roofline=line, slice_ids=slices)


def test_tables_show_memory_communication_and_assumptions(capsys: pytest.CaptureFixture[str]) -> None:
    made = hand_written_plan(Program(9.0, TEXT, 100, 100, 100, 2**30, peak_bytes=2**30))
    show(made, console())
    printed = capsys.readouterr().out
    for expected in (
        "fits: needs 1.00 GiB",
        "which has 15.75",
        "f32[1000,1000]",
        "recomputation",
        "Assumptions:",
        "MFU",
    ):
        assert expected in printed
    assert "4.0" in next(line for line in printed.splitlines() if line.startswith("all-reduce"))
    assert json.loads(json.dumps(to_json(made)))["roofline"]["link_bytes"] == 2e6


def test_a_step_that_does_not_fit_reports_the_missing_memory(capsys: pytest.CaptureFixture[str]) -> None:
    for program in (
        Program(1.0, required_bytes=20 * 2**30, limit_bytes=63 * 2**28),
        Program(1.0, TEXT, peak_bytes=20 * 2**30),
    ):
        made = hand_written_plan(program)
        assert not made.fits
        show(made, console())
        assert "does not fit: needs 20.00 GiB" in capsys.readouterr().out
        assert to_json(made)["missing_bytes"] == 4.25 * 2**30


def test_weak_scaling_prints_a_table_and_draws_a_plot(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made = hand_written_plan(Program(9.0, TEXT, peak_bytes=2**30))
    refused = hand_written_plan(Program(1.0, required_bytes=20 * 2**30, limit_bytes=15 * 2**30))
    points = [
        ScalingPoint(1, "v5e:1x1", made),
        ScalingPoint(4, "v5e:2x2", refused),
        ScalingPoint(16, "v5e:4x4", None, "no such mesh"),
    ]
    show_scaling(points, console())
    printed = capsys.readouterr().out
    for expected in ("weak scaling", "1,024", "does not fit", "no such mesh"):
        assert expected in printed
    plot(points, tmp_path / "scaling.png")
    assert imread(tmp_path / "scaling.png")[..., :3].std() > 0.1  # the picture is not empty
    with pytest.raises(BridgeError, match="nothing to draw"):
        plot(points[1:], tmp_path / "none.png")


# With libtpu.


def tpu_plan(tmp_path: Path, *arguments: object) -> tuple[subprocess.CompletedProcess[str], dict]:
    if importlib.util.find_spec("libtpu") is None:
        pytest.skip("libtpu is not installed: `make test-tpu` installs it")
    file = tmp_path / "plan.json"
    done = plan(*arguments, "--json", file, timeout=580)
    assert done.stderr == ""
    return done, json.loads(file.read_text())


def state_bytes(c: GPT2Config, fsdp: int) -> int:
    """Parameter bytes per device. `fsdp` shards embeddings and projections, but not biases and norms."""
    D, F = c.n_embd, c.feed_forward_size
    whole = c.n_layer * (3 * D + D + F + D + 4 * D) + 2 * D
    padding = (50304 - c.vocab_size) * D
    return 4 * ((num_parameters(c) + padding - whole) // fsdp + whole)


def require_consistent(found: dict, preset: str, fsdp: int) -> None:
    own = state_bytes(PRESETS[preset].model, fsdp)
    assert found["state_bytes"]["parameters"] == own
    assert found["state_bytes"]["optimizer"] == 2 * own + 8
    assert sum(found["state_bytes"].values()) <= found["program"]["argument_bytes"]  # the compiler pads tiles
    assert found["program"]["argument_bytes"] < found["peak_bytes"] <= found["peak_upper_bound"]
    assert found["uncounted_loops"] == []
    c = PRESETS[preset].model
    stacked = {c.n_layer * math.prod(p.flax_shape) for p in parameters(c) if p.layer == 0 and p.decays}
    gathered = [
        math.prod(map(int, re.findall(r"\d+", operand.split("[")[1]))) * one["group_size"]
        for one in found["collectives"]
        if one["kind"] == "all-gather"
        for operand in one["operands"]
    ]
    assert gathered
    assert not stacked & {*gathered}, "the layers' weights are gathered one layer at a time"
    assert max(gathered) <= 50304 * c.n_embd, "nothing larger than the embedding is gathered; logits would be larger"


@pytest.mark.tpu
def test_the_smallest_size_fits_on_four_chips(tmp_path: Path) -> None:
    done, found = tpu_plan(tmp_path, "--preset", "gpt2", "--topology", "v5e:2x2", "--mesh", "fsdp=4")
    assert done.returncode == 0
    assert "fits: needs" in done.stdout
    require_consistent(found, "gpt2", 4)
    assert found["config"]["attention"] == "splash"
    assert found["missing_bytes"] == 0
    # Each of 40 microbatches gathers every layer's weights in both passes and reduces their gradients.
    layers = 12 * 12 * 768**2 * 2
    rings = next(row for row in found["traffic"] if row["kind"] == "collective-permute")
    assert rings["sent_bytes"] >= 40 * 3 * layers * 3 / 4


@pytest.mark.tpu
def test_the_largest_size_fits_on_sixteen_chips_with_microbatches(tmp_path: Path) -> None:
    parts = ("--mesh", "fsdp=16", "--num-microbatches", 6)
    done, found = tpu_plan(tmp_path, "--preset", "gpt2-xl", "--topology", "v5e:4x4", *parts)
    assert done.returncode == 0
    require_consistent(found, "gpt2-xl", 16)
    assert found["peak_bytes"] <= found["available_bytes"]


@pytest.mark.tpu
def test_the_largest_size_does_not_fit_unsharded_on_a_chip(tmp_path: Path) -> None:
    done, found = tpu_plan(tmp_path, "--preset", "gpt2-xl", "--topology", "v5e:2x2", "--mesh", "data=4")
    assert done.returncode == 1
    assert "does not fit: needs" in done.stdout
    assert found["state_bytes"]["parameters"] == state_bytes(PRESETS["gpt2-xl"].model, 1)
    assert found["missing_bytes"] == found["peak_bytes"] - found["available_bytes"] > 0
    assert found["suggestion"]["mesh"]["fsdp"] > 1


@pytest.mark.tpu
def test_an_unknown_topology_or_a_mesh_that_does_not_divide_exits_with_2(tmp_path: Path) -> None:
    if importlib.util.find_spec("libtpu") is None:
        pytest.skip("libtpu is not installed: `make test-tpu` installs it")
    done = plan("--preset", "gpt2", "--topology", "v5e:3x3")
    assert done.returncode == 2
    assert "libtpu does not support it" in done.stderr
    done = plan("--preset", "gpt2", "--topology", "v5e:4x4", "--mesh", "fsdp=16")
    assert done.returncode == 2
    assert "does not divide" in done.stderr
    assert "the fastest estimate on v5e:4x4 is --mesh" in done.stderr
