"""kill -9 before every system call with which a conversion, a save, or the end of a run changes the disk.

    PYTHONPATH=.:tests python -m faults.every_call

Each case is traced once, which gives its K calls (`faults.syscalls`). It then runs K times in a process that is killed
before the first call, before the second, and so on. After each kill, every path that loads must have the complete old
or the complete new result, and a repetition must succeed and leave nothing else behind. The trace also shows that all
data is flushed before it is renamed, and that the new name is flushed before the next change.
Prints the number of kills for each result. Exits with 1 if anything is wrong. Runs only on Linux on x86-64.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import multiprocessing
import os
import shutil
import signal
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, TypeVar

import jax
import jax.numpy as jnp
import matplotlib.backends.backend_agg  # noqa: F401  # imported before the forks, to save time
import numpy as np
import orbax.checkpoint.experimental.v1 as ocp
from support.models import TINY, config_for, random_checkpoint, random_state

import bridge
from bridge import BridgeError
from bridge.formats import FORMATS, WRITABLE
from bridge.formats.directory import CONFIG, write_config, write_json
from bridge.formats.trainers.run import CHECKPOINTS, RUN, steps
from bridge.storage import manifest
from faults.syscalls import Call, end_with, flushed, trace, why_not
from gpt2_jax.training.loop import finish
from gpt2_jax.training.run.checkpointing import Checkpoints
from gpt2_jax.training.run.directory import EXPORT
from gpt2_jax.training.run.metrics import METRICS, PLOT
from gpt2_jax.training.state import TrainState

WRONG = "FAILED"

T = TypeVar("T")


class Case(Protocol):
    """An operation in a directory."""

    @property
    def result(self) -> str:
        """The path of the result, relative to the directory."""

    def prepare(self, directory: Path) -> None:
        """Create the initial contents."""

    def act(self, directory: Path) -> None: ...

    def found(self, directory: Path, before: Path, whole: Path) -> str:
        """Return a description of the state after a kill, and repeat the operation. Raises `AssertionError` on failure.

        before, whole: directories as before the operation, and as after a complete one.
        """


@dataclass(frozen=True)
class Conversion:
    format: str
    as_file: bool = False
    overwrite: bool = False

    def __str__(self) -> str:
        return f"{self.format}, {'file' if self.as_file else 'directory'}, {'overwritten' if self.overwrite else 'new'}"

    @property
    def result(self) -> str:
        return f"out{FORMATS[self.format].suffixes[0]}" if self.as_file else "out"

    def prepare(self, directory: Path) -> None:
        config = config_for(self.format, TINY)
        bridge.save(random_checkpoint(config), directory / "source", format="huggingface")
        bridge.save_tokenizer(bridge.byte_tokenizer(), directory / "source")
        if self.overwrite:
            bridge.save(random_checkpoint(config, seed=1), directory / self.result, format=self.format)

    def act(self, directory: Path) -> None:
        self._convert(directory, self.overwrite)

    def found(self, directory: Path, before: Path, whole: Path) -> str:
        is_there = (directory / self.result).exists()
        state = _which(directory, before, whole, self.result)
        _require_whole_where_it_loads(directory, before, whole)
        self._convert(directory, self.overwrite or is_there)
        assert tree(directory) == tree(whole), "the repetition gives the same files and no others"
        return state

    def _convert(self, directory: Path, overwrite: bool) -> None:
        checkpoint = bridge.load(directory / "source")
        bridge.save(checkpoint, directory / self.result, format=self.format, overwrite=overwrite)


class InPlace(Conversion):
    """A conversion that writes in place. The check must detect it."""

    def act(self, directory: Path) -> None:
        (directory / self.result).mkdir(exist_ok=True)
        write = FORMATS[self.format].write
        assert write is not None
        write(bridge.load(directory / "source"), directory / self.result)


@dataclass(frozen=True)
class Save:
    """Save the checkpoint of step 9 beside those of 3 and 6, with keep_last=2."""

    result = f"{CHECKPOINTS}/9"

    def __str__(self) -> str:
        return "save"

    def prepare(self, directory: Path) -> None:
        _begin_run(directory, 3, 6)

    def act(self, directory: Path) -> None:
        with Checkpoints(directory, keep_last=2) as checkpoints:
            checkpoints.latest()
            checkpoints.save(_state(9), _loss(9))

    def found(self, directory: Path, before: Path, whole: Path) -> str:
        there = steps(directory)
        assert there in ([3, 6], [3, 6, 9], [6, 9])
        _require_whole_where_it_loads(directory, before, whole)
        assert bridge.fingerprint(bridge.load(directory).tensors) == _fingerprint(there[-1])
        with Checkpoints(directory, keep_last=2) as checkpoints:
            assert _names(directory) == {*map(str, there)}, "no other files remain"
            assert checkpoints.latest() == there[-1]
            for step in there:
                _require_restored(checkpoints, step)
            checkpoints.save(_state(12), _loss(12))
        assert _names(directory) == {str(there[-1]), "12"}
        return f"steps {', '.join(map(str, there))}"


@dataclass(frozen=True)
class LaterLoss:
    """Add the validation loss to a checkpoint that was saved before its evaluation."""

    result = f"{CHECKPOINTS}/6/{manifest.MANIFEST}"

    def __str__(self) -> str:
        return "loss added to a save"

    def prepare(self, directory: Path) -> None:
        _begin_run(directory, 3, 6)

    def act(self, directory: Path) -> None:
        with Checkpoints(directory) as checkpoints:
            checkpoints.add_loss(6, _loss(9))

    def found(self, directory: Path, before: Path, whole: Path) -> str:
        state = _which(directory, before, whole, self.result)
        _require_whole_where_it_loads(directory, before, whole)
        with Checkpoints(directory) as checkpoints:
            assert checkpoints.latest() == 6
            _require_restored(checkpoints, 6)
        self.act(directory)
        assert tree(directory) == tree(whole), "the repetition gives the same files and no others"
        return state


@dataclass(frozen=True)
class End:
    """Write the export and the plot of a run, with or without earlier ones."""

    overwrite: bool = False
    result = EXPORT

    def __str__(self) -> str:
        return f"end of a run, {'overwritten' if self.overwrite else 'new'}"

    def prepare(self, directory: Path) -> None:
        _begin_run(directory, 3)
        if self.overwrite:
            finish(directory, {}, 3, None)
        _begin_run(directory, 6)

    def act(self, directory: Path) -> None:
        finish(directory, {}, 6, None)

    def found(self, directory: Path, before: Path, whole: Path) -> str:
        states = [_which(directory, before, whole, name) for name in (EXPORT, PLOT)]
        _require_whole_where_it_loads(directory, before, whole)
        assert bridge.fingerprint(bridge.load(directory).tensors) == _fingerprint(6)
        if (directory / EXPORT).exists():
            manifest.verify(directory / EXPORT)
        self.act(directory)
        assert tree(directory) == tree(whole), "the repetition gives the same files and no others"
        return f"export {states[0]}, plot {states[1]}"


def cases() -> Iterator[Case]:
    for format in WRITABLE:
        for as_file in (False, True) if FORMATS[format].file_name is not None else (False,):
            for overwrite in (False, True):
                yield Conversion(format, as_file, overwrite)
    yield from (Save(), LaterLoss())
    yield from (End(), End(overwrite=True))


def kill_at_each(case: Case, home: Path, only: int | None = None) -> tuple[list[Call], Counter[str], Counter[str]]:
    """Return the calls of `case`, the states after the kills, and the names of the calls that the kills prevented.

    only: the number of kills, evenly spaced. By default, one before each call.
    """
    before, whole, directory = (home / state / "run" for state in ("before", "whole", "killed"))
    calls = traced(case, before, whole)
    found, at = Counter[str](), Counter[str]()
    if late := named_early(calls, whole, case.result):
        print(f"{case}: renamed before it was flushed: {late}", file=sys.stderr)
        found[WRONG] += 1
    every = range(1, len(calls) + 1)
    for number in every if only is None else sorted({round(n) for n in np.linspace(1, len(calls), only)}):
        shutil.rmtree(directory, ignore_errors=True)
        shutil.copytree(before, directory)
        made, code = trace(lambda: case.act(directory), directory, kill_at=number)
        if code == 0:  # the order of threads and the number of their retries vary
            found["ended before its kill"] += 1
            continue
        assert code == -signal.SIGKILL, f"{case} fails"
        at[made[-1].name] += 1
        try:
            found[in_child(lambda: case.found(directory, before, whole))] += 1
        except EOFError:
            print(f"{case}: killed at call {number}, {made[-1]}, which left the state above", file=sys.stderr)
            found[WRONG] += 1
    return calls, found, at


def traced(case: Case, before: Path, whole: Path) -> list[Call]:
    """Return the calls of `case` without a kill. Creates the directories `before` and `whole`."""
    before.mkdir(parents=True)
    in_child(lambda: case.prepare(before))
    shutil.copytree(before, whole)
    calls, code = trace(lambda: case.act(whole), whole)
    assert code == 0, f"{case} fails"
    return calls


def named_early(calls: list[Call], directory: Path, result: str) -> list[str]:
    """Return the files of the result that are renamed before they are flushed, and its parent if not flushed next."""
    named = [n for n, call in enumerate(calls) if call.name.startswith("rename") and call.to == result]
    if not named:
        return [result]  # it was written under its final name
    at, on_disk, parent = named[-1], flushed(calls[: named[-1]]), str(Path(result).parent)
    there = [Path(), *(path.relative_to(directory / result) for path in (directory / result).rglob("*"))]
    late = [name for name in (str(calls[at].path / path) for path in there) if name not in on_disk]
    return sorted(late) + ([parent] if calls[at + 1] != Call("fsync", parent) else [])


def save_by_orbax_alone(home: Path) -> tuple[list[Call], set[str]]:
    """Return the calls of a save by Orbax, and the files and directories that it creates."""
    home.mkdir()
    calls, code = trace(lambda: ocp.save(home / "3", _state(3)), home)
    assert code == 0
    return calls, {str(path.relative_to(home)) for path in home.rglob("*")}


def use_the_cpu() -> None:
    jax.config.update("jax_platforms", "cpu")


def in_child(work: Callable[[], T]) -> T:
    """Return the result of `work` in a forked process.

    A forked process has no other threads, so JAX's backend must never start in the parent. Raises `EOFError` on
    failure, for which the child prints the reason.
    """
    receive, send = multiprocessing.Pipe(duplex=False)
    child = os.fork()
    if child == 0:
        end_with(lambda: send.send(work()))
    send.close()
    try:
        given: T = receive.recv()
        return given
    finally:
        os.waitpid(child, 0)


def tree(path: Path) -> dict[str, str | None] | None:
    """Return name -> SHA-256 of all files, or None for a directory. Returns None if the path does not exist."""
    if not path.exists():
        return None
    return {
        str(p.relative_to(path)): hashlib.sha256(p.read_bytes()).hexdigest() if p.is_file() else None
        for p in (path, *path.rglob("*"))
    }


def _which(directory: Path, before: Path, whole: Path, name: str) -> str:
    now, old, new = (tree(place / name) for place in (directory, before, whole))
    assert now in (old, new), f"{name} is neither the old one nor the new one"
    return "new" if now == new else "none" if old is None else "old"


def _require_whole_where_it_loads(directory: Path, *wholes: Path) -> None:
    """Assert that every path is refused or loads the weights of a complete checkpoint."""
    known = {found for whole in wholes for found in _loadable(whole)}
    assert _loadable(directory) <= known, "an incomplete checkpoint loads"


def _loadable(directory: Path) -> set[str]:
    """Return the fingerprints of everything that loads from a directory or below it."""
    found = set()
    for path in (directory, *directory.rglob("*")):
        try:
            found.add(bridge.fingerprint(bridge.load(path).tensors))
        except BridgeError:
            continue
    return found


def _begin_run(directory: Path, *saved: int) -> None:
    """Create a run with these checkpoints, or add them to a run. Each has a line in the log."""
    write_config(directory / CONFIG, TINY)
    write_json(directory / RUN, {})
    for step in saved:
        with Checkpoints(directory, keep_last=2) as checkpoints:
            checkpoints.save(_state(step), _loss(step))
        with (directory / METRICS).open("a") as lines:
            lines.write(json.dumps({"step": step, "train_loss": _loss(step), "val_loss": _loss(step)}) + "\n")


def _loss(step: int) -> float:
    return 1 + 1 / step


def _weights(step: int) -> dict[str, np.ndarray]:
    return random_state(TINY, seed=step)


def _fingerprint(step: int) -> str:
    return bridge.fingerprint(_weights(step))


def _state(step: int) -> TrainState:
    params = bridge.stack_layers(bridge.to_flax(_weights(step), TINY))
    moments = jax.tree.map(np.square, params)
    return jax.tree.map(jnp.asarray, TrainState(jnp.int32(step), params, {"count": np.int32(step), "mu": moments}))


def _require_restored(checkpoints: Checkpoints, step: int) -> None:
    expected = _state(step)
    found = checkpoints.restore(step, expected)
    jax.tree.map(np.testing.assert_array_equal, found, expected)


def _names(run: Path) -> set[str]:
    return {path.name for path in (run / CHECKPOINTS).iterdir()}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", type=int, metavar="N", help="only N evenly spaced kills in each case")
    options = parser.parse_args()
    if why := why_not():
        parser.error(why)
    use_the_cpu()
    total, at = Counter[str](), Counter[str]()
    for case in cases():
        with tempfile.TemporaryDirectory() as home:
            calls, found, names = kill_at_each(case, Path(home), options.only)
        print(f"{case}: {len(calls)} calls, {names.total()} kills: {dict(found)}", flush=True)
        total, at = total + found, at + names
    print(f"{at.total()} kills, before {dict(at)}: {total[WRONG]} {WRONG}")
    return int(total[WRONG] > 0)


if __name__ == "__main__":
    sys.exit(main())
