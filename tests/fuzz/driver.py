"""Damaged checkpoints by the thousand: each is refused with a `BridgeError`, or is what its bytes say.

    PYTHONPATH=.:tests python -m fuzz.driver --mutants 100000 [--formats llmc gguf] [--seed 1]

Each format has a module here with `samples` (small valid checkpoints), `mutable` (the files of one that are damaged)
and `oracle` (the arrays of one under canonical names, read by somebody else's code). A mutant that loads must have
the fingerprint of what the oracle reads. Where the oracle refuses a mutant that loads, that is counted and no more.
"""

from __future__ import annotations

import argparse
import importlib
import random
import resource
import shutil
import tempfile
import time
import warnings
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType

import bridge

FORMATS = ("safetensors", "flax", "torch_file", "nanogpt", "flax_msgpack", "llmc", "gguf", "openai")
MOST_SECONDS = 2.0
MOST_GROWTH = 64 * 2**20
"""Bytes by which the process may grow over all mutants: what refusing one may take."""

_TELLING = (0, 1, 2, 3, 7, 8, 0x20, 0x2E, 0x5B, 0x7B, 0x7F, 0x80, 0x92, 0xC0, 0xC9, 0xDF, 0xFE, 0xFF)
_WIDE = (0, 1, 2**15, 2**16 - 1, 2**31 - 1, 2**31, 2**32 - 1, 2**62, 2**63 - 1, 2**63, 2**64 - 1)


@dataclass
class Outcome:
    """What became of the mutants of one format."""

    counts: Counter[str] = field(default_factory=Counter)
    """Of "refused", "loaded" (as the oracle reads it) and "only we load it"."""
    slowest: float = 0.0
    """Seconds."""
    growth: int = 0
    """Bytes by which the peak of the process rose."""


def fuzz(format: str, mutants: int, folder: Path, seed: int = 0) -> Outcome:
    """Damage samples of one format `mutants` times; raises `AssertionError`, with how to repeat it, on a failure."""
    module = importlib.import_module(f"fuzz.{format}")
    sources = module.samples(folder)
    originals = {file: file.read_bytes() for source in sources for file in module.mutable(source)}
    for source in sources:
        assert _fingerprint_of_oracle(module, source) == _fingerprint(source), f"the oracle misreads {source.name}"
    peak = _peak()
    outcome = Outcome()
    for number in range(mutants):
        rng = random.Random(f"{seed} {number}")
        source = rng.choice(sources)
        file = rng.choice(module.mutable(source))
        file.write_bytes(_damaged(originals[file], rng))
        if hasattr(module, "repair") and rng.random() < 0.7:
            module.repair(source)  # checksums made right again, so that what they protect is reached
        began = time.process_time()
        try:
            outcome.counts[_judged(module, source)] += 1
        except Exception as error:
            raise AssertionError(f"{format}: mutant {number} of seed {seed}, of {file}: {error!r}") from error
        seconds = time.process_time() - began
        assert seconds < MOST_SECONDS, f"{format}: mutant {number} of seed {seed} took {seconds:.1f} s"
        outcome.slowest = max(outcome.slowest, seconds)
        for damaged in module.mutable(source):
            damaged.write_bytes(originals[damaged])
    outcome.growth = _peak() - peak
    assert outcome.growth < MOST_GROWTH, f"{format}: the process grew by {outcome.growth} bytes"
    return outcome


def _judged(module: ModuleType, source: Path) -> str:
    try:
        ours = _fingerprint(source)
    except bridge.BridgeError:
        return "refused"
    try:
        theirs = _fingerprint_of_oracle(module, source)
    except Exception:  # whatever a peer raises for a file that it does not take
        return "only we load it"
    assert ours == theirs, "it loads, and not as what its bytes say"
    return "loaded"


def _fingerprint(source: Path) -> str:
    return bridge.fingerprint(bridge.load(source).tensors)


def _fingerprint_of_oracle(module: ModuleType, source: Path) -> str:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return bridge.fingerprint(module.oracle(source))


def _damaged(content: bytes, rng: random.Random) -> bytes:
    """`content` with one to four changes, each near the beginning or near the end or anywhere."""
    changed = bytearray(content)
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        at = _place(len(changed), rng)
        length = rng.choice((1, 1, 2, 4, 8, 16, 64))
        match rng.randrange(10):
            case 0 if changed:
                changed[at] ^= 1 << rng.randrange(8)
            case 1 if changed:
                changed[at] = rng.choice(_TELLING)
            case 2:
                value = rng.choice(_WIDE)
                width = rng.choice((2, 4, 8))
                changed[at : at + width] = (value % 2 ** (8 * width)).to_bytes(width, rng.choice(("little", "big")))
            case 3:
                del changed[at : at + length]
            case 4:
                changed[at:at] = rng.randbytes(length)
            case 5:
                del changed[at:]
            case 6:
                changed[at : at + length] = bytes(len(changed[at : at + length]))
            case 7:
                changed[at:at] = changed[at : at + length]
            case 8:
                other = _place(len(changed), rng)
                part = bytes(changed[other : other + length])
                changed[at : at + len(part)] = part
            case _:
                changed[at : at + length] = rng.randbytes(len(changed[at : at + length]))
    return bytes(changed)


def _place(length: int, rng: random.Random) -> int:
    near = min(length, rng.choice((16, 256, 2048, length)))
    at = rng.randrange(near) if near else 0
    return at if rng.random() < 0.6 else max(0, length - 1 - at)


def _peak() -> int:
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mutants", type=int, default=100_000, help="of each format")
    parser.add_argument("--formats", nargs="+", choices=FORMATS, default=FORMATS)
    parser.add_argument("--seed", type=int, default=1)
    chosen = parser.parse_args()
    for format in chosen.formats:
        folder = Path(tempfile.mkdtemp(prefix="fuzz-", dir="/dev/shm" if Path("/dev/shm").is_dir() else None))
        try:
            began = time.perf_counter()
            outcome = fuzz(format, chosen.mutants, folder, chosen.seed)
        finally:
            shutil.rmtree(folder)
        counted = ", ".join(f"{count} {what}" for what, count in outcome.counts.most_common())
        print(
            f"{format}: {counted}; slowest {1000 * outcome.slowest:.0f} ms, process grew {outcome.growth / 2**20:.1f} "
            f"MiB, {time.perf_counter() - began:.0f} s",
            flush=True,
        )


if __name__ == "__main__":
    main()
