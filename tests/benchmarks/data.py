"""Cost of feeding a training run: memory and time per batch.

    python -m tests.benchmarks.data [directory with 3 GB of room]

Memory is the growth of a child process's peak while it reads every window of 1 GB of tokens once, from one file and
from 50 shards. For comparison, it is also measured with memory maps that stay open.
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import tempfile
import time
from itertools import islice
from pathlib import Path

import numpy as np

from gpt2_jax.data import open_data, training_batches

MIB = 2**20
TOKENS = 2**29  # 1 GiB of uint16
SHARDS = 50
ROUNDS = 5

# On Linux, writing 5 to clear_refs resets the peak to the current memory.
PEAK = """
def kib(name):
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(name))

open("/proc/self/clear_refs", "w").write("5")
before = kib("VmRSS")
work()
print(1024 * (kib("VmHWM") - before))
"""

READ = """
import sys
import numpy as np
from gpt2_jax.data import open_data, training_batches

data = open_data(sys.argv[1], validation_fraction=0)
batch_size, length = 64, 1024
batches = training_batches(data.train, batch_size=batch_size, seq_len=length)
next(batches)
kept = [np.memmap(file.path, np.uint8, "r") for file in data.train.files] if sys.argv[2] == "kept" else []

def work():
    for _ in range(len(data.train) // (batch_size * length)):
        next(batches)
    for pages in kept:
        pages[::4096].sum()
"""

ENCODE = """
import sys
from gpt2_jax.data import open_data

def work():
    open_data(sys.argv[1], tokenizer="bytes", cache=sys.argv[2])
"""


def growth_while_reading(source: str | Path, *, kept: bool = False) -> int:
    """Growth of peak memory in bytes while all tokens of `source` are read in random order.

    Args:
        kept: also keep a memory map of each file open, to show that the measurement detects it.
    """
    return _printed(READ + PEAK, str(source), "kept" if kept else "not kept")


def growth_while_encoding(source: str | Path, cache: Path) -> int:
    """Growth of peak memory in bytes while the text of `source` is encoded into the cache."""
    return _printed(ENCODE + PEAK, str(source), str(cache))


def _printed(program: str, *arguments: str) -> int:
    done = subprocess.run([sys.executable, "-c", program, *arguments], capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(done.stderr)
    return int(done.stdout)


def write_tokens(directory: Path, tokens: int, shards: int = 1) -> str:
    """Write random ids to `shards` files in nanoGPT's format. Returns a glob that matches them."""
    rng = np.random.default_rng(0)
    for shard in range(shards):
        left = tokens // shards
        with (directory / f"tokens_{shard:03d}.bin").open("wb") as file:
            while left:
                ids = rng.integers(0, 50257, min(left, 2**22), np.uint16)
                file.write(ids.data)
                left -= len(ids)
    return str(directory / "*.bin")


def main() -> None:
    with tempfile.TemporaryDirectory(dir=sys.argv[1] if len(sys.argv) > 1 else None) as scratch:
        for shards in (1, SHARDS):
            directory = Path(scratch) / str(shards)
            directory.mkdir()
            source = write_tokens(directory, TOKENS, shards)
            name = f"1 GiB in {shards} file{'s' * (shards > 1)}"
            print(f"{name:20} peak grows by {growth_while_reading(source) / MIB:8.1f} MiB")
            if shards == 1:
                print(
                    f"{'  with a map kept':20} peak grows by {growth_while_reading(source, kept=True) / MIB:8.1f} MiB"
                )
            for batch_size, length in ((12, 64), (64, 256), (64, 1024)):
                _time_batches(source, batch_size, length)


def _time_batches(source: str, batch_size: int, length: int, number: int = 300) -> None:
    batches = training_batches(open_data(source).train, batch_size=batch_size, seq_len=length)
    rounds = []
    for _ in range(ROUNDS):
        start = time.perf_counter()
        for _ in islice(batches, number):
            pass
        rounds.append((time.perf_counter() - start) / number)
    seconds = statistics.median(rounds)
    speed = batch_size * length / seconds / 1e6
    print(f"  {batch_size} x {length:4}: {1e3 * seconds:6.3f} ms per batch, {speed:6.1f} M tokens/s")


if __name__ == "__main__":
    main()
