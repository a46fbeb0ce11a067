"""The short version of `faults.every_call`: kills before some calls, and the order of flushes and renames."""

from __future__ import annotations

import multiprocessing
from collections.abc import Iterator
from concurrent.futures import Executor, ProcessPoolExecutor
from pathlib import Path

import pytest

from faults import every_call, syscalls
from faults.every_call import WRONG, Case, Conversion, End, InPlace, Save
from faults.syscalls import Call

pytestmark = pytest.mark.processes


@pytest.fixture(scope="module")
def fresh() -> Iterator[Executor]:
    """A process that can fork, because JAX's backend has not started in it."""
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, spawn, initializer=every_call.use_the_cpu) as process:
        if why := process.submit(syscalls.why_not).result():
            pytest.skip(why)
        yield process


@pytest.mark.parametrize(
    ("case", "states"),
    [
        (Conversion("huggingface", overwrite=True), {"old", "new"}),
        (Save(), {"steps 3, 6", "steps 6, 9"}),
        (End(overwrite=True), {f"export {e}, plot {p}" for e, p in (("old", "old"), ("new", "old"), ("new", "new"))}),
    ],
    ids=["conversion", "save", "end"],
)
def test_a_kill_leaves_the_old_or_the_new_result(fresh: Executor, tmp_path: Path, case: Case, states: set[str]) -> None:
    _, found, at = fresh.submit(every_call.kill_at_each, case, tmp_path, only=8).result()
    assert {*found} <= {*states, "ended before its kill"}
    assert at.total() >= 6


def test_a_conversion_in_place_is_detected(fresh: Executor, tmp_path: Path) -> None:
    _, found, at = fresh.submit(every_call.kill_at_each, InPlace("huggingface"), tmp_path, only=4).result()
    assert at.total() == 4
    assert found == {"none": 1, WRONG: 4}, "three of the kills and the early name fail"


@pytest.mark.parametrize(
    ("case", "file"),
    [
        (Save(), "_CHECKPOINT_METADATA"),
        (Conversion("gguf", as_file=True), "new"),
        (Conversion("llmc", overwrite=True), "model.bin"),
    ],
    ids=str,
)
def test_data_is_flushed_before_it_is_renamed(fresh: Executor, tmp_path: Path, case: Case, file: str) -> None:
    before, after = tmp_path / "before", tmp_path / "after"
    calls = fresh.submit(every_call.traced, case, before, after).result()
    assert every_call.named_early(calls, after, case.result) == []
    less = [call for call in calls if not (call.name == "fsync" and call.path.endswith(f"/{file}"))]
    [late] = every_call.named_early(less, after, case.result)
    assert late.endswith(f"/{file}")


def test_orbax_alone_flushes_arrays_but_not_metadata_or_the_name(fresh: Executor, tmp_path: Path) -> None:
    """This is why `Checkpoints` flushes everything. If it fails, Orbax has changed, and flushing may be redundant."""
    calls, there = fresh.submit(every_call.save_by_orbax_alone, tmp_path / "run").result()
    late = {*there, "."} - syscalls.flushed(calls)
    assert not [name for name in late if Path(name).parent.name == "d"], "arrays are flushed"
    assert late >= {
        ".",
        "3",
        "3/_CHECKPOINT_METADATA",
        "3/orbax.checkpoint",
        "3/state/_METADATA",
        "3/state/array_metadatas/process_0",
    }


def test_flushed_files_follow_from_the_calls() -> None:
    calls = [Call("mkdir", "a"), Call("openat", "a/b"), Call("write", "a/b"), Call("fsync", "a/b"), Call("fsync", "a")]
    assert syscalls.flushed(calls) == {"a", "a/b"}
    assert syscalls.flushed([*calls, Call("write", "a/b")]) == {"a"}
    assert syscalls.flushed([*calls, Call("unlinkat", "a/c")]) == {"a/b"}
    assert syscalls.flushed([*calls, Call("fsync", "."), Call("rename", "a", "ab")]) == {"ab", "ab/b"}
    assert syscalls.flushed([*calls, Call("fsync", "."), Call("rename", "a/b", "c")]) == {"c"}
