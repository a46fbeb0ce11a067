"""Systems and file systems without locks."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest
from support.file_trees import fill, make_hidden_directory, tree
from support.models import config_for, huggingface_directory

import bridge
from bridge.storage.hidden_directories import MARKER


def test_without_locks_no_hidden_directory_is_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(descriptor: int, operation: int) -> None:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    monkeypatch.setattr("fcntl.flock", refuse)
    left = make_hidden_directory(tmp_path / ".out.0123abcd.partial")
    fill(tmp_path / "out")
    marker = {left.name: None, f"{left.name}/{MARKER}": b""}
    assert tree(tmp_path) == {**marker, "out": None, "out/new": b"new"}


WITHOUT_FCNTL = """
import sys
sys.modules["fcntl"] = None
import bridge
source, target = sys.argv[1:]
bridge.save(bridge.load(source), target, format="flax")
bridge.save(bridge.load(source), target, format="flax", overwrite=True)
bridge.save_tokenizer(bridge.byte_tokenizer(), target)
bridge.save(bridge.load(source), target + ".gguf", format="gguf")
print(bridge.fingerprint(bridge.load(target).tensors))
"""


def test_conversions_work_without_fcntl(tmp_path: Path) -> None:
    source = huggingface_directory(tmp_path / "source", config_for("gguf"))
    arguments = [sys.executable, "-c", WITHOUT_FCNTL, str(source), str(tmp_path / "out")]
    done = subprocess.run(arguments, capture_output=True, text=True)
    assert (done.stdout, done.stderr) == (bridge.fingerprint(bridge.load(source).tensors) + "\n", "")
    assert {p.name for p in tmp_path.iterdir()} == {"source", "out", "out.gguf"}
