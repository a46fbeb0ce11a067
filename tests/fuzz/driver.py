"""Thousands of damaged checkpoints: each is refused with a `BridgeError`, or read as another library reads it.

    PYTHONPATH=.:tests python -m fuzz.driver --mutants 100000 [--formats llmc gguf] [--seed 1] [--state FILE]

With `--state`, the driver can be stopped at any time (Ctrl-C) and later continues after the last finished mutant.

Each format has a module here with `samples` (small valid checkpoints), `mutable` (the files of a checkpoint to damage)
and `oracle` (its arrays under canonical names, read by another library). A mutant that loads must have the fingerprint
of the oracle's arrays. A mutant that loads although the oracle rejects it is only counted.

A companion of the weights (`tokenizer.json`, `config.json` ...) has a module with `judge` instead of `oracle`: it reads
a mutant, compares the result with that of another library, and returns the outcome. A module may also have `repair`,
which updates checksums, and `damage`, which changes the structure of a file, because random bytes are rejected early.
"""

from __future__ import annotations

import argparse
import importlib
import json
import random
import resource
import shutil
import signal
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import ModuleType

import bridge

FORMATS = ("safetensors", "flax", "torch_file", "nanogpt", "flax_msgpack", "llmc", "gguf", "openai")
COMPANIONS = (
    *("tokenizer_json", "vocab_and_merges", "vocab_txt", "sentencepiece_model", "meta_pkl", "gguf_tokenizer"),
    *("config_json", "adapter_config_json", "settings", "chat_templates"),
)
DATA = ("npy_file", "token_cache", "run_json", "manifest_json", "metrics_lines", "run_arrays", "parity_certificate")
MOST_SECONDS = 2.0
MOST_GROWTH = 64 * 2**20
"""Limit on the growth of the process for one mutant, in bytes."""

_TELLING = (0, 1, 2, 3, 7, 8, 0x20, 0x2E, 0x5B, 0x7B, 0x7F, 0x80, 0x92, 0xC0, 0xC9, 0xDF, 0xFE, 0xFF)
_WIDE = (0, 1, 2**15, 2**16 - 1, 2**31 - 1, 2**31, 2**32 - 1, 2**62, 2**63 - 1, 2**63, 2**64 - 1)


@dataclass
class Outcome:
    """Results for the mutants of one format."""

    counts: Counter[str] = field(default_factory=Counter)
    """Numbers of "refused", "loaded" (as the oracle reads it) and "only we load it"."""
    slowest: float = 0.0
    """Seconds for one mutant."""
    growth: int = 0
    """Largest growth of the process by one mutant, in bytes."""


def fuzz(
    format: str,
    mutants: int,
    folder: Path,
    seed: int = 0,
    outcome: Outcome | None = None,
    finished: Callable[[Outcome], object] = lambda _: None,
) -> Outcome:
    """Damage samples of one format `mutants` times. A failure raises `AssertionError` with the seed to repeat it.

    Args:
        outcome: the results of an earlier call that was stopped. The call continues after its mutants.
        finished: called after each mutant.
    """
    module = importlib.import_module(f"fuzz.{format}")
    sources = module.samples(folder)
    originals = {file: file.read_bytes() for source in sources for file in module.mutable(source)}
    for source in sources:
        assert _judged(module, source) == "loaded", f"{source.name} does not load without damage"
    outcome = outcome or Outcome()
    for number in range(outcome.counts.total(), mutants):
        rng = random.Random(f"{seed} {number}")
        source = rng.choice(sources)
        file = rng.choice(module.mutable(source))
        file.write_bytes(_mutant(module, file, originals[file], rng))
        if hasattr(module, "repair") and rng.random() < 0.7:
            module.repair(source)  # with valid checksums, damage reaches the code behind them
        size, began = _reset_peak(), time.process_time()
        try:
            result = _judged(module, source)
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException as error:  # a panic in a Rust library is not an Exception
            raise AssertionError(f"{format}: mutant {number} of seed {seed}, of {file}: {error!r}") from error
        seconds = time.process_time() - began
        assert seconds < MOST_SECONDS, f"{format}: mutant {number} of seed {seed} took {seconds:.1f} s"
        for damaged in module.mutable(source):
            damaged.write_bytes(originals[damaged])
        outcome.counts[result] += 1
        outcome.slowest = max(outcome.slowest, seconds)
        outcome.growth = max(outcome.growth, _peak() - size)
        assert outcome.growth < MOST_GROWTH, f"{format}: mutant {number}: the process grew by {outcome.growth} bytes"
        finished(outcome)
    return outcome


