"""An interrupted conversion leaves nothing that loads.

A killed process leaves the files that are on the disk at that moment. The partial output is therefore copied before
every tensor, and each copy is opened.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from support.models import SMALLEST, config_for, random_checkpoint

import bridge
from bridge import BridgeError
from bridge.formats import FORMATS, WRITABLE
from bridge.storage.tensors import LazyTensor, LazyTensorMap


def checkpoint_that_calls(before_each: Callable[[], object], format: str) -> bridge.Checkpoint:
    """Return a checkpoint for the format that calls `before_each` when one of its tensors is read."""
    checkpoint = random_checkpoint(config_for(format, SMALLEST))

    def watched(entry: LazyTensor) -> LazyTensor:
        def read() -> np.ndarray:
            before_each()
            return entry.read()

        return replace(entry, read=read)

    entries = {name: watched(entry) for name, entry in checkpoint.tensors.entries.items()}
    return replace(checkpoint, tensors=LazyTensorMap(entries))


@pytest.mark.parametrize("as_file", [False, True], ids=["directory", "file"])
@pytest.mark.parametrize("format", WRITABLE)
def test_no_partial_output_loads(tmp_path: Path, format: str, as_file: bool) -> None:
    if as_file and FORMATS[format].file_name is None:
        pytest.skip(f"{format} is a directory")
    target = tmp_path / ("out" + (FORMATS[format].suffixes[0] if as_file else ""))
    states = tmp_path / "states"
    states.mkdir()

    def copy_what_is_there() -> None:
        assert not target.exists()
        [partial] = [*tmp_path.glob(".*.partial/new")] or [None]
        if partial is not None:
            copy = states / f"{len(list(states.iterdir()))}{target.suffix}"
            (shutil.copytree if partial.is_dir() else shutil.copy)(partial, copy)

    bridge.save(checkpoint_that_calls(copy_what_is_there, format), target, format=format)
    assert bridge.load(target).format == format
    tensors = len(bridge.parameters(SMALLEST))
    assert len(list(states.iterdir())) >= tensors - 1, "a copy before nearly every tensor"
    for state in states.iterdir():
        with pytest.raises(BridgeError):
            bridge.fingerprint(bridge.load(state).tensors)


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), RuntimeError("pulled the plug")])
@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("format", WRITABLE)
def test_an_error_during_the_write_changes_nothing(
    tmp_path: Path, format: str, overwrite: bool, error: Exception
) -> None:
    if overwrite:
        bridge.save(random_checkpoint(config_for(format, SMALLEST)), tmp_path / "out", format=format)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    calls = []

    def fail_at_the_tenth() -> None:
        calls.append(1)
        if len(calls) == 10:
            raise error

    checkpoint = checkpoint_that_calls(fail_at_the_tenth, format)
    with pytest.raises((BridgeError, RuntimeError), match=str(error).partition("] ")[2] or str(error)):
        bridge.save(checkpoint, tmp_path / "out", format=format, overwrite=overwrite)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before
    assert list(tmp_path.iterdir()) == ([tmp_path / "out"] if overwrite else [])
