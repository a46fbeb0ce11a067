"""Corruptions of the newest checkpoint: each is found and named, and the run resumes from the newest valid one.

    PYTHONPATH=.:tests python -m faults.corruptions --corruptions 500 --resumed 10 --seed 0

Prints the number of corruptions of each kind. Exits with 1 if any failed.
"""

from __future__ import annotations

import argparse
import hashlib
import random
import re
import shutil
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import jax
import numpy as np

import bridge
from bridge import BridgeError
from bridge.formats.trainers.run import CHECKPOINTS, steps, steps_by_loss, validation_loss
from bridge.storage.manifest import MANIFEST
from faults import runs
from gpt2_jax.parallel.sharding import make_mesh
from gpt2_jax.training import TrainState, make_optimizer
from gpt2_jax.training.run.checkpointing import Checkpoints
from gpt2_jax.training.run.identity import stored_identity
from gpt2_jax.training.state import abstract_state, make_model

FLAGS = ("--n-embd", 24, "--learning-rate", 1e-3, "--eval-every", 3, "--keep-last", 4)
"""The loss falls until the end, so that the newest checkpoint is also the best. The run keeps four checkpoints."""

Damage = Callable[[Path, random.Random], dict[Path, Path]]
"""Corrupts a checkpoint. Returns changed checkpoint -> the path that the message must name."""


def flip(checkpoint: Path, rng: random.Random) -> dict[Path, Path]:
    file, data = _contents(checkpoint, rng)
    if data:
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    return _written(checkpoint, file, data)


def truncate(checkpoint: Path, rng: random.Random) -> dict[Path, Path]:
    file, data = _contents(checkpoint, rng)
    return _written(checkpoint, file, data[: rng.randrange(len(data) or 1)])


def append(checkpoint: Path, rng: random.Random) -> dict[Path, Path]:
    file, data = _contents(checkpoint, rng)
    return _written(checkpoint, file, data + rng.randbytes(rng.randint(1, 100)))


def zero(checkpoint: Path, rng: random.Random) -> dict[Path, Path]:
    """Zero a range of the file, like a disk block that was never written, or all of it."""
    file, data = _contents(checkpoint, rng)
    start, stop = sorted(rng.choices(range(len(data) + 1), k=2)) if rng.random() < 0.7 else (0, len(data))
    return _written(checkpoint, file, data[:start] + bytes(stop - start) + data[stop:])


def delete(checkpoint: Path, rng: random.Random) -> dict[Path, Path]:
    file, _ = _contents(checkpoint, rng)
    file.unlink()
    return _named(checkpoint, file)


def delete_directory(checkpoint: Path, rng: random.Random) -> dict[Path, Path]:
    directory = rng.choice([path for path in sorted(checkpoint.rglob("*")) if path.is_dir()])
    shutil.rmtree(directory)
    return {checkpoint: directory}


def swap(checkpoint: Path, rng: random.Random) -> dict[Path, Path]:
    """Exchange a file of this step and one of another.

    They have the same name, the same position (because files of a database have random names), or the same size.
    """
    file, data = _contents(checkpoint, rng)
    other = checkpoint.with_name(rng.choice([name for name in _names(checkpoint) if name != checkpoint.name]))
    like = file.relative_to(checkpoint)
    partners = [
        path
        for path in _files(other)
        if (path.parent == other / like.parent and (like.name == path.name or like.parent.name == "d"))
        or path.stat().st_size == len(data)
    ]
    partners = [path for path in partners if path.read_bytes() != data]
    if not partners:
        return {}
    partner = rng.choice(partners)
    file.write_bytes(partner.read_bytes())
    partner.write_bytes(data)
    return {**_named(checkpoint, file), **_named(other, partner)}


