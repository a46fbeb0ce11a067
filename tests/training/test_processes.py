"""Training with several processes over loopback: the same losses, output of process 0 only, and a common end."""

from __future__ import annotations

import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from support.models import random_checkpoint
from support.on_meshes import SAME_CURVE
from support.several_processes import start, train, wait
from support.tokenizers_for_tests import write_byte_tokenizer
from support.training_runs import write_text

import bridge
from bridge.formats.trainers.run import steps
from gpt2_jax.training.run.metrics import read_metrics

pytestmark = pytest.mark.mesh

STEPS = 8
FLAGS = shlex.split("""
    --tokenizer bytes --n-positions 16 --n-embd 32 --n-layer 2 --n-head 4 --vocab-multiple 64
    --max-steps 8 --batch-size 8 --num-microbatches 2 --seq-len 12 --learning-rate 1e-2 --warmup-steps 2
    --eval-every 4 --eval-batches 2 --log-every 1 --checkpoint-every 2 --keep-last 9 --sample-tokens 3
""")


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("processes")
    write_text(directory, 200)
    return directory


def arguments(directory: Path, name: str, *more: object) -> list[object]:
    places = ["--data", directory / "text.txt", "--cache", directory / "cache", "--out", directory / name]
    return [*places, *FLAGS, *more]


@pytest.fixture(scope="module")
def alone(directory: Path) -> Path:
    [ended] = train(1, 1, arguments(directory, "alone"))
    assert ended.code == 0, ended.err
    return directory / "alone"


@pytest.fixture(scope="module")
def by_four(directory: Path) -> Path:
    ended = train(4, 1, arguments(directory, "four", "--mesh", "data=2,fsdp=2"))
    assert [e.code for e in ended] == [0] * 4, ended
    return directory / "four"


def assert_the_same_curve(run: Path, other: Path) -> None:
    mine, theirs = (read_metrics(r) for r in (run, other))
    assert [r["step"] for r in mine] == [r["step"] for r in theirs] == [*range(STEPS + 1)]
    for record, expected in zip(mine, theirs, strict=True):
        for name in ("train_loss", "val_loss"):
            assert (name in record) == (name in expected)
            if name in record:
                assert abs(record[name] - expected[name]) <= SAME_CURVE, (record["step"], name)
    assert theirs[-1]["train_loss"] < theirs[1]["train_loss"] - 0.1


@pytest.mark.parametrize(("devices", "mesh"), [(2, "data=2,fsdp=2"), (2, "tensor=4"), (1, "fsdp=-1"), (2, "data=-1")])
def test_two_processes_train_like_one(devices: int, mesh: str, directory: Path, alone: Path) -> None:
    name = f"two {devices} {mesh}"
    ended = train(2, devices, arguments(directory, name, "--mesh", mesh))
    assert [e.code for e in ended] == [0, 0], ended
    assert_the_same_curve(directory / name, alone)
    assert "exported the best step" in ended[0].out
    assert ended[1].out == "", "only process 0 prints"
    assert [e.err for e in ended] == ["", ""]


def test_four_processes_train_like_one(by_four: Path, alone: Path) -> None:
    assert_the_same_curve(by_four, alone)


@pytest.mark.parametrize(
    ("processes", "devices", "mesh"), [(2, 2, "fsdp=2,tensor=2"), (1, 1, "data=1"), (1, 8, "fsdp=4")]
)
def test_two_processes_resume_the_run_of_four(
    processes: int, devices: int, mesh: str, directory: Path, by_four: Path, alone: Path
) -> None:
    name = f"resumed {processes} {mesh}"
    shutil.copytree(by_four, directory / name)
    for step in steps(directory / name):
        if step > STEPS // 2:
            shutil.rmtree(directory / name / "checkpoints" / str(step))
    ended = train(
        processes, devices, ["--out", directory / name, "--cache", directory / "cache", "--resume", "--mesh", mesh]
    )
    assert [e.code for e in ended] == [0] * processes, ended
    assert_the_same_curve(directory / name, alone)


def test_an_error_in_one_process_ends_all_with_its_message(directory: Path) -> None:
    one, other = train(2, 1, arguments(directory, "wrong"), p1=["--data", directory / "missing.txt"])
    assert (one.code, other.code) == (1, 2), (one, other)
    assert "missing.txt" in other.err
    assert "gpt2: ended because of a failure in process 1:" in one.err
    assert "missing.txt" in one.err