def _mutant(module: ModuleType, file: Path, original: bytes, rng: random.Random) -> bytes:
    if hasattr(module, "damage") and rng.random() < 0.7:
        changed: bytes = module.damage(original, file, rng)
        return changed
    return _damaged(original, rng)


def _judged(module: ModuleType, source: Path) -> str:
    if hasattr(module, "judge"):
        judged: str = module.judge(source)
        return judged
    try:
        ours = _fingerprint(source)
    except bridge.BridgeError:
        return "refused"
    try:
        theirs = _fingerprint_of_oracle(module, source)
    except Exception:  # other libraries raise any exception for invalid files
        return "only we load it"
    assert ours == theirs, "it loads, but differs from what the oracle reads"
    return "loaded"


def _fingerprint(source: Path) -> str:
    return bridge.fingerprint(bridge.load(source).tensors)


def _fingerprint_of_oracle(module: ModuleType, source: Path) -> str:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return bridge.fingerprint(module.oracle(source))


def _damaged(content: bytes, rng: random.Random) -> bytes:
    """Return `content` with one to four changes, each near the beginning, near the end or anywhere."""
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


def _reset_peak() -> int:
    """Reset the peak memory and return it in bytes. Without Linux's /proc, it cannot be reset."""
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")
    return _peak()


def _peak() -> int:
    with suppress(OSError):
        status = Path("/proc/self/status").read_text()
        return 1024 * int(status.partition("VmHWM:")[2].split()[0])
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


class _State:
    """The outcomes of the driver, stored in a file so that another process can continue."""

    def __init__(self, file: Path | None, seed: int) -> None:
        self._file, self._seed, self._saved_at = file, seed, time.monotonic()
        self.outcomes: dict[str, Outcome] = {}
        if file is not None and file.exists():
            stored = json.loads(file.read_text())
            if stored["seed"] != seed:
                raise SystemExit(f"{file} is of seed {stored['seed']}; give --seed {stored['seed']} or another --state")
            for format, values in stored["outcomes"].items():
                self.outcomes[format] = Outcome(**{**values, "counts": Counter(values["counts"])})

    def finished(self, format: str, outcome: Outcome) -> None:
        self.outcomes[format] = outcome
        if time.monotonic() - self._saved_at > 5:
            self.save()

    def save(self) -> None:
        self._saved_at = time.monotonic()
        if self._file is None:
            return
        beside = self._file.with_name(f"{self._file.name}.new")
        outcomes = {format: {**vars(o), "counts": dict(o.counts)} for format, o in self.outcomes.items()}
        beside.write_text(json.dumps({"seed": self._seed, "outcomes": outcomes}, indent=1) + "\n")
        beside.replace(self._file)


def main() -> None:
    formats = (*FORMATS, *COMPANIONS, *DATA)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mutants", type=int, default=100_000, help="of each format")
    parser.add_argument("--formats", nargs="+", choices=formats, default=formats)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--state", type=Path, help="store the progress in this file, and continue from it")
    chosen = parser.parse_args()
    state = _State(chosen.state, chosen.seed)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        for format in chosen.formats:
            _fuzz_and_report(format, chosen.mutants, chosen.seed, state)
    except KeyboardInterrupt:
        raise SystemExit("stopped; run the same command again to continue" if chosen.state else 130) from None
    finally:
        state.save()


def _fuzz_and_report(format: str, mutants: int, seed: int, state: _State) -> None:
    folder = Path(tempfile.mkdtemp(prefix="fuzz-", dir="/dev/shm" if Path("/dev/shm").is_dir() else None))
    began = time.perf_counter()
    try:
        outcome = fuzz(format, mutants, folder, seed, state.outcomes.get(format), partial(state.finished, format))
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
