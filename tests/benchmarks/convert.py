"""Time and memory of converting a checkpoint of gpt2-xl's size (1.56B parameters, 6.2 GB), compared with `cp`.

    python -m tests.benchmarks.convert [rounds] [--size gpt2-xl] [--formats flax llmc ...]

Conversions and `cp` alternate, each in its own process, and both wait for the disk (`sync`). The benchmark prints
medians. The peak is the child's `ru_maxrss`, minus that of a process with the same imports that does nothing. It needs
three times the checkpoint's size on disk.
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import bridge
from bridge import GPT2_SIZES
from bridge.formats import WRITABLE
from gpt2_jax.bench.disk_tasks import copy_to_disk, write_checkpoint

CONVERT = "bridge.save(bridge.load(sys.argv[1]), sys.argv[2], format=sys.argv[3])"
PROGRAM = "import resource, sys; import bridge\n{}\nprint(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rounds", type=int, nargs="?", default=3)
    parser.add_argument("--size", choices=GPT2_SIZES, default="gpt2-xl")
    parser.add_argument("--formats", nargs="+", choices=WRITABLE, default=WRITABLE)
    chosen = parser.parse_args()
    config = GPT2_SIZES[chosen.size]
    with tempfile.TemporaryDirectory(dir=".") as scratch:
        folder = Path(scratch)
        largest = 4 * config.vocab_size * config.n_embd
        print(f"{chosen.size}: {4 * bridge.num_parameters(config):,} bytes, the largest tensor {largest:,}")
        idle = _peak("")[0]
        for activation in ("gelu_new", "gelu"):  # nanoGPT has gelu; llm.c and GGUF have gelu_new
            source = write_checkpoint(folder / activation, replace(config, activation_function=activation))
            for format in chosen.formats:
                if (format == "nanogpt") == (activation == "gelu"):
                    _measure(source, folder, format, chosen.rounds, idle)
            shutil.rmtree(source)


def _measure(source: Path, folder: Path, format: str, rounds: int, idle: int) -> None:
    copied, converted, peaks = [], [], []
    target = folder / "converted"
    for _ in range(rounds):
        shutil.rmtree(target, ignore_errors=True)
        copied.append(_copied(source / "model.safetensors", folder / "copy"))
        peak, seconds = _peak(CONVERT, source, target, format)
        converted.append(seconds)
        peaks.append(peak - idle)
    ratios = sorted(ours / theirs for ours, theirs in zip(converted, copied, strict=True))
    back, _ = _peak(CONVERT, target, folder / "back", "huggingface")
    prints = {bridge.fingerprint(bridge.load(path).tensors) for path in (source, folder / "back")}
    assert len(prints) == 1, format
    for path in (target, folder / "back"):
        shutil.rmtree(path)
    print(
        f"huggingface -> {format}: {statistics.median(converted):.1f} s, cp {statistics.median(copied):.1f} s, "
        f"{statistics.median(ratios):.2f} times cp ({ratios[0]:.2f} to {ratios[-1]:.2f}); peak over the idle process "
        f"{max(peaks) / 2**20:.0f} MiB, and back {(back - idle) / 2**20:.0f}",
        flush=True,
    )


def _copied(source: Path, target: Path) -> float:
    """Return the seconds of one `cp`."""
    began = time.perf_counter()
    copy_to_disk(source, target)
    seconds = time.perf_counter() - began
    target.unlink()
    return seconds


def _peak(code: str, *arguments: object) -> tuple[int, float]:
    """Peak memory of a child process in bytes, and its time in seconds.

    The child is started by `sh`, because `ru_maxrss` starts at the peak of the process that executes it.
    """
    command = ["/bin/sh", "-c", '"$@"; exit $?', "sh", sys.executable, "-c", PROGRAM.format(code), *map(str, arguments)]
    began = time.perf_counter()
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return 1024 * int(done.stdout), time.perf_counter() - began


if __name__ == "__main__":
    main()