def exchange(checkpoint: Path, rng: random.Random) -> dict[Path, Path]:
    """Exchange the names of two checkpoints."""
    other = checkpoint.with_name(rng.choice([name for name in _names(checkpoint) if name != checkpoint.name]))
    aside = checkpoint.with_name("aside")
    checkpoint.rename(aside)
    other.rename(checkpoint)
    aside.rename(other)
    return {checkpoint: checkpoint, other: other}


KINDS: tuple[Damage, ...] = (flip, truncate, append, zero, delete, delete_directory, swap, exchange)


def _contents(checkpoint: Path, rng: random.Random) -> tuple[Path, bytearray]:
    """Read a random file, chosen uniformly or, like a disk fault, in proportion to its size."""
    files = _files(checkpoint)
    by_size = rng.choices(files, [path.stat().st_size for path in files])[0]
    file = rng.choice([rng.choice(files), by_size])
    return file, bytearray(file.read_bytes())


def _written(checkpoint: Path, file: Path, data: bytes) -> dict[Path, Path]:
    if data == file.read_bytes():
        return {}
    file.write_bytes(data)
    return _named(checkpoint, file)


def _named(checkpoint: Path, file: Path) -> dict[Path, Path]:
    """Return what the message must name: the file, or the checkpoint if the file is its manifest."""
    return {checkpoint: checkpoint if file.name == MANIFEST else file}


def _files(checkpoint: Path) -> list[Path]:
    return [path for path in sorted(checkpoint.rglob("*")) if path.is_file()]


def _names(checkpoint: Path) -> list[str]:
    return [str(step) for step in steps(checkpoint.parents[1])]


@dataclass(frozen=True)
class Undamaged:
    """The run before the corruption, and hashes of its checkpoints."""

    run: Path
    like: TrainState
    states: dict[int, str]
    weights: dict[int, str]

    @classmethod
    def of(cls, run: Path) -> Undamaged:
        config = stored_identity(run).config
        tx = make_optimizer(config.optimizer, config.max_steps)
        like = abstract_state(config, make_model(config), tx, make_mesh(config.mesh))
        with Checkpoints(run) as checkpoints:
            states = {step: hash_of_state(checkpoints.restore(step, like)) for step in steps(run)}
        weights = {step: bridge.fingerprint(bridge.load(run / CHECKPOINTS / str(step)).tensors) for step in steps(run)}
        assert len({*states.values()}) == len({*weights.values()}) == len(steps(run)) > 2
        assert steps_by_loss(run)[0] == steps(run)[-1]
        return cls(run, like, states, weights)

    def copy(self, to: Path) -> Path:
        """Copy the run without its export."""
        return Path(shutil.copytree(self.run, to, ignore=shutil.ignore_patterns("export", "*.png")))


def hash_of_state(state: TrainState) -> str:
    seen = hashlib.sha256()
    for path, leaf in jax.tree_util.tree_leaves_with_path(state):
        array = np.asarray(leaf)
        seen.update(f"{jax.tree_util.keystr(path)} {array.dtype} {array.shape}".encode() + array.tobytes())
    return seen.hexdigest()


def corrupt(run: Path, kind: Damage, rng: random.Random) -> dict[int, str]:
    """Damage the newest checkpoint. Returns damaged step -> the path that the message must name."""
    newest = run / CHECKPOINTS / str(steps(run)[-1])
    changed: dict[Path, Path] = {}
    while not changed:
        changed = kind(newest, rng)
    return {int(checkpoint.name): str(path) for checkpoint, path in changed.items()}


