"""`gpt2 train --distributed` in several processes of this machine, each with simulated CPU devices."""

from __future__ import annotations

import os
import re
import socket
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
PATIENCE = 300
"""Seconds to wait for a process."""


@dataclass(frozen=True)
class Ended:
    code: int
    out: str
    err: str


Process = subprocess.Popen[str]


def start(processes: int, devices: int, arguments: Sequence[object], **of_one: Sequence[object]) -> list[Process]:
    """Start processes with `devices` devices each. `p1=[...]`: additional arguments of process 1 only."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}",
        "PYTHONPATH": str(ROOT),
    }
    joining: list[object] = []
    if processes > 1:
        joining = ["--distributed", "--coordinator", f"127.0.0.1:{port}", "--processes", processes]
    started = []
    for process in range(processes):
        own = [*joining, "--process", process] if joining else []
        command = [*arguments, *own, *of_one.get(f"p{process}", ())]
        code = "from gpt2_jax.cli import main; main()"
        started.append(
            subprocess.Popen(
                [sys.executable, "-c", code, "train", *map(str, command)],
                env=environment,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
        )
    return started


def wait(started: Sequence[Process]) -> list[Ended]:
    ended = []
    try:
        for process in started:
            out, err = process.communicate(timeout=PATIENCE)
            ended.append(Ended(process.returncode, _without_gloo(out), _without_gloo(err)))
    finally:
        for process in started:
            process.kill()
    return ended


def train(processes: int, devices: int, arguments: Sequence[object], **of_one: Sequence[object]) -> list[Ended]:
    return wait(start(processes, devices, arguments, **of_one))


def _without_gloo(text: str) -> str:
    """Remove the messages of Gloo, the library for collectives on CPUs. They may be interleaved."""
    return re.sub(r"(\[Gloo\] Rank )*\d* ?is connected to .*?: \d+\n|\[Gloo\] Rank (\d+ )?", "", text)
