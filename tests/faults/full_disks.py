"""Full disks, file size limits and read-only directories: the command prints one error and leaves existing files
unchanged. When it can write again, the resumed run gives the result of an undisturbed one.

    PYTHONPATH=.:tests python -m faults.full_disks --levels 50 --limits 10

Mounts a file system of a few MB in its own namespace, which needs util-linux, and root or user namespaces. Prints how
often each write failed. Exits with 1 if anything is wrong.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import io
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from support.models import TINY, config_for, huggingface_directory

import bridge
from bridge.formats import WRITABLE
from bridge.formats.trainers.run import CHECKPOINTS, steps, verified
from faults import runs
from faults.disks import PAGE, Fault, enter_namespace, small_disk, taken
from gpt2_jax.cli import main as gpt2

FLAGS = ("--n-embd", 24)
SIZE = 8 * 2**20
NOT_STARTED, HALFWAY, TRAINED, WHOLE = "not started", "halfway", "trained", "whole"
"""States of a run. A trained one has its last checkpoint, but neither the export nor the plot."""
LIMITS = (
    (HALFWAY, 400_000),
    (NOT_STARTED, 0),
    (NOT_STARTED, 1_000),
    (NOT_STARTED, 10_000),
    (NOT_STARTED, 10**6),
    (HALFWAY, 0),
    (HALFWAY, 15_000),
    (HALFWAY, 10**6),
    (TRAINED, 5_000),
    (TRAINED, 30_000),
    (TRAINED, 100_000),
    (TRAINED, 10**6),
)
NOTHING = "nothing"

Case = tuple[str, Fault, Callable[[Fault], str]]
"""The name of an operation, the fault, and a function that checks it and returns what could not be written."""


@dataclass(frozen=True)
class Bench:
    """A directory with runs in all states, and a small disk."""

    directory: Path
    disk: Path
    expected: str
    """The result of an undisturbed run."""

    @classmethod
    def set_up(cls, directory: Path, disk: Path) -> Bench:
        runs.write_text(directory)
        (directory / "elsewhere").mkdir()
        process = runs.start(directory, HALFWAY, *FLAGS)
        while len(steps(directory / HALFWAY)) < 2 and process.poll() is None:
            time.sleep(0.001)
        process.send_signal(signal.SIGKILL)
        process.communicate()
        code, errors = train(directory, WHOLE)
        assert (code, errors) == (0, ""), errors
        ends = shutil.ignore_patterns("export", "loss.png")
        shutil.copytree(directory / WHOLE, directory / TRAINED, ignore=ends)
        for to in WRITABLE:
            huggingface_directory(directory / f"for {to}", config_for(to))
        return cls(directory, disk, runs.outcome(directory / WHOLE))

    def copy_run(self, state: str, place: Path) -> Path:
        """Copy a run in this state to `place`."""
        clear(place)
        if state != NOT_STARTED:
            shutil.copytree(self.directory / state, place / "run", ignore=shutil.ignore_patterns(".*"))
        return place / "run"

    def levels(self, count: int) -> list[tuple[str, int]]:
        """Return (state, free bytes). The sizes are dense around the ends of files, and exceed the needs of the run."""
        checkpoint = taken(newest(self.directory / HALFWAY)) // PAGE
        export, plot = (taken(self.directory / WHOLE / name) // PAGE for name in ("export", "loss.png"))
        pages = {
            NOT_STARTED: [*range(12), checkpoint // 2, checkpoint + 12, 4 * checkpoint],
            HALFWAY: [
                *range(5),
                *range(12, checkpoint - 4, 18),
                *range(checkpoint - 4, checkpoint + 3),
                *(checkpoint * quarters // 4 for quarters in (5, 6, 7, 8, 10, 12)),
            ],
            TRAINED: [
                *(0, 1, 2, export // 2, export - 1, export, export + 1),
                *(export + plot // 2, export + plot - 1, export + plot, export + plot + 4),
            ],
        }
        every = [(state, number * PAGE) for state, numbers in pages.items() for number in numbers]
        return [every[round(i * (len(every) - 1) / max(1, count - 1))] for i in range(count)]


def of_runs(bench: Bench, levels: int, cached: int, limits: int, read_only: int) -> Iterator[tuple[str, list[Case]]]:
    """Yield the name and the cases of each kind of fault, in the given numbers."""

    def case(state: str, place: Path, fault: Fault, *more: object) -> Case:
        return f"a run {state}", fault, lambda fault: check_run(bench, state, place, fault, *more)

    disk, inside = bench.disk, ("--cache", bench.disk / "cache")
    yield "full disks", [case(state, disk, Fault.full(disk, leave)) for state, leave in bench.levels(levels)]
    small = [(state, number * PAGE) for state in (NOT_STARTED, HALFWAY) for number in (0, 4, 10)][:cached]
    yield "full disks with the cache", [case(state, disk, Fault.full(disk, leave), *inside) for state, leave in small]
    elsewhere = bench.directory / "elsewhere"
    yield "limited files", [case(state, elsewhere, Fault.limit(size)) for state, size in LIMITS[:limits]]
    states = (HALFWAY, NOT_STARTED, TRAINED)[:read_only]
    yield "read-only disks", [case(state, disk, Fault.read_only(disk)) for state in states]
    yield "no permission", [case(state, disk, Fault.forbidden(disk)) for state in states]


def of_conversions(bench: Bench) -> Iterator[tuple[str, list[Case]]]:
    disk = bench.disk
    for to in WRITABLE:
        check_conversion(bench, to, disk, False, None)
        size = taken(disk / "converted")
        faults = [Fault.full(disk, leave) for leave in (0, PAGE, size // 2, size - PAGE, size + 4 * PAGE)]
        faults += [Fault.limit(limit) for limit in (0, 100, size // 4, 2 * size)]
        faults += [Fault.read_only(disk), Fault.forbidden(disk)]
        for overwrite, how in ((False, "new"), (True, "overwritten")):
            check = partial(check_conversion, bench, to, disk, overwrite)
            yield f"conversions to {to}, {how}", [(how, fault, check) for fault in faults]


def check_run(bench: Bench, state: str, place: Path, fault: Fault, *more: object) -> str:
    """Resume a run under a fault, then without it. Returns what could not be written."""
    run = bench.copy_run(state, place)
    name = str(run.relative_to(bench.directory))
    with fault.lasting():
        code, errors = train(bench.directory, name, *more)
    failed = what_failed(code, errors, fault, run)
    assert_readable(run, state)
    if failed != NOTHING:
        code, errors = train(bench.directory, name, *more)
        assert (code, errors) == (0, ""), f"it does not resume: {errors}"
    assert runs.outcome(run) == bench.expected, "the result differs"
    wrong = names(run) ^ names(bench.directory / WHOLE)
    assert not wrong, f"left behind, or missing: {wrong}"
    there = {path.name for path in place.iterdir()} - {"cache"}
    assert there == {run.name}, f"left behind: {there}"
    return failed


def train(directory: Path, name: str, *more: object) -> tuple[int, str]:
    """Return the exit code and standard error of `gpt2 train --resume`."""
    process = runs.start(directory, name, *FLAGS, *more)
    try:
        _, errors = process.communicate(timeout=120)
    except subprocess.TimeoutExpired:
        process.kill()
        raise AssertionError(f"it hangs: {process.communicate()}") from None
    return process.returncode, errors


def what_failed(code: int, errors: str, fault: Fault, target: Path) -> str:
    """Return what could not be written, according to the error message."""
    if (code, errors) == (0, ""):
        return NOTHING
    assert code == 2, f"exit code {code}: {errors}"
    assert errors.startswith("gpt2: ") and errors.count("gpt2: ") == 1 and "Traceback" not in errors, errors
    assert fault.why in errors, errors
    if re.match(r"gpt2: the checkpoint of step \d+ could not be written", errors):
        return "checkpoint"
    named = re.match(r"gpt2: (?:cannot write (?:into )?)?'(.*?)'", errors)
    assert named, f"it does not name what could not be written: {errors}"
    path = Path(named[1])
    name = path.relative_to(target if target in path.parents else target.parent).parts[0]
    return re.sub(r"^\.(.*)\.[0-9a-f]{8}\.partial$", r"\1", name)


def assert_readable(run: Path, state: str) -> None:
    """Assert that the run and its newest checkpoint can be read."""
    assert steps(run) or state == NOT_STARTED, "its checkpoints are missing"
    if steps(run):
        verified(run, steps(run)[-1])
        for source in (run, newest(run)):
            loaded = bridge.load(source)
            bridge.fingerprint(loaded.tensors)
            assert len(loaded.diagnostics) == 1, f"a checkpoint is damaged: {loaded.diagnostics}"


def newest(run: Path) -> Path:
    return run / CHECKPOINTS / str(steps(run)[-1])


def names(run: Path) -> set[str]:
    """Return the paths of all files. Random names of the files in Orbax's databases are replaced."""
    return {re.sub(r"/[0-9a-f]{32}$", "/*", str(path.relative_to(run))) for path in run.rglob("*")}