def test_an_error_of_process_0_after_training_is_reported_as_its_own(directory: Path) -> None:
    """The other process waits for it, and is not reported as lost. The report's file appears during the run."""
    report = directory / "result.json"
    started = start(2, 1, arguments(directory, "full"), p0=["--json", report])
    while not (directory / "full" / "run.json").exists() and started[0].poll() is None:
        time.sleep(0.1)
    report.write_text("theirs")
    one, other = wait(started)
    assert (one.code, other.code) == (2, 1), (one, other)
    assert "result.json' exists; choose another name" in one.err
    assert "lost" not in one.err
    assert "gpt2: ended because of a failure in process 0: " in other.err and "result.json' exists" in other.err
    assert report.read_text() == "theirs"


def test_processes_with_different_arguments_refuse_to_start(directory: Path) -> None:
    write_text(directory / "other", 150)
    other = ["--data", directory / "other" / "text.txt", "--cache", directory / "other" / "cache"]
    for name, given, field in (("seed", ["--seed", "5"], "seed is '5' here"), ("data", other, "data is")):
        ended = train(2, 1, arguments(directory, f"other {name}"), p1=given)
        assert [e.code != 0 for e in ended] == [True, True], ended
        assert field in ended[1].err
        assert "started with other arguments than process 0" in ended[0].err, "process 0 prints the reason"
        assert not (directory / f"other {name}").exists()


def test_two_processes_start_from_a_checkpoint(directory: Path) -> None:
    config = bridge.GPT2Config(vocab_size=256, n_positions=16, n_embd=32, n_layer=2, n_head=4)
    bridge.save(random_checkpoint(config), directory / "source", format="huggingface")
    write_byte_tokenizer(directory / "source")
    more = ["--init-from", directory / "source", "--tokenizer", "init-from", "--mesh", "fsdp=-1"]
    for processes in (1, 2):
        ended = train(processes, 1, arguments(directory, f"from weights {processes}", *more))
        assert [e.code for e in ended] == [0] * processes, ended
    assert_the_same_curve(directory / "from weights 2", directory / "from weights 1")


def test_a_process_without_a_coordinator_names_the_missing_flags(directory: Path) -> None:
    [ended] = train(1, 1, arguments(directory, "nobody", "--distributed"))
    assert ended.code == 2
    assert "--coordinator HOST:PORT, --processes N and --process I" in ended.err


def test_a_single_joined_process_that_fails_prints_its_message_alone(directory: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        join = [
            "--distributed",
            "--coordinator",
            f"127.0.0.1:{free.getsockname()[1]}",
            "--processes",
            1,
            "--process",
            0,
        ]
    [ended] = train(1, 1, arguments(directory, "refused", *join, "--batch-size", 7))
    assert ended.code == 2
    assert ended.err.count("gpt2:") == 1
    assert "was killed" not in ended.err


def test_a_process_that_cannot_connect_names_the_coordinator(directory: Path) -> None:
    code = "import functools, jax; jax.distributed.initialize = functools.partial(jax.distributed.initialize, "
    code += "initialization_timeout=2); from gpt2_jax.parallel.distributed import join; join('127.0.0.1:9', 2, 1)"
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert ended.returncode != 0
    assert "gpt2: ended before all processes had connected (process 0 at 127.0.0.1:9)" in ended.stderr


@pytest.mark.parametrize("process", [0, 1])
def test_a_signal_to_one_process_stops_all_after_the_same_step(process: int, directory: Path, alone: Path) -> None:
    run = directory / f"signal to {process}"
    long = ["--max-steps", 100_000, "--checkpoint-every", 100_000, "--eval-every", 100_000]
    started = start(2, 1, arguments(directory, run.name, *long))
    until(lambda: len(read_metrics(run)) > 5)
    started[process].send_signal(signal.SIGTERM)
    ended = wait(started)
    assert [e.code for e in ended] == [128 + signal.SIGTERM] * 2, ended
    last = steps(run)[-1]
    assert read_metrics(run)[-1]["step"] <= last < 100_000
    assert f"stopped by SIGTERM and saved at step {last}" in ended[0].out


def until(happened: Any) -> None:
    deadline = time.monotonic() + 200
    while not happened():
        assert time.monotonic() < deadline
        time.sleep(0.1)
