"""Full disks, file size limits and read-only directories: the command ends with one message, existing files are
unchanged, and once there is space, the resumed run gives the result of an undisturbed one.

    PYTHONPATH=.:tests python -m faults.full_disks --levels 50 --limits 10

Mounts a file system of a few MB in its own namespace: needs util-linux, and root or user namespaces. Prints how often
which write failed. Exits with 1 if anything is wrong.
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
from bridge.formats.run import CHECKPOINTS, steps, verified
from faults import runs
from faults.disks import PAGE, Fault, enter_namespace, small_disk, taken
from gpt2_jax.cli import main as gpt2

FLAGS = ("--n-embd", 24)
SIZE = 8 * 2**20
NOT_BEGUN, ON_ITS_WAY, AT_ITS_END, WHOLE = "not begun", "on its way", "at its end", "whole"
"""States of a run. At its end, it has its last checkpoint, but neither the export nor the plot."""
LIMITS = (
    (ON_ITS_WAY, 400_000),
    (NOT_BEGUN, 0),
    (NOT_BEGUN, 1_000),
    (NOT_BEGUN, 10_000),
    (NOT_BEGUN, 10**6),
    (ON_ITS_WAY, 0),
    (ON_ITS_WAY, 15_000),
    (ON_ITS_WAY, 10**6),
    (AT_ITS_END, 5_000),
    (AT_ITS_END, 30_000),
    (AT_ITS_END, 100_000),
    (AT_ITS_END, 10**6),
)
NOTHING = "nothing"

Case = tuple[str, Fault, Callable[[Fault], str]]
"""An operation under a fault. It returns what could not be written."""


@dataclass(frozen=True)
class Bench:
    """A directory with the started runs, and a small disk."""

    directory: Path
    disk: Path
    expected: str
    """The result of an undisturbed run."""

    @classmethod
    def set_up(cls, directory: Path, disk: Path) -> Bench:
        runs.write_text(directory)
        (directory / "elsewhere").mkdir()
        process = runs.start(directory, ON_ITS_WAY, *FLAGS)
        while len(steps(directory / ON_ITS_WAY)) < 2 and process.poll() is None:
            time.sleep(0.001)
        process.send_signal(signal.SIGKILL)
        process.communicate()
        code, errors = train(directory, WHOLE)
        assert (code, errors) == (0, ""), errors
        ends = shutil.ignore_patterns("export", "loss.png")
        shutil.copytree(directory / WHOLE, directory / AT_ITS_END, ignore=ends)
        for to in WRITABLE:
            huggingface_directory(directory / f"for {to}", config_for(to))
        return cls(directory, disk, runs.outcome(directory / WHOLE))

    def lay(self, begun: str, place: Path) -> Path:
        """Put a run in this state into `place`."""
        clear(place)
        if begun != NOT_BEGUN:
            shutil.copytree(self.directory / begun, place / "run", ignore=shutil.ignore_patterns(".*"))
        return place / "run"

    def levels(self, count: int) -> list[tuple[str, int]]:
        """Yield states and numbers of free bytes: page by page where files end, up to more than the run needs."""
        checkpoint = taken(newest(self.directory / ON_ITS_WAY)) // PAGE
        export, plot = (taken(self.directory / WHOLE / name) // PAGE for name in ("export", "loss.png"))
        pages = {
            NOT_BEGUN: [*range(12), checkpoint // 2, checkpoint + 12, 4 * checkpoint],
            ON_ITS_WAY: [
                *range(5),
                *range(12, checkpoint - 4, 18),
                *range(checkpoint - 4, checkpoint + 3),
                *(checkpoint * quarters // 4 for quarters in (5, 6, 7, 8, 10, 12)),
            ],
            AT_ITS_END: [
                *(0, 1, 2, export // 2, export - 1, export, export + 1),
                *(export + plot // 2, export + plot - 1, export + plot, export + plot + 4),
            ],
        }
        every = [(begun, number * PAGE) for begun, numbers in pages.items() for number in numbers]
        return [every[round(i * (len(every) - 1) / max(1, count - 1))] for i in range(count)]


def of_runs(bench: Bench, levels: int, cached: int, limits: int, read_only: int) -> Iterator[tuple[str, list[Case]]]:
    """Yield this many cases of each fault."""

    def case(begun: str, place: Path, fault: Fault, *more: object) -> Case:
        return f"a run {begun}", fault, lambda fault: withstands(bench, begun, place, fault, *more)

    disk, inside = bench.disk, ("--cache", bench.disk / "cache")
    yield "full disks", [case(begun, disk, Fault.full(disk, leave)) for begun, leave in bench.levels(levels)]
    small = [(begun, number * PAGE) for begun in (NOT_BEGUN, ON_ITS_WAY) for number in (0, 4, 10)][:cached]
    yield "full disks with the cache", [case(begun, disk, Fault.full(disk, leave), *inside) for begun, leave in small]
    elsewhere = bench.directory / "elsewhere"
    yield "limited files", [case(begun, elsewhere, Fault.limit(size)) for begun, size in LIMITS[:limits]]
    states = (ON_ITS_WAY, NOT_BEGUN, AT_ITS_END)[:read_only]
    yield "read-only disks", [case(begun, disk, Fault.read_only(disk)) for begun in states]
    yield "no permission", [case(begun, disk, Fault.forbidden(disk)) for begun in states]


def of_conversions(bench: Bench) -> Iterator[tuple[str, list[Case]]]:
    disk = bench.disk
    for to in WRITABLE:
        converts(bench, to, disk, False, None)
        size = taken(disk / "converted")
        faults = [Fault.full(disk, leave) for leave in (0, PAGE, size // 2, size - PAGE, size + 4 * PAGE)]
        faults += [Fault.limit(limit) for limit in (0, 100, size // 4, 2 * size)]
        faults += [Fault.read_only(disk), Fault.forbidden(disk)]
        for overwrite, how in ((False, "anew"), (True, "over another")):
            meet = partial(converts, bench, to, disk, overwrite)
            yield f"conversions to {to}, {how}", [(how, fault, meet) for fault in faults]


def withstands(bench: Bench, begun: str, place: Path, fault: Fault, *more: object) -> str:
    """Resume a run under a fault, then without it."""
    run = bench.lay(begun, place)
    name = str(run.relative_to(bench.directory))
    with fault.lasting():
        code, errors = train(bench.directory, name, *more)
    failed = what_failed(code, errors, fault, run)
    assert_readable(run, begun)
    if failed != NOTHING:
        code, errors = train(bench.directory, name, *more)
        assert (code, errors) == (0, ""), f"it does not continue: {errors}"
    assert runs.outcome(run) == bench.expected, "it came to another end"
    wrong = names(run) ^ names(bench.directory / WHOLE)
    assert not wrong, f"left behind, or missing: {wrong}"
    there = {path.name for path in place.iterdir()} - {"cache"}
    assert there == {run.name}, f"left behind: {there}"
    return failed


def train(directory: Path, name: str, *more: object) -> tuple[int, str]:
    """Exit code and standard error of `gpt2 train --resume`."""
    process = runs.start(directory, name, *FLAGS, *more)
    try:
        _, errors = process.communicate(timeout=120)
    except subprocess.TimeoutExpired:
        process.kill()
        raise AssertionError(f"it hangs: {process.communicate()}") from None
    return process.returncode, errors


def what_failed(code: int, errors: str, fault: Fault, target: Path) -> str:
    """The one message names the failed write."""
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


def assert_readable(run: Path, begun: str) -> None:
    """Check its newest checkpoint, and the run."""
    assert steps(run) or begun == NOT_BEGUN, "its checkpoints are gone"
    if steps(run):
        verified(run, steps(run)[-1])
        for source in (run, newest(run)):
            loaded = bridge.load(source)
            bridge.fingerprint(loaded.tensors)
            assert len(loaded.diagnostics) == 1, f"a checkpoint is damaged: {loaded.diagnostics}"


def newest(run: Path) -> Path:
    return run / CHECKPOINTS / str(steps(run)[-1])


def names(run: Path) -> set[str]:
    """Hashes of all files. The files of Orbax's databases have random names."""
    return {re.sub(r"/[0-9a-f]{32}$", "/*", str(path.relative_to(run))) for path in run.rglob("*")}