def check_conversion(bench: Bench, to: str, place: Path, overwrite: bool, fault: Fault | None) -> str:
    """Convert under a fault, and assert that the complete new result or the unchanged old one is there.

    Returns what could not be written.
    """
    clear(place)
    source, target = bench.directory / f"for {to}", place / "converted"
    if overwrite:
        huggingface_directory(target, TINY, seed=1)
    before, options = contents(target), ["--overwrite"] if overwrite else []
    with fault.lasting() if fault else contextlib.nullcontext():
        code, errors = command("convert", source, target, "--to", to, *options)
        failed = NOTHING if fault is None else what_failed(code, errors, fault, target)
        there = {path.name for path in place.iterdir()} - {"filler"}
    if failed == NOTHING:
        assert bridge.fingerprint(bridge.load(target).tensors) == bridge.fingerprint(bridge.load(source).tensors)
    else:
        assert contents(target) == before, "an existing file changed"
    assert there == ({target.name} if overwrite or failed == NOTHING else set()), there
    return failed


def command(*arguments: object) -> tuple[int, str]:
    """Return the exit code and standard error of `gpt2 ARGUMENTS`, run in this process."""
    errors = io.StringIO()
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(errors):
        try:
            gpt2([str(argument) for argument in arguments])
        except SystemExit as ended:
            return int(ended.code or 0), errors.getvalue()
    raise AssertionError("the command did not exit")


