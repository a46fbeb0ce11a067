"""What the command sets up for its own process."""

from __future__ import annotations

import logging
import os
import stat
import sys
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import pytest
from support.commands import run

from gpt2_jax.console import process
from gpt2_jax.console.process import (
    HUGE_PAGES,
    TUNABLES,
    keep_compiled_programs,
    leave_errors_to_their_message,
    take_huge_pages,
    with_huge_pages,
)


@pytest.fixture
def linux(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A system whose kernel gives huge pages to those that ask; the file that says so."""
    file = tmp_path / "enabled"
    file.write_text("always [madvise] never\n")
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setattr(process, "_THP", file)
    return file


def test_huge_pages_are_asked_for_beside_the_users_tunables(linux: Path) -> None:
    assert with_huge_pages({"A": "1"}) == {"A": "1", TUNABLES: HUGE_PAGES}
    assert with_huge_pages({TUNABLES: "glibc.malloc.check=3"})[TUNABLES] == f"glibc.malloc.check=3:{HUGE_PAGES}"


def test_nothing_is_asked_for_where_it_is_set_or_cannot_be_had(linux: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    off = {TUNABLES: "glibc.malloc.hugetlb=0"}
    assert with_huge_pages(off) == off
    linux.write_text("always madvise [never]\n")
    assert with_huge_pages({}) == {}
    linux.unlink()
    assert with_huge_pages({}) == {}
    monkeypatch.setattr(sys, "platform", "darwin")
    assert with_huge_pages({}) == {}


def test_the_command_starts_again_once_with_the_same_arguments(linux: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[Any] = []
    monkeypatch.setattr(os, "execve", lambda *call: started.append(call))
    monkeypatch.setattr(os, "environ", {"A": "1"})
    monkeypatch.setattr(sys, "orig_argv", ["python", "-X", "utf8", "gpt2", "train"])
    monkeypatch.setattr(sys, "stdout", None)  # as with >&-
    take_huge_pages()
    ((program, arguments, environment),) = started
    assert program == arguments[0] == sys.executable and arguments[1:] == ["-X", "utf8", "gpt2", "train"]
    assert environment["A"] == "1" and environment[TUNABLES] == HUGE_PAGES
    kept_from_it = {name: value for name, value in environment.items() if name != TUNABLES}
    monkeypatch.setattr(os, "environ", kept_from_it)
    take_huge_pages()
    assert len(started) == 1


def test_a_command_that_cannot_start_again_goes_on(linux: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: Any) -> None:
        raise OSError("no such file")

    monkeypatch.setattr(os, "execve", fails)
    monkeypatch.setattr(os, "environ", {})
    take_huge_pages()


@pytest.fixture
def cache_setting() -> Any:
    before = jax.config.values["jax_compilation_cache_dir"]
    yield
    jax.config.update("jax_compilation_cache_dir", before)


@pytest.mark.parametrize(
    ("cpu", "kept"), [("vendor_id : AuthenticAMD", True), ("vendor_id : GenuineIntel", False), ("arm64", True)]
)
def test_programs_are_kept_by_what_the_cpu_can_do(
    cpu: str, kept: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cache_setting: None
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(process, "_cpu", lambda: cpu)
    jax.config.update("jax_compilation_cache_dir", None)
    keep_compiled_programs()
    folder = jax.config.values["jax_compilation_cache_dir"]
    assert (folder is not None) == kept
    if kept:
        assert Path(folder).is_dir() and Path(folder).is_relative_to(tmp_path)
        monkeypatch.setattr(process, "_cpu", lambda: cpu + " sse9")
        jax.config.update("jax_compilation_cache_dir", None)
        keep_compiled_programs()
        assert jax.config.values["jax_compilation_cache_dir"] != folder


@pytest.fixture
def some_cpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cache_setting: None) -> Path:
    """The cache of a process on a CPU whose programs are kept."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(process, "_cpu", lambda: "some")
    jax.config.update("jax_compilation_cache_dir", None)
    return tmp_path / "gpt2-bridge"


def test_the_cache_of_programs_is_private(some_cpu: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = os.umask(0)
    try:
        keep_compiled_programs()
    finally:
        os.umask(before)
    folder = Path(jax.config.values["jax_compilation_cache_dir"])
    assert [stat.S_IMODE(path.stat().st_mode) for path in (some_cpu, folder.parent, folder)] == [0o700] * 3
    assert folder.parent.parent == some_cpu and capsys.readouterr().err == ""


@pytest.mark.parametrize("level", [0, 1, 2], ids=["cache", "compiled", "folder"])
@pytest.mark.parametrize("mode", [0o770, 0o707, 0o777])
def test_a_cache_that_others_may_write_to_is_not_used(
    level: int, mode: int, some_cpu: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    keep_compiled_programs()
    folder = Path(jax.config.values["jax_compilation_cache_dir"])
    jax.config.update("jax_compilation_cache_dir", None)
    opened = (some_cpu, folder.parent, folder)[level]
    opened.chmod(mode)
    keep_compiled_programs()
    assert jax.config.values["jax_compilation_cache_dir"] is None
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("gpt2: ") and f"other users can write to '{opened}'" in line and "chmod go-w" in line
    opened.chmod(0o755)
    keep_compiled_programs()
    assert jax.config.values["jax_compilation_cache_dir"] == str(folder)


def test_a_cache_of_another_user_is_not_used(
    some_cpu: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    some_cpu.mkdir()
    monkeypatch.setattr(os, "geteuid", lambda: some_cpu.stat().st_uid + 1)
    keep_compiled_programs()
    assert jax.config.values["jax_compilation_cache_dir"] is None
    assert f"'{some_cpu}' belongs to another user; set XDG_CACHE_HOME" in capsys.readouterr().err


def test_programs_of_several_processes_on_cpus_are_not_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cache_setting: None
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(process, "_cpu", lambda: "vendor_id : AuthenticAMD")
    monkeypatch.setattr(process, "are_several", lambda: True)
    jax.config.update("jax_compilation_cache_dir", None)
    keep_compiled_programs()
    assert jax.config.values["jax_compilation_cache_dir"] is None


def test_the_users_own_directory_stays(tmp_path: Path, cache_setting: None) -> None:
    jax.config.update("jax_compilation_cache_dir", str(tmp_path))
    keep_compiled_programs()
    assert jax.config.values["jax_compilation_cache_dir"] == str(tmp_path)


def test_without_a_home_directory_nothing_is_kept(monkeypatch: pytest.MonkeyPatch, cache_setting: None) -> None:
    def fails() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(process, "cache_directory", fails)
    monkeypatch.setattr(process, "_cpu", lambda: "some")
    jax.config.update("jax_compilation_cache_dir", None)
    keep_compiled_programs()
    assert jax.config.values["jax_compilation_cache_dir"] is None


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--attention", "cudnn"], "attention=cudnn: takes bfloat16 and float16, not float32"),
        (["--attention", "cudnn", "--dtype", "bfloat16"], "attention='cudnn' needs an NVIDIA GPU"),
        (["--attention", "splash"], "attention='splash' needs a TPU"),
        (["--attention", "splash", "--seq-len", "100"], "takes lengths that are multiples of 128, not 100"),
        (["--attention", "blockwise", "--attn-pdrop", "0.1"], "attn_pdrop"),
        (["--attention", "blockwise", "--examples", "documents"], "--examples documents"),
    ],
)
def test_attention_that_cannot_run_is_refused_before_the_run_is_made(
    flags: list[str], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = tmp_path / "text.txt"
    text.write_text("To be, or not to be. " * 200)
    out = tmp_path / "run"
    code = run("train", "--preset", "nano", "--data", text, "--tokenizer", "bytes", "--out", out, *flags)
    assert code == 2 and said in capsys.readouterr().err and not out.exists()


@pytest.mark.parametrize(
    ("file", "error", "is_said"),
    [
        ("site-packages/orbax/checkpoint/_src/futures/future.py", OSError("no space"), False),
        ("site-packages/orbax/checkpoint/_src/futures/future.py", None, True),
        ("site-packages/absl/app.py", OSError("no space"), True),
    ],
)
def test_tracebacks_of_orbaxs_threads_are_not_said(file: str, error: OSError | None, is_said: bool) -> None:
    leave_errors_to_their_message()
    said = error and (type(error), error, None)
    record = logging.LogRecord("absl", logging.ERROR, file, 1, "it raised an exception", (), said)
    assert bool(logging.getLogger("absl").filter(record)) == is_said


@pytest.mark.parametrize(("error", "is_said"), [("Event loop is closed", False), ("another", True)])
def test_nor_is_what_they_would_have_told_a_loop_that_is_closed(
    error: str, is_said: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[Any] = []
    monkeypatch.setattr(process, "_unraisable_before", said.append)
    monkeypatch.setattr(sys, "unraisablehook", None)
    leave_errors_to_their_message()
    sys.unraisablehook(SimpleNamespace(exc_value=RuntimeError(error)))  # type: ignore[arg-type]
    assert bool(said) == is_said


@pytest.mark.parametrize(("module", "is_said"), [("tensorboard.summary.writer", False), ("threading", True)])
def test_nor_are_those_of_tensorboards(module: str, is_said: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[Any] = []
    monkeypatch.setattr(process, "_in_thread_before", said.append)
    monkeypatch.setattr(threading, "excepthook", None)
    leave_errors_to_their_message()
    thread = type("Writer", (threading.Thread,), {"__module__": module})()
    threading.excepthook(SimpleNamespace(exc_value=OSError("no space"), thread=thread))  # type: ignore[arg-type]
    assert bool(said) == is_said