def assert_skipped(undamaged: Undamaged, run: Path, damaged: dict[int, str]) -> None:
    """Assert that `bridge.load` and a resumed run skip and name the damaged steps."""
    good = [step for step in steps(undamaged.run) if step not in damaged]
    best = min(good, key=lambda step: validation_loss(undamaged.run, step) or float("inf"))
    loaded = bridge.load(run)
    assert bridge.fingerprint(loaded.tensors) == undamaged.weights[best]
    assert loaded.diagnostics[0] == f"read from {CHECKPOINTS}/{best}"
    unknown = {step for step, what in damaged.items() if what == str(run / CHECKPOINTS / str(step))}
    assert_named(
        {step: what for step, what in damaged.items() if step > best or step in unknown}, loaded.diagnostics[1:]
    )
    for step, what in damaged.items():
        try:
            bridge.load(run / CHECKPOINTS / str(step))
            raise AssertionError(f"the damaged step {step} was read")
        except BridgeError as error:
            assert what in str(error), str(error)
    messages: list[str] = []
    with Checkpoints(run, say=messages.append) as checkpoints:
        newest = checkpoints.latest()
        assert newest == good[-1]
        assert hash_of_state(checkpoints.restore(newest, undamaged.like)) == undamaged.states[newest]
    assert_named(damaged, messages)
    assert all((run / CHECKPOINTS / f"{step}.damaged").is_dir() for step in damaged)


def assert_named(damaged: dict[int, str], messages: tuple[str, ...] | list[str]) -> None:
    """Assert that the messages name exactly these steps, each with its damage."""
    lines = {
        int(found[1]): line
        for line in messages
        if (found := re.match(r"the checkpoint of step (\d+) is damaged", line))
    }
    assert lines.keys() == damaged.keys(), f"{damaged} was damaged; messages: {messages}"
    assert all(what in lines[step] for step, what in damaged.items()), f"{damaged} was damaged; messages: {messages}"


def assert_resumed(undamaged: Undamaged, run: Path, damaged: dict[int, str], expected: str) -> None:
    """Resume with the command, and assert that the result equals that of the undamaged run."""
    before = {step: _bytes(run / CHECKPOINTS / str(step)) for step in damaged}
    process = runs.start(run.parent, run.name, *FLAGS)
    output, errors = process.communicate(timeout=300)
    assert (process.returncode, errors) == (0, ""), errors
    assert_named(damaged, output.splitlines())
    assert runs.outcome(run) == expected
    assert {step: _bytes(run / CHECKPOINTS / f"{step}.damaged") for step in damaged} == before


def _bytes(directory: Path) -> dict[str, bytes]:
    return {str(path.relative_to(directory)): path.read_bytes() for path in _files(directory)}


def corruptions(undamaged: Undamaged, rng: random.Random, beside: Path) -> Iterator[tuple[str, Path, dict[int, str]]]:
    """Yield the corruptions in turn, each on a fresh copy of the run at the same path."""
    while True:
        for kind in KINDS:
            run = undamaged.copy(beside)
            yield kind.__name__.replace("_", " "), run, corrupt(run, kind, rng)
            shutil.rmtree(run)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--corruptions", type=int, default=500)
    parser.add_argument("--resumed", type=int, default=10, help="number of these that resume with the command")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    rng, seen, wrong = random.Random(options.seed), Counter[str](), 0
    with tempfile.TemporaryDirectory() as temporary:
        directory = Path(temporary)
        runs.write_text(directory)
        errors = runs.start(directory, "whole", *FLAGS).communicate(timeout=300)[1]
        assert not errors, errors
        undamaged, expected = Undamaged.of(directory / "whole"), runs.outcome(directory / "whole")
        cases = corruptions(undamaged, rng, directory / "run")
        for number, (kind, run, damaged) in enumerate(islice(cases, options.corruptions)):
            try:
                if number < options.resumed:
                    assert_resumed(undamaged, run, damaged, expected)
                    seen["resumed with the command"] += 1
                else:
                    assert_skipped(undamaged, run, damaged)
            except AssertionError as error:
                print(f"FAILED: {kind} of {damaged}: {error}", flush=True)
                wrong += 1
            seen[kind] += 1
            if (number + 1) % 50 == 0 or number + 1 == options.corruptions:
                print(f"{number + 1} corruptions: {dict(seen)}, {wrong} failed", flush=True)
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main())