def converts(bench: Bench, to: str, place: Path, overwrite: bool, fault: Fault | None) -> str:
    """The directory holds either the complete new result or the unchanged old one."""
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
        assert contents(target) == before, "what was there is not as it was"
    assert there == ({target.name} if overwrite or failed == NOTHING else set()), there
    return failed


def command(*arguments: object) -> tuple[int, str]:
    """Exit code and standard error of `gpt2 ARGUMENTS`, in this process."""
    errors = io.StringIO()
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(errors):
        try:
            gpt2([str(argument) for argument in arguments])
        except SystemExit as ended:
            return int(ended.code or 0), errors.getvalue()
    raise AssertionError("it did not end")


def contents(directory: Path) -> dict[str, str]:
    files = [path for path in sorted(directory.rglob("*")) if path.is_file()]
    return {str(path.relative_to(directory)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def clear(place: Path) -> None:
    for path in place.iterdir():
        shutil.rmtree(path) if path.is_dir() else path.unlink()


def count(name: str, cases: list[Case]) -> int:
    """Run the cases and print their results. Returns the number of failures."""
    failed, wrong = Counter[str](), 0
    for who, fault, meet in cases:
        try:
            failed[meet(fault)] += 1
        except AssertionError as error:
            print(f"OTHERWISE: {who}, {fault.name}: {error}", flush=True)
            wrong += 1
    print(f"{name}: {len(cases)}; what could not be written: {dict(failed)}; otherwise {wrong}", flush=True)
    return wrong


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--levels", type=int, default=50, help="of bytes that are free")
    parser.add_argument("--cached", type=int, default=6, help="with the tokeniser's cache on the disk too")
    parser.add_argument("--limits", type=int, default=12, help="of how large a file may get")
    parser.add_argument("--read-only", type=int, default=3, help="states of a run that cannot be written to")
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