def contents(directory: Path) -> dict[str, str]:
    files = [path for path in sorted(directory.rglob("*")) if path.is_file()]
    return {str(path.relative_to(directory)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def clear(place: Path) -> None:
    for path in place.iterdir():
        shutil.rmtree(path) if path.is_dir() else path.unlink()


def count(name: str, cases: list[Case]) -> int:
    """Run the cases and print their results. Returns the number of failures."""
    failed, wrong = Counter[str](), 0
    for who, fault, check in cases:
        try:
            failed[check(fault)] += 1
        except AssertionError as error:
            print(f"FAILED: {who}, {fault.name}: {error}", flush=True)
            wrong += 1
    print(f"{name}: {len(cases)}; what could not be written: {dict(failed)}; {wrong} failed", flush=True)
    return wrong


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--levels", type=int, default=50, help="number of sizes of free space")
    parser.add_argument("--cached", type=int, default=6, help="number of these with the token cache on the disk too")
    parser.add_argument("--limits", type=int, default=12, help="number of file size limits")
    parser.add_argument("--read-only", type=int, default=3, help="number of states with a read-only directory")
    parser.add_argument("--conversions", action=argparse.BooleanOptionalAction, default=True)
    options = parser.parse_args()
    enter_namespace()
    with tempfile.TemporaryDirectory() as temporary, small_disk(Path(temporary) / "disk", SIZE) as disk:
        bench = Bench.set_up(Path(temporary), disk)
        wrong = 0
        for name, cases in of_runs(bench, options.levels, options.cached, options.limits, options.read_only):
            wrong += count(name, cases)
        for name, cases in of_conversions(bench) if options.conversions else ():
            wrong += count(name, cases)
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main())
