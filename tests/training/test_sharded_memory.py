"""Peak memory of eight processes that load 1.5B parameters: each holds its share and one whole tensor."""

from __future__ import annotations

import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import bridge
from bridge import GPT2_SIZES, Checkpoint
from bridge.storage.tensors import LazyTensor, LazyTensorMap

pytestmark = [pytest.mark.slow, pytest.mark.skipif(sys.platform != "linux", reason="/proc is Linux's")]

PROCESSES = 8
CONFIG = GPT2_SIZES["gpt2-xl"]
SHARE = 4 * bridge.num_parameters(CONFIG) / PROCESSES
LARGEST_TENSOR = 4 * CONFIG.vocab_size * CONFIG.n_embd
SLACK = 64 * 2**20
"""Python, malloc, and the biases and norms, which are replicated."""

LOAD = """
import sys
import jax
import bridge
from gpt2_jax.parallel.distributed import join, leave
from gpt2_jax.loading import sharded_params
from gpt2_jax.parallel.sharding import make_mesh

def status(name):
    with open("/proc/self/status") as file:
        return 1024 * next(int(line.split()[1]) for line in file if line.startswith(name))

join(sys.argv[2], int(sys.argv[3]), int(sys.argv[4]))
mesh, checkpoint = make_mesh("fsdp=-1"), bridge.load(sys.argv[1])
idle = status("VmRSS")
params = jax.block_until_ready(sharded_params(checkpoint, mesh, scan=True))
print("grew by", status("VmHWM") - idle, flush=True)
leave()
"""


def test_a_process_holds_its_share_and_one_tensor(tmp_path: Path) -> None:
    def zeros(shape: tuple[int, ...]) -> LazyTensor:
        return LazyTensor(np.dtype(np.float32), shape, lambda: np.zeros(shape, np.float32))

    tensors = LazyTensorMap({p.torch_name: zeros(p.torch_shape) for p in bridge.parameters(CONFIG)})
    bridge.save(Checkpoint(CONFIG, tensors, "memory"), tmp_path / "xl", format="huggingface")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    started = [
        subprocess.Popen(
            [sys.executable, "-c", LOAD, str(tmp_path / "xl"), address, str(PROCESSES), str(process)],
            stdout=subprocess.PIPE,
            text=True,
        )
        for process in range(PROCESSES)
    ]
    grown = [int(process.communicate(timeout=600)[0].split("grew by")[1].split()[0]) for process in started]
    print(
        f"share {SHARE / 2**20:.0f} MiB, largest tensor {LARGEST_TENSOR / 2**20:.0f} MiB, grew by",
        [g >> 20 for g in grown],
    )
    assert max(grown) <= SHARE + LARGEST_TENSOR + SLACK
    assert min(grown) >= 0.95 * SHARE, "the measurement must show the shares"
